"""The error for what cannot be exact, and the way round that it names."""

from __future__ import annotations

from collections.abc import Iterable


class UnsupportedModuleError(RuntimeError):
    """A module's per-example gradients cannot be had exactly; the message names it and the way to leave it out."""


def leave_out(keys: Iterable[str]) -> str:
    """Say how to run without some parameters.

    Args:
        keys: Their canonical names.

    Returns:
        A sentence for an error message.
    """
    names = sorted(keys)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"Leave {shown} out with parameters=lambda name, parameter: ..., or take fishkern.SketchedFisher, "
        "which needs to know no layer."
    )

"""The error for what cannot be exact, and the way round that it names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class UnsupportedModuleError(RuntimeError):
    """A module's per-example gradients cannot be had exactly; the message names it and the way to leave it out."""


def leave_out(keys: Iterable[str], *, by_autograd: bool = True) -> str:
    """Say how to run without some parameters.

    Args:
        keys: Their canonical names.
        by_autograd: Whether ordinary autograd, which the sketch takes, gives them a gradient.

    Returns:
        A sentence for an error message.
    """
    names = sorted(keys)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    way = f"Leave {shown} out with parameters=lambda name, parameter: ..."
    return f"{way}, or take fishkern.SketchedFisher, which needs to know no layer." if by_autograd else way


def without_gradient(key: str, parameter: Tensor) -> UnsupportedModuleError:
    """Make the error for a parameter that takes a path of ordinary autograd, which gives it no gradient.

    Args:
        key: Its canonical name.
        parameter: The parameter, a tensor subclass.

    Returns:
        The error.
    """
    return UnsupportedModuleError(
        f"{key} is a {type(parameter).__name__}, to which autograd gives no gradient, and no rule of a layer serves it "
        f"here. {leave_out([key], by_autograd=False)}"
    )

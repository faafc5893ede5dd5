"""The error for gradients that cannot be exact; its message says how to avoid it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fishkern.names import listed


class UnsupportedModuleError(RuntimeError):
    """The per-example gradients of a module cannot be computed exactly. The message says how to exclude it."""


def leave_out(keys: Iterable[str], *, by_autograd: bool = True) -> str:
    """Say how to run without some parameters.

    Args:
        keys: Their canonical names.
        by_autograd: Whether ordinary autograd, which the sketch uses, gives them a gradient.

    Returns:
        A sentence for an error message.
    """
    way = f"Leave {listed(sorted(keys))} out with parameters=lambda name, parameter: ..."
    return f"{way}, or use fishkern.SketchedFisher, which supports any layer." if by_autograd else way


def without_gradient(key: str, parameter: Tensor) -> UnsupportedModuleError:
    """Make the error for a parameter that needs ordinary autograd, which gives it no gradient.

    Args:
        key: Its canonical name.
        parameter: The parameter, a tensor subclass.

    Returns:
        The error.
    """
    return UnsupportedModuleError(
        f"{key} is a {type(parameter).__name__}, to which autograd gives no gradient, and no layer rule computes it. "
        f"{leave_out([key], by_autograd=False)}"
    )

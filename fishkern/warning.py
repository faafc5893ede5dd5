"""Warnings that point at the user's line, however deep in the package their cause was noticed."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_PASSED_THROUGH = ("fishkern", "torch", "contextlib")


def warn_caller(message: str) -> None:
    """Warn at the nearest line outside of this package and of what it runs through.

    Args:
        message: The warning.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2  # of the frame above this one
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH:
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)

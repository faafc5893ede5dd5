"""A kernel with all that it is launched with."""

from __future__ import annotations

from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One kernel with all that it is launched with.

    Args:
        kernel: The device function.
        grid: Number of programs on each axis.
        arguments: By name.
        options: Of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch it on the current device."""
        self.kernel[self.grid](**self.arguments, **self.options)

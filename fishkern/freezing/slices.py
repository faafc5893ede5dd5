"""How a parameter is cut into the slices that stop training one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch

from fishkern.arguments import at_least, one_of
from fishkern.selection.ranges import Columns, Ranges, Rows

Key: TypeAlias = tuple[str, int]
"""One slice: the name of its parameter and its number there."""
Axis = Literal["rows", "columns", "tensor"]

# Names of modules, and of parameters of nn.MultiheadAttention, that hold queries, keys and values in one tensor.
_FUSED = frozenset({
    "c_attn", "in_proj_bias", "in_proj_weight", "qkv", "qkv_proj", "query_key_value", "to_qkv", "W_pack", "Wqkv",
})  # fmt: skip


@dataclass(frozen=True)
class Slices:
    """Recipe that cuts each parameter into slices, ranges of its rows or columns.

    A slice is what stops training as a whole. The slices of a parameter are together all of it, and none is empty. The
    bounds of ``count`` slices are floor(linspace(0, size, count + 1)), as in FisherAdapTune (Rostami et al., 2026,
    arXiv:2606.10196); an axis of fewer than ``count`` indices gives one slice for each.

    Args:
        count: Slices of a parameter, or of each third of one that holds queries, keys and values.
        axis: ``"rows"`` cuts the first axis, which is the outputs of most layers; ``"columns"`` the second one, where
            a vector stays whole; with ``"tensor"`` each parameter is one slice, whatever ``count``. Rows are contiguous
            in memory, so masked optimizers step them fastest.
        split_qkv: Whether a tensor of queries, keys and values is cut into thirds first, and each third into ``count``.
            It is recognised by its name (``qkv``, ``c_attn``, ``in_proj_weight`` and the like). Its thirds are those of
            the axis that it is fused along, and that axis is cut, whatever ``axis`` says: the first one, or the last
            one of a matrix that is three times as wide as high (GPT-2's). Where it is not divisible by 3, the tensor is
            cut as any other. Models with fewer keys than queries, or with queries, keys and values next to each other
            for each head, have other thirds than these three.

    Raises:
        TypeError: ``count`` is not an integer.
        ValueError: ``count`` is below 1, or ``axis`` is unknown.
    """

    count: int = 4
    axis: Axis = "rows"
    split_qkv: bool = True

    def __post_init__(self) -> None:
        vars(self).update(count=at_least(1, self.count, "count"), split_qkv=bool(self.split_qkv))
        one_of(self.axis, get_args(Axis), "axis")

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe in plain values, for the header of a file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def of(self, name: str, shape: torch.Size) -> tuple[Ranges, ...]:
        """Cut a parameter.

        Args:
            name: The parameter's canonical name.
            shape: Its shape, as it is stored.

        Returns:
            Its slices in ascending order, all of one axis; none of a parameter without entries.
        """
        shape = torch.Size(shape)
        if not shape.numel():
            return ()
        if self.axis == "tensor" or not shape:
            return (Rows((0, Rows.size(shape))),)
        along = _fused_axis(name, shape) if self.split_qkv else None
        if along is not None:
            third = shape[along] // 3
            bounds = [(n * third + start, n * third + stop) for n in range(3) for start, stop in self._bounds(third)]
        elif self.axis == "columns" and len(shape) > 1:
            along, bounds = 1, list(self._bounds(shape[1]))
        else:
            along, bounds = 0, list(self._bounds(shape[0])) if self.axis == "rows" else [(0, shape[0])]
        if along == 0:
            return tuple(map(Rows, bounds))
        width = shape[2:].numel()  # columns of one index of the second axis
        return tuple(Columns((start * width, stop * width)) for start, stop in bounds)

    def _bounds(self, size: int) -> Iterator[tuple[int, int]]:
        count = min(self.count, size)
        return ((n * size // count, (n + 1) * size // count) for n in range(count))


def _fused_axis(name: str, shape: torch.Size) -> int | None:
    """Tell which axis queries, keys and values lie one after the other along; ``None`` for another parameter."""
    if not _FUSED.intersection(name.split(".")[-2:]):
        return None
    if len(shape) == 2 and shape[1] == 3 * shape[0]:
        return 1
    return 0 if shape[0] % 3 == 0 else None

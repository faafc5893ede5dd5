"""What two selections have in common, and what is made of both: sets of coordinates, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fishkern.ops.streaming_topk import index_dtype

if TYPE_CHECKING:
    from fishkern.selection.result import Selection


def union(a: Tensor, b: Tensor) -> Tensor:
    """Join two lists of indices, ``[K]`` each, ascending."""
    return torch.cat([a, b]).unique()


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Keep what is in both lists of indices, ``[K]`` each, ascending."""
    return a[_are_in(a, b)]


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Keep what is in the first list of indices alone, ``[K]`` each, ascending."""
    return a[~_are_in(a, b)]


def combined(
    ours: Selection, theirs: Selection, combine: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Mapping[str, torch.Size], dict[str, Tensor]]:
    """Combine two selections parameter by parameter.

    Args:
        ours: A selection.
        theirs: Another one. Outside its pool nothing of a parameter is selected.
        combine: One of the functions above.

    Returns:
        The pool of both, and indices by name.

    Raises:
        ValueError: A parameter has different shapes.
    """
    _check_shapes(ours, theirs)
    pool = {**ours.shapes, **theirs.shapes}
    indices = {}
    for name, shape in pool.items():
        nothing = torch.empty(0, dtype=index_dtype(shape.numel()))
        sides = (one.indices(name) if name in one else nothing for one in (ours, theirs))
        indices[name] = combine(*sides)
    return pool, indices


def shared(ours: Selection, theirs: Selection) -> dict[str, int]:
    """Count for each parameter in both pools the coordinates that both select.

    Args:
        ours: A selection.
        theirs: Another one.

    Returns:
        The counts by name.

    Raises:
        ValueError: A parameter has different shapes.
    """
    _check_shapes(ours, theirs)
    counts, others, found = ours.counts, theirs.counts, {}
    whole = {*ours.whole} | {*theirs.whole}
    for name in ours.names:
        if name in theirs:
            if name in whole:  # no list of indices is made
                found[name] = min(counts[name], others[name])
            else:
                found[name] = int(_are_in(ours.indices(name), theirs.indices(name)).sum())
    return found


def jaccard(shared: int, a: int, b: int) -> float:
    """Divide what is in both by what is in either; 1 where neither holds anything.

    Args:
        shared: How many are in both.
        a: How many are in one.
        b: How many are in the other.

    Returns:
        From 0 to 1.
    """
    return shared / (a + b - shared) if a or b else 1.0


def _are_in(some: Tensor, others: Tensor) -> Tensor:
    """Tell which of ``some`` are among ``others``; both ascending."""
    if len(others) == 0:
        return torch.zeros(len(some), dtype=torch.bool)
    places = torch.searchsorted(others, some).clamp_(max=len(others) - 1)
    return others[places] == some


def _check_shapes(ours: Selection, theirs: Selection) -> None:
    for name, shape in ours.shapes.items():
        if name in theirs and theirs.shapes[name] != shape:
            raise ValueError(
                f"{name} is {tuple(shape)} in one selection and {tuple(theirs.shapes[name])} in the other: they are "
                "not of one model."
            )

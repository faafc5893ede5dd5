"""Levels of a quantised weight where its Fisher information is: the k-means of SqueezeLLM.

Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", ICML 2024 (arXiv:2306.07629): each row of a weight gets levels
of its own, by a k-means in which every entry weighs as much as its Fisher information says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.arguments import at_least, integer
from fishkern.files import PIECE

MOST_BITS = 8  # the numbers of the levels are bytes


class Levels(NamedTuple):
    """A weight as levels of its rows.

    Attributes:
        levels: ``[O, 2^bits]``, float32, ascending in each row.
        indices: ``[O, I]``, uint8, which level of its row each entry has.
    """

    levels: Tensor
    indices: Tensor

    def __repr__(self) -> str:
        return f"Levels({self.levels.shape[1]} for each of {len(self.levels):,} rows of {self.indices.shape[1]:,})"

    def weight(self) -> Tensor:
        """Give the weight that they stand for, ``[O, I]`` in float32."""
        return self.levels.gather(1, self.indices.long())


@torch.no_grad()
def weighted_levels(weight: Tensor, fisher: Tensor, *, bits: int = 4, iterations: int = 50, seed: int = 0) -> Levels:
    """Quantise a weight to the levels that cost the least, by the second order of the loss.

        cost = sum over entries of fisher * (weight - its level)^2

    Each row begins with levels at entries that are drawn by this very cost (k-means++), and moves every level to the
    weighted mean of the entries nearest to it, until no entry changes its level or the moves are over. Where all
    entries of a level have no Fisher information, it is at their plain mean, and in a row without any all of them count
    equally. Computed in float64; one seed gives one result.

    Args:
        weight: ``[O, I]``, floating, on any device.
        fisher: ``[O, I]``, at least 0, such as ``statistics[name]``. A factor changes nothing.
        bits: From 1 to 8; a row has ``2^bits`` levels.
        iterations: Most moves of the levels, at least 1 (SqueezeLLM's own code has 50).
        seed: Of the first levels.

    Returns:
        The levels and the numbers of the entries' levels, on the CPU.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: Shapes differ or are no ``[O, I]``; a value is not finite, or a Fisher information negative; or a
            number is out of range.
    """
    _check(weight, fisher)
    bits, iterations = at_least(1, bits, "bits"), at_least(1, iterations, "iterations")
    if bits > MOST_BITS:
        raise ValueError(f"bits must be at most {MOST_BITS}, got {bits}: with more, rounding to nearest costs nothing.")
    O, I = weight.shape
    draws = torch.rand(O, 2**bits, dtype=torch.float64, generator=torch.Generator().manual_seed(integer(seed, "seed")))
    rows = max(PIECE // max(I, 1), 1)
    parts = [
        _of_rows(weight[start : start + rows], fisher[start : start + rows], draws[start : start + rows], iterations)
        for start in range(0, O, rows)
    ]
    return Levels(*(torch.cat(one) for one in zip(*parts, strict=True)))


def _check(weight: Tensor, fisher: Tensor) -> None:
    if weight.ndim != 2 or weight.shape != fisher.shape or not weight.numel():
        raise ValueError(
            "weight and fisher are [O, I], the same and not empty; "
            f"got {tuple(weight.shape)} and {tuple(fisher.shape)}."
        )
    if not (weight.is_floating_point() and fisher.is_floating_point()):
        raise TypeError(f"weight and fisher are floating, got {weight.dtype} and {fisher.dtype}.")
    if not (weight.isfinite().all() and fisher.isfinite().all() and (fisher >= 0).all()):
        raise ValueError("weight and fisher are finite, and a Fisher information is at least 0.")


def _of_rows(weight: Tensor, fisher: Tensor, draws: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Quantise some rows: in a sorted row the entries of a level are a range, and sums over ranges are differences."""
    x, order = weight.double().cpu().sort(dim=1)  # [O, I]
    fisher = fisher.double().cpu().gather(1, order)
    fisher = torch.where(fisher.sum(1, keepdim=True) > 0, fisher, 1.0)
    sums = [torch.nn.functional.pad(one.cumsum(1), (1, 0)) for one in (fisher, fisher * x, x)]
    levels, cuts = _first_levels(x, fisher, draws), None
    for _ in range(iterations):
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.searchsorted(x, middles.contiguous())  # an entry between two levels goes to the lower one's range
        ends = torch.nn.functional.pad(ends, (1, 0))
        ends = torch.cat([ends, torch.full_like(ends[:, :1], x.shape[1])], dim=1)  # [O, K + 1]
        if cuts is not None and torch.equal(ends, cuts):
            break
        cuts = ends
        levels = _means(x, sums, cuts, levels)
    counts = cuts.diff(dim=1)  # [O, K]
    numbers = torch.arange(counts.shape[1], dtype=torch.uint8).expand_as(counts)
    of_sorted = torch.repeat_interleave(numbers.reshape(-1), counts.reshape(-1)).view(x.shape)
    return levels.float(), torch.empty_like(of_sorted).scatter_(1, order, of_sorted)


def _first_levels(x: Tensor, fisher: Tensor, draws: Tensor) -> Tensor:
    """Draw entries as levels, each with the probability of its cost by those before; ascending."""
    chosen, cost = [], fisher
    for k in range(draws.shape[1]):
        total = cost.cumsum(1)
        place = torch.searchsorted(total, (draws[:, k : k + 1] * total[:, -1:]).contiguous(), right=True)
        level = x.gather(1, place.clamp_(max=x.shape[1] - 1))  # [O, 1]
        chosen.append(level)
        distance = fisher * (x - level).square()
        cost = distance if k == 0 else torch.minimum(cost, distance)
    return torch.cat(chosen, dim=1).sort(dim=1).values


def _means(x: Tensor, sums: list[Tensor], cuts: Tensor, before: Tensor) -> Tensor:
    """Give the weighted mean of each range ``[O, K]``; an empty one keeps its level."""
    of_fisher, of_both, of_x = (one.gather(1, cuts).diff(dim=1) for one in sums)
    counts = cuts.diff(dim=1)
    plain = of_x / counts.clamp(min=1)
    means = torch.where(of_fisher > 0, of_both / of_fisher.clamp(min=torch.finfo(torch.float64).tiny), plain)
    last = x.shape[1] - 1
    least, most = x.gather(1, cuts[:, :-1].clamp(max=last)), x.gather(1, (cuts[:, 1:] - 1).clamp(min=0))
    return torch.where(counts > 0, means.clamp(least, most), before)  # differences of sums are rounded

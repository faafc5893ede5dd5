"""Scores in their order, without sorting them all: counted by their leading bits, and followed one by one in a few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern.files import AnyTensor, pieces
from fishkern.ops._digits import ordered_keys
from fishkern.ops.streaming_topk import Order
from fishkern.selection.ranking import no_rank

# Leading bits of a score by which scores are counted: of a float32 sign, exponent and 7 bits of the mantissa.
_BITS = 16
# The leading bits of zero, and of the scores next to it.
ZERO = 2 ** (_BITS - 1)


@dataclass(frozen=True)
class Runs:
    """Scores in their order, those of one value and one parameter as one entry.

    Attributes:
        layers: ``[M]`` the number of the layer that each run is in.
        counts: ``[M]`` how many scores it has.
        edges: ``[U + 1]`` where each unit of runs begins, and the end: inside a unit the order is not known.
    """

    layers: Tensor
    counts: Tensor
    edges: Tensor


class InOrder:
    """Scores by name, in the order in which the first of all are taken: of equal ones the earlier parameter's first.

    Args:
        scores: In memory or on disk.
        layer_of: The number of each parameter's layer.
        order: Which scores come first.
    """

    def __init__(self, scores: Mapping[str, AnyTensor], layer_of: Mapping[str, int], order: Order) -> None:
        self._scores = {name: score for name, score in scores.items() if score.numel()}
        self._layer_of, self._largest = layer_of, order == "largest"
        double = any(score.dtype == torch.float64 for score in scores.values())
        self._dtype = torch.float64 if double else torch.float32  # which holds every score exactly

    def counted(self) -> tuple[Tensor, Runs]:
        """Count the scores of each parameter by their leading bits; reads all of them.

        Returns:
            ``[U]`` the leading bits, in order; and the counts, a unit for each.

        Raises:
            ValueError: A score is NaN; its parameter is named.
        """
        bins, layers, counts = [], [], []
        for name, score in self._scores.items():
            histogram = torch.zeros(2**_BITS, dtype=torch.int64)
            for keys in self._keys(name, score):
                histogram += torch.bincount(self._leading(keys), minlength=2**_BITS).cpu()
            filled = histogram.nonzero().view(-1)
            bins.append(filled)
            counts.append(histogram[filled])
            layers.append(torch.full_like(filled, self._layer_of[name]))
        bins, order = torch.cat(bins).sort(descending=True, stable=True)
        bins, sizes = bins.unique_consecutive(return_counts=True)
        edges = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return bins, Runs(torch.cat(layers)[order], torch.cat(counts)[order], edges)

    def ordered(self, bins: Tensor) -> list[Runs]:
        """Put the scores of some leading bits into order; reads all scores.

        Memory: 20 bytes for each distinct value of each parameter among them.

        Args:
            bins: ``[U]`` some of those of :meth:`counted`, in order.

        Returns:
            The runs of each, every run a unit.

        Raises:
            ValueError: As there.
        """
        wanted = torch.zeros(2**_BITS, dtype=torch.bool)
        wanted[bins] = True
        values, layers, counts = [], [], []
        for name, score in self._scores.items():
            own = wanted.to(score.device)
            parts = [
                keys[own.index_select(0, self._leading(keys))].unique(return_counts=True)
                for keys in self._keys(name, score)
            ]
            value, place = torch.cat([value.cpu() for value, _ in parts]).unique(return_inverse=True)
            count = torch.zeros(len(value), dtype=torch.int64)
            count.index_add_(0, place, torch.cat([count.cpu() for _, count in parts]))
            values.append(value)
            counts.append(count)
            layers.append(torch.full_like(count, self._layer_of[name]))
        values, order = torch.cat(values).sort(descending=True, stable=True)
        layers, counts = torch.cat(layers)[order], torch.cat(counts)[order]
        sizes = self._leading(values).unique_consecutive(return_counts=True)[1].tolist()
        return [
            Runs(layer, count, torch.arange(len(layer) + 1))
            for layer, count in zip(layers.split(sizes), counts.split(sizes), strict=True)
        ]

    def _keys(self, name: str, score: AnyTensor) -> Iterator[Tensor]:
        """Yield a parameter's scores as integers, of which larger ones come first."""
        first = 0
        for piece in pieces(score):
            # the sum is the quicker look; it is NaN also where infinities of both signs meet
            if piece.sum().isnan() and (nan := piece.isnan()).any():
                raise ValueError(no_rank(name, first + int(nan.nonzero()[0])))
            values = piece.to(self._dtype)
            yield ordered_keys(values if self._largest else -values)
            first += len(piece)

    def _leading(self, keys: Tensor) -> Tensor:
        return (keys >> (8 * self._dtype.itemsize - _BITS)) + ZERO

"""Tensors that are made of those of several models, piece by piece: weighted means, and what must be equal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern.files import PIECE, AnyTensor, pieces

_CHUNK = 2**16  # entries in float64 at once, which stay in the cache of a core


class _Lazy:
    """A tensor that is made piece by piece, with the shape and the dtype of the first model's."""

    tensors: Sequence[AnyTensor]

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.tensors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tensors[0].dtype

    def numel(self) -> int:
        """Count the entries.

        Returns:
            The number of entries.
        """
        return self.shape.numel()


@dataclass(frozen=True, eq=False)
class Merged(_Lazy):
    """The weighted mean of a parameter.

    Args:
        labels: What messages call each of the tensors.
        tensors: One of each model.
        fishers: The Fisher information of each; ``None`` for the mean by ``shares`` alone.
        shares: The weight of each model.
        floor: The least Fisher information.
    """

    labels: Sequence[str]
    tensors: Sequence[AnyTensor]
    fishers: Sequence[AnyTensor] | None
    shares: Sequence[float]
    floor: float

    def pieces(self, numel: int = PIECE) -> Iterator[Tensor]:
        """Compute it in flat pieces.

        Args:
            numel: Entries per piece.

        Yields:
            ``[numel]`` (the last one shorter), of :attr:`dtype`, on the first model's device.

        Raises:
            ValueError: A Fisher information is negative or not finite.
        """
        streams = [pieces(tensor, numel) for tensor in [*self.tensors, *(self.fishers or ())]]
        for aligned in zip(*streams, strict=True):
            piece = torch.empty(len(aligned[0]), dtype=self.dtype, device=aligned[0].device)
            scratch = torch.empty(4, min(_CHUNK, len(piece)), dtype=torch.float64, device=piece.device)
            for low in range(0, len(piece), _CHUNK):
                chunks = [one[low : low + _CHUNK] for one in aligned]
                piece[low : low + _CHUNK] = self._mean(chunks, scratch[:, : len(chunks[0])])
            yield piece

    def _mean(self, chunks: Sequence[Tensor], scratch: Tensor) -> Tensor:
        """Compute the mean of one chunk of each tensor, in four rows of memory for float64."""
        values, fishers = chunks[: len(self.tensors)], chunks[len(self.tensors) :]
        if not fishers:
            return self._plain(values)
        total, weighted, fisher, value = scratch
        total.zero_()
        weighted.zero_()
        for label, share, given, score in zip(self.labels, self.shares, values, fishers, strict=True):
            low, high = (bound.item() for bound in fisher.copy_(score).aminmax())
            if not (low >= 0 and math.isfinite(high)):
                shown = low if not low >= 0 else high
                raise ValueError(f"the statistics of {label} hold {shown:g}: merging needs numbers from 0 on.")
            if low < self.floor:
                fisher.clamp_min_(self.floor)
            if share != 1:
                fisher.mul_(share)
            total.add_(fisher)
            weighted.addcmul_(fisher, value.copy_(given))
        if total.min() > 0:
            return weighted.div_(total)
        return torch.where(total > 0, weighted / total, self._plain(values))

    def _plain(self, values: Sequence[Tensor]) -> Tensor:
        device = values[0].device
        sums = sum(share * one.to(device, torch.float64) for share, one in zip(self.shares, values, strict=True))
        return sums / sum(self.shares)


@dataclass(frozen=True, eq=False)
class Equal(_Lazy):
    """A buffer, which all models must have alike.

    Args:
        name: Its name.
        tensors: One of each model.
        models: What messages call the models.
    """

    name: str
    tensors: Sequence[AnyTensor]
    models: Sequence[str]

    def pieces(self, numel: int = PIECE) -> Iterator[Tensor]:
        """Give it in flat pieces.

        Args:
            numel: Entries per piece.

        Yields:
            ``[numel]`` (the last one shorter) of the first model.

        Raises:
            ValueError: It differs.
        """
        for first, *others in zip(*(pieces(tensor, numel) for tensor in self.tensors), strict=True):
            for model, other in zip(self.models[1:], others, strict=True):
                if not torch.equal(first, other.to(first.device)):
                    raise ValueError(
                        f"{self.name} is no parameter and differs between {self.models[0]} and {model}: models merge "
                        "whose buffers are equal. Give them one value, or name it in own=."
                    )
            yield first

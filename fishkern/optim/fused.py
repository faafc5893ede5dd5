"""Selected rows, and whole parameters, stepped by torch's own fused updates: views, without indices or gathering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.ops._entries import followed
from fishkern.optim.compact import Bucket
from fishkern.selection import Entries

Span = tuple[int, tuple[int]]  # where a range begins in a flat tensor, and (how many entries it has,)


class FusedOperands(NamedTuple):
    """What a fused update of torch takes, one of each for each range of rows, or for a parameter's master.

    Attributes:
        weights: ``[n]`` each, changed in place.
        grads: ``[n]`` each, of the same dtype.
        state: By name ``[n]`` each, changed in place.
        steps: Which update this is, zero-dimensional.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    steps: list[Tensor]


FusedUpdate = Callable[..., None]  # (operands, *, first)


class _Pieces:
    """A bucket cut into its ranges of rows once, since every call costs the host; gradients are cut at each step.

    Attributes:
        addresses: Where the parameters' memory begins. The pieces hold that memory, so that nothing else can come to
            have these addresses meanwhile.
        operands: Those of all parameters, without gradients.
    """

    def __init__(self, bucket: Bucket, addresses: list[int]) -> None:
        self.addresses = addresses
        self._counts = [one.entries.count for one in bucket.selected]
        self._inside = [list(_spans(one.entries)) for one in bucket.selected]
        self._compact = [list(_one_after_the_other(spans)) for spans in self._inside]
        if bucket.master is not None:  # it is compact, and so its ranges are one piece
            self._compact = [[(0, (count,))] for count in self._counts]
        views = [bucket.views(i) for i in range(len(bucket.params))]
        if bucket.master is None:
            self._weights = [_cut(p.detach(), at) for p, at in zip(bucket.params, self._inside, strict=True)]
        else:
            self._weights = [[own["master"]] for own in views]
        self._state = {
            name: [_cut(own[name], at) for own, at in zip(views, self._compact, strict=True)]
            for name in bucket.flat
            if name != "master"
        }
        self._steps = [[own["step"]] * len(at) for own, at in zip(views, self._compact, strict=True)]
        self.operands = self.of(range(len(bucket.params)))

    def of(self, numbers: Sequence[int]) -> FusedOperands:
        """Take the pieces of some parameters, without gradients."""

        def joined(parts: list[list[Tensor]]) -> list[Tensor]:
            return list(chain.from_iterable(parts[i] for i in numbers))

        state = {name: joined(parts) for name, parts in self._state.items()}
        return FusedOperands(joined(self._weights), [], state, joined(self._steps))

    def of_grads(self, numbers: Sequence[int], grads: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
        """Cut the gradients of some parameters, each of its parameter's shape or ``[K_i]``."""
        pieces: list[Tensor] = []
        for i in numbers:
            grad = grads[i]
            if grad.dtype is not dtype:
                grad = grad.to(dtype)
            if not grad.is_contiguous():
                grad = grad.contiguous()
            begin = grad.storage_offset()
            for start, size in self._compact[i] if grad.numel() == self._counts[i] else self._inside[i]:
                pieces.append(grad.as_strided(size, (1,), begin + start))
        return pieces


def step_fused(bucket: Bucket, grads: Sequence[Tensor | None], scale: Tensor | None, update: FusedUpdate) -> None:
    """Update the parameters of a bucket, whose steps are already counted.

    Args:
        bucket: Without indices.
        grads: The gradient of each parameter, of its shape or ``[K_i]``; ``None``: it stays as it is.
        scale: Zero-dimensional, what gradients are multiplied by; or ``None``.
        update: ``update(operands, first=first)`` does the step; ``first``: it is the first one of these entries.
    """
    addresses = [param.data_ptr() for param in bucket.params]
    if bucket.pieces is None or bucket.pieces.addresses != addresses:
        bucket.pieces = _Pieces(bucket, addresses)
    for first, numbers in bucket.by_age(grads):
        operands = _operands(bucket, numbers, grads)
        if scale is not None:
            operands = operands._replace(grads=torch._foreach_mul(operands.grads, scale))
        update(operands, first=first)
        if bucket.master is None:
            # Torch's fused update does not count its writes: a later backward through weights that have changed since
            # would raise no error.
            torch.autograd.graph.increment_version([bucket.params[i] for i in numbers])
        else:
            for i, weight in zip(numbers, operands.weights, strict=True):
                bucket.selected[i].entries.scatter_(bucket.params[i], weight)


def _operands(bucket: Bucket, numbers: Sequence[int], grads: Sequence[Tensor | None]) -> FusedOperands:
    pieces: _Pieces = bucket.pieces
    operands = pieces.operands if len(numbers) == len(bucket.params) else pieces.of(numbers)
    if bucket.master is None:
        return operands._replace(grads=pieces.of_grads(numbers, grads, bucket.dtype))
    gathered = []
    for i, master in zip(numbers, operands.weights, strict=True):
        param, selected, grad = bucket.params[i], bucket.selected[i], grads[i]
        followed(master, selected.gather(param))
        grad = grad if grad.shape != param.shape else selected.gather(grad)
        gathered.append(grad.to(master.dtype))
    return operands._replace(grads=gathered)


def _spans(entries: Entries) -> Iterator[Span]:
    for start, stop in entries.spans:
        yield start, (stop - start,)


def _one_after_the_other(spans: Sequence[Span]) -> Iterator[Span]:
    """Where the same ranges are in the compact state."""
    begin = 0
    for _, size in spans:
        yield begin, size
        begin += size[0]


def _cut(tensor: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """View the ranges of a contiguous tensor."""
    begin = tensor.storage_offset()
    return [tensor.as_strided(size, (1,), begin + start) for start, size in spans]

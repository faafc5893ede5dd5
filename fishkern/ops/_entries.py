"""Shared by the masked optimizers: checks of their arguments, and the walk through selected entries in chunks.

Layout: ``P`` parameters of one dtype on one device, flat in row-major order; parameter ``i`` has ``K_i`` selected
entries at ``indices[i]``. State is compact: one ``[K]`` tensor for all of them, ``K = sum_i K_i``, parameter after
parameter and ascending within each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.ops._threads import in_threads, threads

# Entries worked on at a time. One thread gathers and scatters them, all threads compute: with few entries these would
# wait for one another more than they compute, and with many the temporary results would leave the caches.
_CHUNK = 2**19
# On a CPU two chunks are worked on beside each other, so that one is gathered while the other is computed; where there
# are at least so many that starting two threads, which get helpers of their own from PyTorch, takes little of the time.
_MANY = 4

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Update = Callable[[slice, float, Tensor, Tensor], None]


class _Piece(NamedTuple):
    """Selected entries of one parameter, from ``start`` to before ``stop``."""

    parameter: int
    start: int
    stop: int


class _Chunk(NamedTuple):
    """What is worked on at a time: some parameters, or a part of one, which are at the same step."""

    pieces: list[_Piece]
    span: slice  # of the compact state
    step: float


def check_entries(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    steps: Tensor,
    *,
    state: Mapping[str, Tensor | None],
    master: Tensor | None,
    starts: Tensor | None,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Check that parameters, gradients, indices and compact state go together, and flatten the first two.

    Indices are not read; the caller guarantees that they ascend within their parameter.

    Args:
        params: ``P`` tensors of one floating dtype and device.
        grads: For each its gradient (its shape), the gradient of its selected entries alone (``[K_i]``), or ``None``.
        indices: For each the selected entries, ``[K_i]``, or ``None`` for all.
        steps: ``[P]``.
        state: Compact tensors by name, ``[K]`` each, of one dtype: ``master``'s, else that of the parameters.
        master: ``[K]`` or ``None``.
        starts: ``[K]`` or ``None``.

    Returns:
        The parameters and the gradients as flat contiguous tensors, views wherever they are contiguous; and the
        indices, ``None`` where they are all of a parameter.

    Raises:
        ValueError: They do not; the message says what.
    """
    if not len(params) == len(grads) == len(indices) == len(steps):
        raise ValueError(
            "params, grads, indices and steps must have one entry for each parameter, "
            f"got {len(params)}, {len(grads)}, {len(indices)} and {len(steps)}."
        )
    counts = [p.numel() if listed is None else listed.numel() for p, listed in zip(params, indices, strict=True)]
    for i, (param, grad, count) in enumerate(zip(params, grads, counts, strict=True)):
        if grad is not None:
            _check_grad(i, param, grad, count)
    _check_dtypes(params, indices)
    dtype = params[0].dtype if params and master is None else torch.float32
    compact = {name: (tensor, dtype) for name, tensor in state.items()}
    compact |= {"master": (master, torch.float32), "starts": (starts, torch.float32)}
    for name, (tensor, own_dtype) in compact.items():
        if tensor is not None:
            _check_compact(name, tensor, own_dtype, sum(counts))
    tensors = [steps, *params, *grads, *indices, *(tensor for tensor, _ in compact.values())]
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors of one call must be on one device, got {_listed(devices)}: call once for each.")
    return (
        [_flat(param) for param in params],
        [None if grad is None else _flat(grad) for grad in grads],
        [None if count == p.numel() else listed for p, count, listed in zip(params, counts, indices, strict=True)],
    )


def _check_grad(i: int, param: Tensor, grad: Tensor, count: int) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"gradient {i} is sparse ({grad.layout}): make it dense.")
    if grad.shape != param.shape and grad.shape != (count,):
        raise ValueError(
            f"gradient {i} must be {tuple(param.shape)}, the parameter's shape, or ({count},), that of its "
            f"selected entries, got {tuple(grad.shape)}."
        )


def _check_dtypes(params: Sequence[Tensor], indices: Sequence[Tensor | None]) -> None:
    dtypes = {param.dtype for param in params}
    index_dtypes = {listed.dtype for listed in indices if listed is not None}
    if len(dtypes) > 1:
        raise ValueError(f"the parameters of one call must have one dtype, got {_listed(dtypes)}: call once for each.")
    if len(index_dtypes) > 1 or not index_dtypes <= {torch.int32, torch.int64}:
        raise ValueError(f"indices must be int32 or int64, one dtype in one call, got {_listed(index_dtypes)}.")


def _check_compact(name: str, tensor: Tensor, dtype: torch.dtype, K: int) -> None:
    if (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) != ((K,), dtype, True):
        raise ValueError(
            f"{name} must be contiguous, {dtype}, ({K},), one number for each selected entry, "
            f"got {tensor.dtype}, {tuple(tensor.shape)}, stride {tensor.stride()}."
        )


def write_back_(params: Sequence[Tensor], flat: Sequence[Tensor]) -> None:
    """Copy flat parameters back into those that they are copies of, not views."""
    for param, values in zip(params, flat, strict=True):
        if not param.is_contiguous():
            param.detach().copy_(values.view(param.shape))


def update_entries_(
    update: Update,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    steps: Tensor,
    *,
    dtype: torch.dtype,
    maximize: bool,
    master: Tensor | None,
    scale: Tensor | None,
    beside: bool = True,
) -> None:
    """Gather weights and gradients of the selected entries, update them, and scatter the weights, chunk by chunk.

    Args:
        update: ``update(span, step, weight, grad)`` changes ``weight`` in place and reads ``grad`` (``[n]``, of
            ``dtype``), entries ``span`` of the compact state, whose ``step``-th update this is.
        params: Flat, contiguous; changed at their selected entries.
        grads: Flat, contiguous; of all entries or of the selected ones, or ``None``.
        indices: ``[K_i]`` or ``None``.
        steps: ``[P]``.
        dtype: What is computed in.
        maximize: Whether gradients change their sign.
        master: ``[K]``, the weights that are updated instead of the rounded ones in ``params``. Where these are not the
            master rounded, they become the master first.
        scale: What gradients are multiplied by, zero-dimensional.
        beside: Whether ``update`` may run in two threads at the same time, on other entries.
    """
    counts = [p.numel() if listed is None else listed.numel() for p, listed in zip(params, indices, strict=True)]
    inference = torch.is_inference_mode_enabled()

    @torch.inference_mode(inference)  # each thread has its own modes
    @torch.no_grad()
    def run(chunk: _Chunk) -> None:
        pieces, span, step = chunk
        places = _places(indices, counts, pieces)
        grad = _gather(grads, places, counts, pieces).to(dtype)
        if scale is not None:
            grad = grad * scale
        if maximize:
            grad = -grad
        weight = _gather(params, places, counts, pieces)
        if master is not None:
            weight = followed(master[span], weight)
        update(span, step, weight, grad)
        _scatter_(params, places, pieces, weight)

    # Some of PyTorch's 16-bit operations round otherwise at the end of a tensor: these are neither joined nor cut.
    size = _CHUNK if dtype.itemsize >= 4 else None
    many = beside and size is not None and steps.device.type == "cpu" and sum(counts) >= _MANY * size
    for _ in in_threads(run, _chunks(counts, grads, steps.tolist(), size), min(2, threads()) if many else 1):
        pass


def _chunks(
    counts: Sequence[int], grads: Sequence[Tensor | None], steps: Sequence[float], chunk: int | None
) -> Iterator[_Chunk]:
    """Join neighbours that are at the same step, cut large parameters, and leave out those without gradient."""
    # `chunk` is how many entries are joined at most; with `None` every parameter is by itself, and whole.
    pieces: list[_Piece] = []
    first = end = 0  # of the pieces, within the compact state
    for i, count in enumerate(counts):
        # A chunk ends before this parameter in three cases: it would be too large; this one has no gradient, so its
        # state, which is next, is a gap that a slice cannot leave out; or it is at another step, and ``update`` gets
        # one step for the chunk.
        alone = chunk is None or end - first + count > chunk or grads[i] is None
        if pieces and (alone or steps[i] != steps[pieces[0].parameter]):
            yield _Chunk(pieces, slice(first, end), steps[pieces[0].parameter])
            pieces = []
        if not pieces:
            first = end
        if grads[i] is not None and count > (chunk or 0):  # larger than a chunk: no piece waits, so the order holds
            size = chunk or count
            for start in range(0, count, size):
                stop = min(start + size, count)
                yield _Chunk([_Piece(i, start, stop)], slice(end + start, end + stop), steps[i])
        elif grads[i] is not None and count:
            pieces.append(_Piece(i, 0, count))
        end += count
    if pieces:
        yield _Chunk(pieces, slice(first, end), steps[pieces[0].parameter])


def _listed(things: set) -> str:
    return " and ".join(sorted(map(str, things)))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)


def _places(indices: Sequence[Tensor | None], counts: Sequence[int], pieces: list[_Piece]) -> list[Tensor | None]:
    """Give the places of each piece of a chunk; ``None`` for all."""
    return [
        indices[i] if indices[i] is None or stop - start == counts[i] else indices[i][start:stop]
        for i, start, stop in pieces
    ]


def _gather(
    tensors: Sequence[Tensor], places: list[Tensor | None], counts: Sequence[int], pieces: list[_Piece]
) -> Tensor:
    """Read the numbers of a chunk one after the other; a view where they are so in memory."""
    if len(pieces) == 1:
        ((i, start, stop),) = pieces
        if places[0] is None or tensors[i].numel() == counts[i]:  # all are selected, or these are the selected ones
            return tensors[i][start:stop]
        return tensors[i].index_select(0, places[0])
    sizes = [counts[i] for i, _, _ in pieces]  # several pieces are whole
    gathered = tensors[pieces[0].parameter].new_empty(sum(sizes))
    for (i, _, _), own, part in zip(pieces, places, gathered.split(sizes), strict=True):
        if own is None or tensors[i].numel() == counts[i]:
            part.copy_(tensors[i])
        else:
            torch.index_select(tensors[i], 0, own, out=part)
    return gathered


def followed(master: Tensor, stored: Tensor) -> Tensor:
    """Make the stored weight the master of entries where it is not what the master rounds to, bit for bit.

    Args:
        master: ``[n]``, float32; changed in place.
        stored: ``[n]``, 16-bit weights.

    Returns:
        ``master``.
    """
    bits = _BITS[stored.element_size()]  # numbers would take 0 for -0, and a NaN for another than itself
    rounded, own = master.to(stored.dtype).view(bits), stored.view(bits)
    if not torch.equal(rounded, own):  # changed elsewhere, as by loading a checkpoint
        master.copy_(torch.where(rounded == own, master, stored.to(master.dtype)))
    return master


def _scatter_(params: Sequence[Tensor], places: list[Tensor | None], pieces: list[_Piece], weight: Tensor) -> None:
    """Write the weights of a chunk into the parameters."""
    weight = weight.to(params[0].dtype)
    sizes = [stop - start for _, start, stop in pieces]
    partial = [own for own in places if own is not None]
    joined = torch.cat(partial) if len(partial) > 1 else partial[0] if partial else None  # one conversion for all
    wide = iter(()) if joined is None else iter(joined.long().split([own.numel() for own in partial]))
    for (i, start, stop), own, values in zip(pieces, places, weight.split(sizes), strict=True):
        if own is not None:
            params[i].scatter_(0, next(wide), values)
        elif values.data_ptr() != params[i][start:].data_ptr():  # else it was updated in place
            params[i][start:stop] = values

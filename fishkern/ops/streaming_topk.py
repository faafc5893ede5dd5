"""Exact top-k of scores in many tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fishkern.arguments import integer, one_of
from fishkern.backend import Backend, BackendUnavailableError, choose
from fishkern.files import AnyTensor, StoredTensor
from fishkern.ops._candidates import Candidates, Chunk
from fishkern.ops._digits import around_nth_largest
from fishkern.ops._scores import NaNScoreError, Scores, refuse_nan
from fishkern.ops._threads import in_threads, threads

__all__ = ["NaNScoreError", "Order", "streaming_topk", "streaming_topk_torch", "topk_with_threshold"]

Order = Literal["largest", "smallest"]
ORDERS = ("largest", "smallest")

# How many scores are sampled for the bracket: this share of all, but at least and at most so many.
_SAMPLED_SHARE, _SMALLEST_SAMPLE, _LARGEST_SAMPLE = 2**-10, 2**16, 2**22
# Standard errors between the sample's estimate and either end of the bracket.
_DEVIATIONS = 6.0
# If a sample leaves more scores than this undecided, one extra pass narrows the bracket first by counting.
_MOST_INSIDE = 2**25
# Up to this k the value of every candidate is kept, so that no upper end of the bracket can be missed.
_KEEP_VALUES = 2**20


def streaming_topk(
    blocks: Sequence[AnyTensor], k: int, *, order: Order = "largest", backend: Backend | None = None
) -> list[Tensor]:
    """Select exactly ``k`` scores, the largest of all blocks together; nothing is concatenated or sorted as a whole.

    Of equal scores the one in the earlier block comes first, then the one of smaller index: the result is that of a
    stable sort, whatever the device, the number of threads and the sizes of the blocks. ``-0.0`` equals ``0.0``,
    infinities are ordered, and scores of different dtypes compare by value.

    A small sample gives a bracket, two values that should enclose the ``k``-th largest. One pass over the scores
    collects those above and inside it; those inside decide exactly. Scores equal to either end (zeros of dead rows) are
    counted, not stored with their values. A file is therefore read once, plus a small sample. If the sample leaves more
    than 2^25 undecided, one extra pass counts scores by the leading bits of their values; if the bracket is wrong, two
    passes count by all bits, and a last one collects. Memory for the result aside, this takes an index for each
    candidate or a bit for each score, whichever is less, and the values of candidates: 4 bytes (of float64: 8) for each
    of twice the ``k`` up to ``k = 2^20``, above that only for those inside the bracket. While scores are read, each
    thread has 2^22 of them in hand, with up to 31 bytes for each where most are candidates. A block that is not
    contiguous is copied while it is processed.

    What it does next depends on the scores, so ``torch.compile`` breaks the graph here and runs it as it is.

    Args:
        blocks: Floating scores (float64, float32, bfloat16, float16), of any shapes, on any devices, also
            :class:`~fishkern.files.StoredTensor`; read more than once.
        k: How many to select in all, from 0 to the number of scores.
        order: ``"largest"`` or ``"smallest"`` first.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`. Triton takes blocks on one GPU.

    Returns:
        For each block the flat (row-major) indices of its selected scores, ascending, on its device; int32 for a block
        of at most 2^31 scores, int64 for a larger one.

    Raises:
        TypeError: A block is not a floating tensor, or ``k`` is no integer.
        ValueError: ``k`` is out of range, ``order`` is neither, or a score is NaN; its block is named.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    run = _as_it_is if torch.compiler.is_compiling() else topk_with_threshold
    return run(blocks, k, order=order, backend=backend)[0]


def topk_with_threshold(
    blocks: Sequence[AnyTensor], k: int, *, order: Order = "largest", backend: Backend | None = None
) -> tuple[list[Tensor], float | None]:
    """Select as :func:`streaming_topk`, and return the last selected score as well.

    Args:
        blocks: As there.
        k: As there.
        order: As there.
        backend: As there.

    Returns:
        The indices, and the ``k``-th score in this order; ``None`` for ``k = 0``, and where it is only known to be
        beyond the bracket of a sample.

    Raises:
        TypeError: As there.
        ValueError: As there.
        BackendUnavailableError: As there.
    """
    blocks, k = list(blocks), integer(k, "k")
    one_of(order, ORDERS, "order")
    scores = Scores(blocks)
    if not 0 <= k <= scores.total:
        raise ValueError(f"k must be from 0 to the number of scores, {scores.total}; got {k}.")
    run = choose(streaming_topk_torch, backend, *_placement(blocks))
    if run is streaming_topk_torch:
        return _topk(scores, k, order == "largest")
    if any(isinstance(block, StoredTensor) for block in blocks):
        raise BackendUnavailableError(
            "streaming_topk cannot run on Triton: a block is in a file. Ask for 'auto' or 'torch'."
        )
    indices = _launched(run, blocks, k, order)
    selected = [block.reshape(-1)[own].float() for block, own in zip(blocks, indices, strict=True) if len(own)]
    extreme = torch.amin if order == "largest" else torch.amax
    return indices, extreme(torch.stack([extreme(scores) for scores in selected])).item() if selected else None


_as_it_is = torch._disable_dynamo(topk_with_threshold)


def _placement(blocks: Sequence[AnyTensor]) -> list[Tensor]:
    """Return tensors of the dtypes and devices of the blocks, to choose a backend by; files are on the CPU."""
    return [block if isinstance(block, Tensor) else torch.empty(0, dtype=block.dtype) for block in blocks]


def _launched(run: Callable[..., list[Tensor]], blocks: list[Tensor], k: int, order: Order) -> list[Tensor]:
    try:
        return run(blocks, k, order=order)
    except ArithmeticError:  # the kernel has seen NaN, but not where
        for piece in Scores(blocks).pieces():
            refuse_nan(piece)
        raise


def streaming_topk_torch(blocks: Sequence[AnyTensor], k: int, *, order: Order = "largest") -> list[Tensor]:
    """Compute :func:`streaming_topk` piece by piece: in PyTorch on a GPU, on a CPU in numpy and in threads."""
    return _topk(Scores(blocks), k, order == "largest")[0]


@torch.no_grad()
def _topk(scores: Scores, k: int, largest: bool) -> tuple[list[Tensor], float | None]:
    if k == 0:
        return _assembled(scores, iter(()), [0] * len(scores.blocks)), None
    low, high, inside = _bracket(scores, k, largest)
    if high < math.inf and inside > _MOST_INSIDE:  # similar scores are neighbours, so a sample says little
        low, high = _counted(scores, k, largest, bits=8 * scores.dtype.itemsize - 16)
    candidates = _collect(scores, k, low, high, largest=largest)
    if candidates is None:  # the sample was not like the scores
        low, high = _counted(scores, k, largest, bits=8 * scores.dtype.itemsize)
        candidates = _collect(scores, k, low, high, largest=largest)
    selected, threshold = candidates.finish()
    if threshold is not None and not largest:
        threshold = -threshold
    return _assembled(scores, selected, candidates.counts(len(scores.blocks))), threshold


def _collect(scores: Scores, k: int, low: float, high: float, *, largest: bool) -> Candidates | None:
    candidates = Candidates(k, low, high, largest=largest, dtype=scores.dtype)
    # A piece from a disk is there until the next one, and a GPU works through its pieces in the order of the caller.
    count = threads() if scores.in_memory else 1
    with closing(scores.pieces()) as pieces, closing(in_threads(candidates.search, pieces, count)) as found:
        for _, chunk in found:
            candidates.add(chunk)
            if candidates.too_many:
                return None
    return None if candidates.too_few else candidates


def _bracket(scores: Scores, k: int, largest: bool) -> tuple[float, float, float]:
    """Estimate from a sample two values that enclose the ``k``-th largest, and how many scores are between them."""
    size = min(max(int(scores.total * _SAMPLED_SHARE), _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
    if scores.total <= size:
        return -math.inf, math.inf, scores.total
    rows = scores.sample(size) if largest else -scores.sample(size)
    values, low, high = _ranked(rows, k / scores.total)
    if len(values) == 0:  # all NaN: the pass will say where
        return -math.inf, math.inf, scores.total
    return (
        values[low].item() if low < len(values) else -math.inf,
        values[high].item() if high >= 0 and k > _KEEP_VALUES else math.inf,
        (min(low, len(values)) - max(high, 0)) / len(values) * scores.total,
    )


def _ranked(rows: Tensor, share: float) -> tuple[Tensor, int, int]:
    """Sort a sample, and find two of its ranks between which the score at this share of all scores should be."""
    # kernels/streaming_topk.py has the same once more, since kernels import nothing of fishkern:
    # tests/kernels/test_streaming_topk.py holds the two together.
    values = torch.from_numpy(np.sort(rows[~rows.isnan()].numpy())).flip(0)  # which is quicker than torch's
    if len(values) == 0:
        return values, 0, -1
    rank = share * len(values)
    above = (rows > values[min(int(rank), len(values) - 1)]).sum(1).double()
    # Neighbours may resemble each other: then whole rows differ by more than independent draws would.
    variance = max(len(rows) * above.var().item() if len(rows) > 1 else 0.0, len(values) * share * (1 - share))
    # The second term is for a small share: so few counts above have a longer tail than a normal distribution.
    margin = _DEVIATIONS * math.sqrt(variance) + _DEVIATIONS**2
    return values, math.ceil(rank + margin), min(math.floor(rank - margin), len(values) - 1)


def _counted(scores: Scores, k: int, largest: bool, bits: int) -> tuple[float, float]:
    """Bound the values that share the leading bits with the ``k``-th largest, by one pass for each 16 of them."""

    def walk() -> Iterator[Tensor]:
        for piece in scores.pieces():
            refuse_nan(piece)
            values = piece.values.to(scores.dtype)
            yield values if largest else -values

    return around_nth_largest(walk, k, scores.dtype, bits=bits)


def _assembled(scores: Scores, chunks: Iterator[Chunk], counts: Sequence[int]) -> list[Tensor]:
    """Join the indices selected in pieces, the last piece first, by blocks; ``counts`` are their numbers."""
    results = [
        torch.empty(count, dtype=index_dtype(numel), device="cpu")
        for numel, count in zip(scores.numels, counts, strict=True)
    ]
    # The last piece comes first, so that each result is filled from its end: `unfilled[block]` indices are missing.
    unfilled = list(counts)

    def places() -> Iterator[tuple[Chunk, np.ndarray | None]]:
        for chunk in chunks:
            block, target = chunk.piece.block, None
            if chunk.piece.bounds is None:
                end = unfilled[block]
                unfilled[block] = start = end - len(chunk)
                target = results[block][start:end].numpy()
            yield chunk, target

    for (chunk, target), indices in in_threads(_filled, places(), threads()):
        if target is not None:
            continue
        # Several whole blocks, none of which is in another piece. Their indices count from the start of the piece, and
        # ascend, so that those of a block are neighbours; `counts` does not know them.
        ends = chunk.piece.bounds
        numbers = np.searchsorted(ends, indices, side="right")
        own = torch.from_numpy((indices - (ends - np.diff(ends, prepend=0))[numbers]).astype(np.int32))
        for number, part in enumerate(own.split(np.bincount(numbers, minlength=len(ends)).tolist())):
            results[chunk.piece.block + number] = part
    return [indices.to(block.device) for indices, block in zip(results, scores.blocks, strict=True)]


def _filled(place: tuple[Chunk, np.ndarray | None]) -> np.ndarray:
    """Write the indices of one piece into those of its block; of a piece of several blocks, give them."""
    chunk, target = place
    if target is None:
        return chunk.indices()
    target[:] = chunk.indices()
    target += chunk.piece.offset
    return target


def index_dtype(numel: int) -> torch.dtype:
    """Choose the dtype of indices into a tensor.

    Args:
        numel: Its number of entries.

    Returns:
        int32 up to 2^31 entries, else int64.
    """
    return torch.int32 if numel <= 2**31 else torch.int64

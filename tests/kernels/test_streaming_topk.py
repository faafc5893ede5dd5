"""What the operation's own tests do not reach: how the kernels of top-k load, and how the launcher cuts the scores."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from fishkern.kernels import streaming_topk as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [0, 1, 3, 4, 8])
def test_kernel_takes_blocks_at_any_address(first: int, dtype: torch.dtype):
    """Loads of 16 bytes only where every block of the launch begins at a multiple: else a GPU raises, or reads others.

    The interpreter loads from anywhere, so that it is the launcher's decision that is looked at.
    """
    base = torch.randn(20_000, device=DEVICE).to(dtype)
    blocks = [base[:9000], base[9000 + first :]]
    assert (9000 * dtype.itemsize) % 16 == 0
    (launch,) = kernels._Pool(blocks, largest=True).launches
    assert launch.constants["ALIGNED"] is (first * dtype.itemsize % 16 == 0)
    indices = kernels.streaming_topk(blocks, 500)
    order = torch.cat(blocks).sort(descending=True, stable=True).indices[:500].sort().values
    assert torch.equal(torch.cat([indices[0], indices[1] + 9000]).long(), order)


def test_kernel_takes_one_launch_for_each_dtype():
    """And one odd address narrows the loads of its own launch alone; empty blocks are in none."""
    full, half = torch.zeros(5001, device=DEVICE), torch.zeros(4097, dtype=torch.float16, device=DEVICE)
    pool = kernels._Pool([full, half[1:], full[:0], half, full[:1]], largest=False)
    constants = [(launch.constants["DTYPE"].name, launch.constants["ALIGNED"]) for launch in pool.launches]
    assert constants == [("fp32", True), ("fp16", False)]
    assert [launch.chunks for launch in pool.launches] == [3, 3]
    # Of each launch: its first chunks, and where these are among the chunks of all blocks.
    assert [launch.table[[0, 3]].tolist() for launch in pool.launches] == [[[0, 2], [0, 5]], [[0, 1], [2, 3]]]
    assert all(launch.constants["LARGEST"] is False for launch in pool.launches)


@pytest.mark.parametrize("most", [1, 7, 20, 8192])
def test_the_sample_is_spread_over_all_chunks(most: int, monkeypatch: pytest.MonkeyPatch):
    """Also where there are fewer than could be sampled: then each of them is, once."""
    monkeypatch.setattr(kernels, "_SAMPLED_CHUNKS", most)
    full, half = (torch.zeros(n * kernels._CHUNK, dtype=dtype) for n, dtype in ((16, torch.float32), (4, torch.half)))
    pool = kernels._Pool([full.to(DEVICE), half.to(DEVICE)], largest=True)
    for launch in pool.launches:
        numbers = [*pool._sampled_chunks(launch).tolist(), launch.chunks]
        gaps = [after - before for before, after in pairwise(numbers)]
        assert numbers[0] == 0
        assert 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1
        assert len(gaps) == min(max(1, most * launch.chunks // pool.chunks), launch.chunks)


def test_scores_of_any_scale_are_read_once(monkeypatch: pytest.MonkeyPatch):
    """Blocks of other scales than the first one are in the sample: else the bracket misses, and 32 passes bisect."""
    passes = []
    read = kernels._Pool._pass
    monkeypatch.setattr(kernels._Pool, "_pass", lambda pool, *call: passes.append(call) or read(pool, *call))
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand(4 * kernels._CHUNK, generator=generator).to(DEVICE) * 10.0**-n for n in (2, 1, 0, 1, 2)]
    indices = kernels.streaming_topk(blocks, 3000)
    order = torch.cat(blocks).sort(descending=True, stable=True).indices[:3000].sort().values
    assert torch.equal(torch.cat([own + n * len(blocks[0]) for n, own in enumerate(indices)]).long(), order)
    assert len(passes) == 1


def test_ties_are_taken_from_chunks_with_a_quota_alone():
    """The first ones in the order of the chunks, none of a chunk whose quota is zero."""
    scores = torch.zeros(3 * kernels._CHUNK, device=DEVICE)
    pool = kernels._Pool([scores], largest=True)
    bits = torch.zeros(3, kernels._WORDS, dtype=torch.int32, device=DEVICE)
    ties = torch.tensor([3, 0, kernels._CHUNK], dtype=torch.int32, device=DEVICE)
    selected = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert pool._take_ties(bits, selected, ties, 5, 0.0) == 5
    assert selected.tolist() == [3, 0, 2]
    indices, counts = pool.emit(bits, selected, torch.int32)
    assert indices.tolist() == [0, 1, 2, 2 * kernels._CHUNK, 2 * kernels._CHUNK + 1]
    assert counts == [5]


def test_bits_are_those_of_their_scores():
    """Any pattern of them gives its indices, ascending; and a slot finds its bit."""
    chosen = torch.rand(2 * kernels._CHUNK, device=DEVICE) < 0.3
    pool = kernels._Pool([chosen.float()], largest=True)
    read = pool._pass(0.5, 0.5, 1)
    assert torch.equal(read.above, chosen.view(2, -1).sum(1, dtype=torch.int32))
    indices, counts = pool.emit(read.bits, read.above, torch.int64)
    assert torch.equal(indices, chosen.nonzero().squeeze(1))
    assert counts == [len(indices)]
    word, bit = kernels._word_and_bit(torch.arange(len(chosen), device=DEVICE))
    assert torch.equal(read.bits.view(-1)[word] >> bit & 1, chosen.to(torch.int32))


@pytest.mark.parametrize("largest", [True, False])
def test_kernel_counts_scores_at_infinite_ends_where_a_chunk_is_short(largest):
    """What does not exist is at neither end, nor inside."""
    scores = torch.tensor([math.inf, -math.inf, 1.0, -math.inf], device=DEVICE)
    pool = kernels._Pool([scores], largest=largest)
    read = pool._pass(-math.inf, math.inf, 128)
    assert read.sums == [0, 1 if largest else 2, 2 if largest else 1, 1]
    slots, values = pool._collected(read)
    assert (slots.tolist(), values.tolist()) == ([2], [1.0 if largest else -1.0])


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_kernel_selects_infinite_scores_at_the_threshold(order, monkeypatch):
    """What a short chunk lacks is not taken for one of them, where both ends of the bracket are infinite."""
    monkeypatch.setattr(kernels._Pool, "_bracket", lambda pool, k: (-math.inf, -math.inf, 0.0))
    last = math.inf if order == "smallest" else -math.inf
    blocks = [torch.full((length,), last, device=DEVICE) for length in (5000, 70, 3)]
    blocks[1][7] = 1.0
    for k in (5002, 5073):
        indices = kernels.streaming_topk(blocks, k, order=order)
        ordered = torch.cat(blocks).sort(descending=order == "largest", stable=True).indices[:k].sort().values
        offsets = (0, 5000, 5070)
        assert torch.equal(torch.cat([own + n for own, n in zip(indices, offsets, strict=True)]).long(), ordered), k


def test_scratch_is_under_a_twentieth_of_the_scores():
    """What grows with them is one bit for each, and the list of words inside the bracket, here of the first 0.5 %."""
    rows = torch.randn(kernels._SAMPLED_CHUNKS, kernels._SAMPLED_SCORES)
    values, low, high = kernels._ranked(rows, 0.005)
    inside = (low - high) / len(values)
    bytes_of_a_score = 1 / 8 + 8 / kernels._CHUNK  # its bit, and the counts of its chunk
    bytes_of_a_score += inside * (kernels._ROOM * 8 + 8 + 4 + 32)  # the list; slots and values; what sorting them takes
    assert bytes_of_a_score < 0.05 * 4


def test_the_room_is_what_the_sample_lets_expect():
    """No more is taken, and what does not fit is found out."""
    scores = torch.rand(20 * kernels._CHUNK, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pool = kernels._Pool([scores], largest=True)
    low, high, expected = pool._bracket(3000)
    inside = ((scores > low) & (scores < high)).sum().item()
    assert 0.8 * inside < expected < 1.3 * inside + 100
    read = pool._pass(low, high, 16)
    assert read.sums[3] > 16
    assert not pool._encloses(read, inside, 3000)
    assert pool._encloses(pool._pass(low, high, pool._room(expected)), inside, 3000)


def test_many_scores_at_the_threshold():
    """More than a chunk of equal ones, in several tensors, each of which has some selected before the next."""
    blocks = [torch.zeros(length, device=DEVICE) for length in (5000, 13_000, 4096)]
    blocks[1][::7] = 1.0
    blocks[2][5] = -1.0
    for k in (9_000, 22_095):
        indices = kernels.streaming_topk(blocks, k)
        order = torch.cat(blocks).sort(descending=True, stable=True).indices[:k].sort().values
        offsets = (0, 5000, 18_000)
        assert torch.equal(torch.cat([own + n for own, n in zip(indices, offsets, strict=True)]).long(), order), k


@pytest.mark.parametrize("share", [1e-6, 0.005, 0.3, 0.5, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("rows", [
    torch.randn(64, 256),
    torch.randn(64, 1).expand(64, 256),  # neighbours alike
    torch.where(torch.rand(9, 16) < 0.5, torch.nan, torch.randn(9, 16)),
    torch.full((3, 4), torch.nan), torch.zeros(5, 16), torch.tensor([[2.0, math.inf, -math.inf]]),
], ids=["independent", "alike", "some missing", "all missing", "equal", "one row"])  # fmt: skip
def test_the_sample_is_read_as_by_the_reference(rows, share):
    """Its mathematics is there once more, since kernels import nothing of fishkern."""
    reference = import_module("fishkern.ops.streaming_topk")  # the package's attribute of this name is the function
    assert kernels._DEVIATIONS == reference._DEVIATIONS
    (values, *ranks), (expected, *expected_ranks) = (module._ranked(rows, share) for module in (kernels, reference))
    assert torch.equal(values, expected)
    assert ranks == expected_ranks

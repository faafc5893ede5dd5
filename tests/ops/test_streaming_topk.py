"""Streaming top-k equals a stable sort of all scores, wherever they are stored and whichever way it takes."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fishkern.files import Format, open_tensors, save_tensors
from fishkern.ops import _arena, _candidates, _scores, streaming_topk

pytestmark = pytest.mark.matrix

op = import_module("fishkern.ops.streaming_topk")  # the package has a function of that name

FORMAT = Format("fishkern.test", version=1, saved_by="Test.save")
N = 20_000
DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def oracle(blocks: list[Tensor], k: int, order: str) -> list[Tensor]:
    """A stable sort of all scores, in float64."""
    scores = torch.cat([block.detach().double().flatten() for block in blocks]) + 0.0
    first = torch.sort(scores, descending=order == "largest", stable=True).indices[:k]
    starts = torch.tensor([0, *(block.numel() for block in blocks)]).cumsum(0)
    return [first[(first >= start) & (first < end)].sort().values - start for start, end in pairwise(starts)]


def assert_exact(blocks: list[Tensor], k: int, order: str = "largest", backend: str = "torch", source=None) -> None:
    blocks = [block.to(DEVICES[backend]) for block in blocks]
    found = streaming_topk(source or blocks, k, order=order, backend=backend)
    assert len(found) == len(blocks)
    assert sum(map(len, found)) == k
    for indices, expected in zip(found, oracle(blocks, k, order), strict=True):
        assert indices.dtype == torch.int32
        assert torch.equal(indices.long(), expected)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def split(scores: Tensor) -> list[Tensor]:
    """Unequal blocks, some empty, some of one element."""
    sizes = [1, 0, 6, len(scores) // 3, 993, 0, 1]
    return list(scores.split([*sizes, len(scores) - sum(sizes)]))


DISTRIBUTIONS = {
    "chi-square": lambda: normal(N).square(),
    "log-normal": lambda: normal(N).mul(4).exp(),
    "signed": lambda: normal(N),
    "half zeros": lambda: normal(N).clamp(min=0),
    "mostly zeros": lambda: normal(N) * (torch.rand(N) < 0.001),
    "nine values": lambda: torch.randint(9, (N,)).float(),
    "ascending": lambda: torch.arange(N).float(),
    "descending": lambda: -torch.arange(N).float(),
    "constant": lambda: torch.full((N,), 0.3),
    "two neighbours": lambda: torch.tensor([1.0, 1.0]).nextafter(torch.tensor([1.0, 2.0]))[torch.randint(2, (N,))],
    "denormals": lambda: torch.randint(1, 1000, (N,), dtype=torch.int32).view(torch.float32),
    "twenty layers": lambda: normal(N).square() * 10.0 ** -(torch.arange(N) // (N // 20)).clamp(max=19),
    "infinities": lambda: torch.where(torch.rand(N) < 0.1, normal(N) * inf, normal(N)),
    "both zeros": lambda: torch.where(torch.rand(N) < 0.6, normal(N) * 0.0, normal(N)),
}
KS = [1, N // 10_000, N // 200, N // 10, N // 2, 3 * N // 4, N - 1, N]

# Which way through the algorithm: all scores are candidates; a sampled bracket; one with an upper end, thinned at once;
# the same in PyTorch alone, as for scores on other devices; and in threads.
SIZES = {"_PIECE": 1000, "_PIECE_ON_DISK": 700, "_SMALL": 62, "_SMALLEST_SAMPLE": 2048}
WAYS = {
    "all": {},
    "sampled": SIZES | {"_PIECE": 4096, "_SMALL": 256},
    "upper end": SIZES | {"_KEEP_VALUES": 0, "_SLACK": 0},
    "tensors": SIZES | {"_KEEP_VALUES": 0, "floats": lambda values, dtype: values.to(dtype)},
    "threads": SIZES | {"_KEEP_VALUES": 0, "_SLACK": 99, "threads": lambda: 3},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in WAYS[request.param].items():
        module = next(module for module in (op, _candidates, _scores) if hasattr(module, name))
        monkeypatch.setattr(module, name, value)
    return request.param


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_a_stable_sort(distribution: str, way: str):
    blocks = split(DISTRIBUTIONS[distribution]())
    for order in ("largest", "smallest"):
        for k in KS:
            assert_exact(blocks, k, order)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_equals_a_stable_sort_when_the_sample_misleads(distribution: str, monkeypatch: pytest.MonkeyPatch):
    """A bracket far from the threshold costs passes, never the result."""
    scores = DISTRIBUTIONS[distribution]()
    monkeypatch.setattr(_candidates, "_SLACK", 100)
    ordered = scores.sort().values
    counted = []
    count = op._counted
    monkeypatch.setattr(op, "_counted", lambda *args, **bits: counted.append(count(*args, **bits)) or counted[-1])
    for low, high in ((0, 0), (0, N // 2), (N // 2, N // 2), (N // 2 - 9, N // 2 + 9), (N - 9, N - 1), (N - 1, N - 1)):
        ends = ordered[low].item(), ordered[high].item()
        monkeypatch.setattr(op, "_bracket", lambda *_, ends=ends: (*ends, 0))
        for k in (1, N // 200, N // 2, N - 1):
            assert_exact(split(scores), k)
    assert counted or distribution == "constant"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_other_dtypes(dtype: torch.dtype, order: str, way: str):
    blocks = split(normal(N).mul(3).to(dtype))
    for k in KS:
        assert_exact(blocks, k, order)


def test_float64_is_not_rounded(monkeypatch: pytest.MonkeyPatch):
    """Values that are equal in float32 keep their order, also when they are counted by their bits."""
    scores = 1 + torch.randperm(1000).double() * 2**-50
    assert_exact([scores], 10)
    monkeypatch.setattr(op, "_bracket", lambda *_: (5.0, 5.0, 0))
    assert_exact([-scores, scores], 10)
    assert_exact([-scores, scores], 1990)


def test_dtypes_compare_by_value(way: str):
    scores = torch.randn(4, 5000).mul(8).round().div(8)
    blocks = [scores[0], scores[1].half(), scores[2].bfloat16(), scores[3].double()]
    for k in (1, 100, 9999):
        assert_exact(blocks, k)


def test_many_small_blocks(way: str):
    blocks = list(normal(3000, 16).round().unbind())
    blocks[7], blocks[1500] = torch.tensor(9.0), torch.empty(0, 4)
    for k in (1, 500, 24_000):
        assert_exact(blocks, k)


@pytest.mark.parametrize(("count", "k"), [(100_000, 32_000), (10_000, 1), (10_000, 320_000)])
def test_a_hundred_thousand_tensors(count: int, k: int):
    """All of 64 scores, with ties among and within them."""
    scores = normal(count, 64).mul(100).round()
    found = streaming_topk(list(scores.unbind()), k, backend="torch")
    expected = scores.flatten().sort(descending=True, stable=True).indices[:k].sort().values
    starts = torch.arange(count).repeat_interleave(torch.tensor([len(indices) for indices in found])) * 64
    assert torch.equal(torch.cat(found) + starts, expected)


@pytest.mark.parametrize("distribution", ["nine values", "half zeros", "twenty layers", "both zeros"])
def test_any_order_of_the_blocks(distribution: str, way: str):
    """Of equal scores those of the earlier block are selected, whichever it is."""
    blocks = split(DISTRIBUTIONS[distribution]())
    for order in ([*reversed(range(len(blocks)))], *(torch.randperm(len(blocks)).tolist() for _ in range(3))):
        for k in (N // 200, N // 2, 3 * N // 4):
            assert_exact([blocks[number] for number in order], k)


@pytest.mark.parametrize("blocks", [[], [torch.empty(0)], [torch.empty(3, 0), torch.empty(0)]], ids=len)
def test_nothing_to_select_from(blocks: list[Tensor], backend: str):
    blocks = [block.to(DEVICES[backend]) for block in blocks]
    found = streaming_topk(blocks, 0, backend=backend)
    assert [(len(indices), indices.dtype) for indices in found] == [(0, torch.int32)] * len(blocks)


def test_strides_shapes_and_gradients(backend: str):
    base = normal(40, 30).to(DEVICES[backend])
    blocks = [base.T, base[::3, 1:], base[0, 0], base.clone().requires_grad_(), base[None].expand(2, 40, 30)]
    for k in (0, 1, 300, sum(block.numel() for block in blocks)):
        assert_exact(blocks, k, backend=backend)
    assert_exact([base.T, base[::3, 1:]], 77, "smallest", backend)
    # one stride for all entries, with which they still are a vector
    assert_exact([base.view(-1)[::3], base[:, ::2], base.view(-1)[:1].expand(50)], 77, backend=backend)


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_ties_go_to_the_earlier_block_and_the_smaller_index(k: int, backend: str):
    blocks = [torch.tensor([0.0, 1.0, -0.0]), torch.tensor([1.0]), torch.tensor([-0.0, 1.0])]
    assert_exact(blocks, k, "largest", backend)
    assert_exact(blocks, k, "smallest", backend)


def test_the_kernel_selects_what_the_reference_selects(backend: str, monkeypatch: pytest.MonkeyPatch):
    """With a sampled bracket, with one that misses the threshold, and with one whose values do not fit."""
    pytest.importorskip("triton")
    kernel = import_module("fishkern.kernels.streaming_topk")
    monkeypatch.setattr(kernel, "_FEW_SCORES", 8000)
    bisected = []
    bisect = kernel._Pool._bisect
    monkeypatch.setattr(kernel._Pool, "_bisect", lambda pool, k: bisected.append(k) or bisect(pool, k))
    for distribution in ("signed", "half zeros", "nine values", "infinities"):
        scores = DISTRIBUTIONS[distribution]()[:10_000]
        blocks = [scores[:5000], scores[5000:5250], scores[5250:].half()]  # all of them are in the sample
        for k, order in [(50, "largest"), (7000, "largest"), (100, "smallest")]:
            assert_exact(blocks, k, order, backend)
    assert not bisected
    tied = DISTRIBUTIONS["nine values"]()[:6000]
    # Ends of the bracket, scores that are expected in it, and k.
    missed = [(-tied, (7.0, 7.5, 8000), 3), (tied, (8.0, 8.0, 8000), 900), (tied, (-inf, inf, 9), 9)]
    monkeypatch.setattr(kernel, "_SMALLEST_ROOM", 9)
    for scores, bracket, k in missed:
        monkeypatch.setattr(kernel._Pool, "_bracket", lambda pool, k, bracket=bracket: bracket)
        assert_exact([scores], k, backend=backend)
    assert len(bisected) == (3 if backend == "triton" else 0)


@settings(max_examples=60)
@given(data=st.data())
def test_property(data: st.DataObject):
    """Over splits, dtypes, ties, k and pieces."""
    total = data.draw(st.integers(0, 300))
    values = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, inf, -inf, 0.5]), min_size=1, max_size=6))
    places = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=total, max_size=total))
    scores = torch.tensor([values[place] for place in places])
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    ends = zip([0, *cuts], [*cuts, total], strict=True)
    blocks = [scores[start:end].to(data.draw(dtypes)) for start, end in ends]
    k = data.draw(st.integers(0, total))
    count = data.draw(st.sampled_from([1, 3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scores, "_PIECE", data.draw(st.sampled_from([16, 50, 2**22])))
        patch.setattr(_scores, "_SMALL", data.draw(st.sampled_from([0, 5, 2**16])))
        patch.setattr(_scores, "_PACKED", data.draw(st.sampled_from([8, 2**20])))
        patch.setattr(op, "threads", lambda: count)
        patch.setattr(op, "_SMALLEST_SAMPLE", data.draw(st.sampled_from([16, 64, 2**16])))
        patch.setattr(op, "_KEEP_VALUES", data.draw(st.sampled_from([0, 2**24])))
        patch.setattr(op, "_MOST_INSIDE", data.draw(st.sampled_from([0, 2**25])))
        patch.setattr(_candidates, "_SLACK", data.draw(st.sampled_from([0, 2**22])))
        patch.setattr(_candidates, "_SPARSE", data.draw(st.sampled_from([0, 32, 2**40])))
        patch.setattr(_candidates, "_SORTED", data.draw(st.sampled_from([0, 2**22])))
        patch.setattr(_arena, "_FIRST", data.draw(st.sampled_from([4, 2**14])))
        assert_exact(blocks, k, data.draw(st.sampled_from(["largest", "smallest"])))


def test_the_same_over_runs_and_threads(way: str):
    blocks = split(normal(N).mul(50).round())
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in range(8):
            torch.set_num_threads(1 + number % 2)
            runs.append(torch.cat(streaming_topk(blocks, N // 7, backend="torch")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("k", [0, 100, N // 2])
def test_modes_of_the_caller_change_nothing(k: int, way: str):
    """Another default device, inference mode, and scores whose sign is a note beside them."""
    scores = torch.randn(N, dtype=torch.complex64)
    blocks = split(scores.conj().imag)
    assert blocks[3].is_neg()
    with torch.device("meta"), torch.inference_mode():
        found = streaming_topk([*blocks, blocks[3].half()], k, backend="torch")
    expected = oracle([*blocks, blocks[3].half()], k, "largest")
    assert all(torch.equal(one.long(), other) for one, other in zip(found, expected, strict=True))


def test_neither_scores_nor_random_state_change(way: str):
    scores = normal(N)
    before, state = scores.clone(), torch.get_rng_state()
    streaming_topk([scores], N // 3, order="smallest")
    assert torch.equal(scores, before)
    assert torch.equal(torch.get_rng_state(), state)


def bytes_held(candidates: _candidates.Candidates) -> int:
    """Blocks count once, whole, however small the view."""
    members = (own.span for chunk in candidates._chunks for own in chunk.members.values())
    spans = [*members, *(chunk.values for chunk in candidates._chunks)]
    return sum({id(span.memory): _whole(span.memory).nbytes for span in spans}.values())


def _whole(array: np.ndarray) -> np.ndarray:
    return array if array.base is None else _whole(array.base)


@pytest.mark.parametrize("high", [inf, 2.5])
def test_what_is_kept_is_no_more_than_what_is_needed(high: float, monkeypatch: pytest.MonkeyPatch):
    """Of pieces that are copies (16-bit scores, small blocks) nothing else stays in memory."""
    monkeypatch.setattr(_arena, "_FIRST", 1)
    monkeypatch.setattr(_arena, "_BLOCK", 1)
    candidates = _candidates.Candidates(400, 2.0, high, largest=True, dtype=torch.float32)
    for piece in _scores.Scores([normal(N).bfloat16(), normal(100), normal(100)]).pieces():
        candidates.add(candidates.search(piece))
    assert candidates._total >= 400
    assert bytes_held(candidates) <= 8 * candidates._total


@pytest.fixture
def most_held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes in use after each piece, of small pieces and a small sample."""
    held: list[int] = []

    class Watched(_candidates.Candidates):
        def add(self, chunk: _candidates.Chunk) -> None:
            super().add(chunk)
            held.append(bytes_held(self))

    monkeypatch.setattr(op, "Candidates", Watched)
    monkeypatch.setattr(op, "_SMALLEST_SAMPLE", 2000)
    monkeypatch.setattr(_arena, "_FIRST", 1)
    monkeypatch.setattr(_arena, "_BLOCK", 1)
    monkeypatch.setattr(_candidates, "_SLACK", 64)
    monkeypatch.setattr(_scores, "_PIECE", 500)
    monkeypatch.setattr(_scores, "_SMALL", 0)
    return held


@pytest.mark.parametrize("few", [0, N // 100, N // 30])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("k", "keep"), [(N // 20, 0), (N // 20, N), (N // 2, 0), (N // 2, N), (N - N // 20, 0)])
def test_equal_scores_are_kept_as_indices(k: int, few: int, first: bool, keep: int, most_held, monkeypatch):
    """Dead rows, and ``B = 0`` of LoRA: most scores are zero, and the ``k``-th is one of them."""
    monkeypatch.setattr(op, "_KEEP_VALUES", keep)
    monkeypatch.setattr(op, "_MOST_INSIDE", N // 50)
    others = torch.linspace(1, 2, few)
    scores = torch.cat([others, torch.zeros(N - few)] if first else [torch.zeros(N - few), others])
    for low in (None, 0.0):
        if low is not None:
            monkeypatch.setattr(op, "_bracket", lambda *_, low=low: (low, 1.5, 0))
        assert_exact([scores], k)
        # one piece may lie beyond; values of what is not zero
        assert max(most_held) <= 4 * (k + 64 + 500) + 8 * (2 * few + 64)


@pytest.mark.parametrize("few", [64, 2000])
def test_where_a_sample_says_little_the_bracket_is_counted(few: int, most_held, monkeypatch):
    """Similar scores are next to each other: runs of them differ far more than independent draws would."""
    monkeypatch.setattr(op, "_KEEP_VALUES", 0)
    monkeypatch.setattr(op, "_MOST_INSIDE", few)
    scores = normal(N).abs().sort().values + torch.arange(N) // (N // 10)
    blocks = list(scores.split(N // 10)[::-1])
    assert_exact(blocks, N // 2)
    assert max(most_held) <= 4 * (N // 2 + 500) + 8 * (few if few == 2000 else 400)


@pytest.fixture
def stored(tmp_path: Path):
    """Put blocks into a file."""

    def write(blocks: list[Tensor]) -> list:
        tensors = {str(number): block for number, block in enumerate(blocks)}
        save_tensors(tmp_path / "scores", tensors, format=FORMAT, metadata={})
        return list(open_tensors(tmp_path / "scores", format=FORMAT)[1].values())

    return write


def test_from_a_file(stored, way: str):
    blocks = split(normal(N))
    blocks[3] = blocks[3].bfloat16()
    source = stored(blocks)
    source[4] = blocks[4]  # half in memory
    for k in (0, 1, N // 200, N // 2, N):
        assert_exact(blocks, k, source=source)


@pytest.mark.parametrize("k", [1, 15_000])
def test_nan_is_refused_by_name(k: int, backend: str):
    blocks = [normal(9000), normal(3), torch.empty(0), normal(6000)]
    blocks[3][4567] = nan
    blocks[3][4569] = nan
    blocks = [block.to(DEVICES[backend]) for block in blocks]
    with pytest.raises(ValueError, match=r"blocks\[3\] holds NaN at flat index 4567, which has no rank: clean"):
        streaming_topk(blocks, k, backend=backend)


def test_nan_is_refused_wherever_it_stands(way: str):
    for place in (0, 17, N // 2, N - 1):
        scores = DISTRIBUTIONS["infinities"]()
        scores[place] = nan
        for order in ("largest", "smallest"):
            with pytest.raises(ValueError, match=f"holds NaN at flat index {place},"):
                streaming_topk([scores], N // 200, order=order)
    with pytest.raises(ValueError, match="holds NaN at flat index 0,"):
        streaming_topk([torch.full((N,), nan)], 3)


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        (ValueError, dict(k=5), "k must be from 0 to the number of scores, 4; got 5"),
        (ValueError, dict(k=-1), "k must be from 0 to the number of scores, 4; got -1"),
        (TypeError, dict(k=1.5), "integer"),
        (ValueError, dict(order="best"), r"order must be one of \('largest', 'smallest'\), got 'best'"),
        (TypeError, dict(blocks=[torch.ones(4).int()]), r"must be float64, .*; blocks\[0\] is torch.int32: cast it"),
        (TypeError, dict(blocks=[torch.ones(4), [1.0]]), r"blocks must be tensors, .*; blocks\[1\] is <class 'list'>"),
        (TypeError, dict(blocks=[torch.ones(4).to(torch.float8_e4m3fn)]), "is torch.float8_e4m3fn: cast it"),
    ],
)
def test_refusals(error: type, arguments: dict, says: str):
    with pytest.raises(error, match=says):
        streaming_topk(**{"blocks": [torch.ones(4)], "k": 2} | arguments)

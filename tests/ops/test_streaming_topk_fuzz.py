"""Exactly k, ties to the smaller index: drawn distributions, and more equal scores at the threshold than are kept."""

from __future__ import annotations

from importlib import import_module
from math import inf

import pytest
import torch
from torch import Tensor

from fishkern.files import open_tensors, save_tensors
from fishkern.ops import _candidates, _scores, streaming_topk
from tests.ops.test_streaming_topk import FORMAT, SIZES, assert_exact

op = import_module("fishkern.ops.streaming_topk")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def drawn(seed: int) -> tuple[list[Tensor], int, str]:
    """Blocks, k and order of one distribution: a shape, a coarseness, zeros, infinities, an order, cuts, dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def integer(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    count = int(10 ** (4 * float(torch.rand((), generator=generator))))  # from 1 to 10,000, small ones as often
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    scores = [
        normal,
        normal.square(),
        (normal * integer(1, 40)).exp(),  # over many powers of ten, with infinities and zeros in the short dtypes
        1 / normal,
        normal * 1e-44,  # denormals of float32
        torch.arange(count, dtype=torch.float64),
        torch.full((count,), float(normal[0]), dtype=torch.float64),
    ][integer(0, 6)]
    if integer(0, 1):
        scores = (scores * integer(1, 30)).round()  # few values, both zeros among them
    for value in (0.0, -0.0, inf, -inf, float(scores[0])):
        if not integer(0, 3):
            scores = torch.where(torch.rand(count, generator=generator) < integer(0, 100) / 100, value, scores)
    if not integer(0, 3):
        scores = scores.sort(descending=bool(integer(0, 1))).values
    sizes = torch.randint(0, count // integer(1, 8) + 1, (integer(0, 8),), generator=generator).tolist()
    ends = [min(sum(sizes[: i + 1]), count) for i in range(len(sizes))]
    blocks = list(scores.tensor_split(ends))
    blocks = [block.to(DTYPES[integer(0, 4)]) for block in blocks]
    k = [0, 1, count, count - 1, count // 2, integer(0, count), integer(0, count)][integer(0, 6)]
    return blocks, k, ("largest", "smallest")[integer(0, 1)]


def check(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other one goes through sampled brackets and small pieces, which such few scores would not."""
    for seed in seeds:
        with monkeypatch.context() as patch:
            for name, value in SIZES.items() if seed % 2 else ():
                module = next(m for m in (op, _candidates, _scores) if hasattr(m, name))
                patch.setattr(module, name, value)
            blocks, k, order = drawn(seed)
            try:
                assert_exact(blocks, k, order)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {k} {order} of {[len(block) for block in blocks]}") from error


def test_a_thousand_distributions(monkeypatch):
    check(range(1000), monkeypatch)


def test_the_fuzz_finds_ties_that_are_dealt_otherwise(monkeypatch):
    """It fails where the last of equal scores is taken in place of the first."""

    def last(blocks, k, **options):
        turned = [block.flip(0) for block in reversed(blocks)]
        found = list(reversed(streaming_topk(turned, k, **options)))
        return [(len(block) - 1 - one).flip(0).int() for block, one in zip(blocks, found, strict=True)]

    monkeypatch.setattr("tests.ops.test_streaming_topk.streaming_topk", last)
    with pytest.raises(AssertionError, match="seed"):
        check(range(10), monkeypatch)


@pytest.mark.parametrize("equal", [4097, 50_000, 900_000])
def test_a_million_scores_with_thousands_equal_at_the_threshold(equal, tmp_path):
    """The equal ones lie anywhere; k ends at the first, in the middle and before the last of them. Also from a file."""
    generator = torch.Generator().manual_seed(equal)
    scores = torch.rand(10**6, generator=generator)
    scores[torch.randperm(10**6, generator=generator)[:equal]] = 0.5
    blocks = list(scores.split([300_000, 1, 699_999]))
    above = int((scores > 0.5).sum())
    save_tensors(tmp_path / "scores", {str(n): block for n, block in enumerate(blocks)}, format=FORMAT, metadata={})
    stored = list(open_tensors(tmp_path / "scores", format=FORMAT)[1].values())
    for k in (above + 1, above + equal // 2, above + equal - 1):
        assert_exact(blocks, k)
        assert_exact(blocks, k, source=stored)

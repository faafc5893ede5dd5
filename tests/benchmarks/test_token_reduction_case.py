"""The case of token reduction: its FLOPs are the arithmetic's, and a miss of its goal is seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.cases import token_reduction as case_
from benchmarks.cases.token_reduction import KEEP, REDUCING, WHAT, Images
from benchmarks.engine.flops import flops

TINY = Images(2, 42, layers=10, hidden=16, patch=7)  # 36 patches


def arithmetic(case: Images, reducing: tuple[int, ...]) -> int:
    """Of a forward pass: what the tokens of each layer cost, with the one row of attention where they are ranked."""
    I, T = case.hidden, (case.size // case.patch) ** 2
    total = T * 3 * case.patch**2 * I + 2 * I * 10
    for number in range(case.layers):
        total += (T + 1) * 4 * I**2 + 2 * (T + 1) ** 2 * I
        if number in reducing:
            heads = max(1, I // 64)
            total += I * I + heads * (I // heads) * I + heads * (T + 1) * I  # the query, and what it makes of the keys
            T = max(1, math.floor(KEEP * T)) + 1
        total += (T + 1) * 2 * 4 * I**2
    return 2 * case.N * total


@pytest.mark.parametrize("reduced", [False, True])
def test_counted_flops_are_the_arithmetics(reduced):
    counted = flops(WHAT["forward"](TINY, reduced=reduced))
    assert counted == arithmetic(TINY, REDUCING if reduced else ())


def test_a_step_with_one_image_takes_half_of_one_with_two():
    one, two = (flops(WHAT["training step"](replace(TINY, N=N), reduced=True)) for N in (1, 2))
    assert 2 * one == two


def test_attention_is_counted():
    query = torch.randn(1, 1, 5, 4, requires_grad=True)

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    assert flops(run) == 3 * 2 * 2 * 5 * 5 * 4  # forward, and two products for each of its two


@pytest.mark.parametrize("what", WHAT)
def test_both_are_measured(what):
    counted, seconds = case_.measured(TINY, what, 2)
    assert counted["fishkern"] < counted["all_tokens"]
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    records = {provider: case_.description(TINY, what, provider) for provider in seconds}
    assert records["fishkern"]["case"]["reducing"] == {"layers": list(REDUCING), "keep": KEEP}
    assert records["all_tokens"]["case"]["reducing"] is None


@pytest.mark.parametrize(("time", "met"), [(0.78, True), (0.9, False)])
def test_a_missed_goal_is_reported_after_recording(monkeypatch, time, met):
    """0.3 of the FLOPs are saved, and of the time 0.7 of that, or less."""
    monkeypatch.setattr(case_, "CASES", (TINY,))
    pretended = {"fishkern": 70, "all_tokens": 100}, {"fishkern": [time] * 9, "all_tokens": [1.0] * 9}
    monkeypatch.setattr(case_, "measured", lambda *_: pretended)
    recorded = []

    class Benchmark:
        def __init__(self) -> None:
            self.extra_info = {}

        def pedantic(self, function, args, rounds):
            return function(*args)

    def go() -> None:
        case_.test_token_reduction(Benchmark(), lambda name, record: recorded.append(record), TINY, "forward")

    if met:
        go()
    else:
        with pytest.raises(AssertionError):
            go()
    ours = recorded[0]
    assert (ours["provider"], ours["saved_flops"]) == ("fishkern", pytest.approx(0.3))
    assert ours["saved_seconds"] == pytest.approx(1 - time)
    assert len(recorded) == 2


def test_revisions_compare_every_run():
    runs = case_.compared()
    assert len(runs) == len(case_.CASES) * len(WHAT)
    assert all(set(providers) == {"fishkern", "all_tokens"} for providers in runs.values())

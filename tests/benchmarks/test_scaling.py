"""The scaling benchmark: all providers compute the same, at sizes that grow geometrically; a failure is a record."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.cases import scaling
from benchmarks.cases.scaling import PROVIDERS, SWEEPS, Sweep
from benchmarks.engine.process import ProcessError
from benchmarks.rivals.providers import MASKED, squares

SMALL = {
    "sum_grad_squared": {"N": 3, "T": 4, "width": 8},
    "streaming_topk": {"n": 2**14, "k": 50, "tensors": 4},
    "whole_pass": {"N": 2, "T": 4, "layers": 1},
}


def results(op: str) -> dict[str, object]:
    return {name: scaling.make(op, name, SMALL[op])() for name in PROVIDERS[op]}


def test_a_layers_squares():
    by_provider = results("sum_grad_squared")
    for name in PROVIDERS["sum_grad_squared"]:
        torch.testing.assert_close(by_provider[name], by_provider["loop"])


def test_the_largest_scores():
    """``cat_topk`` tells places in the whole."""
    by_provider = results("streaming_topk")
    size = SMALL["streaming_topk"]["n"] // SMALL["streaming_topk"]["tensors"]
    whole = sorted(by_provider["cat_topk"][0].tolist())
    for name in ("fishkern", "sampled_threshold"):
        assert (
            sorted(n * size + place for n, block in enumerate(by_provider[name]) for place in block.tolist()) == whole
        )


def test_a_whole_pass():
    by_provider = {name: squares(result) for name, result in results("whole_pass").items()}
    for name, values in by_provider["one_by_one"].items():
        for other in ("fishkern", "vmap_grad"):
            torch.testing.assert_close(by_provider[other][name], values, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("provider", PROVIDERS["masked_adamw"])
def test_a_masked_step_moves_as_many_entries(provider, monkeypatch):
    """Dense AdamW with masked gradients decays the others, too."""
    seen = []
    run = PROVIDERS["masked_adamw"][provider]

    def watched(model, selection):
        seen.append((model, [p.detach().clone() for p in model]))
        return run(model, selection)

    monkeypatch.setitem(PROVIDERS["masked_adamw"], provider, watched)
    scaling.make("masked_adamw", provider, {"P": 2**10, "k": 30, "tensors": 4})()
    (model, before), = seen  # fmt: skip
    moved = sum(int((p != old).sum()) for p, old in zip(model, before, strict=True))
    assert moved == 30 if MASKED[provider].exact else moved > 30


def test_sizes_grow_geometrically():
    for sweep in SWEEPS:
        assert len(sweep.sizes) >= 5
        steps = [b / a for a, b in zip(sweep.sizes, sweep.sizes[1:], strict=False)]
        assert min(steps) >= 2
        assert all(step == steps[0] for step in steps), sweep
    assert {sweep.op for sweep in SWEEPS} == PROVIDERS.keys()


@pytest.mark.parametrize("quantity", ["time", "memory"])
def test_what_fails_is_recorded_and_larger_sizes_are_not_tried(quantity, monkeypatch):
    asked = []

    def worker(provider: str) -> SimpleNamespace:
        def prepare(function, op, name, sizes):
            asked.append((name, sizes["N"]))
            if name == "vmap" and sizes["N"] >= 4:
                raise ProcessError("out of memory above 2 GiB")

        return SimpleNamespace(prepare=prepare, seconds=lambda: 0.5, peak_mib=lambda: 3.0)

    @contextmanager
    def processes(op, *, memory):
        assert memory == (quantity == "memory")
        yield {provider: worker(provider) for provider in PROVIDERS[op]}

    monkeypatch.setattr(scaling, "processes", processes)
    sweep = Sweep("sum_grad_squared", "N", (2, 4, 8), {"T": 1, "width": 1})
    by_provider = {(provider, size): figure for provider, size, figure in scaling.measure(sweep, quantity)}
    assert len(by_provider) == 9
    assert by_provider["vmap", 4] == {"left out": "out of memory above 2 GiB"}
    assert by_provider["vmap", 8] == {"left out": "not tried: out of memory above 2 GiB at N = 4"}
    assert ("vmap", 8) not in asked
    measured = {"peak_mib": 3.0} if quantity == "memory" else {"median": 0.5, "min": 0.5, "max": 0.5}
    assert by_provider["fishkern", 8].get("seconds", by_provider["fishkern", 8]) == measured

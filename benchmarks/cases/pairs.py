"""Preference pairs in one forward pass, against the same pairs in two.

A LLaMA takes ``N`` pairs of answers of equal length: as ``2 N`` rows at once by ``Preference``, in both orders of rows,
and by a loss function that runs the chosen and the rejected answers one after the other, of which each example has one
row. An ordinary forward and backward pass of the ``2 N`` rows runs along. What comes before the first batch is prepared
and not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fishkern as fk
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread
from benchmarks.subjects.transformers import Workload, small_llama

TESTS = {"run": ["tests/models/test_pairs.py"]}
ROUNDS = 7
MOST = 1.1  # times the pass with two forward passes
BETA = 0.1
PROVIDERS = ("fishkern", "interleaved", "two_passes", "ordinary")

pytestmark = pytest.mark.skipif(not hasattr(fk, "Preference"), reason="this fishkern has no Preference")

CASES = [Workload(small_llama(4, 256), T, N=8, batches=1) for T in (16, 64, 256)]


def label(case: Workload) -> str:
    return f"N={case.N},T={case.T},layers={case.shape.layers},hidden={case.shape.hidden}"


def batches(provider: str, case: Workload) -> list[dict[str, Tensor]]:
    """The same pairs each time: a quarter of a row is the prompt."""
    generator = torch.Generator().manual_seed(2)
    data = []
    for _ in range(case.batches):
        pairs = torch.randint(1, case.shape.vocabulary, (2, case.N, case.T), generator=generator)
        references = -torch.rand(2, case.N, generator=generator)
        rows = pairs.transpose(0, 1) if provider == "interleaved" else pairs
        mask = torch.ones(2 * case.N, case.T, dtype=torch.int64)
        mask[:, : case.T // 4] = 0
        rows = {"input_ids": rows.flatten(0, 1), "completion_mask": mask}
        data.append({**rows, "ref_chosen_logps": references[0], "ref_rejected_logps": references[1]})
    if provider == "two_passes":
        return [_in_columns(batch) for batch in data]
    return data


def _in_columns(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both answers of a pair as entries of their own."""
    columns = {
        f"{side}_{key}": half
        for key in ("input_ids", "completion_mask")
        for side, half in zip(("chosen", "rejected"), batch[key].chunk(2), strict=True)
    }
    return {**columns, **{key: value for key, value in batch.items() if key.startswith("ref_")}}


def one_after_the_other(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """DPO's loss of each pair, by two forward passes."""
    ratios = []
    for side in ("chosen", "rejected"):
        ids = batch[f"{side}_input_ids"]
        labels = ids.masked_fill(batch[f"{side}_completion_mask"] == 0, -100)
        rows = {"input_ids": ids, "labels": labels}
        logps = -fk.CausalLM(reduction="sum").predictive(model, rows).losses()
        ratios.append(logps - batch[f"ref_{side}_logps"])
    return -F.logsigmoid(BETA * (ratios[0] - ratios[1]))


def passing(provider: str, case: Workload) -> Run:
    """A pass over all pairs, prepared; or an ordinary forward and backward pass of each batch."""
    model, data = case.model(), batches(provider, case)
    if provider == "ordinary":
        return partial(ordinary, model, data)
    rows = "interleaved" if provider == "interleaved" else "halves"
    likelihood = one_after_the_other if provider == "two_passes" else fk.Preference(BETA, rows=rows)
    prepared = fk.prepare(model, data[0], likelihood=likelihood)
    return partial(fk.estimate, model, data, prepared=prepared)


def ordinary(model: nn.Module, data: list[dict[str, Tensor]]) -> None:
    """What a training step of these pairs computes, without the optimizer."""
    for batch in data:
        fk.Preference(BETA).predictive(model, batch).losses().mean().backward()
        model.zero_grad()


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    return {label(case): {name: partial(passing, name, case) for name in PROVIDERS} for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=label)
def test_time(case, benchmark, record):
    passes = {name: passing(name, case) for name in PROVIDERS}
    for run in passes.values():
        run()
    seconds = in_turns(benchmark, {name: partial(seconds_of, run) for name, run in passes.items()}, ROUNDS)
    for name, values in seconds.items():
        record(
            "pairs",
            {
                "op": "pairs",
                "quantity": "time",
                "case": {"N": case.N, "T": case.T, "batches": case.batches},
                "model": {"layers": case.shape.layers, "hidden": case.shape.hidden},
                "dtype": case.dtype,
                "attention": "sdpa",
                "provider": name,
                "seconds": spread(values),
                "rounds": ROUNDS,
            },
        )
    for name in ("fishkern", "interleaved"):
        ratio = median(seconds[name]) / median(seconds["two_passes"])
        assert ratio <= MOST, f"{name} takes {ratio:.2f} times the pass with two forward passes, at most {MOST}"

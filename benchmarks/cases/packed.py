"""Documents packed into rows, against the same documents padded to the longest of their batch.

Lengths are log-normal with sigma 1, as those of instructions and answers are. Both passes take the same documents of a
LLaMA in the same batches; packed, a batch is one row. What comes before the first batch is prepared and not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fishkern as fk
from benchmarks.engine.memory import peak_mib, rounded
from benchmarks.engine.process import in_process
from benchmarks.engine.records import Record
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread
from benchmarks.subjects.transformers import Workload, small_llama

TESTS = {"run": ["tests/models/test_packed.py"]}
ROUNDS = 5
SECONDS = 90  # that a measurement in a process of its own may take
LEAST = 1.5  # times the examples per second of padded batches
PROVIDERS = ("fishkern", "padded")

pytestmark = pytest.mark.skipif(
    not hasattr(fk.statistics, "PackedCategorical"), reason="this fishkern refuses packed rows"
)


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents.

    Args:
        middle: Their median.
        sigma: Standard deviation of their logarithms.
        least: The shortest.
        most: Longer ones are cut.
    """

    middle: int = 64
    sigma: float = 1.0
    least: int = 4
    most: int = 512

    def drawn(self, count: int) -> list[int]:
        """Draw lengths, the same each time."""
        normal = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        drawn = (self.middle * (self.sigma * normal).exp()).round().long()
        return drawn.clamp(self.least, self.most).tolist()


LENGTHS = Lengths()
CASES = [Workload(small_llama(4, hidden), LENGTHS.most, N=8, batches=4) for hidden in (128, 256)]


def label(case: Workload) -> str:
    return f"N={case.N},layers={case.shape.layers},hidden={case.shape.hidden}"


def batches(provider: str, case: Workload, lengths: Lengths = LENGTHS) -> list[dict[str, Tensor]]:
    """The same documents in the same order, ``N`` in each batch."""
    generator = torch.Generator().manual_seed(2)
    drawn = lengths.drawn(case.N * case.batches)
    documents = [torch.randint(1, case.shape.vocabulary, (one,), generator=generator) for one in drawn]
    together = {"fishkern": packed, "padded": padded}[provider]
    return [together(documents[first : first + case.N]) for first in range(0, len(documents), case.N)]


def packed(documents: list[Tensor]) -> dict[str, Tensor]:
    """One row, as transformers' ``DataCollatorWithFlattening`` makes it."""
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(one)) for one in documents])[None]
    return {"input_ids": row, "labels": row, "position_ids": positions}


def padded(documents: list[Tensor]) -> dict[str, Tensor]:
    """A row for each document, as long as the longest."""
    ids = pad_sequence(documents, batch_first=True)
    mask = pad_sequence([torch.ones_like(one) for one in documents], batch_first=True)
    labels = pad_sequence(documents, batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def passing(provider: str, case: Workload) -> Run:
    """A pass over all documents, prepared."""
    model, data = case.model(), batches(provider, case)
    prepared = fk.prepare(model, data[0])
    return partial(fk.estimate, model, data, prepared=prepared)


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    return {label(case): {name: partial(passing, name, case) for name in PROVIDERS} for case in CASES}


def description(case: Workload, provider: str, quantity: str) -> dict[str, Any]:
    """The fields of a record other than its figures."""
    tokens = [batch["input_ids"].numel() for batch in batches(provider, case)]
    lengths = LENGTHS.drawn(case.N * case.batches)
    return {
        "op": "packed",
        "quantity": quantity,
        "case": {"N": case.N, "batches": case.batches, "lengths": vars(LENGTHS)},
        "model": {"layers": case.shape.layers, "hidden": case.shape.hidden},
        "dtype": case.dtype,
        "attention": "sdpa",
        "provider": provider,
        "tokens": sum(lengths),
        "positions": sum(tokens),
    }


@pytest.mark.parametrize("case", CASES, ids=label)
def test_time(case, benchmark, record):
    passes = {name: passing(name, case) for name in PROVIDERS}
    for run in passes.values():
        run()
    seconds = in_turns(benchmark, {name: partial(seconds_of, run) for name, run in passes.items()}, ROUNDS)
    examples = case.N * case.batches
    rates = {name: examples / median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        figures = {"seconds": spread(values), "rounds": ROUNDS, "examples_per_second": round(rates[name], 2)}
        record("packed", {**description(case, name, "time"), **figures})
    ratio = rates["fishkern"] / rates["padded"]
    assert ratio >= LEAST, f"{ratio:.2f} times the examples per second of padded batches, at least {LEAST}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_peak_memory(case, record):
    peaks = {}
    for name in PROVIDERS:
        figures = in_process("benchmarks.cases.packed:memory", name, case, seconds=SECONDS)
        record("packed", {**description(case, name, "memory"), **figures})
        peaks[name] = figures["peak_mib"]
    assert peaks["fishkern"] <= peaks["padded"]


def memory(provider: str, case: Workload) -> Record:
    """The peak of a pass above the loaded model, accumulators included."""
    run = passing(provider, case)
    run()  # libraries are loaded and allocate on first use
    return rounded({"peak_mib": peak_mib(run)})

"""What one more batch costs the host: a pass over a model with the modules of LLaMA 1B and next to no arithmetic.

On a GPU the host only launches, and with few tokens its time is the time of the pass. So this is CPU time of one
thread, with matrices so small that only Python and the calls into torch remain: of a Fisher pass by the reference, of
one without the squares (the cost of capture itself), and of an ordinary forward and backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.engine.turns import Run, in_turns, spread
from benchmarks.rivals import Batches
from benchmarks.subjects.transformers import LLAMA_1B, Workload

TESTS = {"run": ["tests/laws/test_layers.py", "tests/models/test_families.py"]}
SHAPE = replace(LLAMA_1B, hidden=32, intermediate=64, vocabulary=64, heads=4, key_heads=2)
CASES = {
    "full": Workload(SHAPE, T=4, N=4, batches=20),
    "lora": Workload(SHAPE, T=4, N=4, batches=20, lora=4),
}
ROUNDS = 7
GOAL = 2.0  # times an ordinary forward and backward pass, for capture itself


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Nothing(fk.DiagonalFisher):
    """Asks for all that the diagonal Fisher asks for, and adds nothing up."""

    reads: ClassVar[str] = "squares"

    def update_(self, state: Tensor, *gradients: Any, **options: Any) -> None:
        """Leave the state as it is."""


Nothing.adds_squares = True  # the same as reads, for revisions that `compare` checks out


def estimated(model: nn.Module, batches: Batches, estimator: fk.DiagonalFisher) -> float:
    """Seconds of one batch, the median over all but the first, which has the set-up of the pass."""
    stamps: list[float] = []

    def stamp(done: int, total: int | None) -> None:
        stamps.append(time.process_time())

    fk.estimate(model, batches, estimator, check=False, progress=stamp)
    return median(after - before for before, after in pairwise(stamps))


def forward_backward(model: nn.Module, batches: Batches) -> float:
    """Seconds of one batch, the median over all."""
    seconds = []
    for batch in batches:
        model.zero_grad()
        start = time.process_time()
        model(**batch).loss.backward()
        seconds.append(time.process_time() - start)
    model.zero_grad()
    return median(seconds)


PROVIDERS: dict[str, Callable[[nn.Module, Batches], float]] = {
    "fishkern": partial(estimated, estimator=fk.DiagonalFisher()),
    "capture": partial(estimated, estimator=Nothing()),
    "forward_backward": forward_backward,
}


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``, which takes the wall-clock time of a whole pass."""

    def make(case: Workload, provider: str) -> Run:
        torch.set_num_threads(1)
        return partial(PROVIDERS[provider], case.model(), case.data())

    return {name: {provider: partial(make, case, provider) for provider in PROVIDERS} for name, case in CASES.items()}


@pytest.mark.filterwarnings("ignore:every entry is exactly zero")
@pytest.mark.parametrize("adapted", CASES)
def test_host_time(adapted, benchmark, record):
    case = CASES[adapted]
    if case.lora:
        pytest.importorskip("peft")
    model, batches = case.model(), case.data()
    with one_thread():
        timed = {name: partial(run, model, batches) for name, run in PROVIDERS.items()}
        seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record(
            "host_time",
            {
                "op": "host_time",
                "quantity": "CPU time of one batch",
                "case": {"parameters": adapted, "examples": case.N, "tokens": case.T},
                "model": vars(SHAPE),
                "dtype": "float32",
                "attention": "sdpa",
                "provider": name,
                "seconds": spread(values),
                "rounds": ROUNDS,
            },
        )
    assert median(seconds["capture"]) <= GOAL * median(seconds["forward_backward"])

"""What one more batch costs the host: a pass over a model with the modules of LLaMA 1B and next to no arithmetic.

On a GPU the host only launches, and where tokens are few its time is the time of the pass. So this is CPU time of one
thread, with matrices so small that what is left is Python and the calls into torch: of a Fisher pass by the reference,
of one whose squares are left out (what capture itself costs), and of an ordinary forward and backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import median
from unittest import mock

import pytest
import torch
from torch import nn

import fishkern as fk
from benchmarks.shapes import LLAMA_1B
from benchmarks.turns import in_turns, spread
from fishkern.statistics.accumulators import Accumulators

TESTS = ["tests/laws/test_layers.py", "tests/models/test_families.py"]
SHAPE = replace(LLAMA_1B, hidden=32, intermediate=64, vocabulary=64, heads=4, key_heads=2)
EXAMPLES, TOKENS, BATCHES, ROUNDS = 4, 4, 20, 7
GOAL = 2.0  # times an ordinary forward and backward pass, for capture itself


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def data() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(SHAPE.vocabulary, (BATCHES, EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def fishkern(model: nn.Module, batches: list) -> float:
    """Seconds of one batch, the median over all but the first, whose set-up is not what is asked for."""
    stamps: list[float] = []
    fk.estimate(model, batches, check=False, progress=lambda done, total: stamps.append(time.process_time()))
    return median(after - before for before, after in pairwise(stamps))


def capture(model: nn.Module, batches: list) -> float:
    with mock.patch.object(Accumulators, "_add", lambda self, *_: setattr(self, "touched", True)):
        return fishkern(model, batches)


def forward_backward(model: nn.Module, batches: list) -> float:
    seconds = []
    for batch in batches:
        model.zero_grad()
        start = time.process_time()
        model(**batch).loss.backward()
        seconds.append(time.process_time() - start)
    model.zero_grad()
    return median(seconds)


PROVIDERS: dict[str, Callable[[nn.Module, list], float]] = {
    "fishkern": fishkern,
    "capture": capture,
    "forward_backward": forward_backward,
}


@pytest.mark.parametrize("adapted", ["full", "lora"])
def test_host_time(adapted, benchmark, record):
    model = SHAPE.model() if adapted == "full" else lora(SHAPE.model().requires_grad_(False))
    batches = data()
    with one_thread():
        timed = {name: lambda run=run: run(model, batches) for name, run in PROVIDERS.items()}
        seconds = in_turns(benchmark, timed, ROUNDS)
    for name, values in seconds.items():
        record(
            "host_time",
            {
                "op": "host_time",
                "quantity": "CPU time of one batch",
                "case": {"parameters": adapted, "examples": EXAMPLES, "tokens": TOKENS},
                "model": vars(SHAPE),
                "dtype": "float32",
                "attention": "sdpa",
                "provider": name,
                "seconds": spread(values),
                "rounds": ROUNDS,
            },
        )
    assert median(seconds["capture"]) <= GOAL * median(seconds["forward_backward"])

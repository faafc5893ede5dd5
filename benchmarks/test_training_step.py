"""A whole training step of LoRA: FISH-Tuning's masked AdamW against plain LoRA with torch's fused AdamW.

Shapes and data are those of :mod:`benchmarks.test_fish_tuning`; both take turns on the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

import fishkern as fk
from benchmarks.test_fish_tuning import DENSITY, adapted, data
from benchmarks.turns import in_turns, spread

TESTS = ["tests/methods/test_fish_training.py", "tests/laws/test_optimizers.py"]
ROUNDS = 15
NEVER_SLOWER = 1.05


def stepper(fused: bool) -> Callable[[dict], float]:
    """Forward, backward and step, in seconds."""
    model, batches = adapted(), data()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if fused:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    else:
        selection = fk.fish_tuning(model, batches, density=DENSITY)
        optimizer = fk.MaskedAdamW(model, selection, lr=1e-4)
    model.train()

    def step(batch: dict) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


COMPARED = {"step": ["fishkern", "plain_lora_fused_adamw"]}  # by `python -m benchmarks compare`


def prepare(_: str, provider: str) -> partial:
    """Make one of :data:`COMPARED`."""
    return partial(stepper(fused=provider != "fishkern"), data()[0])


def test_training_step(benchmark, record):
    steps = {"fishkern": stepper(fused=False), "plain_lora_fused_adamw": stepper(fused=True)}
    batch = data()[0]
    for step in steps.values():
        step(batch)
    seconds = in_turns(benchmark, {name: partial(step, batch) for name, step in steps.items()}, ROUNDS)
    for name, values in seconds.items():
        record(
            "training_step",
            {
                "op": "training_step",
                "quantity": "time",
                "case": {"batch": len(batch["labels"]), "tokens": batch["input_ids"].shape[1], "density": DENSITY},
                "model": {"layers": 6, "hidden": 384},
                "dtype": "float32",
                "attention": "sdpa",
                "provider": name,
                "seconds": spread(values),
                "rounds": ROUNDS,
            },
        )
    assert median(seconds["fishkern"]) <= NEVER_SLOWER * median(seconds["plain_lora_fused_adamw"])

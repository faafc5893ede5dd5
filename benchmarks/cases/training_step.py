"""A whole training step of LoRA: FISH-Tuning's masked AdamW against plain LoRA with torch's fused AdamW.

Shapes and data are those of :mod:`benchmarks.cases.fish_tuning`; both take turns on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

import fishkern as fk
from benchmarks.cases.fish_tuning import DENSITY, adapted, data
from benchmarks.engine.turns import Run, in_turns, seconds_of, spread

TESTS = {"run": ["tests/methods/test_fish_training.py", "tests/laws/test_optimizers.py"]}
ROUNDS = 15
NEVER_SLOWER = 1.05
PROVIDERS = ("fishkern", "plain_lora_fused_adamw")


def stepper(provider: str) -> Run:
    """Forward, backward and step on the first batch."""
    model, batches = adapted(), data()
    if provider == "fishkern":
        selection = fk.fish_tuning(model, batches, density=DENSITY)
        optimizer: torch.optim.Optimizer = fk.MaskedAdamW(model, selection, lr=1e-4)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compared() -> dict[str, dict[str, Callable[[], Run]]]:
    """For ``python -m benchmarks compare``."""
    return {"step": {name: partial(stepper, name) for name in PROVIDERS}}


def test_training_step(benchmark, record):
    steps = {name: stepper(name) for name in PROVIDERS}
    batch = data()[0]
    for step in steps.values():
        step()
    seconds = in_turns(benchmark, {name: partial(seconds_of, step) for name, step in steps.items()}, ROUNDS)
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

"""Rank of a Trainer with a penalty under DistributedDataParallel, see ``test_penalty.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import fishkern as fk
from tests.integrations.test_penalty import fisher_of, model_of, trainer

rank, world, folder = 0, 1, Path()  # set by the launcher


def values_trained(accumulated: int) -> list[float]:
    """Three steps of four examples; a double for each parameter, and the last penalty that was logged."""
    model = model_of()
    penalty = fk.QuadraticPenalty(fisher_of(model), model, weight=20)
    options: dict[str, Any] = dict(
        max_steps=3, per_device_train_batch_size=4 // world // accumulated, gradient_accumulation_steps=accumulated,
        save_strategy="no", logging_steps=1, ddp_backend="gloo",
    )  # fmt: skip
    with as_torchrun():
        training = trainer(folder / f"trained {rank} {accumulated}", model, penalty, **options)
        training.train()
    assert isinstance(training.model_wrapped, DistributedDataParallel) is (world > 1)
    rows = (parameter.detach().double().flatten() for parameter in model.parameters())
    sums = [float(row @ torch.linspace(1, 2, len(row), dtype=torch.float64)) for row in rows]
    return [*sums, [entry["penalty"] for entry in training.state.log_history if "penalty" in entry][-1]]


@contextmanager
def as_torchrun() -> Iterator[None]:
    """Set what torchrun sets, which accelerate reads; the processes are connected already."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update({name: str(value) for name, value in own.items()} if world > 1 else {})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


CASES = {"one batch": lambda: values_trained(1), "two batches": lambda: values_trained(2)}

"""A small network that trains with a freezer, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fishkern as fk

EAGER = fk.FreezeRule(margin=0.5, most=0.4, size_aware=False)
CLASSES = fk.Classification()


def network(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)]


PROBE = batches(2, seed=2)


def everything(model: nn.Module) -> fk.Selection:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return fk.Selection(shapes, {}, whole=shapes)


def adamw(model: nn.Module, selection: fk.Selection | None = None) -> fk.MaskedAdamW:
    return fk.MaskedAdamW(model, selection or everything(model), lr=1e-2, weight_decay=0.1)


def freezer_of(model: nn.Module, optimizer: fk.MaskedOptimizer, probe=PROBE, **options) -> fk.Freezer:
    options = {"every": 4, "read_every": 2, "rule": EAGER, "likelihood": CLASSES, **options}
    return fk.fisher_adaptune(model, probe, optimizer=optimizer, **options)


def train(model, optimizer, freezer, data) -> Iterator[fk.Freezing | None]:
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield freezer.step() if freezer is not None else None


def trained(steps: int, selection=None, **options) -> tuple[nn.Module, fk.Freezer, list[fk.Freezing]]:
    model = network()
    optimizer = adamw(model, selection)
    freezer = freezer_of(model, optimizer, **options)
    return model, freezer, [event for event in train(model, optimizer, freezer, batches(steps)) if event]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name

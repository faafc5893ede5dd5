"""Freezing that knows less: as many entries, at the same times, of slices in an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

import fishkern as fk
from benchmarks.studies.freezing.tasks import Task
from fishkern import hosts

Key = tuple[str, int]  # name of a parameter, number of its slice
Order = Callable[["Control"], Mapping[Key, float]]
"""From a control to a number for each slice in training; the smallest stop first."""


class Control:
    """Stops slices in an order of its own until as many entries train as are wanted.

    Args:
        model: The model in training.
        optimizer: Its masked optimizer.
        task: Of the model.
        seed: Of what is drawn.
        kept: Entries that are left after each event.
        order: Which slices stop first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: fk.MaskedAdamW,
        task: Task,
        seed: int,
        kept: Sequence[int],
        order: Order,
    ) -> None:
        self.model, self.task, self.seed = model, task, seed
        self._optimizer, self._kept, self._order = optimizer, list(kept), order
        self.parameters = _parameters(model)
        self.start = {name: value.detach().clone() for name, value in self.parameters.items()}
        slices, pool = fk.Slices(), optimizer.selection.shapes
        self.slices = {
            (name, number): piece
            for name, shape in pool.items()
            if not any(fnmatch(name, pattern) for pattern in task.setting.spare)
            for number, piece in enumerate(slices.of(name, shape))
        }
        self.sizes = {key: _entries(pool, key[0], piece).count for key, piece in self.slices.items()}
        self._steps = 0

    def step(self) -> fk.Selection | None:
        """Count a step, and stop slices where it is an event.

        Returns:
            What is left in training, or None where it is no event.
        """
        self._steps += 1
        if not self.task.setting.is_event(self._steps):
            return None
        wanted = self._optimizer.selection.count - self._kept.pop(0)
        order = self._order(self)
        stopped: dict[Key, fk.Rows | fk.Columns] = {}
        for key in sorted(order, key=lambda key: (order[key], key)):
            if self.sizes[key] <= wanted:
                wanted -= self.sizes[key]
                stopped[key] = self.slices.pop(key)
        self._optimizer.reselect(_without(self._optimizer.selection, stopped), freeze=True)
        return self._optimizer.selection

    def values(self, tensors: Mapping[str, Tensor]) -> dict[Key, float]:
        """The mean of each slice in training."""
        pool = self._optimizer.selection.shapes
        return {
            (name, number): _entries(pool, name, piece).gather(tensors[name]).double().mean().item()
            for (name, number), piece in self.slices.items()
        }


def bottom(control: Control) -> Mapping[Key, float]:
    """The layers next to the input, the embeddings first."""
    names = [name for name, _ in control.model.named_parameters()]
    layers = hosts.layer_of(names)
    first = min((n for n, name in enumerate(names) if layers[name]), default=0)
    # embeddings come before the layers, what follows them comes after
    outside = {name: -1 if n < first else len(names) for n, name in enumerate(names)}
    numbers = {fk.canonical_name(name): layer.number if (layer := layers[name]) else outside[name] for name in names}
    return {key: float(numbers[key[0]]) for key in control.slices}


def largest(control: Control) -> Mapping[Key, float]:
    """The largest tensors."""
    return {key: -float(control.parameters[key[0]].numel()) for key in control.slices}


def drawn(control: Control) -> Mapping[Key, float]:
    """Slices by chance."""
    draws = torch.Generator().manual_seed(1000 * control.seed + len(control.slices))
    return dict(zip(control.slices, torch.rand(len(control.slices), generator=draws).tolist(), strict=True))


def smallest_fisher(control: Control) -> Mapping[Key, float]:
    """The slices whose Fisher information is the smallest at the moment."""
    names = list(dict.fromkeys(name for name, _ in control.slices))
    probe = control.task.probe(control.seed)
    return control.values(fk.estimate(control.model, probe, likelihood=control.task.likelihood, parameters=names))


def smallest_change(control: Control) -> Mapping[Key, float]:
    """The slices that training has moved the least."""
    names = {name for name, _ in control.slices}
    moved = {name: (control.parameters[name].detach() - control.start[name]).abs() for name in names}
    return control.values(moved)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {fk.canonical_name(name): value for name, value in model.named_parameters() if value.requires_grad}


def _entries(pool: Mapping[str, torch.Size], name: str, piece: fk.Rows | fk.Columns):
    return fk.Selection({name: pool[name]}, {}, ranges={name: piece}).entries(name)


def _without(selection: fk.Selection, stopped: Mapping[Key, fk.Rows | fk.Columns]) -> fk.Selection:
    ranges: dict[str, fk.Rows | fk.Columns] = {}
    for (name, _), piece in stopped.items():
        ranges[name] = ranges[name] | piece if name in ranges else piece
    return selection - fk.Selection(selection.shapes, {}, ranges=ranges)

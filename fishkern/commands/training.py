"""A plain training loop for ``fishkern tune``, which can stop anywhere and be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.commands.freezing import Stopping
from fishkern.commands.output import Report
from fishkern.commands.resuming import Checkpoint, State
from fishkern.integrations.examples import Encoder, Example
from fishkern.layers import gradient_kept
from fishkern.optim import MaskedOptimizer
from fishkern.selection import Entries, Selection
from fishkern.selection.start import named_tensors


@dataclass
class Epoch:
    """How far training is.

    Attributes:
        losses: The mean loss of each epoch that has ended.
        total: The sum of the losses in this epoch, over its examples.
        begun: State of the generator when this epoch began: from it the same order can be drawn again.
        taken: Batches done in this epoch.
    """

    losses: list[float]
    total: float
    begun: Tensor
    taken: int


class Loop:
    """Training in shuffled epochs, with a learning rate that falls linearly to zero.

    Resumed from a checkpoint it ends in the same bits as without the interruption.

    Args:
        model: Changed in place.
        optimizer: Moves its parameters.
        encoder: Makes batches.
        examples: What to train on.
        epochs: Number of epochs.
        batch_size: Examples in a step.
        seed: Of the shuffling and of dropout; the global generators are left alone.
        trained: All that has been trained or will be; the optimizer may have fewer entries left.
        stopping: Called after each step, where something stops during training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MaskedOptimizer,
        encoder: Encoder,
        examples: list[Example],
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        trained: Selection,
        stopping: Stopping | None = None,
    ) -> None:
        self._trained, self._stopping = trained, stopping
        self._model, self._optimizer, self._encoder, self._examples = model, optimizer, encoder, examples
        self._epochs, self._batch_size, self._seed = epochs, batch_size, seed
        self._device = next(model.parameters()).device
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = Epoch([], 0.0, self._generator.get_state(), 0)
        steps = epochs * -(-len(examples) // batch_size)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    @property
    def seen(self) -> int:
        """The number of examples trained on so far, over all epochs."""
        return len(self._epoch.losses) * len(self._examples) + self._epoch.taken * self._batch_size

    def run(self, checkpoint: Checkpoint, more: Callable[[], State], report: Report) -> list[float]:
        """Train to the end, from the state of the checkpoint.

        Args:
            checkpoint: Keeps the state.
            more: Gives the rest of a checkpoint's state, which is not of the training.
            report: Called with the examples seen so far, and all that will be seen.

        Returns:
            The mean loss of each epoch.

        Raises:
            ValueError: The loss is not finite.
        """

        def state() -> State:
            return {**more(), **self._state()}

        self._model.train()
        with _drawing(self._seed, self._device):
            if checkpoint.state is not None:
                with checkpoint.reading():
                    self._restore(checkpoint.state)
            else:
                checkpoint.keep(state, now=True)  # so that an interruption does not cost the selection
            while len(self._epoch.losses) < self._epochs:
                self._run_epoch(report, lambda: checkpoint.keep(state))
                checkpoint.keep(state, now=True)
        return self._epoch.losses

    def _run_epoch(self, report: Report, keep: Callable[[], None]) -> None:
        """Train on the rest of an epoch; keep the state after each batch but the last."""
        epoch = self._epoch
        parts = torch.randperm(len(self._examples), generator=self._generator).split(self._batch_size)
        for part in parts[epoch.taken :]:
            seen = self.seen
            epoch.total += self._step([self._examples[n] for n in part.tolist()]) * len(part)
            epoch.taken += 1
            report(seen + len(part), self._epochs * len(self._examples))
            if epoch.taken < len(parts):  # the end of the epoch is kept in any case, and then the state is of the next
                keep()
        losses = [*epoch.losses, epoch.total / len(self._examples)]
        self._epoch = Epoch(losses, 0.0, self._generator.get_state(), 0)

    def _step(self, examples: list[Example]) -> float:
        batch = self._encoder.collate(examples)
        loss = self._model(**{key: value.to(self._device) for key, value in batch.items()}).loss
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {loss.item()} after {self.seen:,} examples: lower --lr, or train in float32."
            )
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        if self._stopping is not None:
            self._stopping.step()
        return loss.item()

    def _state(self) -> State:
        values = named_tensors(self._model)
        return {
            "seen": self.seen,
            "values": {
                name: self._trained.entries(name).gather(values[name].detach()).cpu()
                for name, count in self._trained.counts.items()
                if count
            },
            "buffers": {name: buffer.cpu() for name, buffer in self._model.named_buffers()},
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generators": _generators(self._device),
            "epoch": vars(self._epoch).copy(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        named, buffers = named_tensors(self._model), dict(self._model.named_buffers())
        with torch.no_grad():
            for name, values in state["values"].items():
                _take_over(named[name], self._trained.entries(name), values)
            for name, buffer in state["buffers"].items():
                buffers[name].copy_(buffer)
        self._optimizer.load_state_dict(state["optimizer"])
        if self._stopping is not None:
            self._stopping.resume(state["stopping"])
        self._schedule.load_state_dict(state["schedule"])
        _set_generators(state["generators"], self._device)
        self._epoch = Epoch(**state["epoch"])
        self._generator.set_state(self._epoch.begun)


@torch.no_grad()
def evaluate(
    model: nn.Module, encoder: Encoder, examples: list[Example], batch_size: int, report: Report
) -> dict[str, float]:
    """Measure a model on examples.

    Args:
        model: Left in evaluation mode.
        encoder: Makes batches.
        examples: What to measure on.
        batch_size: Examples in a batch.
        report: Called with the examples measured so far, and how many there are.

    Returns:
        ``"loss"``, the mean of the batches' losses weighted by their examples, and for single labels ``"accuracy"``.
    """
    device = next(model.parameters()).device
    model.eval()
    loss, right, labelled = 0.0, 0, 0
    for start in range(0, len(examples), batch_size):
        batch = encoder.collate(examples[start : start + batch_size])
        batch = {key: value.to(device) for key, value in batch.items()}
        with gradient_kept(model):  # no layer repacks itself for inference, since training goes on
            outputs = model(**batch)
        labels = batch["labels"]
        loss += outputs.loss.item() * len(labels)
        if labels.ndim == 1 and not labels.is_floating_point():
            right += int((outputs.logits.argmax(-1) == labels).sum())
            labelled += len(labels)
        report(min(start + batch_size, len(examples)), len(examples))
    measured = {"loss": loss / len(examples)}
    return measured | {"accuracy": right / labelled} if labelled else measured


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of the device, and restore their states afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _generators(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _take_over(parameter: Tensor, entries: Entries, values: Tensor) -> None:
    """Write the values of the trained entries; files of older versions hold the whole parameter."""
    if values.shape == parameter.shape:
        parameter.copy_(values)
    else:
        entries.scatter_(parameter, values.to(parameter.device))

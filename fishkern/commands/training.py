"""A plain training loop for ``fishkern tune``, which can stop anywhere and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fishkern.commands.resuming import Checkpoint
from fishkern.integrations.examples import Encoder, Example
from fishkern.layers import gradient_kept
from fishkern.optim import MaskedOptimizer
from fishkern.selection.start import named_tensors

Report = Callable[[int, int | None], None]


def train(
    model: nn.Module,
    optimizer: MaskedOptimizer,
    encoder: Encoder,
    examples: list[Example],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    report: Report,
    checkpoint: Checkpoint,
    described: Callable[[], dict[str, Any]],
) -> list[float]:
    """Train in shuffled epochs, with a learning rate that falls to zero in a straight line.

    Where the checkpoint holds a state, training goes on from there, and ends in the same bits as without the interrupt.

    Args:
        model: Changed in place.
        optimizer: Moves its parameters.
        encoder: Makes batches.
        examples: What to train on.
        epochs: How often each is seen.
        batch_size: Examples in a step.
        seed: Of the shuffling and of dropout; the global generators are left alone.
        report: Told the examples seen, and to be seen.
        checkpoint: Keeps the state.
        described: Makes what goes into the checkpoint besides.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: The loss is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(examples) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses, total, begun, taken = [], 0.0, generator.get_state(), 0
    model.train()

    def state() -> dict[str, Any]:
        moving = named_tensors(model)
        return {
            **described(),
            "seen": len(losses) * len(examples) + taken * batch_size,
            "values": {name: moving[name].detach().cpu() for name in optimizer.selection.names},
            "buffers": {name: buffer.cpu() for name, buffer in model.named_buffers()},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generators": _generators(device),
            "epoch": {"losses": losses, "total": total, "begun": begun, "taken": taken},
        }

    with _drawing(seed, device):
        if (held := checkpoint.state) is not None:
            with checkpoint.reading():
                _restore(model, held)
                optimizer.load_state_dict(held["optimizer"])
                schedule.load_state_dict(held["schedule"])
                _set_generators(held["generators"], device)
                losses, total, begun, taken = (held["epoch"][key] for key in ("losses", "total", "begun", "taken"))
                generator.set_state(begun)
        else:
            checkpoint.keep(state, now=True)  # the selection is not made twice
        while len(losses) < epochs:
            parts = torch.randperm(len(examples), generator=generator).split(batch_size)
            for part in parts[taken:]:
                batch = encoder.collate([examples[n] for n in part.tolist()])
                loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                seen = len(losses) * len(examples) + taken * batch_size
                if not loss.isfinite():
                    raise ValueError(
                        f"the loss is {loss.item()} after {seen:,} examples: lower --lr, or train in float32."
                    )
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item() * len(part)
                taken += 1
                report(seen + len(part), epochs * len(examples))
                if taken < len(parts):
                    checkpoint.keep(state)
            losses, total, begun, taken = [*losses, total / len(examples)], 0.0, generator.get_state(), 0
            checkpoint.keep(state, now=True)
    return losses


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from the generators of the CPU and of the device as from new ones, and give them back as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _generators(device: torch.device) -> list[torch.Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_generators(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for held in states[1:]:
        torch.cuda.set_rng_state(held, device)


@torch.no_grad()
def _restore(model: nn.Module, held: dict[str, Any]) -> None:
    moving, buffers = named_tensors(model), dict(model.named_buffers())
    for name, value in held["values"].items():
        moving[name].copy_(value)
    for name, value in held["buffers"].items():
        buffers[name].copy_(value)


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
        report: Told the examples measured, and how many there are.

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
    found = {"loss": loss / len(examples)}
    return found | {"accuracy": right / labelled} if labelled else found

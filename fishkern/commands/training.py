"""A plain training loop, for ``fishkern tune`` and the demo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fishkern.integrations.examples import Encoder, Example
from fishkern.optim import MaskedOptimizer

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
) -> list[float]:
    """Train in shuffled epochs, with a learning rate that falls to zero in a straight line.

    Args:
        model: Changed in place.
        optimizer: Moves its parameters.
        encoder: Makes batches.
        examples: What to train on.
        epochs: How often each is seen.
        batch_size: Examples in a step.
        seed: Of the shuffling.
        report: Told the examples seen, and to be seen.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: The loss is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(examples) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses, seen = [], 0
    model.train()
    for _ in range(epochs):
        total = 0.0
        for part in torch.randperm(len(examples), generator=generator).split(batch_size):
            batch = encoder.collate([examples[n] for n in part.tolist()])
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            if not loss.isfinite():
                raise ValueError(f"the loss is {loss.item()} after {seen:,} examples: lower --lr, or train in float32.")
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(part)
            seen += len(part)
            report(seen, epochs * len(examples))
        losses.append(total / len(examples))
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, encoder: Encoder, examples: list[Example], batch_size: int) -> dict[str, float]:
    """Measure a model on examples.

    Args:
        model: Left in evaluation mode.
        encoder: Makes batches.
        examples: What to measure on.
        batch_size: Examples in a batch.

    Returns:
        ``"loss"``, the mean of the batches' losses weighted by their examples, and for single labels ``"accuracy"``.
    """
    device = next(model.parameters()).device
    model.eval()
    loss, right, labelled = 0.0, 0, 0
    for start in range(0, len(examples), batch_size):
        batch = encoder.collate(examples[start : start + batch_size])
        batch = {key: value.to(device) for key, value in batch.items()}
        outputs = model(**batch)
        labels = batch["labels"]
        loss += outputs.loss.item() * len(labels)
        if labels.ndim == 1 and not labels.is_floating_point():
            right += int((outputs.logits.argmax(-1) == labels).sum())
            labelled += len(labels)
    found = {"loss": loss / len(examples)}
    return found | {"accuracy": right / labelled} if labelled else found

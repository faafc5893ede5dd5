"""The independent truth: one example at a time, through ordinary autograd, squared afterwards. Shares no code with the
package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, dict], Tensor]


def squares_one_by_one(model: nn.Module, batches: list[dict], loss: Loss) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of every trainable parameter, float64 accumulators."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    count = 0
    for batch in batches:
        for n in range(size(batch)):
            grads = torch.autograd.grad(loss(model, row(batch, n)), list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad.double().square()
            count += 1
    for module, mode in modes.items():
        module.training = mode
    return {name: value / count for name, value in total.items()}


def size(batch: dict) -> int:
    return max(value.shape[0] for value in batch.values())


def row(batch: dict, n: int) -> dict:
    return {key: value[n : n + 1] if value.shape[0] > 1 else value for key, value in batch.items()}


def next_token(model: nn.Module, batch: dict) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    virtual = logits.shape[1] - batch["labels"].shape[1]  # prompt tuning's tokens, which carry no label
    labels = F.pad(batch["labels"], (virtual, 0), value=-100)
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)


def per_token(model: nn.Module, batch: dict) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return F.cross_entropy(logits[0], batch["labels"][0], ignore_index=-100)


def decoder_tokens(model: nn.Module, batch: dict) -> Tensor:
    return F.cross_entropy(model(**batch).logits[0], batch["labels"][0], ignore_index=-100)


def one_class(model: nn.Module, batch: dict) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return F.cross_entropy(logits, batch["labels"].view(-1))


def worst_error(
    actual: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> tuple[float, str]:
    """Largest error of a parameter relative to its own largest entry, and whose it is.

    A gradient that is zero but for rounding (a key's bias) is measured at the square of the rounding of the model's
    largest gradient.
    """
    assert set(actual) == set(truth)
    floor = (256 * torch.finfo(dtype).eps) ** 2 * max(value.abs().max().item() for value in truth.values())
    errors = {
        name: (actual[name].double() - truth[name]).abs().max().item() / max(truth[name].abs().max().item(), floor)
        for name in truth
        if truth[name].numel()
    }
    name = max(errors, key=errors.get)
    return errors[name], name

"""Run a model on a batch, and read its logits or its own loss, in whatever form it returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.batches import Batch
from fishkern.statistics.labels import as_tensor

_LABELS = ("labels", "start_positions", "end_positions")
_OWN_FUNCTION = "pass likelihood= as a function (model, batch) -> losses [N]"


def call(model: nn.Module, batch: Batch, *, without: tuple[str, ...] = (), **more: Any) -> Any:
    """Run the model on a batch.

    Args:
        model: The model.
        batch: A mapping of keyword arguments, or ``(inputs, labels)``, of which the model gets the inputs.
        without: Keys to withhold from the model.
        more: Further arguments, which replace the batch's own.

    Returns:
        The model's output.
    """
    if not isinstance(batch, Mapping):
        return model(batch[0], **more)
    arguments = {key: value for key, value in batch.items() if key not in without}
    return model(**{**hosts.call_options(model), **arguments, **more})


def logits_of(outputs: Any, model: nn.Module, names: tuple[str, ...] = ("logits",)) -> list[Tensor]:
    """Read the logits from a model's output: by name, or by position in a plain tuple, after a loss.

    Args:
        outputs: A tensor, an object or a mapping with these names, or a tuple that begins with them.
        model: The model, for the message.
        names: Names of the logits.

    Returns:
        One tensor for each name.

    Raises:
        ValueError: The output has no logits.
    """
    logits = [_named(outputs, name) for name in names]
    if isinstance(outputs, Tensor):
        logits = [outputs]
    elif isinstance(outputs, tuple | list) and not hasattr(outputs, "_fields"):
        loss = _loss(outputs)
        logits = list(outputs[0 if loss is None else 1 :][: len(names)])
    if len(logits) == len(names) and all(isinstance(one, Tensor) and one.ndim for one in logits):
        # in float32 at least, as transformers computes its losses
        return [one.to(accumulates_in(one.dtype)) for one in logits]
    if _loss(outputs) is not None and hasattr(outputs, names[0]):
        raise ValueError(
            f"{type(model).__name__} returned no logits ({type(outputs).__name__}): a fused loss (Liger) does not "
            f"compute them. Switch the fused loss off for this pass, or {_OWN_FUNCTION}."
        )
    expected = " and ".join(map(repr, names))
    raise ValueError(
        f"{type(model).__name__} returned no logits, but {_described(outputs)}: expected a tensor, an object or "
        f"mapping with {expected}, or a tuple that begins with them. Let it return that, or {_OWN_FUNCTION}."
    )


def own_loss(model: nn.Module, example: Batch, *, numbers: bool) -> Tensor | None:
    """Run the model on a labelled example, and read the loss that it returns.

    Args:
        model: The model.
        example: Keyword arguments, labels among them; or a pair, for a model that takes ``labels``.
        numbers: Whether the labels are target values instead of classes.

    Returns:
        A scalar, or ``None`` if it returns none, or takes no labels.
    """
    arguments = example if isinstance(example, Mapping) else {"labels": example[1]}
    device = next(model.parameters()).device
    labels = {
        key: _as_torch_takes(arguments[key], device, numbers=numbers)
        for key in _LABELS
        if arguments.get(key) is not None
    }
    if not labels or not all(hosts.accepts(model, key) for key in labels):
        return None
    config = getattr(hosts.base_model(model), "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        return _loss(call(model, example, **labels))
    finally:
        if hasattr(config, "problem_type"):  # transformers stores there which task it inferred from the labels
            config.problem_type = problem


def _loss(outputs: Any) -> Tensor | None:
    """Find the loss; in a plain tuple it is first, as in transformers."""
    plain = isinstance(outputs, tuple | list) and not hasattr(outputs, "_fields")
    loss = outputs[0] if plain and outputs else _named(outputs, "loss")
    return loss if isinstance(loss, Tensor) and not loss.ndim else None


def _named(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _described(outputs: Any) -> str:
    names = list(outputs) if isinstance(outputs, Mapping) else list(getattr(outputs, "_fields", ()))
    if names:
        return f"{type(outputs).__name__} with {', '.join(map(repr, names))}"
    if isinstance(outputs, tuple | list):
        return f"a {type(outputs).__name__} of {', '.join(type(one).__name__ for one in outputs) or 'nothing'}"
    return f"{type(outputs).__name__}"


def _as_torch_takes(labels: Any, device: torch.device, *, numbers: bool) -> Any:
    """Convert labels to what torch's losses take: a tensor, int64 for classes, floating for target values."""
    try:
        labels = as_tensor(labels).to(device)
    except TypeError:  # not numbers, such as the mappings that a detector takes
        return labels
    if labels.is_floating_point() or labels.is_complex():
        return labels
    return labels.float() if numbers else labels.long()

"""The masked optimizer that a freezer acts on, and its parameters by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fishkern import hosts
from fishkern.names import listed
from fishkern.optim import MaskedOptimizer


def masked(optimizer: Any) -> MaskedOptimizer:
    """Take the masked optimizer out of accelerate's wrapper.

    Args:
        optimizer: What the caller has.

    Returns:
        The masked optimizer.

    Raises:
        TypeError: It is another one.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, MaskedOptimizer):
        raise TypeError(
            f"freezing needs a masked optimizer, and this is {type(optimizer).__name__}, which would go on moving "
            "frozen entries by momentum and weight decay: use fishkern.MaskedAdamW(model, selection, ...)."
        )
    return optimizer


def named(optimizer: MaskedOptimizer) -> dict[str, Tensor]:
    """Give the parameters of an optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        Of all groups, by name.
    """
    groups = optimizer.param_groups
    return {name: one for group in groups for name, one in zip(group["param_names"], group["params"], strict=True)}


def demand_trains(optimizer: MaskedOptimizer, model: nn.Module) -> None:
    """Refuse an optimizer of another model, whose own would stand still in every reading.

    Args:
        optimizer: The optimizer.
        model: The model that is read.

    Raises:
        ValueError: Something in training is not a parameter of the model.
    """
    counts, own = optimizer.selection.counts, set(hosts.unwrap(model).parameters())
    if strange := [name for name, one in named(optimizer).items() if counts.get(name) and one not in own]:
        raise ValueError(
            f"the optimizer trains {len(strange)} parameters that are not the model's ({listed(strange)}), such as "
            "those of a copy: give the model that the optimizer was made with."
        )

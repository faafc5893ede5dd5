"""What a masked optimizer trains: its parameters by name, and the size of its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fishkern.optim import MaskedOptimizer
from fishkern.optim.selected import ENTRIES


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


def state_bytes(optimizer: MaskedOptimizer, counts: Mapping[str, int]) -> int:
    """Compute the size of what an optimizer keeps for each entry: moments, masters, starts.

    Args:
        optimizer: The optimizer.
        counts: How many entries of each parameter of its pool are to stay, at most as many as it has.

    Returns:
        Bytes; 0 before the first step, which makes the state.
    """
    present = optimizer.selection.counts
    nbytes = 0
    for name, parameter in named(optimizer).items():
        size = present.get(name, parameter.numel())
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in ENTRIES and isinstance(value, Tensor) and value.ndim == 1 and len(value) == size:
                nbytes += counts.get(name, size) * value.element_size()
    return nbytes

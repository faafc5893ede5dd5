"""From a saved state to the state of an optimizer: by name, for the same entries, and nothing cast."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def loaded(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], places: Mapping[str, Tensor | None]
) -> tuple[defaultdict[Tensor, Any], list[dict[str, Any]]]:
    """Fit a saved state to an optimizer's parameters.

    torch's own way tells parameters by their order and casts every tensor to the parameter's dtype, which would round
    indices and masters to 16 bits.

    Args:
        state_dict: What ``state_dict()`` of a masked optimizer gave.
        groups: The groups of the optimizer that loads it.
        places: Of each name the indices that it moves at, ``[K]`` on its device, or ``None`` for all.

    Returns:
        State by parameter, copied to its device, and groups with the saved options; one that is newer than the state
        keeps the optimizer's own.

    Raises:
        ValueError: It has other groups, names or entries.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state has {len(saved_groups)} groups, the optimizer {len(groups)}.")
    keys: dict[str, Any] = {}
    for group in saved_groups:
        if "param_names" not in group:
            raise ValueError("the state holds no names of parameters: it is not that of a masked optimizer.")
        keys |= zip(group["param_names"], group["params"], strict=True)
    own = {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}
    if differing := keys.keys() ^ own.keys():
        raise ValueError(
            f"the state is of other parameters; {len(differing)} are in one and not the other, such as "
            f"{min(differing)}: make the optimizer as it was when the state was saved."
        )
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for name, parameter in own.items():
        if saved := state_dict["state"].get(keys[name]):
            _check_entries(name, parameter, saved, places[name])
            state[parameter] = {
                key: value.detach().to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }
    options = [{key: value for key, value in group.items() if key != "params"} for group in saved_groups]
    return state, [
        {**group, **copy.deepcopy(saved), "params": group["params"], "param_names": group["param_names"]}
        for group, saved in zip(groups, options, strict=True)
    ]


def _check_entries(name: str, parameter: Tensor, saved: Mapping[str, Any], places: Tensor | None) -> None:
    theirs = saved.get("indices")
    same = (places is None) == (theirs is None) and (places is None or torch.equal(places, theirs.to(places)))
    count = parameter.numel() if places is None else len(places)
    sizes = [tuple(value.shape) for key, value in saved.items() if isinstance(value, Tensor) and key != "step"]
    if not same or any(size != (count,) for size in sizes):
        raise ValueError(
            f"the state of {name} belongs to other entries than are selected here: make the optimizer with the "
            "selection that was in use when the state was saved."
        )

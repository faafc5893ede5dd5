"""Between saved state and that of an optimizer: by name, for the same entries, whole on any number of ranks."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fishkern.hosts import Share
from fishkern.names import listed
from fishkern.optim.frozen import FROZEN, frozen_in
from fishkern.optim.selected import ENTRIES, Selected
from fishkern.selection import Entries, Rows, Selection
from fishkern.selection.local import Joined, in_shard, own_values


def loaded(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], selected: Mapping[str, Selected]
) -> tuple[defaultdict[Tensor, Any], list[dict[str, Any]]]:
    """Fit a saved state to an optimizer's parameters.

    torch's own way tells parameters by their order and casts every tensor to the parameter's dtype, which would round
    indices and masters to 16 bits.

    Args:
        state_dict: What ``state_dict()`` of a masked optimizer gave, or with names in the place of its numbers, as
            ``torch.distributed.checkpoint`` has it.
        groups: The groups of the optimizer that loads it.
        selected: Of each name the entries that move, of a sharded parameter those of the local shard.

    Returns:
        State by parameter, copied to its device, and groups with the saved options; one that is newer than the state
        keeps the optimizer's own.

    Raises:
        ValueError: Its groups, names or entries differ.
    """
    _check_form(state_dict)
    saved_groups = [_with_names(group) for group in state_dict["param_groups"]]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state has {len(saved_groups)} groups, the optimizer {len(groups)}.")
    keys: dict[str, Any] = {}
    for group in saved_groups:
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
            if (share := selected[name].share) is not None:
                saved = _in_shard(name, saved, share)
            _check_entries(name, saved, selected[name].entries)
            values = {
                key: value.detach().to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
                if key not in ENTRIES
            }
            state[parameter] = {**values, **selected[name].key()}  # the same entries, maybe saved as the other of both
    return state, [_options(number, group, saved_groups[number]) for number, group in enumerate(groups)]


def _with_names(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a group without parameters its empty list of names, which torch loses when it flattens a whole state."""
    empty = isinstance(group["params"], list | tuple) and not group["params"]
    return {"param_names": [], **group} if empty else group


def _check_form(state_dict: object) -> None:
    """Demand what ``state_dict()`` gives, before anything of it is looked up."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, list | tuple) or not isinstance(state, Mapping):
        raise ValueError("this is no state of an optimizer: it has a 'state' by key and a list of 'param_groups'.")
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError("this is no state of an optimizer: each of its groups lists its 'params'.")
        group = _with_names(group)
        if "param_names" not in group:
            raise ValueError("the state holds no names of parameters: it is not that of a masked optimizer.")
        numbers, names = group["params"], group["param_names"]
        lists = isinstance(numbers, list | tuple) and isinstance(names, list | tuple) and len(numbers) == len(names)
        keyed = lists and all(type(n) in (int, str) for n in numbers)
        if not keyed or not all(isinstance(name, str) for name in names):
            raise ValueError("the state is damaged: each of its groups has a key and a name for each parameter.")


def _options(number: int, own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Take a group's saved options; one that the save does not know stays as it is, as torch has it."""
    if set(saved["param_names"]) != set(own["param_names"]):
        raise ValueError(
            f"group {number} of the state holds other parameters than group {number} of the optimizer: make the "
            "optimizer with the same groups."
        )
    for key in own.keys() & saved.keys() - {"params", "param_names", FROZEN}:
        if not _of_a_kind(own[key], saved[key]):
            raise ValueError(f"the state is damaged: {key} of group {number} is {saved[key]!r:.60}.")
    options = {key: copy.deepcopy(value) for key, value in saved.items() if key != FROZEN}
    return {**own, **options, "params": own["params"], "param_names": own["param_names"]}


def loaded_frozen(state_dict: Mapping[str, Any], selection: Selection) -> frozenset[str]:
    """Read which parameters the optimizer had frozen when its state was saved.

    Args:
        state_dict: As :func:`loaded` takes it, and has checked it.
        selection: What moves.

    Returns:
        Their names; none for a state from before there was such a thing.

    Raises:
        ValueError: Something of them is selected here, or they are no parameters of the optimizer.
    """
    groups = state_dict["param_groups"]
    for group in groups:
        names = group.get(FROZEN, [])
        if not isinstance(names, list | tuple) or not all(name in group.get("param_names", []) for name in names):
            raise ValueError("the state is damaged: 'frozen' of a group lists names of its parameters.")
    frozen = frozen_in(groups)
    if moving := [name for name in frozen if selection.counts.get(name, 1)]:
        raise ValueError(
            f"the state is of a training in which {listed(moving)} had stopped, and something of it is selected here: "
            "make the optimizer with the selection that was in use when the state was saved."
        )
    return frozenset(frozen)


def _of_a_kind(own: object, saved: object) -> bool:
    """Tell whether a saved option is of the same kind as the optimizer's: a number, a flag, as many betas."""
    if isinstance(own, list | tuple):
        fits = isinstance(saved, list | tuple) and len(own) == len(saved)
        return fits and all(_of_a_kind(0.0, beta) and 0 <= beta < 1 for beta in saved)
    if own is None and saved is None:
        return True
    if isinstance(own, bool):
        return isinstance(saved, bool)
    if isinstance(saved, Tensor):
        return saved.ndim == 0 and not saved.is_complex() and bool(saved.isfinite())
    number = isinstance(saved, int | float) and not isinstance(saved, bool)
    return number and (math.isfinite(saved) if isinstance(saved, float) else abs(saved) < 2**63)


def whole_state(
    state: Mapping[Tensor, dict[str, Any]],
    named: Mapping[str, Tensor],
    selected: Mapping[str, Selected],
    selection: Selection,
) -> Mapping[Tensor, dict[str, Any]]:
    """Join the state that ranks keep for the selected entries of their shards. A collective operation.

    Args:
        state: ``optimizer.state``, of which every rank has the same parameters and keys.
        named: The parameters by name.
        selected: Of each the selected entries, of a sharded one those of the local shard.
        selection: What is selected.

    Returns:
        The state by parameter as one process would keep it; of parameters that are not sharded the given one.
    """
    whole = dict(state)
    for name, parameter in named.items():
        own, share = state.get(parameter), selected[name].share
        if own and share is not None:
            join = Joined(selected[name].entries, share)
            entries = selection.entries(name) if name in selection else join.entries
            entries = entries if entries.count == join.entries.count else join.entries
            values = {
                key: join(value) if isinstance(value, Tensor) and value.ndim else value
                for key, value in own.items()
                if key not in ENTRIES
            }
            whole[parameter] = values | Selected(entries, entries.indices().to(own["step"].device)).key()
    return whole


def _in_shard(name: str, saved: Mapping[str, Any], share: Share) -> dict[str, Any]:
    """Take from a saved state of a whole parameter that of the entries in the local shard."""
    entries = _saved_entries(share.shape, saved) if isinstance(saved, Mapping) else None
    if entries is None:
        raise ValueError(_of_others(name))
    _check_entries(name, saved, entries)
    values = {
        key: own_values(value, entries, share) if value.ndim else value
        for key, value in ((key, torch.as_tensor(value)) for key, value in saved.items() if key not in ENTRIES)
    }
    return {**values, "indices": in_shard(entries, share).indices()}


def _check_entries(name: str, saved: object, entries: Entries) -> None:
    if not isinstance(saved, Mapping) or not all(isinstance(value, Tensor | int | float) for value in saved.values()):
        raise ValueError(f"the state of {name} is damaged: it is a tensor for each of its keys.")
    step = torch.as_tensor(saved.get("step", 0))
    if step.ndim or step.is_complex() or not 0 <= float(step) < 2**53:
        raise ValueError(f"the state of {name} is damaged: step is the number of its updates.")
    values = {key: value for key, value in saved.items() if key not in ("step", *ENTRIES)}
    sized = all(isinstance(value, Tensor) and tuple(value.shape) == (entries.count,) for value in values.values())
    if _saved_entries(entries.shape, saved) != entries or not sized:
        raise ValueError(_of_others(name))
    if odd := [key for key, value in values.items() if value.is_complex() or value.dtype == torch.bool]:
        raise ValueError(f"the state of {name} is damaged: {odd[0]} is {values[odd[0]].dtype}.")


def _saved_entries(shape: torch.Size, saved: Mapping[str, Any]) -> Entries | None:
    """Read which entries a saved state is of, listed or in ranges of rows; ``None`` if it does not say."""
    if "rows" not in saved and "indices" not in saved:
        return Entries.all(shape)
    said = saved["indices" if "indices" in saved else "rows"]
    if not isinstance(said, Tensor) or said.dtype not in (torch.int32, torch.int64):
        return None
    if "indices" in saved and not bool((said[1:] > said[:-1]).all()):
        return None
    try:
        return Entries.of(shape, said if "indices" in saved else Rows(*said.tolist()))
    except (TypeError, ValueError):
        return None


def _of_others(name: str) -> str:
    return (
        f"the state of {name} belongs to other entries than are selected here: make the optimizer with the selection "
        "that was in use when the state was saved."
    )

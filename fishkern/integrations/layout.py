"""Where the parameters of a model of transformers are in its checkpoint: other names, other shapes, or nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError, is_stored
from fishkern.names import listed
from fishkern.selection import CheckpointLayout


def checkpoint_layout(model: nn.Module) -> CheckpointLayout:
    """Find the parameters of a model in the checkpoint that ``save_pretrained`` writes of it.

    Wrappers and PEFT's prefixes are taken out of the names, a tied weight has the name under which it is stored, and
    what transformers renames or merges on loading, such as experts, has its names and places in the checkpoint, as
    engines of inference expect them. Weights are not copied.

    Args:
        model: A model of transformers, wrapped or in PEFT's wrapper.

    Returns:
        The layout, for ``Delta.patches`` and ``Delta.stream``. Parameters of an adapter are in no checkpoint.

    Raises:
        UnsupportedModuleError: It is no model of transformers, or its weights are quantised.
    """
    unwrapped = hosts.unwrap(model)
    plain = hosts.base_model(unwrapped)
    if not hasattr(plain, "save_pretrained"):
        raise UnsupportedModuleError(
            f"{type(plain).__name__} is no model of transformers, whose checkpoints are known."
        )
    names = hosts.named_parameters(unwrapped, remove_duplicate=False)
    if packed := [name for name, one in names.items() if is_stored(one)]:
        raise UnsupportedModuleError(f"{listed(packed)} is quantised: its checkpoint has no values to patch.")
    plain_names, absent = _without_peft(unwrapped, plain, names)
    kept = _kept_of_tied(plain, plain_names, names)
    meta = {name: torch.empty(names[ours].shape, device="meta") for ours, name in kept.items()}
    renamed, groups = _renamed_and_grouped(plain, meta)
    stored = {ours: renamed[name] for ours, name in kept.items() if name in renamed}
    of_plain = {name: ours for ours, name in kept.items()}

    def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return _converted(plain, {kept[ours]: tensor for ours, tensor in tensors.items()})

    first = {id(names[ours]): ours for ours in kept}  # a tied weight has several names, and is stored once
    aliases = {ours: first[id(one)] for ours, one in names.items() if ours in plain_names and id(one) in first}
    stored |= {ours: stored[kept_name] for ours, kept_name in aliases.items() if kept_name in stored}
    absent |= {
        ours: f"{kept_name} is the name under which it is stored, in another form: select under that name"
        for ours, kept_name in aliases.items()
        if kept_name not in stored and ours != kept_name
    }
    grouped = tuple(tuple(of_plain[name] for name in group) for group in groups)
    shapes = {ours: names[ours].shape for group in grouped for ours in group}
    return CheckpointLayout(stored, grouped, convert, shapes, absent)


def _without_peft(model: nn.Module, plain: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Give the names that parameters have in the model without PEFT, and why the others have none."""
    if model is plain:
        return {name: name for name in names}, {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    root = next(path for path, module in model.named_modules() if module is plain)
    inside = {}  # of each wrapper of PEFT, where the module is that the checkpoint knows; inner wrappers first
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, BaseTunerLayer):
            inside[f"{path}."] = ["base_layer."]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside[f"{path}."] = [f"modules_to_save.{adapter}." for adapter in module.active_adapters]
    plain_names, absent = {}, {}
    for name in names:
        plain_name = name
        for path, places in inside.items():
            if not plain_name.startswith(path):
                continue
            if (place := next((one for one in places if plain_name.startswith(path + one)), None)) is None:
                plain_name = ""
                break
            plain_name = path + plain_name.removeprefix(path + place)
        if plain_name.startswith(f"{root}."):
            plain_names[name] = plain_name.removeprefix(f"{root}.")
        else:
            absent[name] = "it is of an adapter: serve the adapter, or merge it and export the model"
    return plain_names, absent


def _kept_of_tied(plain: nn.Module, plain_names: Mapping[str, str], named: Mapping[str, Tensor]) -> dict[str, str]:
    """Drop the names under which a tied weight is not stored; by our names, in the model's order."""
    tensors = {plain_name: named[ours].detach() for ours, plain_name in plain_names.items()}
    counts: dict[int, int] = {}
    for ours in plain_names:
        counts[id(named[ours])] = counts.get(id(named[ours]), 0) + 1
    tied = {name: tensors[name] for ours, name in plain_names.items() if counts[id(named[ours])] > 1}
    stored = {*tensors} - {*tied} | {*remove_tied_weights_from_state_dict(dict(tied), plain)}
    return {ours: name for ours, name in plain_names.items() if name in stored}


def _converted(plain: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        converted = revert_weight_conversion(plain, dict(tensors))
    except Exception as error:
        raise UnsupportedModuleError(
            f"transformers does not say how {type(plain).__name__} stores {listed(tensors)}: {error}"
        ) from error
    return {name: one[0] if isinstance(one, list) else one for name, one in converted.items()}


def _renamed_and_grouped(plain: nn.Module, meta: dict[str, Tensor]) -> tuple[dict[str, str], list[tuple[str, ...]]]:
    """Tell what is stored as it is, by its name there, from parameters that share tensors of the checkpoint."""
    stored = {id(tensor): name for name, tensor in _converted(plain, meta).items()}  # the tensors that went in
    renamed = {name: stored[id(tensor)] for name, tensor in meta.items() if id(tensor) in stored}
    groups: list[tuple[list[str], set[str]]] = []
    for name in (name for name in meta if name not in renamed):
        group, tensors = [name], set(_converted(plain, {name: meta[name]}))
        for other in [other for other in groups if other[1] & tensors]:
            groups.remove(other)
            group, tensors = other[0] + group, other[1] | tensors
        groups.append((group, tensors))
    return renamed, [tuple(group) for group, _ in groups]

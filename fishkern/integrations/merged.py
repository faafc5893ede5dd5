"""From an adapter or a delta to a whole model, and from two models to a delta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError, is_stored
from fishkern.names import listed
from fishkern.selection import Delta, Selection, delta

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge_adapter(model: nn.Module) -> nn.Module:
    """Put the adapter of a PEFT model into its weights.

    Args:
        model: A PEFT model; its weights are changed, and it is not to be used afterwards.

    Returns:
        The model without PEFT, with the trained head where the adapter brought one.

    Raises:
        UnsupportedModuleError: It is no PEFT model, the adapter has no form that a weight could take (a prompt, a
            prefix), or the weights are quantised.
        ValueError: Merging gives values that are not finite.
    """
    if not hasattr(model, "peft_config"):
        raise UnsupportedModuleError(f"{type(model).__name__} has no adapter of PEFT to merge.")
    kinds = sorted({str(getattr(one.peft_type, "value", one.peft_type)) for one in model.peft_config.values()})
    if not hasattr(model.base_model, "merge_and_unload"):
        raise UnsupportedModuleError(
            f"an adapter of type {', '.join(kinds)} is no change of weights and cannot be merged: serve it as it is."
        )
    if packed := [name for name, one in hosts.named_parameters(model).items() if is_stored(one)]:
        raise UnsupportedModuleError(
            f"the base is quantised ({listed(packed)}), and merging would round the adapter to its levels: load the "
            "base in 16 bits or more."
        )
    return model.merge_and_unload(safe_merge=True)


@torch.no_grad()
def changes(model: nn.Module, base: nn.Module) -> Delta:
    """Collect the entries in which a model differs from the one that it was trained from.

    Args:
        model: The trained model.
        base: The model before.

    Returns:
        The delta, whose pool are all parameters; ``fishkern.apply_delta(base, delta)`` gives the trained model to the
        bit.

    Raises:
        ValueError: The models differ in the names, shapes, dtypes or ties of their tensors, in a buffer or extra state,
            or in a parameter of integers.
    """
    ours, theirs = (hosts.unwrap(one).state_dict() for one in (model, base))
    if odd := ours.keys() ^ theirs.keys():
        raise ValueError(
            f"the models differ in {listed(sorted(odd))}, which one of them lacks: a delta is of one model."
        )
    for name, tensor in ours.items():
        other = theirs[name]
        if not isinstance(tensor, Tensor) or not isinstance(other, Tensor):  # extra state of a module
            continue
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            shown = [f"{tuple(one.shape)} of {one.dtype}" for one in (tensor, other)]
            raise ValueError(f"{name} is {shown[0]} in the model and {shown[1]} before: a delta is of one model.")
    tied, tied_before = _first_names(model), _first_names(base)
    if odd := [name for name, first in tied.items() if tied_before.get(name) != first]:
        raise ValueError(f"{listed(odd)} is tied in one of the models and not in the other: a delta is of one model.")
    named, before = hosts.named_parameters(model), hosts.named_parameters(base)
    parameters = set(hosts.named_parameters(model, remove_duplicate=False))
    if moved := [name for name in ours if name not in parameters and not _are_equal(ours[name], theirs[name])]:
        raise ValueError(
            f"{listed(moved)} is a buffer or an extra state and differs, which a delta cannot hold: export the whole "
            "model."
        )
    indices: dict[str, Tensor] = {}
    for name, parameter in named.items():
        differing = (_bits(parameter) != _bits(before[name])).flatten().nonzero().view(-1)
        if len(differing):
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is of {parameter.dtype} and differs, and a delta has floating values: export the whole "
                    "model."
                )
            indices[name] = differing
    shapes = {name: parameter.shape for name, parameter in named.items()}
    return delta(model, Selection(shapes, indices, provenance={"rule": {"name": "what differs from the base"}}))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Give the first name of each parameter by each of its names."""
    firsts: dict[nn.Parameter, str] = {}
    named = hosts.named_parameters(model, remove_duplicate=False)
    return {name: firsts.setdefault(parameter, name) for name, parameter in named.items()}


def _are_equal(one: Any, other: Any) -> bool:
    """Compare two entries of a state: tensors by their bits, others as they compare themselves."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(_bits(one), _bits(other))
    return type(one) is type(other) and bool(one == other)


def _bits(tensor: Tensor) -> Tensor:
    """View values as integers, so that equal bits are what is equal: zeros of both signs differ, equal NaN do not."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])

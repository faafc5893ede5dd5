"""Why a model or a batch is not supported: each function returns the reason, or ``None``.

The caller puts the reason into its error, because only the caller knows what was asked for. Classes are compared by
name, so that none of the libraries they belong to is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Container

import torch
from torch import nn

from fishkern.hosts.fully_sharded import FullySharded
from fishkern.hosts.modes import checkpoints_itself
from fishkern.hosts.tensor_parallel import is_distributed, mesh_of, why_not_split
from fishkern.hosts.wrappers import base_model, unwrap
from fishkern.names import without_wrappers


def added_loss(model: nn.Module) -> str | None:
    """Say what a model adds to the loss of its labels.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        The reason, or ``None`` if nothing is known to be added.
    """
    model = unwrap(model)
    for config in getattr(model, "peft_config", {}).values():
        if str(getattr(config, "peft_type", "")).endswith("ADALORA"):
            return "AdaLoRA adds its orthogonality term"
    if getattr(getattr(base_model(model), "config", None), "output_router_logits", False):
        return "the model adds the auxiliary loss of its routers (output_router_logits)"
    return None


def dispatched(model: nn.Module) -> str | None:
    """Say where accelerate has put parts of a model, if not on the device of its parameters.

    Args:
        model: A module.

    Returns:
        The reason, or ``None`` if the whole model is where its parameters are.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False) or type(one).__name__ == "CpuOffload":
                return f"accelerate offloads the weights of {name or 'the model'!r}, which are elsewhere until it runs"
    devices = getattr(model, "hf_device_map", None)
    if devices and len(set(map(str, devices.values()))) > 1:
        return f"its hf_device_map spreads it over {sorted(set(map(str, devices.values())))}"
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "some of its parameters are on the meta device"
    return None


def sharded(
    model: nn.Module, *, fsdp2: bool = False, tensor_parallel: bool = False, trained: bool = False
) -> str | None:
    """Say how a model's parameters are split over processes.

    Args:
        model: A module.
        fsdp2: Whether the caller serves what FSDP2 shards, so that this is no reason.
        tensor_parallel: Whether the caller serves what tensor parallel splits, likewise.
        trained: Whether the caller uses parameters and their gradients alone, and not what the model returns.

    Returns:
        The reason and what to do, or ``None`` if every process has all of them.
    """
    whole = "Load the whole model in each process, wrapped in DistributedDataParallel or not at all"
    fully = ", or shard it by FSDP2 (fully_shard of torch; fsdp_version: 2 of accelerate)" if fsdp2 else ""
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds or ("FSDPModule" in kinds and not fsdp2):
            of = repr(name) if name else "'the model'"
            return f"FSDP shards the parameters of {of}. {whole}, and shard it after the estimate{fully}"
    if _in_parts_of_examples(model):
        return (
            f"each process has some positions of every example (context parallel). {whole}, and estimate outside of it"
        )
    owned = set(FullySharded(model).parameters()) if fsdp2 else set()
    if (tensor_parallel or owned) and (reason := why_not_split(model, owned, trained=trained)):
        return reason
    split = tensor_parallel and mesh_of(model) is not None
    if (size := getattr(base_model(unwrap(model)), "_tp_size", None) or 1) > 1 and not split:
        return f"transformers has split it over {size} processes. {whole}, without tp_plan={fully}"
    if split:
        owned |= {one for one in model.parameters() if is_distributed(one)}
    for name, parameter in model.named_parameters():
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__) and parameter not in owned:
            return f"{name} is a DTensor, split over processes. {whole}, and split it after the estimate{fully}"
        if hasattr(parameter, "ds_id"):
            return f"DeepSpeed's ZeRO-3 has partitioned {name}. {whole}, or use ZeRO stage 2{fully}"
    return None


def _in_parts_of_examples(model: nn.Module) -> bool:
    """Tell whether torch runs attention over positions of several processes, by a function or hooks of its own."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    functions = (nn.functional.scaled_dot_product_attention, *hooks)
    return any("_context_parallel" in str(getattr(one, "__module__", "")) for one in functions)


def merged_adapter(model: nn.Module, names: Container[str]) -> str | None:
    """Say which adapter PEFT has merged into the weights, so that its parameters get no gradients.

    Args:
        model: A module.
        names: Canonical names of the parameters that need one.

    Returns:
        The reason and what to do, or ``None`` if none of them is merged.
    """
    for path, module in unwrap(model).named_modules():
        if not isinstance(merged := getattr(module, "merged_adapters", None), list) or not merged:
            continue
        for name, _ in module.named_parameters():
            if not name.startswith("base_layer.") and without_wrappers(f"{path}.{name}") in names:
                return (
                    f"the adapter {merged[0]!r} is merged into the weights and {path}.{name} gets no gradient: "
                    "call unmerge_adapter() first"
                )
    return None


def scripted(model: nn.Module) -> str | None:
    """Name a module made by ``torch.jit.script``, which supports no hooks. Traced modules do.

    Args:
        model: A module.

    Returns:
        The reason and what to do, or ``None`` if there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.RecursiveScriptModule):
            return (
                f"{repr(name) if name else 'the model'} ({module.original_name}) was made by torch.jit.script, and "
                "supports no hooks. Estimate with the module that it was made from: its parameters have the same names"
            )
    return None


def lost_prefix(model: nn.Module, *, training: bool = False) -> str | None:
    """Say why a model would ignore the prefix that PEFT passes as a cache; most models do so silently.

    Args:
        model: A module.
        training: Whether the model will run in training mode; otherwise its present mode counts.

    Returns:
        The reason and what to do, or ``None`` if there is no such prefix, or the model reads it.
    """
    model = unwrap(model)
    configs = getattr(model, "peft_config", {})
    if not any(str(getattr(config, "peft_type", "")).endswith("PREFIX_TUNING") for config in configs.values()):
        return None
    base = base_model(model)
    forwards = [base.forward, getattr(base, "base_model", base).forward]  # PEFT calls either
    if not any("past_key_values" in inspect.signature(forward).parameters for forward in forwards):
        return (
            f"{type(base).__name__} takes no past_key_values, in which PEFT passes the prefix, and would ignore it: "
            "use another adapter, such as LoRA"
        )
    if any((training or module.training) and checkpoints_itself(module) for module in model.modules()):
        in_evaluation = "" if training else " or the model to eval()"
        return (
            f"under activation checkpointing {type(model).__name__} loses its prefix: switch checkpointing off "
            f"(gradient_checkpointing_disable()){in_evaluation}, or use fishkern.adapters.PrefixAdapter"
        )
    return None

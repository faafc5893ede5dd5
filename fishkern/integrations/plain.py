"""An adapter of PEFT as a plain LoRA for its base as it is, whatever start it was trained from."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fishkern.layers import UnsupportedModuleError
from fishkern.names import listed


def write_plain_lora(model: nn.Module, base: nn.Module, folder: str | os.PathLike[str]) -> int:
    """Write the LoRA of a PEFT model so that any loader gets the same from it on the base as it is.

    A start such as PiSSA's takes a part out of the base, which a loader must do again, by the same decomposition. Here
    the start becomes a second half of the LoRA, of twice the rank: ``[A; A0]`` and ``[B, -B0]``. Where the base was
    left alone, the adapter is written as it is.

    Args:
        model: The PEFT model, with its trained values.
        base: The base model, loaded anew; it is changed, and not to be used afterwards.
        folder: An empty folder.

    Returns:
        The rank of what was written.

    Raises:
        UnsupportedModuleError: The adapter is no LoRA that adds a product of two factors and nothing else, or its start
            is another one each time.
        ValueError: PEFT cannot convert it, such as rank-stabilised LoRA with several ranks.
    """
    import peft

    (adapter,) = model.active_adapters
    config = model.peft_config[adapter]
    if not isinstance(config, peft.LoraConfig) or config.use_dora or config.lora_bias:
        what = (
            "DoRA" if getattr(config, "use_dora", False) else str(getattr(config.peft_type, "value", config.peft_type))
        )
        raise UnsupportedModuleError(f"an adapter of type {what} is no plain LoRA: export the merged model instead.")
    if config.layer_replication:
        raise UnsupportedModuleError(
            "layer_replication= repeats layers of the base, which a plain LoRA cannot: export the merged model instead."
        )
    if not _differing(model, base):
        model.save_pretrained(folder)
        return config.r
    trained = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    if others := [name for name in trained if ".lora_embedding_" in name]:
        raise UnsupportedModuleError(
            f"the start {config.init_lora_weights!r} of an embedding's LoRA ({listed(others)}) cannot be made part of "
            "a plain one: export the merged model instead."
        )
    if config.bias != "none":
        raise UnsupportedModuleError(
            f"an adapter with bias={config.bias!r} and the start {config.init_lora_weights!r} is no plain LoRA: export "
            "the merged model instead."
        )
    fresh = peft.get_peft_model(base, copy.deepcopy(config), adapter)
    if odd := _differing(model, fresh):
        raise UnsupportedModuleError(
            f"the start {config.init_lora_weights!r} of the adapter is another one each time (at {listed(odd)}), so "
            "that the base it was trained on is not known: export the merged model instead."
        )
    with tempfile.TemporaryDirectory() as start:
        fresh.save_pretrained(start)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
    _add_whole(trained, Path(folder) / "adapter_model.safetensors")
    return peft.LoraConfig.from_pretrained(folder).r


def _add_whole(trained: Mapping[str, Tensor], file: Path) -> None:
    """Add what an adapter trains besides factors to its file: heads, modules_to_save and trainable tokens.

    PEFT leaves them out where it converts a start.
    """
    written = load_file(file)
    whole = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in trained.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    if whole.keys() - written.keys():
        save_file(written | whole, file, metadata={"format": "pt"})


def _differing(model: nn.Module, other: nn.Module) -> list[str]:
    """List modules with a LoRA whose own weights another model has differently."""
    from peft.tuners.lora import LoraLayer

    adapted = {path: one for path, one in model.base_model.model.named_modules() if isinstance(one, LoraLayer)}
    others = dict((other.base_model.model if hasattr(other, "peft_config") else other).named_modules())
    differing = []
    for path, module in adapted.items():
        # a module with two adapted parameters is wrapped twice
        theirs = others[path if path in others else path.replace(".base_layer", "")]
        theirs = theirs.get_base_layer() if isinstance(theirs, LoraLayer) else theirs
        pairs = zip(_own(module.get_base_layer()), _own(theirs), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            differing.append(path)
    return differing


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))

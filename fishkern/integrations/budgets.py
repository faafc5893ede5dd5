"""The number of parameters that an adapter's configuration would train."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from fishkern import adapters, hosts


def trained_by(adapter: Any, model: nn.Module, heads: tuple[str, ...] = hosts.HEADS) -> int:
    """Count the adapter entries that a configuration would train on a model, without the head.

    The model is built again from its config on the meta device, which needs no memory and reads no weights.

    Args:
        adapter: A configuration of PEFT (``LoraConfig(...)``), or an :class:`fishkern.adapters.Adapter`.
        model: A transformers model, with or without adapters.
        heads: Names of the modules of the head.

    Returns:
        The number of entries.

    Raises:
        TypeError: ``adapter`` is neither, or the model has no config to be built from.
    """
    base = hosts.base_model(hosts.unwrap(model))
    if getattr(base, "config", None) is None:
        raise TypeError(f"match= builds the model from its config, and {type(base).__name__} has none: give k=.")
    with torch.device("meta"):
        bare = type(base)(base.config)
    if isinstance(adapter, adapters.Adapter):
        adapters.attach(bare, adapter, train=())
        return sum(parameter.numel() for parameter in bare.parameters() if parameter.requires_grad)
    if not hasattr(adapter, "peft_type"):
        raise TypeError(f"match takes a PEFT config or a fishkern adapter, got {type(adapter).__name__}.")
    import peft

    if hasattr(adapter, "init_lora_weights"):  # PiSSA and others read the weights, and there are none here
        adapter = dataclasses.replace(adapter, init_lora_weights=True)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of PEFT, about saving
        wrapped = peft.get_peft_model(bare, adapter)
    trainable = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    return sum(parameter.numel() for name, parameter in trainable.items() if not hosts.is_head(name, heads))

"""Adapters by name, as the command line asks for them, put into a model and saved from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fishkern import adapters
from fishkern.adapters import Adapter, BottleneckAdapter, PrefixAdapter, UniPELTAdapter

ADAPTERS = ("lora", "dora", "ia3", "bottleneck", "prefix", "unipelt")
"""What can be asked for: the first three are PEFT's."""

_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}


def check(kind: str, size: int | None) -> None:
    """Refuse an adapter that there is not, before a model is loaded for it.

    Args:
        kind: One of :data:`ADAPTERS`.
        size: As :func:`adapt` takes it.

    Raises:
        ValueError: ``kind`` is unknown, or has no size.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"--adapter is one of {', '.join(ADAPTERS)}, got {kind!r}.")
    if size is not None and kind in ("ia3", "unipelt"):
        raise ValueError(f"{kind} has no size: leave --size out.")


def adapt(
    model: nn.Module,
    kind: str,
    *,
    task: str,
    layers: Sequence[int] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Adapter | None]:
    """Put a fresh adapter into a model.

    LoRA and DoRA start from PiSSA with twice the rank as alpha, as FISH-Tuning asks: with LoRA's usual start half of
    the adapter has no Fisher information.

    Args:
        model: A transformers model, changed in place.
        kind: One of :data:`ADAPTERS`.
        task: What the model is trained for.
        layers: Numbers of the layers to adapt; ``None`` for all.
        size: Rank of LoRA and DoRA, width of a bottleneck, length of a prefix; ``None`` for 8, 48 and 30.
        seed: Seed of the adapter's first values.

    Returns:
        The model to train, and the recipe where the adapter is not PEFT's.

    Raises:
        ValueError: ``kind`` is unknown, has no size, or knows not where to go in such a model.
    """
    check(kind, size)
    if kind in ("bottleneck", "prefix", "unipelt"):
        chosen = None if layers is None else tuple(layers)
        recipe: Adapter = {
            "bottleneck": lambda: BottleneckAdapter(layers=chosen, width=size or 48),
            "prefix": lambda: PrefixAdapter(layers=chosen, length=size or 30),
            "unipelt": lambda: UniPELTAdapter(layers=chosen),
        }[kind]()
        adapters.attach(model, recipe, seed=seed)
        return model, recipe
    import peft

    shared = {"task_type": _TASK_TYPES.get(task)}
    if task == "image-classification":
        shared["modules_to_save"] = ["classifier"]
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind == "ia3":
        known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if layers is not None:
            raise ValueError("ia3 adapts all layers: leave --layers out.")
        config: peft.PeftConfig = peft.IA3Config(**shared)
    else:
        rank = size or 8
        targets = None if model.config.model_type in known else "all-linear"
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            use_dora=kind == "dora",
            init_lora_weights="pissa",
            layers_to_transform=None if layers is None else list(layers),
            target_modules=targets,
            **shared,
        )
    if kind == "ia3" and model.config.model_type not in known:
        raise ValueError(f"PEFT does not know where (IA)^3 goes in a {model.config.model_type} model: take lora.")
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        return peft.get_peft_model(model, config), None


def save_adapter(model: nn.Module, recipe: Adapter | None, folder: Path) -> Path:
    """Save the adapter of a model, with its head.

    Args:
        model: What :func:`adapt` returned, after training.
        recipe: What it returned besides.
        folder: An existing folder.

    Returns:
        ``folder/adapter`` for PEFT's own ``from_pretrained``, or ``folder/adapter.safetensors`` for
        :func:`fishkern.adapters.load`.
    """
    if recipe is not None:
        return adapters.save(model, recipe, folder / "adapter.safetensors")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"

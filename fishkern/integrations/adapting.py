"""Adapters by name, as the command line asks for them: put into a model, and saved from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishkern import adapters
from fishkern.adapters import Adapter, BottleneckAdapter, PrefixAdapter, UniPELTAdapter
from fishkern.integrations.tasks import TASKS

FOLDER, FILE = "adapter", "adapter.safetensors"  # what PEFT saves, and what fishkern.adapters saves


@dataclass(frozen=True)
class Request:
    """An adapter for one model.

    Attributes:
        config: The model's config.
        task: What the model is trained for.
        layers: Numbers of the layers to adapt; ``None`` for all.
        size: Rank, width or length; 0 for an adapter that has no size.
    """

    config: Any
    task: str
    layers: tuple[int, ...] | None
    size: int


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        recipe: Makes PEFT's config, or an :class:`fishkern.adapters.Adapter`.
        size: Rank, width or length if none is requested; ``None`` for an adapter that has no size.
        saved_as: The name of its folder or file.
    """

    recipe: Callable[[Request], Any]
    size: int | None = None
    saved_as: str = FOLDER


def check(kind: str, size: int | None) -> None:
    """Refuse an adapter that does not exist, before a model is loaded for it.

    Args:
        kind: One of :data:`ADAPTERS`.
        size: As :func:`adapt` takes it.

    Raises:
        ValueError: ``kind`` is unknown, or has no size.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"--adapter is one of {', '.join(ADAPTERS)}, got {kind!r}.")
    if size is not None and ADAPTERS[kind].size is None:
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
        task: What the model is trained for, one of :data:`fishkern.integrations.tasks.TASKS`.
        layers: Numbers of the layers to adapt; ``None`` for all.
        size: Rank of LoRA and DoRA, width of a bottleneck, length of a prefix; ``None`` for 8, 48 and 30.
        seed: Seed of the adapter's first values.

    Returns:
        The model to train, and the recipe of an adapter that is not PEFT's.

    Raises:
        ValueError: ``kind`` is unknown, has no size, or cannot be put into such a model or such layers.
    """
    check(kind, size)
    numbers = None if layers is None else tuple(layers)
    recipe = ADAPTERS[kind].recipe(Request(model.config, task, numbers, size or ADAPTERS[kind].size or 0))
    if isinstance(recipe, Adapter):
        adapters.attach(model, recipe, seed=seed)
        return model, recipe
    import peft

    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        return peft.get_peft_model(model, recipe), None


def save_adapter(model: nn.Module, recipe: Adapter | None, folder: Path) -> Path:
    """Save the adapter of a model, with its head.

    Args:
        model: The model that :func:`adapt` returned, after training.
        recipe: The recipe that it returned.
        folder: An existing folder.

    Returns:
        ``folder/adapter`` for PEFT's own ``from_pretrained``, or ``folder/adapter.safetensors`` for
        :func:`fishkern.adapters.load`.
    """
    if recipe is not None:
        return adapters.save(model, recipe, folder / FILE)
    model.save_pretrained(folder / FOLDER)
    return folder / FOLDER


def _lora(request: Request, *, use_dora: bool = False) -> Any:
    import peft

    known = request.config.model_type in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if not known and request.layers is not None:
        raise ValueError(
            f"PEFT cannot choose layers in a {request.config.model_type} model, of which it adapts every linear layer: "
            "leave --layers out."
        )
    return peft.LoraConfig(
        r=request.size,
        lora_alpha=2 * request.size,
        use_dora=use_dora,
        init_lora_weights="pissa",
        layers_to_transform=None if request.layers is None else list(request.layers),
        target_modules=None if known else "all-linear",
        **_of_task(request.task),
    )


def _ia3(request: Request) -> Any:
    import peft

    if request.layers is not None:
        raise ValueError("ia3 adapts all layers: leave --layers out.")
    if request.config.model_type not in peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"PEFT does not know where (IA)^3 goes in a {request.config.model_type} model: use --adapter lora."
        )
    return peft.IA3Config(**_of_task(request.task))


def _of_task(task: str) -> dict[str, Any]:
    """Let PEFT train the head; it has no task type for images, so their head is named."""
    heads = {"modules_to_save": ["classifier"]} if task == "image-classification" else {}
    return {"task_type": TASKS[task].peft_type, **heads}


ADAPTERS: dict[str, Kind] = {
    "lora": Kind(_lora, size=8),
    "dora": Kind(lambda request: _lora(request, use_dora=True), size=8),
    "ia3": Kind(_ia3),
    "bottleneck": Kind(
        lambda request: BottleneckAdapter(layers=request.layers, width=request.size),
        size=48,
        saved_as=FILE,
    ),
    "prefix": Kind(lambda request: PrefixAdapter(layers=request.layers, length=request.size), size=30, saved_as=FILE),
    "unipelt": Kind(lambda request: UniPELTAdapter(layers=request.layers), saved_as=FILE),
}
"""Every kind of adapter by its name."""

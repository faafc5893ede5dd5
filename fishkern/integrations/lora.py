"""The start of an adapter as a LoRA of PEFT: attached to a model that does not change, trained, and written out.

    model = attach_init(model, init)                       # a PeftModel that gives the model's own logits
    Trainer(model, ..., callbacks=[InitCallback(init)]).train()
    plain_lora(model, "lora")                              # an ordinary LoRA for the model as it was

See :mod:`fishkern.layers.twins` for how the start is taken away again.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback

from fishkern import hosts
from fishkern.arguments import one_of
from fishkern.files import atomic_write
from fishkern.initialization import AdapterInit, ModuleInit
from fishkern.integrations.lora_patterns import peft_patterns, targets
from fishkern.layers import LinearMap, ResidualA, ResidualB, TwinA, TwinB, linear_maps
from fishkern.layers.base import is_patched
from fishkern.names import listed

FILE, FOLDER = "adapter_init.safetensors", "plain_lora"

_ADAPTER = "default"  # PEFT's own name of the only adapter
_OPTIONS = frozenset(
    {
        "base_model_name_or_path",
        "bias",
        "inference_mode",
        "lora_dropout",
        "modules_to_save",
        "revision",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    }
)
_FACTORS = {"twin": (TwinA, TwinB), "weights": (ResidualA, ResidualB)}


def lora_config(init: AdapterInit, *, model: nn.Module | None = None, **options: Any) -> LoraConfig:
    """Make PEFT's config of a LoRA with the ranks and scalings of a start, on its modules.

    With ``peft.get_peft_model`` this is an ordinary LoRA that starts at ``B = 0`` and has its ranks from data;
    :func:`attach_init` also gives it the values.

    Args:
        init: The start; only its ranks and scalings are used.
        model: The model to adapt. PEFT's list of targets also takes modules whose path ends in the path of a target;
            with the model, this is checked, and if there are any, an expression names the targets alone. It also tells
            whether weights are stored transposed (``fan_in_fan_out``), of which PEFT warns otherwise.
        options: Fields of ``LoraConfig`` that do not concern ranks, targets or the start: ``task_type``,
            ``lora_dropout``, ``bias``, ``modules_to_save``, ``trainable_token_indices``, ``use_rslora``,
            ``inference_mode``, ``base_model_name_or_path``, ``revision``.

    Returns:
        The config. Alpha follows the rank, so that all modules of one scaling keep it where a loader ignores patterns.

    Raises:
        TypeError: ``init`` is no start.
        ValueError: Another option is given, such as ``use_dora``.
    """
    config = _config(init, 1, options)
    if model is not None:
        _fit(config, init, model)
    return config


def attach_init(
    model: nn.Module,
    init: AdapterInit,
    *,
    residual: Literal["twin", "weights"] = "twin",
    autocast_adapter_dtype: bool = True,
    **options: Any,
) -> PeftModel:
    """Put a LoRA with a start into a model, whose output stays what it was.

    Trained are PEFT's ``lora_A.default.weight`` and ``lora_B.default.weight``, and nothing else of the adapter requires
    a gradient. Both have one from the first step on. By default the frozen weights are left alone, and each module
    computes ``W x + scaling (B A - B0 A0) x``, whose second part is exactly 0 before the first step, in any dtype,
    under autocast and on quantised weights.

    With ``residual="weights"`` the start is subtracted from the frozen weight instead, as the published methods do:
    ``W - scaling B0 A0`` in the dtype of ``W``. It costs nothing in a step, but rounds the weights: the output is the
    model's own up to 2e-6 of the largest logit in float32, and up to 2 % of it in bfloat16, on a LLaMA of 260 thousand
    parameters. And ``disable_adapter`` and ``unload`` then give the model without its start, not the model.

    What ``save_pretrained`` writes is an ordinary LoRA of twice the rank for the model as it was, with the start in its
    second half, so that no loader can forget it. To train on from there, attach the same start to the model and load
    into it: ``model.load_adapter(folder, "default", is_trainable=True)``, as the Trainer does. Merging takes the start
    into account. PEFT's combinations of several adapters (``add_weighted_adapter``) do not know of it, nor does a
    trainer that copies the adapter for a reference, which fails: give it the model as its reference.

    ``lora_dropout`` drops the same features of what enters a module for the trained half and the frozen one: what is
    dropped is the change since the start, and a first step in training mode still gives the model's own output.

    Args:
        model: A model of transformers, or any other, without wrappers and without adapters; changed in place.
        init: The start, made for this model.
        residual: ``"twin"`` for a frozen negative half beside the trained one, ``"weights"`` for frozen weights that
            lack the start.
        autocast_adapter_dtype: As in PEFT: keep the adapter of a 16-bit model in float32.
        options: As in :func:`lora_config`.

    Returns:
        PEFT's model around ``model``.

    Raises:
        TypeError: ``init`` is no start.
        ValueError: The start was made for another model or other weights; the model has adapters, is wrapped or
            sharded; an option concerns what the start decides; or a module is not a linear one of PEFT's. With
            ``residual="weights"``: a weight is quantised or shared, or there is a dropout, which would drop a part of
            the model's own weights. The model is then as it was.
    """
    one_of(residual, tuple(_FACTORS), "residual")
    config = _config(init, 1, options)
    maps = _checked_maps(model, init)
    if residual == "weights":
        _check_weights(model, maps, config)
    _fit(config, init, model)
    with _undone_on_error(model):
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        layers = _lora_layers(peft_model, init)
        for path, layer in layers.items():
            _start(layer, init[path], residual)
    if residual == "weights":
        for path, layer in layers.items():
            _subtract(maps[path], layer, init[path].scaling)
    # What is saved has twice the rank, and is described by the config.
    saved = _config(init, 2, options)
    config.r, config.lora_alpha = saved.r, saved.lora_alpha
    config.rank_pattern, config.alpha_pattern = saved.rank_pattern, saved.alpha_pattern
    return peft_model


@torch.no_grad()
def plain_lora(model: nn.Module, folder: str | os.PathLike[str], *, pad: bool = False) -> Path:
    """Write what a model with a start has learnt as an ordinary LoRA for the model as it was.

    Each module has twice its rank: the factors ``[A; A - A0]`` and ``[B - B0, B0]``, whose product is ``B A - B0 A0``.
    Small changes stay exact when a server casts them to 16 bits. It needs no file of the start, and any loader of
    LoRA that reads PEFT's patterns can use it (vLLM's ``max_lora_rank`` must cover the largest). After
    ``residual="weights"``, it differs from the trained model by the rounding of the frozen weights.

    Args:
        model: What :func:`attach_init` returned, trained or not, also under DDP or ``torch.compile``.
        folder: Made if it does not exist. ``adapter_model.safetensors`` and ``adapter_config.json`` in it appear whole
            or not at all.
        pad: Whether to fill all modules up to one rank with zeros and to multiply the scaling into ``B``, so that a
            loader that knows neither ``rank_pattern`` nor ``alpha_pattern`` reads it right.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no start.
        OSError: The folder cannot be written to.
    """
    peft_model = hosts.unwrap(model)
    layers = dict(_started_layers(peft_model))
    if not layers:
        raise ValueError(
            f"this {type(peft_model).__name__} has no adapter with a start: give the model that attach_init returned."
        )
    state = get_peft_model_state_dict(peft_model)
    factors = {path: _joined(layer) for path, layer in layers.items()}
    ranks = {path: len(A) for path, (A, _) in factors.items()}
    scalings = {path: layer.scaling[_ADAPTER] for path, layer in layers.items()}
    if pad:
        rank = max(ranks.values())
        factors = {path: _padded(A, scalings[path] * B, rank) for path, (A, B) in factors.items()}
        ranks, scalings = dict.fromkeys(ranks, rank), dict.fromkeys(ranks, 1.0)
    for path, (A, B) in factors.items():
        state[f"base_model.model.{path}.lora_A.weight"] = A
        state[f"base_model.model.{path}.lora_B.weight"] = B
    fields = peft_patterns(ranks, scaling=scalings)
    config = _as_saved(peft_model, {**fields, "target_modules": targets(ranks, _modules(peft_model))})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, metadata={"format": "pt"})
    with atomic_write(folder / CONFIG_NAME, "w") as file:  # renamed last: no config ever describes older tensors
        json.dump(config, file, indent=2, sort_keys=True)
        with atomic_write(folder / SAFETENSORS_WEIGHTS_NAME) as tensors:
            tensors.write(data)
    return folder


class InitCallback(TrainerCallback):
    """Saves the start of an adapter in every checkpoint of a Trainer, and writes the plain LoRA at the end.

        Trainer(attach_init(model, init), ..., callbacks=[InitCallback(init)]).train()

    To resume, attach the start that is in the checkpoint, or the same one, and call ``train(resume_from_checkpoint=
    True)``: a checkpoint that was trained from another start is refused. Works with every Trainer that is built on
    transformers'.

    Args:
        init: The start that was attached.
        folder: Where the plain LoRA goes, in the Trainer's ``output_dir``; ``None`` writes none.

    Raises:
        TypeError: ``init`` is no start.
    """

    def __init__(self, init: AdapterInit, *, folder: str | None = FOLDER) -> None:
        _check_init(init)
        self._init, self._folder = init, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the model has this start.

        Raises:
            ValueError: It has none, or another, or is sharded.
        """
        _check_whole(kwargs["model"])
        layers = dict(_started_layers(hosts.unwrap(kwargs["model"])))
        if layers.keys() != set(self._init):
            raise ValueError(
                "InitCallback needs a model with the start that it is given: train attach_init(model, init), and give "
                f"both the same init (they differ in {listed(sorted(layers.keys() ^ set(self._init)))})."
            )
        for path, layer in layers.items():
            for factor, initial in ((layer.lora_A, self._init[path].A), (layer.lora_B, self._init[path].B)):
                if factor[_ADAPTER].weight.shape != initial.shape or not factor[_ADAPTER].starts_from(initial):
                    raise ValueError(
                        f"the model was given another start than this InitCallback: {path} has other initial values."
                    )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the start in the folder of the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._init.save(folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the plain LoRA of the trained model."""
        if state.is_world_process_zero and self._folder is not None:
            plain_lora(kwargs["model"], Path(args.output_dir) / self._folder)


def _check_init(init: object) -> None:
    if not isinstance(init, AdapterInit):
        raise TypeError(f"init must be an AdapterInit, such as fk.initialize gives, got {type(init).__name__}.")


def _config(init: AdapterInit, times: int, options: dict[str, Any]) -> LoraConfig:
    """Make the config of a LoRA with some times the ranks of a start, and its scalings."""
    _check_init(init)
    if odd := sorted(options.keys() - _OPTIONS):
        raise ValueError(
            f"a LoRA with a start takes no {listed(odd)}: its modules, ranks and values are those of the start, and "
            f"only {', '.join(sorted(_OPTIONS))} are open."
        )
    ranks = {path: times * rank for path, rank in init.ranks.items()}
    scalings = {path: one.scaling for path, one in init.items()}
    return LoraConfig(**options, **peft_patterns(ranks, scaling=scalings, rslora=bool(options.get("use_rslora"))))


def _fit(config: LoraConfig, init: AdapterInit, model: nn.Module) -> None:
    """Let a config name the modules of one model alone, and say whether it stores them transposed."""
    config.target_modules = targets(init, dict(model.named_modules()))
    config.fan_in_fan_out = any(one.transposed for one in linear_maps(model).values() if one.path in init)


def _checked_maps(model: nn.Module, init: AdapterInit) -> dict[str, LinearMap]:
    """Check that the start fits the model, and give the linear maps that it is for."""
    if hosts.unwrap(model) is not model:
        raise ValueError(f"attach the start before the model is wrapped in {type(model).__name__}.")
    _check_whole(model)
    if adapted := [path for path, one in model.named_modules() if isinstance(one, BaseTunerLayer)]:
        raise ValueError(
            f"the model already has an adapter (at {listed(adapted)}): attach the start to the model without it."
        )
    init.check(model)
    maps = {one.path: one for one in linear_maps(model).values()}
    if other := [path for path in init if maps[path].weight.ndim != 2 and not maps[path].stored]:
        raise ValueError(f"only linear modules can have a start, and {listed(other)} are convolutions.")
    return {path: maps[path] for path in init}


def _check_whole(model: nn.Module) -> None:
    """Refuse a model in parts: the trained half and the initial values are saved as one tensor."""
    if reason := hosts.sharded(model):
        raise ValueError(
            f"{reason.partition('. ')[0]}, and a LoRA with a start is saved as a whole: train it with the whole model "
            "in each process, under DistributedDataParallel."
        )


def _check_weights(model: nn.Module, maps: dict[str, LinearMap], config: LoraConfig) -> None:
    """Refuse what the start cannot be subtracted from."""
    advice = 'take residual="twin", which leaves the weights alone'
    if stored := [path for path, one in maps.items() if one.stored]:
        raise ValueError(f"the start cannot be subtracted from quantised weights ({listed(stored)}): {advice}.")
    if config.lora_dropout:
        raise ValueError(f"lora_dropout would drop a part of the model's own weights: {advice}, or leave it at 0.")
    places: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                places[parameter] = places.get(parameter, 0) + 1
    if shared := [path for path, one in maps.items() if places[one.weight] > 1]:
        raise ValueError(f"other modules share the weight of {listed(shared)}, and would change as well: {advice}.")


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """Take out again what PEFT has put into a model, after an exception."""
    children = {module: dict(module._modules) for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, own in children.items():
            module._modules.clear()
            module._modules.update(own)
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        vars(model).pop("peft_config", None)
        raise


def _modules(peft_model: PeftModel) -> dict[str, nn.Module]:
    """List the modules of the model inside by their paths in the model as it was."""
    return dict(peft_model.get_base_model().named_modules())


def _lora_layers(peft_model: PeftModel, init: AdapterInit) -> dict[str, LoraLayer]:
    """List PEFT's layers by path, and check that they are those of the start and hold plain linears."""
    layers = {path: module for path, module in _modules(peft_model).items() if isinstance(module, LoraLayer)}
    if differing := layers.keys() ^ set(init):
        raise ValueError(
            f"PEFT adapts other modules than the start has ({listed(sorted(differing))} differ); modules_to_save must "
            "name none of them."
        )
    for path, layer in layers.items():
        for factor in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
            if type(factor) is not nn.Linear or is_patched(factor) or factor._forward_hooks:
                raise ValueError(
                    f"{path} ({type(layer).__name__}) computes its adapter in a way of its own, such as in parallel "
                    "parts: a start needs PEFT's ordinary linears."
                )
    return {path: layers[path] for path in init}


@torch.no_grad()
def _start(layer: LoraLayer, init: ModuleInit, residual: str) -> None:
    """Give one of PEFT's layers the values of its start, and factors that remember them."""
    for factors, initial, kind in zip((layer.lora_A, layer.lora_B), (init.A, init.B), _FACTORS[residual], strict=True):
        factors[_ADAPTER].weight.copy_(initial)
        factors[_ADAPTER] = kind(factors[_ADAPTER])
    if residual == "twin":
        layer.get_delta_weight = partial(_delta, layer)  # what merging adds


def _delta(layer: LoraLayer, adapter: str) -> Tensor:
    """Compute what merging adds to the weight: with twins, what training has added."""
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(A, TwinA) or not isinstance(B, TwinB):
        return type(layer).get_delta_weight(layer, adapter)
    product = (B.joined().float() @ A.joined().float()) * layer.scaling[adapter]
    return (product.T if layer.fan_in_fan_out else product).to(A.weight.dtype)


@torch.no_grad()
def _subtract(linear: LinearMap, layer: LoraLayer, scaling: float) -> None:
    """Subtract the start from a frozen weight, as the adapter has it in its own dtype."""
    A, B = layer.lora_A[_ADAPTER].weight.float(), layer.lora_B[_ADAPTER].weight.float()
    start = scaling * (B @ A)
    weight = linear.weight
    weight.copy_(weight.float() - (start.T if linear.transposed else start))


def _started_layers(peft_model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """List the layers whose adapter has a start, by path."""
    for path, module in _modules(peft_model).items() if isinstance(peft_model, PeftModel) else ():
        adapters = module.lora_A if isinstance(module, LoraLayer) else {}
        if _ADAPTER in adapters and isinstance(adapters[_ADAPTER], ResidualA):
            yield path, module


def _joined(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    return layer.lora_A[_ADAPTER].joined(), layer.lora_B[_ADAPTER].joined()


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - len(A)
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def _as_saved(peft_model: PeftModel, fields: dict[str, Any]) -> dict[str, Any]:
    """Give the config as PEFT saves it, with some other fields."""
    config = copy.deepcopy(peft_model.peft_config[_ADAPTER])
    for name, value in {**fields, "inference_mode": True, "init_lora_weights": True, "use_rslora": False}.items():
        setattr(config, name, value)
    config.base_model_name_or_path = config.base_model_name_or_path or vars(peft_model.get_base_model()).get(
        "name_or_path"
    )
    if config.task_type is None:
        kind = type(peft_model.get_base_model())
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    said = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return said

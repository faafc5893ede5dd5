"""What a model of transformers or PEFT is, read from its structure and names, importing neither.

Everything here answers one question about a module: what lies under its wrappers, which task its head serves, how it
is to be called, what in it cannot be served.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern.names import renamed, without_wrappers

Task = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
]

_TASK_BY_SUFFIX: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_CLASSIFIER_SUFFIXES = ("ForSequenceClassification", "ForImageClassification")

# Wrappers of torch that hold the model as ``module``.
_RUNNING = ("DistributedDataParallel", "DataParallel", "AveragedModel")

HEADS = ("classifier", "pre_classifier", "score", "qa_outputs", "classification_head")
"""What transformers calls a task's own layers, which start at random. A language model's head is not one of them."""


def unwrap(model: nn.Module) -> nn.Module:
    """Take off the wrappers that only change how a model runs, or average it (DDP, ``torch.compile``, torch's EMA).

    Args:
        model: Any module.

    Returns:
        The innermost module whose parameters carry canonical names; PEFT's wrappers stay, they are part of the names.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {getattr(model, '__qualname__', type(model).__name__)!r}: a "
            "function has no parameters to differentiate by; wrap it in a module that owns them."
        )
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif any(base.__name__ in _RUNNING for base in type(model).__mro__):
            model = model.module
        else:
            return model


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Give every parameter of a model by its one name.

    Args:
        model: Any module, wrapped or not.
        remove_duplicate: Whether a shared parameter has its first name alone.

    Returns:
        Parameters by the names that the unwrapped model gives them, without what torch puts in between. A submodule
        called ``module`` keeps its name.

    Raises:
        ValueError: Two names become one.
    """
    return renamed(dict(unwrap(model).named_parameters(remove_duplicate=remove_duplicate)), without_wrappers)


def base_model(model: nn.Module) -> nn.Module:
    """Find the transformers model inside a PEFT model.

    Args:
        model: A module without running wrappers, see :func:`unwrap`.

    Returns:
        The wrapped model, or ``model`` itself when PEFT does not wrap it.
    """
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def task(model: nn.Module, labels: Tensor | None = None) -> Task | None:
    """Recognise the task of a transformers model by the name of its class or of a base class, and its config.

    Args:
        model: A module, with or without PEFT around it.
        labels: The batch's labels, whose dtype decides between one label and several where the config leaves it open,
            as in transformers.

    Returns:
        The task, or ``None`` when the name says nothing.
    """
    model = base_model(unwrap(model))
    config = getattr(model, "config", None)
    if config is None:
        return None
    named = (_named_task(base.__name__, config, labels) for base in type(model).__mro__)  # a subclass keeps its head
    return next((task for task in named if task), None)


def _named_task(name: str, config: Any, labels: Tensor | None) -> Task | None:
    if name.endswith("ForConditionalGeneration"):
        return "seq2seq-lm" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
    if name.endswith(_CLASSIFIER_SUFFIXES):
        return _classifier_task(config, labels)
    return next((task for suffix, task in _TASK_BY_SUFFIX.items() if name.endswith(suffix)), None)


def _classifier_task(config: Any, labels: Tensor | None) -> Task:
    problem = getattr(config, "problem_type", None)
    if problem is None:
        if config.num_labels == 1:
            problem = "regression"
        elif labels is None or not labels.is_floating_point():
            problem = "single_label_classification"
        else:
            problem = "multi_label_classification"
    by_problem: dict[str, Task] = {
        "regression": "regression",
        "single_label_classification": "classification",
        "multi_label_classification": "multi-label",
    }
    return by_problem[problem]


def is_head(name: str, heads: tuple[str, ...] = HEADS) -> bool:
    """Tell whether a parameter belongs to the head of a model, which fine-tuning trains whole.

    Args:
        name: The parameter's name.
        heads: Names of modules that are heads.

    Returns:
        Whether a module on the parameter's path has one of these names.
    """
    return not set(heads).isdisjoint(name.split(".")[:-1])


def accepts(model: nn.Module, keyword: str) -> bool:
    """Tell whether a model takes a keyword argument.

    Args:
        model: A module.
        keyword: The argument's name.

    Returns:
        Whether its ``forward`` names it, or takes any.
    """
    parameters = inspect.signature(model.forward).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def call_options(model: nn.Module) -> dict[str, Any]:
    """Say which keyword arguments keep a model from doing work that a pass over data does not need.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        ``{"use_cache": False}`` for models that would fill a key-value cache, else nothing.
    """
    model = base_model(unwrap(model))
    caches = getattr(getattr(model, "config", None), "use_cache", None)
    accepts = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if caches and accepts else {}


def added_loss(model: nn.Module) -> str | None:
    """Say what a model is known to add to the loss of its labels.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        The reason in words, or ``None`` where nothing says so.
    """
    model = unwrap(model)
    for config in getattr(model, "peft_config", {}).values():
        if str(getattr(config, "peft_type", "")).endswith("ADALORA"):
            return "AdaLoRA adds its orthogonality term"
    if getattr(getattr(base_model(model), "config", None), "output_router_logits", False):
        return "the model adds the auxiliary loss of its routers (output_router_logits)"
    return None


def padding_token(model: nn.Module) -> int | None:
    """Name the token of a language model that is padding and nothing else.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        Its number; ``None`` where there is none, or where it also ends texts.
    """
    config = getattr(base_model(unwrap(model)), "config", None)
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    return None if pad in (ends if isinstance(ends, list | tuple) else [ends]) else pad


def packed_batch(batch: Mapping[str, Any]) -> str | None:
    """Say what shows that rows of a batch hold several examples each.

    Args:
        batch: Keyword arguments of a model.

    Returns:
        The reason in words, or ``None`` when each row is one example.
    """
    for key in batch:
        if key.startswith(("cu_seq_lens", "cu_seqlens", "seq_idx")):
            return f"it carries {key!r}"
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2:
        mask = batch.get("attention_mask")
        falls = positions.diff(dim=1) < 0
        if isinstance(mask, Tensor) and mask.shape == positions.shape:
            falls &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        if falls.any():
            return "its 'position_ids' restart within a row"
    return None


def dispatched(model: nn.Module) -> str | None:
    """Say what shows that accelerate spreads or offloads a model.

    Args:
        model: A module.

    Returns:
        The reason in words, or ``None`` when the model lies where its parameters say.
    """
    devices = getattr(model, "hf_device_map", None)
    if devices and len(set(map(str, devices.values()))) > 1:
        return f"its hf_device_map spreads it over {sorted(set(map(str, devices.values())))}"
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            return f"accelerate offloads the weights of {name or 'the model'!r}"
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "some of its parameters lie on the meta device"
    return None


def sharded(model: nn.Module) -> str | None:
    """Say what shows that processes hold parts of a model's parameters.

    Args:
        model: A module.

    Returns:
        The reason and the way out, or ``None`` when every process holds them whole.
    """
    whole = "Load the whole model in each process, wrapped in DistributedDataParallel or not at all"
    for name, module in model.named_modules():
        if any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__):
            return f"FSDP shards the parameters of {name or 'the model'!r}. {whole}, and shard it after the estimate"
    if (size := getattr(base_model(unwrap(model)), "_tp_size", None) or 1) > 1:
        return f"transformers has split it over {size} processes. {whole}, without tp_plan="
    for name, parameter in model.named_parameters():
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__):
            return f"{name} is a DTensor, split over processes. {whole}, and split it after the estimate"
        if hasattr(parameter, "ds_id"):
            return f"DeepSpeed's ZeRO-3 has partitioned {name}. {whole}, or take ZeRO stage 2"
    return None


def merged_adapter(model: nn.Module, names: Container[str]) -> str | None:
    """Say why parameters of an adapter would get no gradient: PEFT has merged them into the weights.

    Args:
        model: A module.
        names: Canonical names of the parameters that need one.

    Returns:
        The reason and the way out, or ``None`` where none of them is merged.
    """
    for path, module in unwrap(model).named_modules():
        if not isinstance(merged := getattr(module, "merged_adapters", None), list) or not merged:
            continue
        for name, _ in module.named_parameters():
            if not name.startswith("base_layer.") and without_wrappers(f"{path}.{name}") in names:
                return (
                    f"the adapter {merged[0]!r} is merged into the weights, so that no gradient reaches {path}.{name}: "
                    "call unmerge_adapter() first"
                )
    return None


def scripted(model: nn.Module) -> str | None:
    """Name a module that ``torch.jit.script`` made: nothing can be hooked on it. Traced ones take hooks.

    Args:
        model: A module.

    Returns:
        The reason and the way out, or ``None`` where there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.RecursiveScriptModule):
            return (
                f"{repr(name) if name else 'the model'} ({module.original_name}) was made by torch.jit.script, and "
                "such a module takes no hooks. Estimate with the module that it was made from: its parameters have the "
                "same names"
            )
    return None


def lost_prefix(model: nn.Module, *, training: bool = False) -> str | None:
    """Say why a model would not see the prefix that PEFT hands over as a cache; most of them drop it without a word.

    Args:
        model: A module.
        training: Ask of the model in training mode, whatever mode it is in.

    Returns:
        The reason and the way out, or ``None`` where there is no such prefix, or it is seen.
    """
    model = unwrap(model)
    configs = getattr(model, "peft_config", {})
    if not any(str(getattr(config, "peft_type", "")).endswith("PREFIX_TUNING") for config in configs.values()):
        return None
    base = base_model(model)
    forwards = [base.forward, getattr(base, "base_model", base).forward]  # PEFT calls either
    if not any("past_key_values" in inspect.signature(forward).parameters for forward in forwards):
        return (
            f"{type(base).__name__} takes no past_key_values, as which PEFT's prefix comes, and would not see it: take "
            "another adapter, such as LoRA"
        )
    if any((training or module.training) and _checkpoints_itself(module) for module in model.modules()):
        in_evaluation = "" if training else " or the model to eval()"
        return (
            f"under activation checkpointing {type(model).__name__} loses its prefix: switch checkpointing off "
            f"(gradient_checkpointing_disable()){in_evaluation}, or take fishkern.adapters.PrefixAdapter"
        )
    return None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation mode, but leave activation checkpointing on where it was.

    transformers checkpoints a layer only while the layer's ``training`` is true. Such a layer keeps the flag up for
    the question and has it down while its body runs, so that no dropout is drawn.

    Args:
        model: A module; its modes are restored on exit, also after an exception.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    checkpointed = [module for module in modes if modes[module] and _checkpoints_itself(module)]
    functions = {module: module.__dict__.get("_gradient_checkpointing_func") for module in checkpointed}
    try:
        for module in modes:
            module.training = False
        for module in checkpointed:
            module.training = True
            module._gradient_checkpointing_func = _with_body_in_evaluation(module, functions[module])
        yield
    finally:
        for module, function in functions.items():
            module._gradient_checkpointing_func = function
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def connected_inputs(model: nn.Module) -> Iterator[None]:
    """Let the embedded inputs of a model with activation checkpointing require a gradient.

    Reentrant checkpointing passes no gradient to a segment none of whose inputs requires one, and while the weights are
    frozen none does.

    Args:
        model: A module.

    Yields:
        Nothing.
    """
    base = base_model(model)
    checkpointed = any(_checkpoints_itself(module) for module in model.modules())
    embeddings = base.get_input_embeddings() if checkpointed and hasattr(base, "get_input_embeddings") else None
    if embeddings is None:
        yield
        return

    def connect(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
            return output.detach().requires_grad_().clone()  # no leaf: the model may write into it
        return None

    handle = embeddings.register_forward_hook(connect)
    try:
        yield
    finally:
        handle.remove()


def _checkpoints_itself(module: nn.Module) -> bool:
    by_name = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return by_name and module.__dict__.get("gradient_checkpointing", False)


def _with_body_in_evaluation(module: nn.Module, checkpoint: Any) -> Any:
    def run(body: Any, *args: Any, **kwargs: Any) -> Any:
        def body_in_evaluation(*inner: Any, **named: Any) -> Any:
            module.training = False
            try:
                return body(*inner, **named)
            finally:
                module.training = True

        return checkpoint(body_in_evaluation, *args, **kwargs)

    return run

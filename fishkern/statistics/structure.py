"""The structure of a model and of a batch, on which the plan of a pass depends, and what has changed in it.

Values of weights are not part of it, nor are training modes, nor what runs without a trace in the model: a plain
attribute that a module's own code asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import stored_weights
from fishkern.statistics.contents import Batch, is_array, is_single, is_structure, items_of

Facts = dict[tuple[str, str], Any]
"""Values by what they are ("the dtype of") and whose they are ("lm_head.weight")."""

_ADAPTERS = {
    "active_adapter of": ("active_adapter", "_active_adapter"),
    "merged_adapters of": ("merged_adapters",),
    "disable_adapters of": ("_disable_adapters",),
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# of a config: what saving or an ordinary step of training sets, and what no gradient depends on
_PASSING = frozenset(
    ("_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
)
_ABSENT = "absent"
_SHOWN = 4


@dataclass(frozen=True)
class Labelled:
    """A value that a message shows by a label; modules and functions equal themselves alone.

    Args:
        value: The value.
        label: Its label.
    """

    value: Any
    label: str = field(compare=False)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class _Inferred:
    """A setting that the model itself replaces in its first step of training, if it is ``None``."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inferred) and (self.value is None or self.value == other.value)

    def __str__(self) -> str:
        return repr(self.value)


def facts_of_model(model: nn.Module) -> Facts:
    """Describe a model.

    Args:
        model: Without running wrappers.

    Returns:
        Its adapters in force, config, modules with their hooks and checkpointing, and its parameters.
    """
    facts: Facts = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        facts |= _facts_of_adapters(path, module)
    config = getattr(hosts.base_model(model), "config", None)
    facts |= {("the config's", key): value for key, value in _settings(config)}
    for path, module in modules.items():
        facts |= _facts_of_module(path, module)
    facts |= _facts_of_parameters(model)
    for name, (_, module) in stored_weights(model).items():
        for own, buffer in module._buffers.items():
            if buffer is not None:
                facts["the storage of", f"{name} ({own})"] = f"{_plain(buffer.dtype)} {list(buffer.shape)}"
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    facts["autocast on", device] = _plain(torch.get_autocast_dtype(device)) if on else "off"
    return facts


def facts_of_batch(content: Batch) -> Facts:
    """Describe a batch by its entries, without the number of examples and of positions.

    Args:
        content: The batch.

    Returns:
        For each entry that is no container: the dtype and the number of axes, or the class of another value. The
        entries of a list are described together.
    """
    return {("the entry", repr(name)): value for name, value in _entries("", content)}


def demand_same(before: Facts, now: Facts) -> None:
    """Refuse another structure.

    Args:
        before: Facts of a model, a batch or a request.
        now: The same, later.

    Raises:
        ValueError: They differ; the message says in what.
    """
    if before == now:
        return
    raise ValueError(
        f"this pass was prepared for something else: {changes_in_words(before, now)}. Undo that, or prepare again with "
        "fishkern.prepare(model, batch, ...)."
    )


def changes_in_words(before: Facts, now: Facts) -> str:
    """Say in what two structures differ.

    Args:
        before: Facts.
        now: The same, later.

    Returns:
        The first few differences, and how many more there are.
    """
    changes = [text for _, group in groupby(_changes(before, now), itemgetter(0)) for text in _shortened(group)]
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return f"{'; '.join(changes[:_SHOWN])}{more}"


def _changes(before: Facts, now: Facts) -> Iterator[tuple[str, str]]:
    """Say what differs, with its kind; of what has come or gone only that."""
    missing: set[str] = set()
    for fact in [*before, *(fact for fact in now if fact not in before)]:
        old, new = before.get(fact, _ABSENT), now.get(fact, _ABSENT)
        kind, name = fact
        if old == new or name in missing:
            continue
        if kind in ("the module", "the parameter") and _ABSENT in (old, new):
            missing.add(name)
        old, new = str(old), str(new)
        yield kind, f"{kind} {name or 'the model'} was {old} and is {f'another {new}' if old == new else new}"


def _shortened(changes: Iterable[tuple[str, str]]) -> list[str]:
    """Show two changes of one kind, or the first of more."""
    texts = [text for _, text in changes]
    return texts if len(texts) < 3 else [f"{texts[0]} (and {len(texts) - 1} more like it)"]


def _facts_of_adapters(path: str, module: nn.Module) -> Facts:
    facts: Facts = {}
    for kind, names in _ADAPTERS.items():
        for name in names:
            # not getattr of the module: a wrapper passes on what the model inside it has
            value = vars(module).get(name, getattr(type(module), name, None))
            if isinstance(value, str | bool | list | tuple):
                facts[kind, path] = tuple(value) if isinstance(value, list) else value
    return facts


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through a config of transformers, which may contain others."""
    if hasattr(config, "to_dict"):
        settings = config.to_dict()
        for name in ("_attn_implementation", "_experts_implementation"):
            settings[name] = getattr(config, name, None)
    else:
        settings = config if isinstance(config, Mapping) else {}
    for key, value in settings.items():
        if key in _PASSING:
            continue
        if isinstance(value, Mapping):
            inner = getattr(config, str(key), value)  # a config inside has an attention implementation of its own
            yield from _settings(inner if hasattr(inner, "to_dict") else value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _Inferred(value) if key == "problem_type" else repr(value)


def _facts_of_module(path: str, module: nn.Module) -> Facts:
    facts: Facts = {("the module", path): Labelled(module, type(module).__name__)}
    forward = vars(module).get("forward", getattr(type(module), "forward", None))
    facts["the forward method of", path] = Labelled(forward, getattr(forward, "__qualname__", type(forward).__name__))
    hooks = [_called(hook) for kind in _HOOKS for hook in getattr(module, kind, {}).values()]
    if hooks:
        facts["the hooks on", path] = ", ".join(hooks)
    if hosts.modes.checkpoints_itself(module):
        function = vars(module).get("_gradient_checkpointing_func")
        facts["the activation checkpointing of", path] = str(getattr(function, "keywords", "on"))
    return facts


def _facts_of_parameters(model: nn.Module) -> Facts:
    facts: Facts = {}
    first: dict[nn.Parameter, str] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        facts["the parameter", name] = type(parameter).__name__
        owner = first.setdefault(parameter, name)
        facts["the tensor of", name] = "its own" if owner == name else f"that of {owner}"
    descriptions = {
        "requires_grad of": lambda one: one.requires_grad,
        "the dtype of": lambda one: _plain(one.dtype),
        "the shape of": lambda one: list(one.shape),
        "the device of": lambda one: str(one.device),
        "the layout of": lambda one: _plain(one.layout),
        "the hooks on the gradient of": lambda one: ", ".join(map(_called, (one._backward_hooks or {}).values())),
    }
    for kind, describe in descriptions.items():
        facts |= {(kind, name): described for name, one in named.items() if (described := describe(one)) != ""}
    return facts


def _entries(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if is_structure(value):
        for key, item in items_of(value):
            yield from _entries(f"{name}.{key}".removeprefix("."), item)
    elif isinstance(value, list):
        kinds = sorted({entry for item in value for entry in _entries("", item)})
        yield name, f"a list of {' and '.join(f'{kind} {inner}'.strip() for inner, kind in kinds) or 'nothing'}"
    elif is_array(value):
        kind = "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        yield name, f"{kind} of {_plain(value.dtype)} with {len(value.shape)} axes"
    else:
        yield name, "None" if value is None else f"a {type(value).__name__}" if is_single(value) else _class(value)


def _class(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__name__}"


def _called(hook: Any) -> str:
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__qualname__", type(hook).__name__)


def _plain(name: Any) -> str:
    return str(name).removeprefix("torch.")

"""Which weights an adapter is for: patterns of their names or of the paths of their modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError, linear_maps
from fishkern.names import listed
from fishkern.selection.base import Patterns
from fishkern.statistics.choosing import near

Value = TypeVar("Value")


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern means a weight.

    Args:
        name: The weight's canonical name.
        pattern: A pattern (``fnmatch``) of whole weight names, ``"*.q_proj.weight"``, or of whole paths of modules,
            ``"*.q_proj"``; or the last parts of a path, as in PEFT, ``"q_proj"``.

    Returns:
        Whether it does.
    """
    path = name.rpartition(".")[0]
    return fnmatchcase(name, pattern) or fnmatchcase(path, pattern) or f".{path}".endswith(f".{pattern}")


def targeted(names: Iterable[str], targets: Patterns, argument: str = "targets") -> list[str]:
    """Choose weights by patterns.

    Args:
        names: Canonical names of weights.
        targets: Patterns, see :func:`matches`.
        argument: Where the patterns come from, for the message.

    Returns:
        The names that any of them means, in their order.

    Raises:
        ValueError: A pattern means none.
    """
    names = list(names)
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            shown = f"{names[0]} to {names[-1]}" if names else "none"
            raise ValueError(
                f"{argument}={pattern!r} matches none of {len(names)} weights ({shown}){near(pattern, names)}."
            )
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def given_by_name(value: Value | Mapping[str, Value], names: Iterable[str], argument: str) -> dict[str, Value]:
    """Look up what an argument says of each weight: by its name, or by the first pattern that means it.

    Args:
        value: One value for all weights, or one for each name or pattern.
        names: Canonical names of weights.
        argument: The argument's name, for the message.

    Returns:
        The value of each weight.

    Raises:
        ValueError: A pattern means no weight, or a weight has no value.
    """
    names = list(names)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    patterns = [key for key in value if key not in names]
    targeted(names, patterns, argument)  # raises where one means nothing
    by_name: dict[str, Value] = {}
    for name in names:
        key = name if name in value else next((pattern for pattern in patterns if matches(name, pattern)), None)
        if key is not None:
            by_name[name] = value[key]
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"{argument}= says nothing of {len(missing)} of {len(names)} weights ({listed(missing)}): add them, or '*' "
            "for all others; targets= leaves weights out."
        )
    return by_name


def check_rank(name: str, rank: int, shape: tuple[int, int]) -> None:
    """Refuse a rank that no adapter of a matrix can use.

    Args:
        name: The weight's name, for the message.
        rank: Of its adapter.
        shape: ``(O, I)`` of the matrix.

    Raises:
        ValueError: The rank exceeds the smaller side.
    """
    if rank > min(shape):
        raise ValueError(
            f"rank {rank} of {name} exceeds the smaller side of its {shape[0]} x {shape[1]} matrix: take a rank of at "
            f"most {min(shape)}, or leave the matrix out with targets=."
        )


def linear_weights(model: nn.Module) -> dict[str, hosts.Layer]:
    """List the weights of linear maps inside the transformer layers of a model.

    Embeddings, heads and convolutions are not among them, nor weights that are shared with an embedding.

    Args:
        model: A model, wrapped or not.

    Returns:
        For each weight, by canonical name, the layer that it is in.

    Raises:
        ValueError: The model has no such weight.
        UnsupportedModuleError: It has an adapter of PEFT already.
    """
    model = hosts.unwrap(model)
    if hosts.base_model(model) is not model:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has an adapter already, and a start is made from the weights alone: pass the "
            "model without it (model.unload(), or model.merge_and_unload() to keep what it has learnt)."
        )
    flat = [name for name, one in linear_maps(model).items() if one.stored or one.weight.ndim == 2]
    weights = {name: layer for name, layer in hosts.layer_of(flat).items() if layer is not None}
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no linear weights in transformer layers, which are the numbered entries of a "
            "list such as 'layers' or 'h'."
        )
    return weights

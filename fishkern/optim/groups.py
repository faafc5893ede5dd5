"""From a model or named parameters to the groups of an optimizer: the selection's pool, and what else trains."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError, is_stored, stored_weights
from fishkern.names import fitted, listed
from fishkern.selection import Selection

Outside = Literal["error", "freeze", "train"]
OUTSIDE: tuple[Outside, ...] = ("error", "freeze", "train")

Named: TypeAlias = tuple[str, Tensor]
Group: TypeAlias = dict[str, Any]  # {"params": [(name, parameter), ...], ...}
Parameters: TypeAlias = nn.Module | Iterable[Named] | Iterable[Group]


def named_groups(parameters: Parameters, selection: Selection) -> list[Group]:
    """Turn a model or parameters into groups of named parameters.

    Args:
        parameters: A model, its named parameters, or groups of them, ``{"params": [(name, parameter), ...], ...}``.
        selection: Decides between the names of a tied parameter: the one in its pool.

    Returns:
        New dicts, whose ``"params"`` is a list of ``(canonical name, parameter)``.

    Raises:
        TypeError: A parameter has no name.
        ValueError: A parameter or a name comes twice.
        UnsupportedModuleError: The model, as it is, does not see PEFT's prefix, so that training it has no effect, or
            has its adapter merged; or it is sharded by other means than FSDP2, or the pool holds a quantised weight.
    """
    if isinstance(parameters, nn.Module):
        hosts.reshard(parameters)
        moving = {name for name, count in selection.counts.items() if count}
        lost = hosts.lost_prefix(parameters) or hosts.merged_adapter(parameters, moving)
        if reason := hosts.sharded(parameters, fsdp2=True, tensor_parallel=True, trained=True) or lost:
            raise UnsupportedModuleError(f"{reason}.")
        _refuse_stored(key for key in stored_weights(hosts.unwrap(parameters)) if key in selection)
        groups = [{"params": _of_model(parameters, selection)}]
    else:
        if not isinstance(parameters, Iterable):
            raise TypeError(_nameless(parameters))
        groups = list(parameters)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
    groups = [{**group, "params": list(_named(group["params"]))} for group in groups]
    read = iter(fitted([name for name, _ in all_named(groups)], selection))
    groups = [{**group, "params": [(next(read), parameter) for _, parameter in group["params"]]} for group in groups]
    _refuse_stored(name for name, parameter in all_named(groups) if name in selection and is_stored(parameter))
    names: dict[Tensor, str] = {}
    for name, parameter in all_named(groups):
        if parameter in names:
            raise ValueError(f"{names[parameter]} and {name} are one parameter: pass it once.")
        names[parameter] = name
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(f"two parameters are named {twice}: pass the names of model.named_parameters().")
    return groups


def all_named(groups: Iterable[Group]) -> list[Named]:
    """Join the parameters of several groups.

    Args:
        groups: As from :func:`named_groups`.

    Returns:
        ``(name, parameter)`` of all groups, in order.
    """
    return [entry for group in groups for entry in group["params"]]


def settle(
    groups: Sequence[Group], selection: Selection, outside: Outside, *, frozen: Collection[str] = ()
) -> list[Group]:
    """Keep the parameters that the optimizer handles: the pool, and with ``outside="train"`` all other trainable ones.

    Args:
        groups: As from :func:`named_groups`.
        selection: What is selected.
        outside: What to do with trainable parameters outside the pool.
        frozen: Those that the optimizer froze itself, and can train again.

    Returns:
        The groups, narrowed.

    Raises:
        ValueError: A trainable parameter is outside the pool and ``outside`` is ``"error"``; a selected one is frozen,
            complex, or sharded in another way than FSDP2 and tensor parallel do.
    """
    strangers = [(n, p) for n, p in all_named(groups) if n not in selection and p.requires_grad]
    if strangers and outside == "error":
        raise ValueError(
            f"{len(strangers)} trainable parameters, {sum(p.numel() for _, p in strangers):,} entries, are outside the "
            f"selection's pool ({listed(n for n, _ in strangers)}): freeze them, estimate and select with them, or "
            "pass outside='freeze' or outside='train' to train them whole."
        )
    if outside == "freeze":
        for _, parameter in strangers:
            parameter.requires_grad_(False)
    counts = selection.counts
    trained = [(n, p) for n, p in all_named(groups) if counts.get(n)] + (strangers if outside == "train" else [])
    if still := [name for name, parameter in trained if not parameter.requires_grad and name not in frozen]:
        raise ValueError(
            f"{len(still)} parameters with selected entries have requires_grad=False ({listed(still)}) and would get "
            "no gradient: call requires_grad_(True) on them, or select with never=."
        )
    for name, parameter in trained:
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}, and only floating parameters are trained.")
        hosts.share_of(name, parameter)
    handled = {name for name, _ in trained} | {name for name, _ in all_named(groups) if name in selection}
    return [{**group, "params": [(n, p) for n, p in group["params"] if n in handled]} for group in groups]


def _refuse_stored(names: Iterable[str]) -> None:
    if names := list(names):
        raise UnsupportedModuleError(
            f"{len(names)} weights of the selection's pool are quantised and stored in another form ({listed(names)}), "
            "whose entries no optimizer can move: estimate without them (parameters=), or take the others with "
            "selection.restrict(...)."
        )


def _of_model(model: nn.Module, selection: Selection) -> list[Named]:
    """Name every parameter of a model once."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in hosts.named_parameters(model, remove_duplicate=False).items():
        names.setdefault(parameter, []).append(name)
    return [(next((n for n in aliases if n in selection), aliases[0]), p) for p, aliases in names.items()]


def _named(entries: Iterable[Named]) -> Iterator[Named]:
    for entry in entries:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[1], Tensor):
            raise TypeError(_nameless(entry))
        yield entry


def _nameless(given: object) -> str:
    return (
        "a masked optimizer identifies parameters by their names: pass the model, model.named_parameters(), or groups "
        f"of (name, parameter) pairs; got {type(given).__name__}."
    )

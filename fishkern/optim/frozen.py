"""Which parameters an optimizer took ``requires_grad`` from, because nothing of them is selected any more.

Their names are in the parameter groups, under :data:`FROZEN`, so that whatever saves and loads groups keeps them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fishkern.names import listed
from fishkern.optim.data_parallel import wrappers_of
from fishkern.selection import Selection

FROZEN = "frozen"  # key of a group


def frozen_in(groups: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Read which parameters are frozen.

    Args:
        groups: The groups of an optimizer, or those of a saved state.

    Returns:
        Their names, in the order of the groups.
    """
    return tuple(name for group in groups for name in group.get(FROZEN, ()))


def to_freeze(
    named: Iterable[tuple[str, Tensor]], selection: Selection, already: Collection[str], *, freeze: bool
) -> frozenset[str]:
    """Choose the parameters that need no gradient under a selection.

    Args:
        named: The optimizer's parameters.
        selection: What moves.
        already: Those that the optimizer froze before, which stay frozen until something of them is selected.
        freeze: Whether those of the pool without a selected entry that require a gradient are frozen, too.

    Returns:
        Their names. A parameter that somebody else froze is not among them.
    """
    counts = selection.counts
    unselected = [(name, parameter) for name, parameter in named if counts.get(name) == 0]
    return frozenset(name for name, parameter in unselected if name in already or (freeze and parameter.requires_grad))


def set_frozen_(groups: Sequence[dict[str, Any]], names: Collection[str]) -> None:
    """Freeze these parameters and no others; those that were frozen before require a gradient again.

    Args:
        groups: The optimizer's; changed in place.
        names: Of the parameters to freeze, whose ``.grad`` is dropped.

    Raises:
        RuntimeError: ``DistributedDataParallel`` was not built for this change; nothing is changed then.
    """
    stopping: dict[str, Tensor] = {}
    returning: dict[str, Tensor] = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in names:
                stopping[name] = parameter
            elif name in group.get(FROZEN, ()):
                returning[name] = parameter
    _check_exchange(stopping, returning)
    for parameter in stopping.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter in returning.values():
        parameter.requires_grad_(True)
    for group in groups:
        group[FROZEN] = [name for name in group["param_names"] if name in names]


def _check_exchange(stopping: Mapping[str, Tensor], returning: Mapping[str, Tensor]) -> None:
    """Refuse a change that ``DistributedDataParallel`` does not notice.

    It waits for the gradients of all parameters that required one when it was built. Without
    ``find_unused_parameters`` the gradients of a step in which one is missing are not exchanged, and only the next
    forward pass raises.

    Raises:
        RuntimeError: It was not built for this change.
    """
    stopping = {name: parameter for name, parameter in stopping.items() if parameter.requires_grad}
    returning = {name: parameter for name, parameter in returning.items() if not parameter.requires_grad}
    if not stopping and not returning:
        return
    for wrapper in wrappers_of([*stopping.values(), *returning.values()]):
        inside = set(wrapper.module.parameters())
        waited_for = [name for name, parameter in stopping.items() if parameter in inside]
        if waited_for and (wrapper.static_graph or not wrapper.find_unused_parameters):
            raise RuntimeError(
                f"{len(waited_for)} parameters ({listed(waited_for)}) would no longer require a gradient, and "
                "DistributedDataParallel would wait for theirs: build it with find_unused_parameters=True and without "
                "static_graph, or reselect with freeze=False."
            )
        if unknown := [name for name, parameter in returning.items() if parameter in inside]:
            raise RuntimeError(
                f"{len(unknown)} frozen parameters ({listed(unknown)}) are to be trained again, and "
                "DistributedDataParallel exchanges no gradient of a parameter that was frozen when it was built: call "
                "requires_grad_(True) on them, build it again, and then go on."
            )

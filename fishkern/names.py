"""The one name of a parameter, whatever the model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")

# Added to a path by torch.compile, FSDP1 and torch's activation checkpointing; no model uses these names itself.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """Remove the wrappers from the name of a parameter of a wrapped model.

    ``_orig_mod`` (torch.compile), ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` are removed everywhere,
    and ``module`` at the front. A name does not tell whether DDP put that ``module`` there or the model has a submodule
    of this name; with the model, :func:`fishkern.hosts.named_parameters` can tell. The last component, which is the
    parameter's own, and PEFT's prefixes stay. Applying it twice changes nothing.

    Args:
        name: A name from ``model.named_parameters()``, such as ``"module.layers.0._orig_mod.weight"``.

    Returns:
        The same name without wrappers: ``"layers.0.weight"``.
    """
    *path, own = without_wrappers(name).split(".")
    while path and path[0] == "module":
        del path[0]
    return ".".join([*path, own])


def without_wrappers(name: str) -> str:
    """Remove the components of a name that come from wrappers for certain.

    Args:
        name: A parameter's name.

    Returns:
        The name without them. ``module`` stays, since it may be the model's own.
    """
    *path, own = name.split(".")
    return ".".join([*(component for component in path if component not in _WRAPPERS), own])


def fitted(names: Sequence[str], known: Container[str]) -> list[str]:
    """Remove the wrappers from names that come without their model, so that they fit names that are known.

    DDP puts ``module.`` before every name, but a model may have a submodule ``module`` that contains all of it.

    Args:
        names: All names that ``model.named_parameters()`` gives.
        known: Canonical names of the same model, such as those of a selection.

    Returns:
        The names without wrappers, and without as many leading ``module.`` as makes most of them known.
    """
    # On a tie the fewer removed: where nothing is known, a name is the model's own.
    best = reading = [without_wrappers(name) for name in names]
    while reading and all(name.startswith("module.") for name in reading):
        reading = [name.removeprefix("module.") for name in reading]
        if sum(name in known for name in reading) > sum(name in known for name in best):
            best = reading
    return best


def renamed(items: Mapping[str, Item], fn: Callable[[str], str]) -> dict[str, Item]:
    """Give every item another name.

    Args:
        items: By the old names.
        fn: From the old name to the new one.

    Returns:
        The same items in the same order, by the new names.

    Raises:
        ValueError: Two names become one.
    """
    old_names: dict[str, str] = {}
    items_by_new: dict[str, Item] = {}
    for old, item in items.items():
        new = fn(old)
        if new in old_names:
            raise ValueError(f"{old_names[new]} and {old} would both be named {new}.")
        old_names[new], items_by_new[new] = old, item
    return items_by_new


def listed(names: Iterable[str], most: int = 3) -> str:
    """List the first few names, for a message.

    Args:
        names: All names.
        most: Maximal number of names to list.

    Returns:
        ``"a, b, c and 4 more"``.
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

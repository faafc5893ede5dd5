"""The one name of a parameter, whatever the model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")

# What torch.compile, FSDP1 and torch's activation checkpointing put into a path; no model uses these names.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """Take the wrappers out of the name of a parameter of a wrapped model.

    ``_orig_mod`` (torch.compile), ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` go wherever they stand,
    ``module`` from the front, for a name says not whether DDP put it there or the model has a submodule of that name:
    where the model is at hand, :func:`fishkern.hosts.named_parameters` knows. The last component is the parameter's own
    and stays, and so do PEFT's prefixes. Applying it twice changes nothing.

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
    """Take those components out of a name that no model has of its own.

    Args:
        name: A parameter's name.

    Returns:
        The name without them; ``module``, which may be the model's own, stays.
    """
    *path, own = name.split(".")
    return ".".join([*(component for component in path if component not in _WRAPPERS), own])


def fitted(names: Sequence[str], known: Container[str]) -> list[str]:
    """Read names that come without their model: be they its own, or have DDP put ``module.`` in front of all of them.

    Args:
        names: As ``model.named_parameters()`` gives them.
        known: Names that tell: of the two readings, the one of which more are known.

    Returns:
        The names without wrappers.
    """
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
    olds: dict[str, str] = {}
    found = {}
    for old, item in items.items():
        new = fn(old)
        if new in found:
            raise ValueError(f"{olds[new]} and {old} would both be named {new}.")
        olds[new], found[new] = old, item
    return found


def listed(names: Iterable[str], most: int = 3) -> str:
    """Name the first few, for a message.

    Args:
        names: All names.
        most: How many to spell out.

    Returns:
        ``"a, b, c and 4 more"``.
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

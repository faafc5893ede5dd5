"""The one name of a parameter, whatever the model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

Item = TypeVar("Item")

# What torch.compile, FSDP1 and torch's activation checkpointing put into a path; no model uses these names.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(name: str) -> str:
    """Take the wrappers out of a parameter's name.

    ``module`` (DDP, FSDP1) goes only from the front, because a model may own a submodule of that name further down;
    ``_orig_mod`` (torch.compile), ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` go wherever they stand.
    The last component is the parameter's own and stays, and so do PEFT's prefixes. Applying it twice changes nothing.

    Args:
        name: A name from ``model.named_parameters()``, such as ``"module.layers.0._orig_mod.weight"``.

    Returns:
        The same name without wrappers: ``"layers.0.weight"``.
    """
    *path, own = name.split(".")
    path = [component for component in path if component not in _WRAPPERS]
    while path and path[0] == "module":
        del path[0]
    return ".".join([*path, own])


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

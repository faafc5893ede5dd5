"""Which parameters a statistic is wanted of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

Predicate = Callable[[str, nn.Parameter], bool]
Wanted = Predicate | str | Sequence[str] | None
"""``None``, ``"all"``, patterns of names, or a predicate."""


def chosen_names(named: Mapping[str, nn.Parameter], wanted: Wanted) -> list[str]:
    """Find the parameters that are wanted.

    Args:
        named: All parameters by canonical name.
        wanted: ``None``: those that require a gradient. ``"all"``. A pattern of ``fnmatch`` for the whole name, or
            several. Or a predicate ``(name, parameter) -> bool``.

    Returns:
        Their names, in the model's order.

    Raises:
        TypeError: ``wanted`` is something else.
        ValueError: A pattern matches no name.
    """
    if wanted is None:
        return [name for name, parameter in named.items() if parameter.requires_grad]
    if wanted == "all":
        return list(named)
    if callable(wanted):
        return [name for name, parameter in named.items() if wanted(name, parameter)]
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(patterns, list | tuple | set | frozenset) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            "parameters must be None, 'all', patterns of names such as '*.bias', or a predicate (name, parameter) -> "
            f"bool, got {wanted!r}."
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"parameters={pattern!r} matches none of {len(named)} names such as {next(iter(named), '')!r}"
                f"{near(pattern, named)}. A pattern is for the whole name, as in '*.bias'."
            )
    return [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]


def near(name: str, names: Iterable[str]) -> str:
    """Say which names are near to one that is not there.

    Args:
        name: The name, or a pattern.
        names: Those that are there.

    Returns:
        A clause for a message; empty where none is near.
    """
    names = list(names)
    core = name.strip("*.")
    inside = [other for other in names if core and core in other]
    found = inside[:3] or get_close_matches(name, names, n=3, cutoff=0.75)
    return f" (did you mean {', '.join(map(repr, found))}?)" if found else ""

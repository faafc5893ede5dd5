"""The parameters that a statistic is requested for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

Predicate = Callable[[str, nn.Parameter], bool]
Requested = Predicate | str | Sequence[str] | None
"""``None``, ``"all"``, patterns of names, or a predicate."""


def requested_names(named: Mapping[str, nn.Parameter], requested: Requested) -> list[str]:
    """List the requested parameters.

    Args:
        named: All parameters by canonical name.
        requested: ``None``: those that require a gradient. ``"all"``. A pattern of ``fnmatch`` for the whole name, or
            several. Or a predicate ``(name, parameter) -> bool``.

    Returns:
        Their names, in the model's order.

    Raises:
        TypeError: ``requested`` is something else.
        ValueError: A pattern matches no name.
    """
    if requested is None:
        return [name for name, parameter in named.items() if parameter.requires_grad]
    if requested == "all":
        return list(named)
    if callable(requested):
        return [name for name, parameter in named.items() if requested(name, parameter)]
    patterns = [requested] if isinstance(requested, str) else requested
    if not isinstance(patterns, list | tuple | set | frozenset) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            "parameters must be None, 'all', patterns of names such as '*.bias', or a predicate (name, parameter) -> "
            f"bool, got {requested!r}."
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"parameters={pattern!r} matches none of {len(named)} names such as {next(iter(named), '')!r}"
                f"{near(pattern, named)}. A pattern is for the whole name, as in '*.bias'."
            )
    return [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]


def near(name: str, names: Iterable[str]) -> str:
    """List names that are similar to an unknown one.

    Args:
        name: The unknown name, or a pattern.
        names: The known ones.

    Returns:
        A clause for a message; empty if none is similar.
    """
    names = list(names)
    core = name.strip("*.")
    containing = [other for other in names if core and core in other]
    similar = containing[:3] or get_close_matches(name, names, n=3, cutoff=0.75)
    return f" (did you mean {', '.join(map(repr, similar))}?)" if similar else ""

"""``merge``: the mean of statistics of different data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fishkern.arguments import weights_of
from fishkern.names import listed
from fishkern.statistics.held import Held

Result = TypeVar("Result", bound=Held)


def merge(a: Result, b: Result | None = None, *more: Result, weights: Sequence[float] | None = None) -> Result:
    """Merge statistics of different data into those of all the data: the mean, weighted by ``count``.

    merged[name] = sum_s count_s * s[name] / sum_s count_s, in float64. ``merge(a, b) == merge(b, a)``.

    Args:
        a: Statistics of some data.
        b: The same statistic, of the same parameters, on other data.
        more: Any number of further ones.
        weights: One for each of them, instead of the counts; at least 0, not all of them 0. They become part of the
            result's definition, so it merges only with results of the same weights.

    Returns:
        New statistics on ``a``'s device and in its order; ``count`` is the sum, ``runs`` are concatenated. If a
        parameter took different paths, the coverage has the slower one, and every reason.

    Raises:
        TypeError: An argument is not statistics, or there are fewer than two.
        ValueError: They differ in definition, names, shapes or sizes of parameters; the message says where. They are
            running means, whose counts are no weights. Or ``weights`` are not one number of at least 0 for each, or
            all 0.
    """
    parts = (a, b, *more)
    check_results(parts, "merge")
    if None in parts[1:]:
        raise TypeError("merge takes two statistics or more: merge(a, b).")
    for part in parts[1:]:
        _check_mergeable(a, part)
    shares = _shares(parts, weights)
    definition = a.provenance["definition"]
    if weights is None and "decay" in definition:
        raise ValueError(
            "running means over a training do not merge: each has forgotten its early steps, so their counts are not "
            "their weights. Pass weights= for a mean of your own, such as equal ones for several ranks."
        )
    if weights is not None:
        definition["weights"] = [*definition.get("weights", []), list(shares)]  # one list for each such merge
    return type(a).mean(parts, shares, definition)


def check_results(parts: Sequence[object], function: str) -> None:
    """Refuse anything but results of one kind.

    Args:
        parts: The arguments of the caller; ``None`` is passed over.
        function: The name of the caller.

    Raises:
        TypeError: There are none, one is not a result, or they are of several kinds.
    """
    if not parts:
        raise TypeError(f"{function} takes statistics one by one: {function}(a, b).")
    others = [part for part in parts if part is not None and not isinstance(part, Held)]
    if others and isinstance(others[0], list | tuple):
        raise TypeError(f"{function} takes statistics one by one: {function}(*parts), not {function}(parts).")
    if others:
        raise TypeError(
            f"{function} takes statistics, such as estimate gives, got {type(others[0]).__name__}. To average models, "
            "take fishkern.fisher_merge."
        )
    if kinds := {type(part).__name__ for part in parts if part is not None and type(part) is not type(parts[0])}:
        raise TypeError(f"{function} takes results of one kind, got {type(parts[0]).__name__} and {', '.join(kinds)}.")


def _shares(parts: Sequence[Held], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each part."""
    if weights is None:
        return [part.count for part in parts]
    return weights_of(weights, len(parts), "statistics")


def check_definitions(a: Held, b: Held, do: str, apart_from: Sequence[str] = ()) -> None:
    """Refuse results of different definitions.

    Args:
        a: A result.
        b: Another one.
        do: What results of one definition do, such as ``"merge"``.
        apart_from: Entries of the definitions that may differ.

    Raises:
        ValueError: They differ; the message says in what.
    """
    ours, theirs = (
        {key: value for key, value in one.provenance["definition"].items() if key not in apart_from} for one in (a, b)
    )
    if ours != theirs:
        keys = [key for key in (ours | theirs) if key not in ours or key not in theirs or ours[key] != theirs[key]]
        values = [f"{key} ({_shown(ours, key)} and {_shown(theirs, key)})" for key in keys]
        raise ValueError(f"only statistics of one definition {do}; these differ in {', '.join(values)}.")


def _check_mergeable(a: Held, b: Held) -> None:
    check_definitions(a, b, "merge")
    for some, others in ((a, b), (b, a)):
        if missing := [name for name in some if name not in others]:
            raise ValueError(
                f"only statistics of the same parameters merge; one lacks {listed(missing)}. Those of different "
                "parameters on the same data are joined by fishkern.union."
            )
    for name, shape in a.shapes.items():
        if shape != b.shapes[name]:
            raise ValueError(f"{name} has shape {tuple(shape)} in one and {tuple(b.shapes[name])} in the other.")


def _shown(definition: Mapping[str, Any], key: str) -> str:
    return repr(definition[key]) if key in definition else "absent"

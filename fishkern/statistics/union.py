"""``union``: statistics of some parameters and of others, on the same data, in one result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fishkern.files import AnyTensor
from fishkern.names import listed
from fishkern.statistics.coverage import Covered
from fishkern.statistics.held import Held
from fishkern.statistics.merge import check_definitions, check_results

Result = TypeVar("Result", bound=Held)

# What describes how a run went, and not what it was of: parts of one model may differ in it.
_HOW = frozenset(("dtype", "batches", "batch_size", "passes", "ranks", "checked", "torch", "note", "logits"))


def union(*statistics: Result) -> Result:
    """Join statistics of disjoint parameters of one model, estimated on the same data.

    This is the estimate of all these parameters: ``union(estimate(..., parameters=some), estimate(...,
    parameters=others)) == estimate(..., parameters=all of them)``, but for what ``runs`` says of how they were made. To
    join statistics of the same parameters on different data, see :func:`fishkern.merge`.

    Statistics do not contain the data. What they say of it (counts, numbers of examples, names of files, seeds of
    draws) must be equal; that the examples were the same is the caller's word.

    Args:
        statistics: Results of one kind.

    Returns:
        A new result with the tensors of all, not copied, in the model's order where the coverage says it. In ``runs``
        the dtypes are those of all parts, and what differs in how they were made is a list, one entry for each part.

    Raises:
        TypeError: An argument is not statistics, there are none, or they are of several kinds.
        ValueError: They differ in definition, data or model, or a parameter is in two of them; the message says which.
    """
    check_results(statistics, "union")
    first = statistics[0]
    for part in statistics[1:]:
        check_definitions(first, part, "form a union", apart_from=("groups",))
    _demand_disjoint(statistics)
    _demand_same_data(statistics)
    coverage = _coverage(statistics)
    definition = first.provenance["definition"]
    groups: dict[str, list[str]] = {}
    for part in statistics:
        groups |= part.provenance["definition"].get("groups", {})
    if groups:
        definition["groups"] = groups
    runs = [_joined(runs) for runs in zip(*(part.provenance["runs"] for part in statistics), strict=True)]
    return type(first)(
        _in_order(statistics, list(coverage), groups),
        count=first.count,
        provenance={"definition": definition, "runs": runs},
        coverage=coverage,
    )


def _demand_disjoint(parts: Sequence[Held]) -> None:
    names = Counter(name for part in parts for name in part)
    if twice := [name for name, number in names.items() if number > 1]:
        verb = "is" if len(twice) == 1 else "are"
        raise ValueError(
            f"only statistics of disjoint parameters form a union, and {listed(twice)} {verb} in several. "
            "Statistics of the same parameters on different data merge: fishkern.merge."
        )


def _demand_same_data(parts: Sequence[Held]) -> None:
    """Refuse parts that say themselves that they are of different data."""
    counts = [part.count for part in parts]
    if len(set(counts)) > 1:
        raise ValueError(
            f"only statistics of the same data form a union; these are means over {listed(map(str, counts))} units."
        )
    runs = [part.provenance["runs"] for part in parts]
    if len({len(own) for own in runs}) > 1:
        numbers = listed(str(len(own)) for own in runs)
        raise ValueError(f"only statistics of the same data form a union; these are of {numbers} runs.")
    for same in zip(*runs, strict=True):
        for other in same[1:]:
            keys = (same[0].keys() | other.keys()) - _HOW
            if differ := sorted(key for key in keys if same[0].get(key) != other.get(key)):
                values = ", ".join(f"{key} ({same[0].get(key)!r} and {other.get(key)!r})" for key in differ)
                raise ValueError(f"only statistics of the same data form a union; these differ in {values}.")


def _coverage(parts: Sequence[Held]) -> dict[str, Covered]:
    """Say how each parameter was computed by the part that has it; empty if that is unknown of a part."""
    if not all(part.coverage for part in parts):
        return {}
    joined = dict(parts[0].coverage)
    for part in parts[1:]:
        others = part.coverage
        if odd := joined.keys() ^ others.keys():
            raise ValueError(f"these are statistics of different models: {listed(sorted(odd))} in one of them only.")
        for name, covered in others.items():
            if covered.numel != joined[name].numel:
                raise ValueError(
                    f"these are statistics of different models: {name} has {joined[name].numel} coordinates in one and "
                    f"{covered.numel} in the other."
                )
            if covered.path != "left out":
                joined[name] = covered
    return joined


def _in_order(parts: Sequence[Held], model: list[str], groups: Mapping[str, Sequence[str]]) -> dict[str, AnyTensor]:
    """Give the tensors of all parts in the model's order, or in that of the parts where it is not known."""
    of_name: dict[str, dict[str, AnyTensor]] = {}
    for part in parts:
        for entry, tensor in part.blocks.items():
            of_name.setdefault(part.name_of(entry), {})[entry] = tensor
    places = {name: place for place, name in enumerate(model)}

    def place(name: str) -> int:
        return min((places[one] for one in groups.get(name, (name,))), default=0)

    names = sorted(of_name, key=place) if places else list(of_name)
    return {entry: tensor for name in names for entry, tensor in of_name[name].items()}


def _joined(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Describe the runs of all parts over one set of data as one."""
    joined = dict(runs[0])
    for key in _HOW & {key for run in runs for key in run}:
        values = [run.get(key) for run in runs]
        if key == "dtype":
            joined[key] = sorted({dtype for dtypes in values for dtype in dtypes or ()})
        elif any(value != values[0] for value in values):
            joined[key] = values
    return joined

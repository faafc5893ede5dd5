"""Coverage: how the statistics of each parameter were computed, or why they were not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

# In the order in which merging prefers the later one: of two runs, the slower path is what the reader should know.
PATHS = ("batch", "sketch", "fused", "generic", "loop", "left out")
# In the place of a path, in what is said before a run.
ONLY_A_RUN = "only a run can tell"


@dataclass(frozen=True)
class Covered:
    """How the statistics of one parameter were computed, or why they were not.

    Attributes:
        path: ``"fused"`` (kernel or rule of the layer), ``"generic"`` (per-example gradients of the smallest enclosing
            module), ``"loop"`` (the whole model, one example at a time), ``"sketch"`` (random signs), ``"batch"`` (the
            batch gradient), or ``"left out"``.
        numel: Coordinates of the parameter, whatever the shape of its statistic.
        reason: Why it took this path, or who excluded it, in words.
    """

    path: str
    numel: int
    reason: str = ""

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {PATHS}, got {self.path!r}.")


def slowest_paths(several: Iterable[Mapping[str, tuple[str, str]]]) -> dict[str, tuple[str, str]]:
    """Join the paths that parameters took in several batches or on several ranks.

    Args:
        several: Path and reason by canonical name.

    Returns:
        The slowest path that each parameter has taken, with the latest reason for it.
    """
    slowest: dict[str, tuple[str, str]] = {}
    for paths in several:
        for key, (path, reason) in paths.items():
            if PATHS.index(path) >= PATHS.index(slowest.get(key, (path, ""))[0]):
                slowest[key] = (path, reason)
    return slowest


def check_coverage(
    names: Collection[str], coverage: Mapping[str, Covered], groups: Mapping[str, Collection[str]]
) -> None:
    """Check that a coverage, if there is one, names the same parameters as a result.

    Args:
        names: Names in the result.
        coverage: By parameter; may be empty.
        groups: For each name that is not a parameter's, the parameters of that group.

    Raises:
        ValueError: They contradict each other.
    """
    if not coverage:
        return
    included = {parameter: name for name in names for parameter in groups.get(name, (name,))}
    for parameter in included:
        if parameter not in coverage:
            raise ValueError(f"{parameter} has a statistic, but coverage does not list it.")
        if coverage[parameter].path == "left out":
            raise ValueError(f"{parameter} has a statistic, but coverage says it was left out.")
    for parameter, covered in coverage.items():
        if covered.path != "left out" and parameter not in included:
            raise ValueError(f"coverage says {covered.path} for {parameter}, which has no statistic.")


def merged_coverage(a: Mapping[str, Covered], b: Mapping[str, Covered]) -> dict[str, Covered]:
    """Join the coverages of two statistics of one model.

    Args:
        a: By parameter name.
        b: The same.

    Returns:
        The slower path of each parameter, and both reasons.

    Raises:
        ValueError: A parameter has another size in the other.
    """
    merged = dict(a)
    for name, covered in b.items():
        merged[name] = _slower(name, merged.get(name, covered), covered)
    return merged


def _slower(name: str, a: Covered, b: Covered) -> Covered:
    if a.numel != b.numel:
        raise ValueError(f"{name} has {a.numel} coordinates in one model and {b.numel} in the other.")
    reasons = {reason for covered in (a, b) for reason in covered.reason.split("; ") if reason}
    return Covered(max(a.path, b.path, key=PATHS.index), a.numel, "; ".join(sorted(reasons)))

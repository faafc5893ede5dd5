"""How the statistics of each parameter were computed, or why they were not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fishkern.files import AnyTensor

# In the order in which merging prefers the later one: of two runs, the slower path is what the reader should know.
PATHS = ("batch", "sketch", "fused", "generic", "loop", "left out")


@dataclass(frozen=True)
class Covered:
    """How the statistics of one parameter were computed, or why they were not.

    Attributes:
        path: ``"fused"`` (kernel or rule of the layer), ``"generic"`` (per-example gradients of the smallest enclosing
            module), ``"loop"`` (the whole model, one example at a time), ``"sketch"`` (random signs), ``"batch"`` (the
            batch gradient), or ``"left out"``.
        numel: Coordinates of the parameter.
        reason: Why this path, in words; by whose word it was left out.
    """

    path: str
    numel: int
    reason: str = ""

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {PATHS}, got {self.path!r}.")


def slowest_paths(several: Iterable[Mapping[str, tuple[str, str]]]) -> dict[str, tuple[str, str]]:
    """Join what several batches or ranks say about the paths of parameters.

    Args:
        several: Path and reason by canonical name.

    Returns:
        The slowest path that each parameter has taken, by the last word on it.
    """
    slowest: dict[str, tuple[str, str]] = {}
    for paths in several:
        for key, (path, reason) in paths.items():
            if PATHS.index(path) >= PATHS.index(slowest.get(key, (path, ""))[0]):
                slowest[key] = (path, reason)
    return slowest


def check_coverage(entries: Mapping[str, AnyTensor], coverage: Mapping[str, Covered]) -> None:
    """Demand, where there is a coverage, that it and the tensors say the same.

    Args:
        entries: Tensors by parameter name.
        coverage: May be empty.

    Raises:
        ValueError: They contradict each other.
    """
    if not coverage:
        return
    for name, entry in entries.items():
        if name not in coverage:
            raise ValueError(f"{name} is held, but coverage says nothing of it.")
        covered = coverage[name]
        if covered.path == "left out":
            raise ValueError(f"{name} is held, but coverage says it was left out.")
        if covered.numel != entry.numel():
            raise ValueError(
                f"{name} has {entry.numel()} coordinates, but coverage says {covered.numel}: a statistic has its "
                "parameter's shape; sum over axes or groups afterwards."
            )
    for name, covered in coverage.items():
        if covered.path != "left out" and name not in entries:
            raise ValueError(f"coverage says {covered.path} of {name}, which is not held.")


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

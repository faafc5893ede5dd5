"""``merge``: the mean of statistics of different data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from fishkern.names import listed
from fishkern.statistics.coverage import merged_coverage
from fishkern.statistics.result import Statistics


def merge(a: Statistics, b: Statistics, *more: Statistics) -> Statistics:
    """Merge statistics of different data into those of all of it: the mean, weighted by ``count``.

    merged[name] = sum_s count_s * s[name] / sum_s count_s, in float64. ``merge(a, b) == merge(b, a)``.

    Args:
        a: Statistics of some data.
        b: The same statistic, of the same parameters, on other data.
        more: Any number of further ones.

    Returns:
        New statistics on ``a``'s device and in its order; ``count`` is the sum, ``runs`` are concatenated. Where a
        parameter took different paths, the coverage has the slower one, and every reason.

    Raises:
        ValueError: They differ in definition, names, shapes or sizes of parameters; the message says where.
    """  # noqa: DOC502
    parts = (a, b, *more)
    for part in parts[1:]:
        _check_mergeable(a, part)
    count = sum(part.count for part in parts)
    tensors = {}
    for name, shape in a.shapes.items():
        tensors[name] = torch.empty(shape, dtype=torch.float32, device=a.blocks[name].device)
        rest = tensors[name].view(-1)
        for aligned in zip(*(part.pieces(name) for part in parts), strict=True):
            doubles = (piece.to(rest.device, torch.float64) for piece in aligned)
            weighted = (part.count * double for part, double in zip(parts, doubles, strict=True))
            rest[: len(aligned[0])] = sum(weighted) / count
            rest = rest[len(aligned[0]) :]
    definition = a.provenance["definition"]
    runs = [run for part in parts for run in part.provenance["runs"]]
    return Statistics(
        tensors,
        count=count,
        provenance={"definition": definition, "runs": runs},
        coverage=reduce(merged_coverage, (part.coverage for part in parts)),
    )


def _check_mergeable(a: Statistics, b: Statistics) -> None:
    ours, theirs = a.provenance["definition"], b.provenance["definition"]
    if ours != theirs:
        keys = [key for key in (ours | theirs) if key not in ours or key not in theirs or ours[key] != theirs[key]]
        values = [f"{key} ({_shown(ours, key)} and {_shown(theirs, key)})" for key in keys]
        raise ValueError(f"only statistics of one definition merge; these differ in {', '.join(values)}.")
    for some, others in ((a, b), (b, a)):
        if missing := [name for name in some if name not in others]:
            raise ValueError(f"only statistics of the same parameters merge; one lacks {listed(missing)}.")
    for name, shape in a.shapes.items():
        if shape != b.shapes[name]:
            raise ValueError(f"{name} has shape {tuple(shape)} in one and {tuple(b.shapes[name])} in the other.")


def _shown(definition: Mapping[str, Any], key: str) -> str:
    return repr(definition[key]) if key in definition else "absent"

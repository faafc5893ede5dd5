"""From statistics to a selection, by a rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor, StoredTensor
from fishkern.names import without_wrappers
from fishkern.selection.base import Rule, matching
from fishkern.selection.result import Selection
from fishkern.statistics import Statistics

_DIGESTED = 256  # scores of each parameter that its fingerprint looks at


def select(
    statistics: Statistics | Mapping[str, AnyTensor], rule: Rule, *, backend: Backend | None = None
) -> Selection:
    """Choose coordinates by their scores.

    Statistics that were loaded lazily are read piece by piece, never as a whole: once beside a small sample, and again
    where the sample does not tell enough, or where the last score selected is zero, to count the zeros.

    Args:
        statistics: What the rule sorts by: statistics, or any mapping from names to floating tensors, in memory or
            :class:`~fishkern.files.StoredTensor`. Every name in it belongs to the pool. Scores of a mapping may be
            negative; their sign counts.
        rule: How to choose, for example ``GlobalTopK(density=0.005)``.
        backend: ``None`` for the ambient choice, see :mod:`fishkern.backend`.

    Returns:
        The selection. Its provenance holds the rule, ``k`` (what the rule chose, without ``always``) and a digest of
        the statistics: over names, shapes, provenance and 256 scores of each parameter, so that it tells statistics
        apart and is no checksum.

    Raises:
        TypeError: ``rule`` is no rule or holds what is not JSON, or an entry is not a floating tensor.
        ValueError: ``k`` exceeds what can be chosen from, a pattern matches nothing, a score is NaN, or two names
            become one without wrappers.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a selection rule such as GlobalTopK(density=0.005), got {rule!r}.")
    try:
        json.dumps(rule.settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = type(rule).__name__
        raise TypeError(f"{what} must hold plain values, for the header of a file: {error}.") from None
    scores = _scores(statistics)
    shapes = {name: score.shape for name, score in scores.items()}
    always, never = matching(rule.always, scores, "always"), matching(rule.never, scores, "never")
    if both := set(always) & set(never):
        raise ValueError(f"{min(both)} is in always= and in never=: leave it out of one.")
    kept = {name: score for name, score in scores.items() if name not in {*always, *never}}
    total = sum(score.numel() for score in scores.values())
    indices = rule.choose(kept, total, backend)
    described = {"digest": _digest(statistics, scores)}
    if isinstance(statistics, Statistics):
        described |= {"count": statistics.count, "definition": statistics.provenance["definition"]}
    k = sum(len(chosen) for chosen in indices.values())
    provenance = {"rule": rule.settings, "k": k, "statistics": described}
    return Selection(shapes, indices, whole=always, provenance=provenance)


def _scores(statistics: Statistics | Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    if isinstance(statistics, Statistics):
        return dict(statistics.blocks)
    scores: dict[str, AnyTensor] = {}
    for name, score in statistics.items():
        if not isinstance(score, Tensor | StoredTensor) or not score.dtype.is_floating_point:
            what = getattr(score, "dtype", type(score).__name__)
            raise TypeError(f"scores are floating tensors, {name} is {what}: cast it.")
        if (short := without_wrappers(name)) in scores:
            raise ValueError(f"two names become {short} without wrappers: leave one out.")
        scores[short] = score.detach() if isinstance(score, Tensor) else score
    return scores


def _digest(statistics: Statistics | Mapping[str, AnyTensor], scores: Mapping[str, AnyTensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(statistics, Statistics):
        digest.update(json.dumps([statistics.count, statistics.provenance], sort_keys=True).encode())
    for name, score in sorted(scores.items()):
        digest.update(json.dumps([name, list(score.shape)]).encode())
        middle = max(0, score.numel() - _DIGESTED) // 2
        if score.numel():
            part = _part(score, middle)
            digest.update(part.float().cpu().numpy().tobytes())
    return f"blake2b:{digest.hexdigest()}"


def _part(score: AnyTensor, start: int) -> Tensor:
    if isinstance(score, StoredTensor):
        return next(score.pieces(_DIGESTED, start=start))
    return score.reshape(-1)[start : start + _DIGESTED]

"""From statistics to a selection, by a rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor
from fishkern.selection.base import Rule
from fishkern.selection.ranking import count_selected
from fishkern.selection.result import Selection
from fishkern.selection.scored import Scored, pool_of
from fishkern.selection.sharded import sharded_selection
from fishkern.selection.shards import Shards, read_at
from fishkern.statistics import FactoredStatistics, Statistics

_DIGESTED = 256  # scores of each parameter that the digest covers


def select(
    statistics: Scored,
    rule: Rule,
    *,
    backend: Backend | None = None,
) -> Selection:
    """Choose coordinates by their scores.

    Statistics that were loaded lazily are read piece by piece, never as a whole: once, after a small sample, and again
    where the sample is not enough, or where the last selected score is zero, to count the zeros. A rule of your
    own gets a tensor, read whole, for each score that it looks up (but see :attr:`Rule.streams`).

    Args:
        statistics: What the rule sorts by: statistics, or any mapping from names to floating tensors, in memory or
            :class:`~fishkern.files.StoredTensor`. Every name in it belongs to the pool. Scores of a mapping may be
            negative; their sign counts. Of factored statistics the score of every entry is formed first, in float32.
            Where any of them is a ``DTensor``, as in the statistics of a model that FSDP2 shards, all ranks call it
            together; others are then whole and alike on every rank.
        rule: How to choose, for example ``GlobalTopK(density=0.005)``.
        backend: ``None`` for the current default, see :mod:`fishkern.backend`. Rules of rows (:class:`PerRowTopK`,
            :class:`NofM`) and :class:`Random` have no operation that it would choose.

    Returns:
        The selection. Its provenance holds the rule, ``k`` (what the rule chose, without ``always``) and a digest of
        the statistics: over names, shapes, provenance and 256 scores of each parameter. It distinguishes statistics
        from each other, and is not a checksum. Of ``DTensor`` scores it is a :class:`ShardedSelection`: what one
        process would select of the whole, of which each rank has the entries that it holds.

    Raises:
        TypeError: ``rule`` is not a rule or has a field that is not JSON, ``statistics`` is not a mapping, an entry is
            not a floating tensor with values, or the rule does not return indices by name.
        ValueError: ``k`` exceeds what can be chosen from, a pattern matches nothing, a score is NaN, two names
            become one without wrappers, statistics are of groups of entries, or the rule selects from a parameter whose
            scores it did not get.
        RuntimeError: Another rank has failed, or ranks differ in the rule or in scores that they all hold.
    """
    scores, always, ranked = pool_of(statistics, rule)
    total = sum(score.numel() for score in scores.values())
    indices, about = rule.choose_and_report(ranked if rule.streams else _OnAccess(ranked), total, backend)
    _check_indices(f"{type(rule).__name__}.choose", indices, ranked)
    described = {"digest": _digest(statistics, scores)}
    if isinstance(statistics, Statistics | FactoredStatistics):
        described |= {"count": statistics.count, "definition": statistics.provenance["definition"]}
    k = sum(count_selected(ranked, indices).values())
    provenance = {"rule": rule.settings, "k": k, "statistics": described, **about}
    if isinstance(scores, Shards):
        return sharded_selection(scores.regions, indices, whole=always, provenance=provenance)
    shapes = {name: score.shape for name, score in scores.items()}
    return Selection(shapes, indices, whole=always, provenance=provenance)


class _OnAccess(Mapping[str, Tensor]):
    """Scores as tensors: one on disk is read whenever it is looked up, and not kept."""

    def __init__(self, scores: Mapping[str, AnyTensor]) -> None:
        self._scores = scores

    def __getitem__(self, name: str) -> Tensor:
        score = self._scores[name]
        return score if isinstance(score, Tensor) else score.read(torch.promote_types(score.dtype, torch.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __contains__(self, name: object) -> bool:
        return name in self._scores  # Mapping's own would read the tensor


def _check_indices(what: str, indices: object, scores: Mapping[str, AnyTensor]) -> None:
    if not isinstance(indices, Mapping):
        raise TypeError(f"{what} must give flat indices by name, a dict of tensors [K]; got {type(indices).__name__}.")
    for name, selected in indices.items():
        if name not in scores:
            raise ValueError(
                f"{what} selects from {name}, which is not among the {len(scores)} scores that it got (not in the "
                "pool, or in always= or never=)."
            )
        if not isinstance(selected, Tensor) or selected.ndim != 1:
            shown = tuple(selected.shape) if isinstance(selected, Tensor) else type(selected).__name__
            raise TypeError(f"{what} must give flat indices, a tensor [K] for each name; for {name} it gave {shown}.")


def _digest(statistics: Mapping[str, AnyTensor], scores: Mapping[str, AnyTensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(statistics, Statistics | FactoredStatistics):
        digest.update(json.dumps([statistics.count, statistics.provenance], sort_keys=True).encode())
    starts = {name: max(0, score.numel() - _DIGESTED) // 2 for name, score in scores.items()}
    places = {name: range(start, min(start + _DIGESTED, scores[name].numel())) for name, start in starts.items()}
    if isinstance(scores, Shards):
        parts = scores.read(places)
    else:
        parts = {name: read_at(score, places[name]) for name, score in scores.items()}
    for name, score in sorted(scores.items()):
        digest.update(json.dumps([name, list(score.shape)]).encode())
        digest.update(parts[name].numpy().tobytes())
    return f"blake2b:{digest.hexdigest()}"

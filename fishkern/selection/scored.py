"""What a rule sorts by: statistics of entries, or any mapping of scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from hashlib import blake2b
from typing import TypeAlias

import torch
from torch import Tensor

from fishkern.arguments import from_file
from fishkern.files import AnyTensor, StoredTensor, is_sharded
from fishkern.names import without_wrappers
from fishkern.selection.base import Rule, matching
from fishkern.selection.shards import Shards
from fishkern.statistics import FactoredStatistics, Held, Statistics
from fishkern.statistics.shards import Ranks

Scored: TypeAlias = Statistics | FactoredStatistics | Mapping[str, AnyTensor]


def pool_of(statistics: Scored, rule: Rule) -> tuple[Mapping[str, AnyTensor], list[str], Mapping[str, AnyTensor]]:
    """Check what a rule is to sort by, and separate what it chooses from. Of shards a collective operation.

    Args:
        statistics: See :func:`fishkern.select`.
        rule: The rule.

    Returns:
        The scores of the whole pool by canonical name, not read; the names that are selected whole; and the scores of
        what is neither selected whole nor never. Where ranks hold parts of any of them, both are
        :class:`~fishkern.selection.shards.Shards`.

    Raises:
        TypeError: It is not a rule or has a field that is not JSON, they are not a mapping of floating tensors with
            values, or they are shards, and the rule takes none.
        ValueError: Two names become one without wrappers, statistics are of groups of entries, or patterns do not fit.
        RuntimeError: The ranks differ in what they select from, or another rank has failed.
    """
    if not isinstance(statistics, Held) and callable(getattr(statistics, "items", None)):
        statistics = dict(statistics.items())  # once, since it may read
    ranks, on_shards = Ranks(), _on_shards(statistics)
    with ranks.failing_together() if on_shards else nullcontext():
        _check_rule(rule)
        scores: Mapping[str, AnyTensor] = scores_of(statistics)
        always, ranked = split_off(rule, scores)
        if on_shards:
            if not rule.on_shards:
                raise TypeError(
                    f"the scores are sharded over processes, and {type(rule).__name__} does not say on_shards = True: "
                    "save the statistics on all ranks, and select from the file on each, "
                    "fishkern.Statistics.load(path, lazy=True), or from statistics.whole() where that fits into memory."
                )
            scores = Shards(scores)
            ranked = scores.only(ranked)
    if on_shards:
        about = [(n, list(one.shape), str(one.dtype), str(getattr(one, "placements", ""))) for n, one in scores.items()]
        digest = blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
        ranks.demand_equal([rule.settings, digest], "the rule, or the scores' names, shapes, dtypes or placements")
    return scores, always, ranked


def scores_of(statistics: Scored) -> dict[str, AnyTensor]:
    """Check what a rule is to sort by, and give it by name.

    Args:
        statistics: See :func:`fishkern.select`.

    Returns:
        The scores of the whole pool by canonical name, without gradients; not read.

    Raises:
        TypeError: They are not a mapping of floating tensors with values.
        ValueError: Two names become one without wrappers, or statistics are of groups of entries.
    """
    if isinstance(statistics, Statistics):
        _refuse_groups(statistics)
        for name, score in statistics.blocks.items():
            _check_score(name, score)
        return dict(statistics.blocks)
    if isinstance(statistics, FactoredStatistics):
        return dict(statistics)
    if isinstance(statistics, Held):
        raise TypeError(
            f"select ranks the entries of parameters, and {type(statistics).__name__} are of directions: take "
            "statistics of entries, such as DiagonalFisher(), or fishkern.initialize for the directions of an adapter."
        )
    if not callable(getattr(statistics, "items", None)):
        raise TypeError(
            "scores come as statistics or as a mapping from names to tensors, such as dict(model.named_parameters()); "
            f"got {type(statistics).__name__}{from_file(statistics)}."
        )
    scores: dict[str, AnyTensor] = {}
    for name, score in statistics.items():
        if not isinstance(name, str):
            raise TypeError(f"scores are given by the names of parameters, strings; got {name!r}.")
        _check_score(name, score)
        if (short := without_wrappers(name)) in scores:
            raise ValueError(f"two names become {short} without wrappers: leave one out.")
        scores[short] = score.detach() if isinstance(score, Tensor) else score
    return scores


def split_off(rule: Rule, scores: Mapping[str, AnyTensor]) -> tuple[list[str], dict[str, AnyTensor]]:
    """Separate the parameters that a rule chooses from, from those that its patterns decide.

    Args:
        rule: Whose ``always`` and ``never``.
        scores: Of the whole pool, by name.

    Returns:
        The names of those selected whole, and the scores of what is neither selected whole nor never.

    Raises:
        ValueError: A pattern matches no name, or two patterns of both kinds match one.
    """
    always, never = matching(rule.always, scores, "always"), matching(rule.never, scores, "never")
    if both := set(always) & set(never):
        raise ValueError(f"{min(both)} is in always= and in never=: leave it out of one.")
    decided = {*always, *never}
    return always, {name: score for name, score in scores.items() if name not in decided}


def _check_rule(rule: Rule) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a selection rule such as GlobalTopK(density=0.005), got {rule!r}.")
    try:
        json.dumps(rule.settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = type(rule).__name__
        raise TypeError(f"{what} must hold plain values, for the header of a file: {error}.") from None


def _on_shards(statistics: object) -> bool:
    """Tell whether each rank holds a part of some scores, without reading any."""
    scores = statistics.blocks if isinstance(statistics, Held) else statistics
    return isinstance(scores, Mapping) and any(map(is_sharded, scores.values()))


def _refuse_groups(statistics: Statistics) -> None:
    """Refuse statistics that hold something else than a score for each entry, such as one for each row."""
    for name, shape in statistics.shapes.items():
        covered = statistics.coverage.get(name)
        if "groups" in statistics.provenance["definition"] or (covered and covered.numel != shape.numel()):
            size = f" of a parameter of {covered.numel:,} entries" if covered else ""
            raise ValueError(
                f"a rule chooses entries by one score for each, and these statistics hold {tuple(shape)} for "
                f"{name}{size}: estimate DiagonalFisher() for scores of entries, or choose rows or columns by yours "
                "and name them in Selection(..., ranges={name: fishkern.Rows(...)})."
            )


def _check_score(name: str, score: object) -> None:
    if not isinstance(score, Tensor | StoredTensor):
        what = type(score).__name__
        raise TypeError(f"scores are floating tensors, {name} is {what}: make a tensor of it (torch.as_tensor).")
    if not score.dtype.is_floating_point:
        raise TypeError(f"scores are floating tensors, {name} is {score.dtype}: cast it.")
    if isinstance(score, StoredTensor):
        return
    if score.is_nested or score.layout != torch.strided:
        what = "nested" if score.is_nested else str(score.layout)
        raise TypeError(f"scores are dense tensors, {name} is {what}: make it dense, as by to_dense().")
    if score.is_meta:
        raise TypeError(f"{name} is on the meta device, where scores have no values: load it first.")

"""FARSS (Chen et al., Findings of ACL 2026): LoRA that starts from components of the weights, by their Fisher score.

Shallow layers hold the knowledge of a pretrained model. So their matrices get ranks that are inverse to their
importance, and start from the components ``sigma_i u_i v_i^T`` that the task needs least; deep layers start from those
that it needs most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, pstdev
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import at_least, integer
from fishkern.backend import Backend
from fishkern.initialization import (
    AdapterInit,
    DirectionInit,
    InverseImportance,
    RankRule,
    UniformRank,
    allocate_ranks,
)
from fishkern.initialization.directions import announce, energy_of, start_of
from fishkern.initialization.probe import probe_losses
from fishkern.initialization.targets import linear_weights, targeted
from fishkern.names import listed
from fishkern.selection.base import Patterns, exactly
from fishkern.statistics import DirectionEnergy, Drawn, Energies, Likelihood, estimate
from fishkern.statistics.batches import Shared
from fishkern.warning import warn_caller

_IMPORTANCE: dict[str, Literal["kronecker", "exact"]] = {"kronecker": "kronecker", "joint": "exact"}


@dataclass(frozen=True)
class ShallowSearch:
    """How :func:`farss` searches for the last shallow layer: a RECONSTRUCTION, since the paper's search is unpublished.

    For each candidate an adapter starts from the same energies and is trained for a few steps
    (:func:`fishkern.initialization.probe_losses`). Then the losses of held-out examples of the task, and of text whose
    knowledge is to be retained, are compared: the candidate with the largest ``z(task) + z(retention)`` wins, where
    ``z`` is the negated loss in standard deviations from the mean over candidates. Ties go to the smaller one.

    Args:
        task: Batches of held-out examples of the task.
        retention: Batches of what the model should not forget.
        train: Batches to train on; ``None`` for those of the statistic. Read several times: no iterator.
        steps: Batches that each candidate trains on; the reconstruction has 1 % of the training's steps.
        lr: Learning rate; the paper trains with 2e-5.
        candidates: Numbers of layers to try; ``None`` for L/16, L/8, 3L/16 and L/4 of L layers, rounded down.

    Raises:
        ValueError: ``steps`` is below 1, ``lr`` is not positive, or ``candidates`` is empty.
    """

    task: Iterable[Any]
    retention: Iterable[Any]
    train: Iterable[Any] | None = None
    steps: int = 10
    lr: float = 2e-5
    candidates: Sequence[int] | None = None

    def __post_init__(self) -> None:
        at_least(1, self.steps, "steps")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}.")
        if self.candidates is not None and not len(self.candidates):
            raise ValueError("candidates must name at least one layer; None for L/16, L/8, 3L/16 and L/4.")


def farss(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    shallow: int | Literal["search"],
    rank: int = 128,
    ranks: RankRule = InverseImportance(average=50, most=64),
    targets: Patterns | None = None,
    fisher: Literal["kronecker", "joint"] = "kronecker",
    positions: Literal["attended", "labelled", "all"] = "attended",
    max_examples: int | None = 16,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
    search: ShallowSearch | None = None,
    scaling: float = 1.0,
    dead: Literal["keep", "skip"] = "keep",
    layers_per_pass: int | None = None,
    accumulate_on: str | torch.device | None = None,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    shared: Shared = None,
) -> AdapterInit:
    """Make the start of a LoRA adapter by FARSS.

    The score of a component is ``sigma_i^2 (v_i^T E[h h^T] v_i) (u_i^T E[d d^T] u_i)``, and the importance of a matrix
    ``<E[d d^T], W E[h h^T] W^T> / (O I)``. A matrix of a layer up to ``shallow`` gets a rank by ``ranks`` and its
    components of smallest score, one of a later layer ``rank`` components of largest score; which of the two is decided
    by the layer alone. The start is ``scaling * B A = sum_i sigma_i u_i v_i^T``, with the same scaling for every rank.

    It differs from the published code where that departs from its formulas: the ranks add up to their budget, padding
    does not count, every example has the same weight in the means (there every token of a batch), the model is in
    evaluation mode, and the singular values are those of the component, whatever the scaling.

    A matrix that no example reaches gets the median importance of the others, and starts from its largest singular
    values, with a warning.

    Cost: a pass of :class:`fishkern.DirectionEnergy`, and once more its eigenproblem of each matrix. A search adds both
    the eigenproblems and the steps of training for each candidate.

    Args:
        model: A model without an adapter. Nothing is changed in it.
        batches: What a ``DataLoader`` over the task's data yields, see :func:`fishkern.estimate`.
        shallow: Number of the last shallow layer, from 0; in a model with several stacks of layers, of each. The paper
            has 6 of 32 for mathematics and 4 for code and instructions. ``"search"`` tries several and trains each
            for a few steps, which is a RECONSTRUCTION; the provenance has its table.
        rank: Rank of the deep matrices, or of as many components as a matrix has.
        ranks: The rule of the shallow matrices; its bounds are narrowed to what a matrix has.
        targets: Patterns of weights or modules, ``"*.q_proj"`` or ``"q_proj"``; ``None`` for every linear weight in
            the layers.
        fisher: ``"kronecker"`` as in the paper; ``"joint"`` scores by the exact Fisher of each example, and the
            importance is ``mean_n <grad_n, W>^2 / (O I)``.
        positions: Which positions count: ``"attended"``, ``"labelled"``, or ``"all"``, which includes padding.
        max_examples: How many examples to look at; the published command sees 16.
        likelihood: See :func:`fishkern.estimate`.
        search: What ``shallow="search"`` needs.
        scaling: alpha / rank of every module.
        dead: See :class:`fishkern.DirectionInit`.
        layers_per_pass: See :class:`fishkern.DirectionEnergy`.
        accumulate_on: See :func:`fishkern.estimate`.
        backend: See :func:`fishkern.estimate`.
        progress: See :func:`fishkern.estimate`.
        shared: See :func:`fishkern.estimate`.

    Returns:
        The start of each module. Its provenance has the importances of the shallow matrices, and of a search each
        candidate's losses.

    Raises:
        TypeError: ``shallow`` is neither a number nor ``"search"``, or ``ranks`` is no rule.
        ValueError: ``shallow`` is not a layer of the model, ``search`` is missing or superfluous, the budget of
            ``ranks`` does not fit the matrices, or what :func:`fishkern.estimate` and :func:`fishkern.initialize`
            refuse.
        UnsupportedModuleError: The model has an adapter already.
    """
    if not isinstance(ranks, RankRule):
        raise TypeError(f"ranks must be a rule for ranks such as InverseImportance(average=50), got {ranks!r}.")
    rule = DirectionInit(rank, score="weighted", fisher=fisher, magnitude="sigma", scaling=scaling, dead=dead)
    layers = linear_weights(model)
    if targets is not None:
        layers = {name: layers[name] for name in targeted(layers, targets)}
    candidates = _candidates(shallow, search, layers)
    ranked = [] if isinstance(ranks, UniformRank) else _up_to(max(candidates), layers)
    energies = estimate(
        model,
        batches,
        DirectionEnergy(
            positions=positions,
            importance=_IMPORTANCE[fisher] if ranked else None,
            importance_of=exactly(ranked) if ranked else "*",
            layers_per_pass=layers_per_pass,
        ),
        likelihood=likelihood,
        parameters=lambda name, parameter: name in layers,
        max_examples=max_examples,
        accumulate_on=accumulate_on,
        backend=backend,
        progress=progress,
        shared=shared,
    )
    starts = {last: _start(model, energies, layers, last, ranks, rule) for last in candidates}
    if search is None:
        (init,) = starts.values()
    else:
        data = batches if search.train is None else search.train
        init = _searched(starts, search, lambda one, held_out: probe_losses(
            model, one, data, held_out, steps=search.steps, lr=search.lr, likelihood=likelihood, shared=shared
        ))  # fmt: skip
    announce(init)
    if capped := init.provenance["method"]["capped"]:
        warn_caller(
            f"rank={rank} is more than {len(capped)} of {len(init)} matrices have components ({listed(capped)}): these "
            "start from all that they have."
        )
    return init


def _candidates(shallow: int | str, search: ShallowSearch | None, layers: Mapping[str, hosts.Layer]) -> list[int]:
    """List the layers that may be the last shallow one: the given one, or those of the search."""
    count = max(layer.count for layer in layers.values())
    if (shallow == "search") != (search is not None):
        raise ValueError(
            "shallow='search' takes search=ShallowSearch(task=..., retention=...), and a number takes none; got "
            f"shallow={shallow!r} and search={'None' if search is None else type(search).__name__}."
        )
    if search is None:
        given = [integer(shallow, "shallow")]
    elif search.candidates is None:
        given = [count // 16, count // 8, 3 * count // 16, count // 4]
    else:
        given = [integer(candidate, "candidates") for candidate in search.candidates]
    for last in given:
        if not 0 <= last < count:
            raise ValueError(
                f"shallow is the number of the last shallow layer, from 0 to {count - 1} in this model, got {last}."
            )
    return sorted(set(given))


def _up_to(last: int, layers: Mapping[str, hosts.Layer]) -> list[str]:
    return [name for name, layer in layers.items() if layer.number <= last]


def _start(
    model: nn.Module,
    energies: Energies,
    layers: Mapping[str, hosts.Layer],
    last: int,
    ranks: RankRule,
    rule: DirectionInit,
) -> AdapterInit:
    """Make the start for one boundary between shallow and deep layers."""
    shallow = _up_to(last, layers)
    sides = {name: min(energies[name].shape) for name in layers}
    by_name = {name: min(rule.ranks, sides[name]) for name in layers}
    importances: dict[str, float] = {}
    if shallow:
        importances = _importances(energies, shallow, rule.fisher, needed=not isinstance(ranks, UniformRank))
        by_name |= allocate_ranks(importances, ranks, largest={name: sides[name] for name in shallow})
    order = {name: "smallest" if name in importances else "largest" for name in layers}
    init = start_of(model, energies, replace(rule, ranks=by_name, order=order))
    method = {
        "name": "FARSS",
        "shallow": last,
        "rank": rule.ranks,
        "ranks": ranks.settings,
        "importances": importances,
        "capped": [name for name in layers if name not in importances and sides[name] < rule.ranks],
    }
    return AdapterInit(init, digests=init.digests, provenance={**init.provenance, "method": method})


def _importances(energies: Energies, names: Iterable[str], fisher: str, *, needed: bool) -> dict[str, float]:
    """Give each matrix its importance, and one that no example reaches the median of the others."""
    if not needed:
        return dict.fromkeys(names, 1.0)
    importances = {name: energies[name].importance for name in names}
    reached = [value for name, value in importances.items() if energy_of(energies[name], fisher).any()]
    return {
        name: value if energy_of(energies[name], fisher).any() else median(reached or [0.0])
        for name, value in importances.items()
    }


def _searched(
    starts: Mapping[int, AdapterInit],
    search: ShallowSearch,
    probe: Callable[[AdapterInit, Mapping[str, Iterable[Any]]], Mapping[str, float]],
) -> AdapterInit:
    """Probe the start of each candidate, and return the best with the table of all in its provenance."""
    losses = {last: probe(init, {"task": search.task, "retention": search.retention}) for last, init in starts.items()}
    z = {key: _standardised([-one[key] for one in losses.values()]) for key in ("task", "retention")}
    table = [
        {"shallow": last, **losses[last], "z": task + retention}
        for last, task, retention in zip(losses, z["task"], z["retention"], strict=True)
    ]
    best = max(table, key=lambda row: row["z"])  # the first of equal ones, and candidates ascend
    init = starts[best["shallow"]]
    described = {"steps": search.steps, "lr": search.lr, "table": table}
    method = {**init.provenance["method"], "search": described}
    return AdapterInit(init, digests=init.digests, provenance={**init.provenance, "method": method})


def _standardised(values: Sequence[float]) -> list[float]:
    """Express values in standard deviations from their mean; all 0 where they are equal."""
    mean, spread = fmean(values), pstdev(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]

"""FILet (Feng, Lin and Kao, ICML 2026, arXiv:2605.01046): LoRA that starts in directions of least Fisher energy.

The Fisher energy of a unit direction ``u v^T`` of a weight is ``(v^T E[h h^T] v) (u^T E[d d^T] u)``. Directions along
which the loss hardly curves are free to move, and a small start there is not degenerate, as ``B = 0`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.backend import Backend
from fishkern.initialization import AdapterInit, DirectionInit, initialize
from fishkern.initialization.targets import check_rank, linear_weights, targeted
from fishkern.layers import linear_maps
from fishkern.names import listed
from fishkern.selection.base import Patterns
from fishkern.statistics import DirectionEnergy, Drawn, Energies, Likelihood, estimate
from fishkern.statistics.batches import Shared
from fishkern.warning import warn_caller

_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the published script's
_POSITIONS_PER_RANK = 4


def filet(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int = 32,
    targets: Patterns | None = None,
    basis: Literal["svd", "power"] = "svd",
    order: Literal["smallest", "largest"] = "smallest",
    magnitude: Literal["energy", "sigma", "uniform"] = "energy",
    fisher: Literal["kronecker", "joint"] = "kronecker",
    floor: float = 1e-8,
    size: float = 0.01,
    distinct: float | None = 0.9,
    positions: Literal["attended", "labelled", "all"] = "attended",
    max_examples: int | None = 320,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | Drawn | None = None,
    scaling: float = 1.0,
    dead: Literal["keep", "skip"] = "keep",
    layers_per_pass: int | None = None,
    accumulate_on: str | torch.device | None = None,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    shared: Shared = None,
) -> AdapterInit:
    """Make the start of a LoRA adapter by FILet: the ``rank`` directions of least Fisher energy of each weight.

    The start is ``scaling * B A = sum_i m_i u_i v_i^T`` with the energies ``m_i``, at least ``floor``. A RECONSTRUCTION
    in three arguments, since the paper's code is not public: that directions are singular vectors (``basis``; a copy of
    the code takes one power step from each coordinate), that the smallest energies are chosen (``order``; the abstract
    reads otherwise), and the size of the start (``magnitude``).

    Energies are those of each example's own loss. If the head of the model starts at random, so do the gradients at its
    outputs: train it for some steps before.

    Args:
        model: A model without an adapter. Nothing is changed in it.
        batches: What a ``DataLoader`` over the task's data yields, see :func:`fishkern.estimate`.
        rank: Directions of each weight.
        targets: Patterns of weights or modules, ``"*.q_proj"`` or ``"q_proj"``. ``None`` for ``q_proj``, ``k_proj``,
            ``v_proj``, ``up_proj`` and ``down_proj`` in the layers, as published; a model without any of these names
            takes every linear weight in its layers, with a warning.
        basis: ``"svd"``, or ``"power"`` for the code copy's candidates.
        order: ``"smallest"`` energies, or ``"largest"``.
        magnitude: ``"energy"``; ``"sigma"``, the singular values; or ``"uniform"``, of ``size``.
        fisher: ``"kronecker"``; or ``"joint"``, the exact energy ``mean_n <grad_n, u v^T>^2``, which chooses others.
        floor: Smallest size of a direction under ``"energy"``.
        size: See :class:`fishkern.DirectionInit`.
        distinct: Leave out a candidate of the power basis whose ``|cos|`` with a chosen one exceeds this for ``u`` and
            ``v``; ``None`` leaves none out.
        positions: Which positions count: ``"attended"``, ``"labelled"``, or ``"all"``, which includes padding.
        max_examples: How many examples to look at.
        likelihood: See :func:`fishkern.estimate`.
        scaling: alpha / rank of every module.
        dead: Directions that the data do not reach have the least energy of all. ``"keep"`` takes them, with a warning
            that counts them; ``"skip"`` leaves them out.
        layers_per_pass: See :class:`fishkern.DirectionEnergy`.
        accumulate_on: See :func:`fishkern.estimate`.
        backend: See :func:`fishkern.estimate`.
        progress: See :func:`fishkern.estimate`.
        shared: See :func:`fishkern.estimate`.

    Returns:
        The start of each module.

    Raises:
        TypeError: An argument is of another type than described.
        ValueError: A weight has met fewer positions than 4 * ``rank``, so that most of its directions have no energy;
            or what :func:`fishkern.estimate` and :func:`fishkern.initialize` refuse.
        UnsupportedModuleError: The model has an adapter already.
    """
    rule = DirectionInit(
        rank,
        order=order,
        fisher=fisher,
        magnitude=magnitude,
        floor=floor,
        size=size,
        scaling=scaling,
        distinct=distinct,
        dead=dead,
    )
    layers = linear_weights(model)
    names = _published(model, layers) if targets is None else targeted(layers, targets)
    maps = linear_maps(hosts.unwrap(model))
    for name in names:  # before the data are read
        check_rank(name, rank, maps[name].shape)
    wanted = frozenset(names)
    energies = estimate(
        model,
        batches,
        DirectionEnergy(basis=basis, positions=positions, layers_per_pass=layers_per_pass),
        likelihood=likelihood,
        parameters=lambda name, parameter: name in wanted,
        max_examples=max_examples,
        accumulate_on=accumulate_on,
        backend=backend,
        progress=progress,
        shared=shared,
    )
    _check_positions(energies, rank)
    init = initialize(model, energies, rule)
    method = {"name": "FILet", "targets": names}
    return AdapterInit(init, digests=init.digests, provenance={**init.provenance, "method": method})


def _published(model: nn.Module, layers: Mapping[str, hosts.Layer]) -> list[str]:
    """Choose the published targets, and say where a model has other names."""
    last = {name: name.split(".")[-2] for name in layers}
    present = [target for target in _TARGETS if target in last.values()]
    kind = type(hosts.unwrap(model)).__name__
    if not present:
        warn_caller(
            f"{kind} has none of FILet's targets {', '.join(_TARGETS)} in its layers: all of their {len(layers)} "
            "linear weights are taken. targets= chooses others."
        )
        return list(layers)
    if len(present) < len(_TARGETS):
        missing = ", ".join(target for target in _TARGETS if target not in present)
        warn_caller(
            f"of FILet's targets {kind} has {', '.join(present)} in its layers, which are taken, and no {missing}. "
            "targets= chooses others."
        )
    return [name for name in layers if last[name] in present]


def _check_positions(energies: Energies, rank: int) -> None:
    """Refuse too few positions: directions that none of them has are the smallest, and not the choice of the data."""
    counts = {name: round(one.positions * energies.count) for name, one in energies.items()}
    counts = {name: count for name, count in counts.items() if count}  # what no example reaches is announced later
    if few := {name: count for name, count in counts.items() if count < _POSITIONS_PER_RANK * rank}:
        least = min(few, key=few.get)
        raise ValueError(
            f"{len(few)} of {len(energies)} weights have met fewer positions than {_POSITIONS_PER_RANK} * rank = "
            f"{_POSITIONS_PER_RANK * rank} ({listed(few)}; {least} has met {few[least]}): take more examples "
            "(max_examples= and the data), a smaller rank, or leave them out with targets=."
        )
    if below := {name: count for name, count in counts.items() if count < min(energies[name].shape)}:
        least = min(below, key=below.get)
        warn_caller(
            f"{len(below)} of {len(energies)} weights have met fewer positions than their smaller side "
            f"({listed(below)}; {least} has met {below[least]:,} for {min(energies[least].shape):,}): some of their "
            "directions have no energy at all, and these are the smallest. More examples reach them."
        )

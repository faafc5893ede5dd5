"""The start of an adapter from rank-one directions of the weights: chosen by their energy, sized by a rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.digests import agree, difference, digest
from fishkern.initialization.direction_init import DirectionInit
from fishkern.initialization.init import AdapterInit, ModuleInit
from fishkern.initialization.targets import check_rank, given_by_name, targeted
from fishkern.layers import LinearMap, linear_maps
from fishkern.names import listed
from fishkern.ops.streaming_topk import Order
from fishkern.statistics import Energies, MatrixEnergies
from fishkern.statistics.bases import Directions, PowerBasis, power_directions, svd_directions
from fishkern.warning import warn_caller

# Singular values below this part of the largest are rounding. Where they are the size of the start, both factors would
# be zero there, and get no gradients.
VANISHES = 1e-7
_BLOCK = 64  # candidates whose columns are formed at a time


class _Chosen(NamedTuple):
    """The directions of one matrix that make its start."""

    start: ModuleInit
    dead: int  # how many of them are
    at_floor: int
    reached: bool  # whether the data reach any direction of the matrix


def initialize(model: nn.Module, energies: Energies, rule: DirectionInit) -> AdapterInit:
    """Make the start of a low-rank adapter from the energies of the directions of its weights.

    The directions are computed anew from the weights, one matrix at a time, and nothing is changed in the model. A
    matrix that no example reaches (all of its energies are zero, as those of an expert that was never chosen) starts
    from its largest singular values (for the power basis from its longest columns), which is announced.

    Cost: one eigenproblem of the smaller side of each matrix, in float64.

    Args:
        model: The model that the energies were estimated on, with the same weights.
        energies: From ``fk.estimate(model, batches, fk.DirectionEnergy())``.
        rule: Which directions, and how large.

    Returns:
        The start of each module, by path, with the digests of the weights. Its provenance holds the rule, the
        definition and count of the energies, and for each module how many of its directions are dead or at the floor.

    Raises:
        TypeError: ``energies`` or ``rule`` is something else.
        ValueError: The energies are of other weights, are NaN or all zero; a pattern matches nothing, a matrix has no
            rank or order; a rank exceeds what the matrix has; there were fewer positions than the rank of a matrix of
            order ``"smallest"``; or the power basis is asked for singular values.
    """
    init = start_of(model, energies, rule)
    announce(init)
    return init


def start_of(model: nn.Module, energies: Energies, rule: DirectionInit) -> AdapterInit:
    """Make the start as :func:`initialize` does, without its warnings.

    Args:
        model: The model that the energies were estimated on.
        energies: The energies.
        rule: Which directions, and how large.

    Returns:
        The start of each module.

    Raises:
        TypeError: As for :func:`initialize`.
        ValueError: As for :func:`initialize`.
    """
    _check_kinds(energies, rule)
    names = targeted(energies, rule.targets)
    maps = _maps_of(model, names)
    ranks, orders = given_by_name(rule.ranks, names, "ranks"), given_by_name(rule.order, names, "order")
    _check_values(energies, names, rule)
    chosen: dict[str, _Chosen] = {}
    digests = {}
    for name in names:
        matrix = maps[name].matrix()
        digests[maps[name].path] = digest(matrix)
        _check_weights(maps[name], digests[maps[name].path], energies[name])
        _check_rank(name, ranks[name], orders[name], energies[name], energies.count)
        chosen[name] = _start(name, matrix, energies, rule, ranks[name], orders[name])
    facts = {
        maps[name].path: {
            "weight": name,
            "order": orders[name],
            "reached": one.reached,
            "dead": one.dead,
            "at_floor": one.at_floor,
        }
        for name, one in chosen.items()
    }
    described = {"count": energies.count, "definition": energies.provenance["definition"]}
    return AdapterInit(
        {maps[name].path: one.start for name, one in chosen.items()},
        digests=digests,
        provenance={"rule": rule.settings, "energies": described, "modules": facts},
    )


def _check_kinds(energies: Energies, rule: DirectionInit) -> None:
    """Check that these are energies and a rule, and that the energies have what the rule asks for."""
    if not isinstance(energies, Energies):
        raise TypeError(
            f"energies come from fk.estimate(model, batches, fk.DirectionEnergy()), got {type(energies).__name__}."
        )
    if not isinstance(rule, DirectionInit):
        raise TypeError(f"rule must be a DirectionInit such as DirectionInit(ranks=16), got {rule!r}.")
    if energies.basis == "power" and (rule.score == "weighted" or rule.magnitude == "sigma"):
        raise ValueError(
            f"score={rule.score!r} with magnitude={rule.magnitude!r} needs singular values, and these energies are of "
            "the power basis, which has none: take score='energy' and magnitude='energy' or 'uniform', or "
            "DirectionEnergy(basis='svd')."
        )


def _maps_of(model: nn.Module, names: list[str]) -> dict[str, LinearMap]:
    """Find the linear maps of a model by the names of their weights; each of these must be one."""
    maps = linear_maps(hosts.unwrap(model))
    if missing := [name for name in names if name not in maps]:
        raise ValueError(
            f"the energies are of another model: {len(missing)} of {len(names)} weights are no linear maps of "
            f"{type(hosts.unwrap(model)).__name__} ({listed(missing)})."
        )
    return maps


def energy_of(energies: MatrixEnergies, fisher: str) -> Tensor:
    """Give the energy of each direction of a matrix.

    Args:
        energies: Of the matrix.
        fisher: ``"kronecker"`` or ``"joint"``.

    Returns:
        ``[K]``, float64 on the CPU.
    """
    if fisher == "joint":
        return energies.joint.double().cpu()
    return energies.input.double().cpu() * energies.output.double().cpu()


def _start(name: str, matrix: Tensor, energies: Energies, rule: DirectionInit, rank: int, order: Order) -> _Chosen:
    """Choose the directions of one matrix and give them their size."""
    basis = svd_directions(matrix) if energies.basis == "svd" else power_directions(matrix)
    sigma = None if isinstance(basis, PowerBasis) else basis.singular_values.cpu()
    energy = energy_of(energies[name], rule.fisher)
    reached = bool(energy.any())
    score = energy * sigma.square() if rule.score == "weighted" else energy
    if reached:
        dead = energy <= rule.dead_below * energy[energy > 0].median()
        ranking = score.sort(descending=order == "largest", stable=True).indices
    else:
        dead = torch.zeros_like(energy, dtype=torch.bool)
        ranking = torch.arange(len(energy)) if sigma is not None else _by_length(matrix)
    usable = _usable(basis, sigma, rule)
    candidates = ranking[usable[ranking] & ~(dead[ranking] & (rule.dead == "skip"))]
    picked = _distinct(basis, candidates, rank, rule.distinct)
    if len(picked) < rank:
        left = f"{len(candidates)} of its {len(energy)} directions" if len(candidates) < rank else f"only {len(picked)}"
        raise ValueError(
            f"{name}: rank {rank} was asked for, and {left} can be chosen; the others vanish, are dead, or are nearly "
            f"equal to one that is chosen (dead={rule.dead!r}, distinct={rule.distinct}): lower the rank or leave the "
            "matrix out with targets=."
        )
    picked = picked.sort().values
    U, V = _columns(basis, picked)
    size = _sizes(rule, score[picked], None if sigma is None else sigma[picked], U, V, matrix).to(U)
    root = (size / rule.scaling).sqrt()
    start = ModuleInit((V * root).T, U * root, rule.scaling, picked)
    at_floor = int((score[picked] <= rule.floor).sum()) if rule.magnitude == "energy" else 0
    return _Chosen(start, int(dead[picked].sum()), at_floor, reached)


def _by_length(matrix: Tensor) -> Tensor:
    """Order the power directions of a matrix by the length of the column that each starts from."""
    return matrix.float().norm(dim=0).cpu().sort(descending=True, stable=True).indices


def _usable(basis: Directions | PowerBasis, sigma: Tensor | None, rule: DirectionInit) -> Tensor:
    """Tell which directions can start an adapter: bool ``[K]`` on the CPU."""
    if sigma is None:  # a column of zeros has no power direction
        return basis.U.any(dim=0).cpu()
    if rule.magnitude == "sigma":
        return sigma > VANISHES * sigma.max()
    return torch.ones_like(sigma, dtype=torch.bool)


def _columns(basis: Directions | PowerBasis, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Form the chosen directions, ``U [O, R]`` and ``V [I, R]``, in float64."""
    if isinstance(basis, PowerBasis):
        U, V, _ = basis.columns(chosen.to(basis.U.device))
    else:
        U, V = (vectors[:, chosen.to(vectors.device)] for vectors in (basis.U, basis.V))
    return U.double(), V.double()


def _distinct(basis: Directions | PowerBasis, candidates: Tensor, rank: int, most: float | None) -> Tensor:
    """Take the first ``rank`` candidates that are not nearly equal to one taken before: ``[R]``, or fewer."""
    if most is None or not isinstance(basis, PowerBasis):
        return candidates[:rank]
    taken: list[int] = []
    U = V = None
    for block in candidates.split(_BLOCK):
        block_U, block_V = _columns(basis, block)
        if U is None:
            U, V = (torch.empty(len(vectors), rank).to(vectors) for vectors in (block_U, block_V))
        for place, candidate in enumerate(block.tolist()):
            u, v, count = block_U[:, place], block_V[:, place], len(taken)
            alike = ((U[:, :count].T @ u).abs() > most) & ((V[:, :count].T @ v).abs() > most)
            if alike.any():
                continue
            U[:, count], V[:, count] = u, v
            taken.append(candidate)
            if len(taken) == rank:
                return torch.tensor(taken)
    return torch.tensor(taken, dtype=torch.int64)


def _sizes(rule: DirectionInit, score: Tensor, sigma: Tensor | None, U: Tensor, V: Tensor, matrix: Tensor) -> Tensor:
    """Give the size ``m_k`` of each chosen direction: ``[R]``."""
    if rule.magnitude == "sigma":
        return sigma
    if rule.magnitude == "energy":
        return score.clamp_min(rule.floor)
    norm = ((U.T @ U) * (V.T @ V)).sum().sqrt()  # of the sum of all u_k v_k^T
    return torch.full_like(score, rule.size * matrix.double().norm().item() / norm.item())


def _check_values(energies: Energies, names: Iterable[str], rule: DirectionInit) -> None:
    by_name = {name: energy_of(energies[name], rule.fisher) for name in names}
    if odd := [name for name, energy in by_name.items() if not (energy.isfinite() & (energy >= 0)).all()]:
        raise ValueError(
            f"the energies of {len(odd)} of {len(by_name)} matrices are negative or not finite ({listed(odd)}): look "
            "at the loss of the examples that they were estimated on."
        )
    if not any(energy.any() for energy in by_name.values()):
        raise ValueError(
            f"all energies are zero ({listed(by_name)}), so that the data do not rank any direction: look at the loss, "
            "and whether it depends on these weights."
        )


def _check_weights(linear: LinearMap, actual: tuple[float, float], energies: MatrixEnergies) -> None:
    if linear.shape != energies.shape:
        raise ValueError(
            f"the energies are of another model: {linear.name} maps {energies.shape[1]} to {energies.shape[0]} "
            f"features in it, and {linear.shape[1]} to {linear.shape[0]} in this one."
        )
    recorded = energies.digest
    if not agree(actual, recorded):
        raise ValueError(
            f"the energies are of other weights: {linear.name} {difference(actual, recorded)}. Load the weights that "
            "they were estimated on, or estimate anew."
        )


def _check_rank(name: str, rank: int, order: Order, energies: MatrixEnergies, count: int) -> None:
    O, I = energies.shape
    check_rank(name, rank, (O, I))
    positions = round(energies.positions * count)
    if order == "smallest" and 0 < positions < rank < min(O, I):
        raise ValueError(
            f"{name} has met {positions} positions in {count} examples, fewer than its rank {rank}: the directions of "
            "least energy are then those that the data say nothing of. Take more examples, or a smaller rank."
        )


def announce(init: AdapterInit) -> None:
    """Warn once of each: matrices without data, chosen directions that are dead, and sizes that are all the floor.

    Args:
        init: From :func:`start_of`.
    """
    rule, modules = init.provenance["rule"], init.provenance["modules"]
    total = sum(init.ranks.values())
    if unreached := [path for path, facts in modules.items() if not facts["reached"]]:
        warn_caller(
            f"no example reaches {len(unreached)} of {len(init)} modules ({listed(unreached)}): they start from their "
            "largest directions, since none has energy. More examples may reach them; targets= leaves them out."
        )
    if dead := {path: facts["dead"] for path, facts in modules.items() if facts["dead"]}:
        warn_caller(
            f"{sum(dead.values()):,} of {total:,} chosen directions are dead, in {len(dead)} of {len(init)} modules "
            f"({listed(dead)}): their energy is at most {rule['dead_below']:g} of the median, so the data say little "
            "about them. dead='skip' leaves them out; more examples may reach them."
        )
    at_floor = sum(facts["at_floor"] for facts in modules.values())
    if 2 * at_floor > total:
        warn_caller(
            f"{at_floor:,} of {total:,} chosen scores are at most floor={rule['floor']:g}, so magnitude='energy' gives "
            "these directions one size, and only their choice depends on the data. Lower floor=, or take "
            "magnitude='uniform' with a size= of your own."
        )

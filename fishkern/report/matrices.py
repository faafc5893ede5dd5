"""Energies and starts of weight matrices, by layer and type of module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishkern.initialization import AdapterInit, ModuleInit
from fishkern.report.cells import cells_of
from fishkern.report.grouped import Grouped
from fishkern.statistics import Energies, MatrixEnergies

SHARE = 0.9  # of the energy of a matrix


@dataclass
class EnergyPart:
    """Energies of one part of a model.

    Attributes:
        matrices: Number of weight matrices.
        directions: Number of their directions.
        energy: Sum over directions of ``input * output``.
        exact: Sum over directions of ``joint``.
        holding: Number of directions, the largest of each matrix, that hold :data:`SHARE` of its energy.
        importance: Sum over matrices of their importance; ``None`` if one has none.
        unreached: Number of matrices that have no energy at all.
    """

    matrices: int = 0
    directions: int = 0
    energy: float = 0.0
    exact: float = 0.0
    holding: int = 0
    importance: float | None = 0.0
    unreached: int = 0

    @property
    def mean(self) -> float:
        """Mean energy of a direction."""
        return self.energy / self.directions if self.directions else 0.0

    @property
    def mean_exact(self) -> float:
        """Mean exact energy of a direction."""
        return self.exact / self.directions if self.directions else 0.0

    @property
    def mean_importance(self) -> float | None:
        """Mean importance of a matrix."""
        return None if self.importance is None or not self.matrices else self.importance / self.matrices

    def add(self, other: EnergyPart) -> None:
        """Add another part to this one.

        Args:
            other: The other part.
        """
        for name in ("matrices", "directions", "energy", "exact", "holding", "unreached"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        known = self.importance is not None and other.importance is not None
        self.importance = self.importance + other.importance if known else None


@dataclass
class StartPart:
    """Starts of one part of a model.

    Attributes:
        modules: Number of modules.
        rank: Sum of their ranks.
        least: Smallest rank; 0 if there is no module.
        most: Largest rank.
        entries: Number of entries of ``A`` and ``B``.
        start: Sum of the squared norms of ``scaling * B A``.
        weight: Sum of the squared norms of the weights.
        dead: Number of chosen directions that the data do not reach.
        orders: ``"smallest"`` or ``"largest"``, or both: the ends of the scores that the directions are from.
    """

    modules: int = 0
    rank: int = 0
    least: int = 0
    most: int = 0
    entries: int = 0
    start: float = 0.0
    weight: float = 0.0
    dead: int = 0
    orders: list[str] = field(default_factory=list)

    @property
    def mean_rank(self) -> float:
        """Mean rank of a module."""
        return self.rank / self.modules if self.modules else 0.0

    @property
    def size(self) -> float:
        """Norm of the start relative to that of the weights."""
        return math.sqrt(self.start / self.weight) if self.weight else 0.0

    def add(self, other: StartPart) -> None:
        """Add another part to this one.

        Args:
            other: The other part.
        """
        self.least = min(self.least, other.least) if self.modules and other.modules else self.least or other.least
        self.most = max(self.most, other.most)
        for name in ("modules", "rank", "entries", "start", "weight", "dead"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.orders = sorted({*self.orders, *other.orders})


@dataclass
class EnergySummary(Grouped[EnergyPart]):
    """The result of :func:`summarise_energies`.

    Attributes:
        counts: Numbers of directions: 1, 2, 4 and so on, up to those of the largest matrix.
        shares: By type of module, the share of a matrix's energy that so many directions hold, those with the most;
            mean over the matrices that have any energy, of which there is at least one.
    """

    counts: list[int]
    shares: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "counts": self.counts, "shares": self.shares}


def summarise_energies(energies: Energies, report: Callable[[int, int], None] | None = None) -> EnergySummary:
    """Sum energies by layer and type of module, and find how many directions hold them.

    Args:
        energies: The energies, also loaded lazily: one matrix is in memory at a time.
        report: Called with the number of matrices read so far, and of all.

    Returns:
        The summary.

    Raises:
        ValueError: An energy is negative or not finite; the message names its matrix.
    """
    parts: dict[str, EnergyPart] = {}
    cumulated: dict[str, Tensor] = {}
    for number, (name, matrix) in enumerate(energies.items(), start=1):
        energy = matrix.kronecker.double().cpu()
        cumulated[name] = energy.sort(descending=True).values.cumsum(0)
        parts[name] = _energy_part(name, matrix, energy, cumulated[name])
        if report:
            report(number, len(energies))
    most = max((part.directions for part in parts.values()), default=1)
    counts = [*(2**n for n in range((most - 1).bit_length())), most]
    return EnergySummary(EnergyPart, parts, counts, _shares(cumulated, counts))


def summarise_start(init: AdapterInit) -> Grouped[StartPart]:
    """Sum the start of an adapter by layer and type of module.

    Args:
        init: The start.

    Returns:
        The sums, by the names of the modules' weights.
    """
    facts = init.provenance.get("modules", {})
    parts = {
        f"{path}.weight": _start_part(module, init.digests[path], facts.get(path, {})) for path, module in init.items()
    }
    return Grouped(StartPart, parts)


def _energy_part(name: str, matrix: MatrixEnergies, energy: Tensor, cumulated: Tensor) -> EnergyPart:
    joint = matrix.joint.double()
    if not all((values.isfinite() & (values >= 0)).all() for values in (energy, joint)):
        raise ValueError(f"the energies of {name} are negative or not finite: look at the loss of the examples.")
    total = cumulated[-1].item()
    holding = int((cumulated < SHARE * total).sum()) + 1 if total else 0
    return EnergyPart(1, len(energy), total, joint.sum().item(), holding, matrix.importance, int(total == 0))


def _shares(cumulated: Mapping[str, Tensor], counts: list[int]) -> dict[str, list[float]]:
    """Average over matrices of one type the shares of their energy that some numbers of directions hold."""
    cells = cells_of(cumulated)
    by_module: dict[str, list[Tensor]] = {}
    for name, sums in cumulated.items():
        if sums[-1] > 0:
            places = torch.tensor(counts).clamp_max(len(sums)) - 1
            by_module.setdefault(cells[name].module, []).append(sums[places] / sums[-1])
    return {module: torch.stack(shares).mean(0).tolist() for module, shares in by_module.items()}


def _start_part(module: ModuleInit, digest: tuple[float, float], facts: Mapping[str, Any]) -> StartPart:
    A, B = module.A.double(), module.B.double()
    squared = module.scaling**2 * ((B.T @ B) * (A @ A.T)).sum().item()  # of B A, which is not formed
    entries = A.numel() + B.numel()
    rank, orders = module.rank, [facts["order"]] if "order" in facts else []
    return StartPart(1, rank, rank, rank, entries, max(squared, 0.0), digest[0] ** 2, facts.get("dead", 0), orders)

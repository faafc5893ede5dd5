"""From energies to the start of an adapter: how many directions of each matrix, which, and how large."""

from fishkern.initialization.direction_init import DirectionInit
from fishkern.initialization.directions import initialize
from fishkern.initialization.init import AdapterInit, ModuleInit
from fishkern.initialization.probe import probe_losses
from fishkern.initialization.ranks import (
    InverseImportance,
    ProportionalImportance,
    RankRule,
    UniformRank,
    allocate_ranks,
)

__all__ = [
    "AdapterInit",
    "DirectionInit",
    "InverseImportance",
    "ModuleInit",
    "ProportionalImportance",
    "RankRule",
    "UniformRank",
    "allocate_ranks",
    "initialize",
    "probe_losses",
]

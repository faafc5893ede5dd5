"""Statistics, selections, energies, starts and freezers in summaries, tables and pictures."""

from fishkern.report.cells import Cell, cells_of
from fishkern.report.freezing import FreezerSummary, FrozenPart, Stop, summarise_freezer
from fishkern.report.grouped import Grouped
from fishkern.report.matrices import EnergyPart, EnergySummary, StartPart, summarise_energies, summarise_start
from fishkern.report.sensitivity import SensitivityPart, round_to_nearest, sensitivity
from fishkern.report.summary import Part, Parts, Summary, locate, summarise
from fishkern.report.values import ValuePart, summarise_values

__all__ = [
    "Cell",
    "EnergyPart",
    "EnergySummary",
    "FreezerSummary",
    "FrozenPart",
    "Grouped",
    "Part",
    "Parts",
    "SensitivityPart",
    "StartPart",
    "Stop",
    "Summary",
    "ValuePart",
    "cells_of",
    "locate",
    "round_to_nearest",
    "sensitivity",
    "summarise",
    "summarise_energies",
    "summarise_freezer",
    "summarise_start",
    "summarise_values",
]

"""Statistics, selections, energies and starts in summaries, tables and pictures."""

from fishkern.report.cells import Cell, cells_of
from fishkern.report.grouped import Grouped
from fishkern.report.matrices import EnergyPart, EnergySummary, StartPart, summarise_energies, summarise_start
from fishkern.report.summary import Part, Parts, Summary, locate, summarise
from fishkern.report.values import Held, held_values

__all__ = [
    "Cell",
    "EnergyPart",
    "EnergySummary",
    "Grouped",
    "Held",
    "Part",
    "Parts",
    "StartPart",
    "Summary",
    "cells_of",
    "held_values",
    "locate",
    "summarise",
    "summarise_energies",
    "summarise_start",
]

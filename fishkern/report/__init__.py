"""Statistics and selections in summaries, tables and pictures."""

from fishkern.report.cells import Cell, cells_of
from fishkern.report.summary import Part, Parts, Summary, locate, summarise
from fishkern.report.values import Held, Values, held_values

__all__ = ["Cell", "Held", "Part", "Parts", "Summary", "Values", "cells_of", "held_values", "locate", "summarise"]

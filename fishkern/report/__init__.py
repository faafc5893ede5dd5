"""Statistics and selections in summaries, tables and pictures."""

from fishkern.report.parts import Layout, Place
from fishkern.report.summary import Part, Parts, Summary, locate, summarise
from fishkern.report.values import Held, Values, held_values

__all__ = ["Held", "Layout", "Part", "Parts", "Place", "Summary", "Values", "held_values", "locate", "summarise"]

"""Statistics and selections in summaries, tables and pictures."""

from fishkern.report.parts import Layout, Place
from fishkern.report.summary import Part, Parts, Summary, locate, summarise

__all__ = ["Layout", "Part", "Parts", "Place", "Summary", "locate", "summarise"]

"""Statistics in summaries, tables and pictures."""

from fishkern.report.parts import Layout, Place
from fishkern.report.summary import Part, Summary, summarise

__all__ = ["Layout", "Part", "Place", "Summary", "summarise"]

"""Statistics over time: what stops training, and when."""

from fishkern.freezing.drift import JensenShannon
from fishkern.freezing.event import Freezing
from fishkern.freezing.freezer import Freezer
from fishkern.freezing.rule import FreezeRule
from fishkern.freezing.slices import Slices

__all__ = ["FreezeRule", "Freezer", "Freezing", "JensenShannon", "Slices"]

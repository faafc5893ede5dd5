"""Statistics over time: what stops training, and when."""

from fishkern.freezing.drift import JensenShannon, Track
from fishkern.freezing.event import Freezing
from fishkern.freezing.freezer import Freezer
from fishkern.freezing.readings import Factors, Reading, reading_of
from fishkern.freezing.reference import ReferenceDrift, ReferenceFactors, ReferenceRule
from fishkern.freezing.rule import FreezeRule
from fishkern.freezing.slices import Key, Slices

__all__ = [
    "Factors",
    "FreezeRule",
    "Freezer",
    "Freezing",
    "JensenShannon",
    "Key",
    "Reading",
    "ReferenceDrift",
    "ReferenceFactors",
    "ReferenceRule",
    "Slices",
    "Track",
    "reading_of",
]

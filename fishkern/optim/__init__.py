"""From a selection to an optimizer that moves the selected entries only."""

from fishkern.optim.base import MaskedOptimizer, Reselected
from fishkern.optim.cost import SkippedLayers, TrainingCost, training_cost
from fishkern.optim.masked_adamw import MaskedAdamW
from fishkern.optim.masked_sgd import MaskedSGD

__all__ = [
    "MaskedAdamW",
    "MaskedOptimizer",
    "MaskedSGD",
    "Reselected",
    "SkippedLayers",
    "TrainingCost",
    "training_cost",
]

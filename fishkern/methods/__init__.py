"""Published fine-tuning methods, one file each, composed of the rooms before this one."""

from fishkern.methods.checkpoint_merging import merge_checkpoints
from fishkern.methods.elastic_weight_consolidation import QuadraticPenalty
from fishkern.methods.farss import ShallowSearch, farss
from fishkern.methods.filet import filet
from fishkern.methods.fish_tuning import fish_tuning
from fishkern.methods.fisher_adaptune import fisher_adaptune
from fishkern.methods.fisher_merging import fisher_merge
from fishkern.methods.pissa import pissa
from fishkern.methods.tr_pts import TaskRelevance, tr_pts
from fishkern.methods.weighted_levels import Levels, weighted_levels

__all__ = [
    "Levels",
    "QuadraticPenalty",
    "ShallowSearch",
    "TaskRelevance",
    "farss",
    "filet",
    "fish_tuning",
    "fisher_adaptune",
    "fisher_merge",
    "merge_checkpoints",
    "pissa",
    "tr_pts",
    "weighted_levels",
]

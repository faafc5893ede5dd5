"""Published fine-tuning methods, one file each, composed of the rooms before this one."""

from fishkern.methods.farss import ShallowSearch, farss
from fishkern.methods.filet import filet
from fishkern.methods.fish_tuning import fish_tuning
from fishkern.methods.fisher_adaptune import fisher_adaptune
from fishkern.methods.pissa import pissa
from fishkern.methods.tr_pts import TaskRelevance, tr_pts

__all__ = [
    "ShallowSearch",
    "TaskRelevance",
    "farss",
    "filet",
    "fish_tuning",
    "fisher_adaptune",
    "pissa",
    "tr_pts",
]

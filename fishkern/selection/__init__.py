"""From statistics to a selection of coordinates."""

from fishkern.selection.base import Rule
from fishkern.selection.contribution_topk import ContributionTopK
from fishkern.selection.contributions import Contributions
from fishkern.selection.delta import Delta, apply_delta, delta
from fishkern.selection.entries import Entries
from fishkern.selection.global_topk import GlobalTopK
from fishkern.selection.n_of_m import NofM
from fishkern.selection.patches import CheckpointLayout, WeightPatch
from fishkern.selection.per_row_topk import PerRowTopK
from fishkern.selection.per_tensor_topk import PerTensorTopK
from fishkern.selection.pruning import prune_
from fishkern.selection.random import Random
from fishkern.selection.ranges import Columns, Rows
from fishkern.selection.result import Selection
from fishkern.selection.saliency import saliency
from fishkern.selection.select import select
from fishkern.selection.sharded import ShardedSelection
from fishkern.selection.start import bound_to_start, check_start, load_start, open_start, save_start
from fishkern.selection.stream import DeltaReader, DeltaStream
from fishkern.selection.updates import DeltaUpdate

__all__ = [
    "CheckpointLayout",
    "Columns",
    "ContributionTopK",
    "Contributions",
    "Delta",
    "DeltaReader",
    "DeltaStream",
    "DeltaUpdate",
    "Entries",
    "GlobalTopK",
    "NofM",
    "PerRowTopK",
    "PerTensorTopK",
    "Random",
    "Rows",
    "Rule",
    "Selection",
    "ShardedSelection",
    "WeightPatch",
    "apply_delta",
    "bound_to_start",
    "check_start",
    "delta",
    "load_start",
    "open_start",
    "prune_",
    "saliency",
    "save_start",
    "select",
]

"""What a model of transformers or PEFT is, read from its structure and names, importing neither."""

from fishkern.hosts import modes
from fishkern.hosts.alterations import alterations
from fishkern.hosts.blocks import Layer, layer_of, stack_of, stacks
from fishkern.hosts.calls import accepts, call_options
from fishkern.hosts.fully_sharded import FullySharded, class_of, local_part, reshard, runs_on, units
from fishkern.hosts.heads import Head, head_of
from fishkern.hosts.insertion import Branch, InsertionPoints, Wrapper, insert, insertion_points, remove
from fishkern.hosts.modes import connected_inputs, evaluation_mode
from fishkern.hosts.refusals import (
    added_loss,
    dispatched,
    lost_prefix,
    merged_adapter,
    scripted,
    sharded,
)
from fishkern.hosts.rotary import LengthLimit, length_limits
from fishkern.hosts.sequence_parallel import demanding_positions
from fishkern.hosts.shares import Share, cuts_of, joined, placed, share_of, whole
from fishkern.hosts.tasks import HEADS, Task, is_head, padding_token, task
from fishkern.hosts.tensor_parallel import (
    Split,
    completes_gradient,
    computed_shape,
    in_any,
    is_distributed,
    mesh_of,
    own_part,
    placed_over,
    split_of,
    split_range,
    why_not_split,
)
from fishkern.hosts.wrappers import base_model, named_parameters, unwrap

__all__ = [
    "HEADS",
    "Branch",
    "FullySharded",
    "Head",
    "InsertionPoints",
    "Layer",
    "LengthLimit",
    "Share",
    "Split",
    "Task",
    "Wrapper",
    "accepts",
    "added_loss",
    "alterations",
    "base_model",
    "call_options",
    "class_of",
    "completes_gradient",
    "computed_shape",
    "connected_inputs",
    "cuts_of",
    "demanding_positions",
    "dispatched",
    "evaluation_mode",
    "head_of",
    "in_any",
    "insert",
    "insertion_points",
    "is_distributed",
    "is_head",
    "joined",
    "layer_of",
    "length_limits",
    "local_part",
    "lost_prefix",
    "merged_adapter",
    "mesh_of",
    "modes",
    "named_parameters",
    "own_part",
    "padding_token",
    "placed",
    "placed_over",
    "remove",
    "reshard",
    "runs_on",
    "scripted",
    "sharded",
    "share_of",
    "split_of",
    "split_range",
    "stack_of",
    "stacks",
    "task",
    "units",
    "unwrap",
    "whole",
    "why_not_split",
]

"""Operations from tensors to tensors: contracts, checks and PyTorch references. No ``nn.Module`` is known here."""

from fishkern.ops import _in_graphs as _in_graphs  # registers operations
from fishkern.ops.embedding_sum_grad_squared import embedding_rows, embedding_sum_grad_squared
from fishkern.ops.expert_sum_grad_squared import expert_sum_grad_squared
from fishkern.ops.group_sum_grad_squared import group_sum_grad_squared
from fishkern.ops.log_histogram import log_histogram
from fishkern.ops.masked_adamw import masked_adamw_
from fishkern.ops.masked_sgd import masked_sgd_
from fishkern.ops.masked_update import masked_update_
from fishkern.ops.project_sum_squared import project_sum_squared
from fishkern.ops.scale_sum_grad_squared import scale_sum_grad_squared
from fishkern.ops.streaming_topk import streaming_topk
from fishkern.ops.sum_grad_squared import sum_grad_squared
from fishkern.ops.sum_position_grad_squared import sum_position_grad_squared

__all__ = [
    "embedding_rows",
    "embedding_sum_grad_squared",
    "expert_sum_grad_squared",
    "group_sum_grad_squared",
    "log_histogram",
    "masked_adamw_",
    "masked_sgd_",
    "masked_update_",
    "project_sum_squared",
    "scale_sum_grad_squared",
    "streaming_topk",
    "sum_grad_squared",
    "sum_position_grad_squared",
]

"""The ways to a diagonal Fisher that people use today, written as they write them.

Each is a function of a model and batches that gives the sum over examples of squared per-example gradients, under the
names of ``model.named_parameters()``, for the parameters that it covers. Libraries are imported where they are called:
none is needed to import this. They leave hooks, wrappers and attributes on a model; :func:`as_found` removes them.
"""

from benchmarks.rivals.as_found import as_found
from benchmarks.rivals.bmm import per_layer_bmm
from benchmarks.rivals.loops import Batches, forward_backward, graphed_one_by_one, one_by_one
from benchmarks.rivals.torch_func import vmap_grad

__all__ = [
    "Batches",
    "as_found",
    "forward_backward",
    "graphed_one_by_one",
    "one_by_one",
    "per_layer_bmm",
    "vmap_grad",
]

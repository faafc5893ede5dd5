"""Wrappers of torch's ``DistributedDataParallel`` around the parameters of an optimizer."""

from __future__ import annotations

import gc
from collections.abc import Collection

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fishkern.optim.release import several_processes
from fishkern.selection import Selection
from fishkern.selection.agreement import check_agreement
from fishkern.statistics.shards import Ranks


def wrappers_of(parameters: Collection[Tensor]) -> list[DistributedDataParallel]:
    """Find the wrappers around parameters.

    An optimizer gets parameters, often before they are wrapped, and a parameter does not know its wrapper.

    Args:
        parameters: Those of an optimizer.

    Returns:
        The wrappers, each once; none where there is one process.
    """
    if not several_processes():
        return []
    known = set(parameters)
    every = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return [one for one in every if not known.isdisjoint(one.module.parameters())]


def check_under_ddp(selection: Selection, parameters: Collection[Tensor]) -> None:
    """Check that all ranks of a wrapper have the same selection: with others their models would drift apart.

    A collective operation where there is a wrapper.

    Args:
        selection: Of this rank.
        parameters: Those of the optimizer.

    Raises:
        RuntimeError: Two ranks differ.
    """
    for wrapper in wrappers_of(parameters)[:1]:
        check_agreement(selection, Ranks(wrapper.process_group))

"""What identifies a call of ``estimate``: a checkpoint goes on only where all of it is the same."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from fishkern import hosts
from fishkern.backend import Backend
from fishkern.digests import exact_digest
from fishkern.statistics.base import Constant
from fishkern.statistics.likelihood_identity import identity_of
from fishkern.statistics.request import Options, Request
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.structure import Facts, facts_of_model

# A model in use sets the latter itself; on which GPU it is makes no difference.
_PASSING = (("the config's", "problem_type"),)
_OF_DEVICES = "the device of"


def facts_of_call(
    request: Request,
    options: Options,
    backend: Backend | None,
    max_examples: int | None,
    ranks: Ranks,
    until: object = None,
) -> Facts:
    """Describe all that the sums of a pass depend on, except for the data and what they show of the likelihood.

    Args:
        request: What is asked for.
        options: The arguments in force.
        backend: As for :func:`fishkern.estimate`.
        max_examples: As for :func:`fishkern.estimate`.
        ranks: The ranks that take part.
        until: As for :func:`fishkern.estimate`.

    Returns:
        Facts whose values are text. Those of the weights are digests of their bits, for which all of them are read.
    """
    estimator = request.estimator
    facts: Facts = {
        ("the argument", "estimator"): (type(estimator).__name__, estimator.definition, estimator.settings),
        ("the argument", "likelihood"): identity_of(options.likelihood),
        ("the argument", "check"): options.check,
        ("the argument", "max_examples"): max_examples,
        ("the argument", "until"): until,
        ("the argument", "backend"): backend,
        ("the argument", "shared"): options.shared,
        ("the device of", "the model"): request.device.type,
        ("the number of", "ranks"): ranks.count,
        ("the version of", "torch"): torch.__version__,
    }
    for name, info in request.infos.items():
        facts["the statistic of", name] = f"{info.dtype} {list(info.shape)} on {info.device.type}"
    if options.parts is not None:
        facts |= {("the pass of", name): number for number, names in enumerate(request.groups) for name in names}
    for fact, value in facts_of_model(request.model).items():
        if fact not in _PASSING and fact[0] != _OF_DEVICES:
            facts[fact] = value
    facts |= {("the digest of", name): _digest(tensor).hex() for name, tensor in _values_of(request.model).items()}
    return {fact: str(value) for fact, value in facts.items()}


def facts_of_constants(states: States) -> Facts:
    """Describe what the estimator has computed once of each parameter, such as a basis, on which its sums depend.

    Args:
        states: The states of a pass, before its first batch.

    Returns:
        Digests of the bits.
    """
    facts: Facts = {}
    for name in states.names:
        constants = [leaf.value for leaf in tree_leaves(states[name]) if isinstance(leaf, Constant)]
        tensors = [one for one in tree_leaves((constants, states.info(name).kept)) if isinstance(one, Tensor)]
        if tensors:
            facts["what the estimator computes once of", name] = _joined(tensors).hex()
    return facts


def _values_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _digest(tensor: Tensor) -> bytes:
    """Compute a digest of a tensor's bits; of one that is made of others, of theirs."""
    if (local := hosts.local_part(tensor)) is not tensor:  # each rank has a file of its own
        return _digest(local)
    if is_traceable_wrapper_subclass(tensor):
        names, settings = tensor.__tensor_flatten__()
        return _joined([getattr(tensor, name) for name in names], repr(settings))
    return exact_digest(tensor if tensor.layout is torch.strided else tensor.to_dense())


def _joined(tensors: list[Tensor], settings: Any = "") -> bytes:
    hashed = blake2b(str(settings).encode(), digest_size=16)
    for tensor in tensors:
        hashed.update(_digest(tensor))
    return hashed.digest()

"""Saliencies: what each weight contributes, by published formulas, to be pruned or selected by."""

from __future__ import annotations

import json
import warnings
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.digests import digest
from fishkern.layers import LinearMap, UnsupportedModuleError, is_stored, linear_maps
from fishkern.names import listed
from fishkern.selection.base import Patterns, matching
from fishkern.statistics import Statistics

FISHER, MAGNITUDE, WANDA = "fisher * weight^2", "|weight|", "|weight| * norm of the input"


@torch.no_grad()
def saliency(
    model: nn.Module, statistics: Statistics | None = None, *, parameters: Patterns | None = None
) -> Statistics:
    """Score each weight by what it contributes.

        F * w^2         of a Fisher information: twice the change of the loss if w becomes zero (LeCun et al., 1989)
        |w| * ||x||_2   of fishkern.InputNorms: Wanda (Sun et al., 2023, arXiv:2306.11695)
        |w|             without statistics

    In Wanda, ``||x||_2`` is the norm of the weight's input feature over all counted positions of all examples; the
    paper compares the weights of one output, which is ``PerRowTopK`` where a weight is stored as ``[O, I]``. A row of
    ``Conv1D`` is an input, whose weights all have one norm; a warning says so.

    Args:
        model: Whose weights.
        statistics: One number for each entry, such as the diagonal Fisher or its running mean, or ``InputNorms``.
        parameters: Patterns of names; ``None`` for those of the statistics, without statistics for all.

    Returns:
        Statistics of the parameters' shapes, float32, on the devices of the parameters. The definition says which
        formula of which statistics it is, and has a digest of the weights, so that saliencies of other weights do not
        merge.

    Raises:
        TypeError: ``statistics`` are of another kind.
        ValueError: Statistics are not of this model, or not of single entries; or a pattern matches nothing.
        UnsupportedModuleError: The model is sharded, or a weight is quantised.

    Warns:
        UserWarning: Of ``InputNorms``, weights are stored as ``[I, O]``.
    """
    plain = hosts.unwrap(model)
    if reason := hosts.sharded(plain):
        raise UnsupportedModuleError(f"{reason}.")
    if statistics is not None and not isinstance(statistics, Statistics):
        raise TypeError(f"statistics must be fishkern.Statistics, got {type(statistics).__name__}.")
    kind = _kind(statistics)
    own = hosts.named_parameters(plain, remove_duplicate=statistics is None)
    names = list(own if statistics is None else statistics)
    if parameters is not None:
        names = matching((parameters,) if isinstance(parameters, str) else parameters, names, "parameters")
    _check(names, own, plain)
    maps = linear_maps(plain) if kind == WANDA else {}
    if turned := [name for name in names if name in maps and maps[name].transposed]:
        warnings.warn(
            f"{listed(turned)} of a Conv1D is stored as [inputs, outputs]: PerRowTopK and NofM would compare the "
            "weights of one input, which all have one norm, and select by |weight| alone. Take a rule over whole "
            "tensors.",
            stacklevel=2,
        )
    scores = {}
    for name in names:
        weight = own[name].detach().to(torch.promote_types(own[name].dtype, torch.float32))
        if statistics is None:
            scores[name] = weight.abs()
        elif kind == WANDA:
            norms = (statistics[name].double() * statistics.count).sqrt()
            scores[name] = weight.abs() * _along_inputs(name, norms, maps.get(name), weight).to(weight)
        else:
            if statistics.shapes[name] != weight.shape:
                raise ValueError(
                    f"the statistics hold {name} with shape {tuple(statistics.shapes[name])}, in the model it has "
                    f"{tuple(weight.shape)}: they are of another model, or not of single entries."
                )
            scores[name] = statistics[name].to(weight) * weight.square()
    provenance = {"definition": _definition(kind, statistics, {name: own[name] for name in names})}
    if statistics is None:
        return Statistics(scores, count=1, provenance=provenance)
    provenance["runs"] = statistics.provenance["runs"]
    return Statistics(scores, count=statistics.count, provenance=provenance)


def _kind(statistics: Statistics | None) -> str:
    if statistics is None:
        return MAGNITUDE
    definition = statistics.provenance["definition"]
    if "groups" in definition:
        raise ValueError("a saliency needs a number for each entry, and these statistics are of groups.")
    if definition.get("estimator") == "Saliency":
        raise ValueError("these statistics are a saliency already: give the Fisher information that it was made of.")
    return WANDA if definition.get("estimator") == "InputNorms" else FISHER


def _check(names: list[str], own: dict[str, nn.Parameter], model: nn.Module) -> None:
    missing = [name for name in names if name not in own]
    packed = [name for name in names if name in own and is_stored(own[name])]
    if quantised := packed or [name for name in missing if _is_linear(name, model)]:
        raise UnsupportedModuleError(
            f"{listed(quantised)} is quantised and stored in another form: take the saliency before it is quantised."
        )
    if missing:
        raise ValueError(f"{type(model).__name__} has no parameter {listed(missing)}: give statistics of this model.")


def _is_linear(name: str, model: nn.Module) -> bool:
    linear: LinearMap | None = linear_maps(model).get(name)
    return linear is not None and linear.stored


def _along_inputs(name: str, norms: Tensor, linear: LinearMap | None, weight: Tensor) -> Tensor:
    """Give each entry of a weight the norm of its input feature."""
    if linear is None or norms.shape != (linear.shape[1],):
        raise ValueError(
            f"{name} is no weight of a linear map with {norms.numel()} input features: the statistics are of another "
            "model."
        )
    if linear.transposed:
        return norms[:, None].expand(weight.shape)
    return norms.expand(weight.flatten(1).shape).reshape(weight.shape)


def _definition(kind: str, statistics: Statistics | None, weights: dict[str, nn.Parameter]) -> dict[str, Any]:
    digests = json.dumps([[name, *digest(weight)] for name, weight in weights.items()])
    definition = {
        "estimator": "Saliency",
        "score": kind,
        "weights": blake2b(digests.encode(), digest_size=8).hexdigest(),
    }
    return definition if statistics is None else {**definition, "of": statistics.provenance["definition"]}

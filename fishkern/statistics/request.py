"""What a pass is asked for: the model and its parameters, described to the estimator, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import integer
from fishkern.backend import Backend
from fishkern.layers import (
    LinearMap,
    UnsupportedModuleError,
    has_gradient_dtype,
    is_wrapped,
    linear_maps,
    scored_tensors,
    stored_weights,
    weight_shape,
)
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.base import Estimator, ParameterInfo, check_estimator
from fishkern.statistics.batches import Reader, Shared
from fishkern.statistics.borders import document_numbers
from fishkern.statistics.choosing import Requested, requested_names
from fishkern.statistics.contents import Batch, Place
from fishkern.statistics.coverage import Covered
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.lengths import check_lengths
from fishkern.statistics.likelihood import CausalLM, Likelihood, recognise_likelihood
from fishkern.statistics.packing import PackedExamples, packed_examples
from fishkern.statistics.pairs import refuse_unnamed_pairs
from fishkern.statistics.parting import Parts, groups_of
from fishkern.statistics.preference import Preference
from fishkern.statistics.states import without_factors
from fishkern.statistics.storage import Where, storage_of
from fishkern.statistics.token_losses import TokenLosses


@dataclass(frozen=True, eq=False)
class Options:
    """Arguments of :func:`fishkern.estimate` that say what is asked for, as the caller gave them."""

    estimator: Estimator | None
    likelihood: Likelihood | LossFunction | Drawn | None
    parameters: Requested
    accumulate_on: Where
    check: bool
    backend: Backend | None
    shared: Shared
    parts: Parts = None
    results_on: Where = None


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for, of a model.

    Args:
        model: Without running wrappers.
        estimator: The recipe.
        which: As ``parameters`` of :func:`fishkern.estimate`.
        maps: The linear maps of the model; empty if the estimator reads no factors.
        tensors: The requested parameters, by canonical name.
        infos: What their states get to know of them.
        groups: Names of the parameters of each pass over the data.
    """

    model: nn.Module
    estimator: Estimator
    which: Requested
    maps: Mapping[str, LinearMap]
    tensors: Mapping[str, Tensor]
    infos: Mapping[str, ParameterInfo]
    groups: list[list[str]]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return hosts.runs_on(next(iter(self.tensors.values())))


def request_of(
    model: nn.Module, options: Options, max_examples: int | None = None, *, in_parts: bool = False
) -> Request:
    """Work out what is asked for, or refuse it.

    Args:
        model: Without running wrappers.
        options: What the caller asks for.
        max_examples: As for :func:`fishkern.estimate`.
        in_parts: Whether FSDP2 may shard the model, or tensor parallel split it.

    Returns:
        The request.

    Raises:
        ValueError: There are no such parameters, or the estimator does not give each of them one pass.
    """
    estimator = DiagonalFisher() if options.estimator is None else options.estimator
    check_estimable(model, estimator, max_examples, in_parts=in_parts)
    maps = linear_maps(model) if estimator.reads_factors else {}
    tensors = requested_tensors(model, options.parameters, estimator, maps)
    infos = parameter_infos(model, tensors, estimator, options.accumulate_on, maps)
    groups = groups_of(estimator, list(tensors), options.parts)
    return Request(model, estimator, options.parameters, maps, tensors, infos, groups)


def check_estimable(
    model: nn.Module,
    estimator: Estimator,
    max_examples: int | None = None,
    *,
    on_meta: bool = False,
    in_parts: bool = False,
) -> None:
    """Refuse what no pass can be made of.

    Args:
        model: Without running wrappers.
        estimator: The recipe.
        max_examples: As for :func:`estimate`.
        on_meta: Whether all of its parameters may be on the meta device.
        in_parts: Whether FSDP2 may shard it, or tensor parallel split it.

    Raises:
        TypeError: The estimator is something else.
        ValueError: A parameter has no shape yet, or ``max_examples`` is below 1.
        RuntimeError: It runs under ``torch.inference_mode()``, or the model was made under it.
        UnsupportedModuleError: The model is sharded, scripted or dispatched, or its examples have no gradient of their
            own.
    """
    check_estimator(estimator)
    if lazy := [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]:
        raise ValueError(
            f"{lazy[0]!r} of {type(model).__name__} has no shape yet, since its module is a lazy one: run the model "
            "once on a batch before estimating."
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise RuntimeError(
            "estimate takes gradients, which torch.inference_mode() rules out, also for parameters made under it: call "
            "it, and load the model, outside (torch.no_grad() does no harm)."
        )
    reason = hosts.sharded(model, fsdp2=in_parts, tensor_parallel=in_parts)
    if reason := reason or hosts.scripted(model) or hosts.lost_prefix(model):
        raise UnsupportedModuleError(f"{reason}.")
    whole_on_meta = on_meta and all(parameter.is_meta for parameter in model.parameters())
    if not whole_on_meta and (reason := hosts.dispatched(model)):
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be estimated where it is: {reason}. Load it onto one device, as by "
            "device_map={'': 0}; sums that do not fit beside it may be on the CPU or in files (accumulate_on=), or be "
            "taken in parts (parts=). Or shard it over several GPUs by FSDP2 (fully_shard)."
        )
    if max_examples is not None and integer(max_examples, "max_examples") < 1:
        raise ValueError(f"max_examples must be at least 1, got {max_examples}.")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
            raise UnsupportedModuleError(
                f"{name!r} ({type(module).__name__}) keeps no running statistics, so it normalises each example by the "
                "others of its batch, and no example has a gradient of its own."
            )


def requested_tensors(
    model: nn.Module, which: Requested, estimator: Estimator, maps: Mapping[str, LinearMap]
) -> dict[str, Tensor]:
    """Choose the parameters of a pass.

    Args:
        model: Without running wrappers.
        which: As for :func:`estimate`.
        estimator: The recipe.
        maps: The linear maps of the model, if the estimator reads factors.

    Returns:
        Parameters and stored weights by canonical name, in the model's order.

    Raises:
        ValueError: There are none.
        UnsupportedModuleError: The estimator reads factors, which one of them does not have.
    """
    named = scored_tensors(model)
    requested = {name: named[name] for name in requested_names(named, which)}
    linear = which is None and estimator.by_default == "linear"
    if linear:
        requested = {name: one for name, one in requested.items() if name in maps}
    if estimator.reads == "factors" and (without := [name for name in requested if name not in maps]):
        raise UnsupportedModuleError(without_factors(without))
    if not requested:
        why = "parameters= chooses none of them"
        if which is None:
            what = "no weight of a linear map among them" if linear else "none of them"
            why = f"{what} requires a gradient"
        raise ValueError(
            f"{type(model).__name__} has {len(named)} parameters, and {why}. Pass parameters='all', "
            "patterns of names or a predicate."
        )
    return requested


def parameter_infos(
    model: nn.Module,
    requested: Mapping[str, Tensor],
    estimator: Estimator,
    accumulate_on: Where,
    maps: Mapping[str, LinearMap],
) -> dict[str, ParameterInfo]:
    """Describe each parameter to its state.

    Args:
        model: Without running wrappers.
        requested: The requested parameters, by canonical name.
        estimator: The recipe.
        accumulate_on: As for :func:`estimate`.
        maps: The linear maps of the model, if the estimator reads factors.

    Returns:
        The descriptions by canonical name.

    Raises:
        UnsupportedModuleError: A parameter has no gradient, or belongs to an adapter that is merged.
    """
    if reason := hosts.merged_adapter(model, requested):
        raise UnsupportedModuleError(f"{reason}.")
    storage = storage_of(accumulate_on, "accumulate_on")
    stored = {key: weight_shape(module) for key, (_, module) in stored_weights(model).items()}
    _refuse_without_gradient(stored, requested, estimator)
    return {
        key: ParameterInfo(
            key,
            one,
            stored.get(key, one.shape),
            # the gradient of a stored weight is float32, whatever it is stored in
            accumulates_in(one.dtype) if has_gradient_dtype(one) else torch.float32,
            storage.device_for(one),
            maps.get(key),
            folder=storage.folder,
        )
        for key, one in requested.items()
    }


def _refuse_without_gradient(
    stored: Mapping[str, torch.Size], requested: Mapping[str, Tensor], estimator: Estimator
) -> None:
    """Refuse parameters without a gradient, except in a quantised linear whose gradients are captured."""
    without = {
        key: parameter
        for key, parameter in requested.items()
        if not has_gradient_dtype(parameter) or (key in stored and not is_wrapped(parameter))
    }
    if numbers := sorted(key for key, parameter in without.items() if parameter.is_complex()):
        raise UnsupportedModuleError(
            f"{numbers} are complex, and a Fisher of complex parameters is not defined here: leave them out with "
            "parameters=, or hold real and imaginary part as two real parameters."
        )
    if sparse := sorted(key for key, parameter in requested.items() if parameter.layout is not torch.strided):
        raise UnsupportedModuleError(
            f"{sparse} are kept in a sparse layout ({requested[sparse[0]].layout}), and statistics are dense: leave "
            "them out with parameters=, or hold a dense parameter and multiply it by its mask."
        )
    if lost := sorted(key for key in without if estimator.reads in ("sums", "batches") or key not in stored):
        dtypes = sorted({str(without[key].dtype).removeprefix("torch.") for key in lost})
        raise UnsupportedModuleError(
            f"{lost} are stored as {', '.join(dtypes)}, so autograd gives them no gradient. Such a weight is supported "
            "in a quantised linear (a module with in_features, out_features and one stored weight), by statistics of "
            "single examples or positions. Leave them out with parameters=."
        )


def coverage_of(request: Request, paths: Mapping[str, tuple[str, str]]) -> dict[str, Covered]:
    """Say how each parameter of a model was computed, or by whose word it was left out.

    Args:
        request: What was asked for.
        paths: Path and reason for each requested parameter.

    Returns:
        By canonical name, of all parameters.
    """
    requested, which = request.tensors, request.which
    excluded_by = "requires_grad is False" if which is None else "the parameters argument"
    by_maps = which is None and request.estimator.by_default == "linear"
    stored = stored_weights(request.model)
    coverage = {}
    for key, parameter in scored_tensors(request.model, stored).items():
        path, reason = paths[key] if key in requested else ("left out", excluded_by)
        if key not in requested and by_maps and key not in request.maps:
            reason = "not the weight of a linear map, so it has no activations and output gradients"
        storage, module = stored.get(key, (key, None))
        numel = parameter.numel() if module is None else weight_shape(module).numel()
        coverage[key] = Covered(path, numel, reason)
        if storage != key:
            coverage[storage] = Covered("left out", 0, f"stored for {key}")
    return coverage


def reader_for(model: nn.Module, likelihood: Likelihood | LossFunction | Drawn | None, shared: Shared) -> Reader:
    """Make the reader of batches that a likelihood needs.

    Args:
        model: Without running wrappers.
        likelihood: As for :func:`estimate`.
        shared: As for :func:`estimate`.

    Returns:
        The reader. A loss function gets the whole batch, and its rows are the examples. A model does not get the number
        of the batch's items, because it would divide the loss of each example by it; packed rows are read as documents,
        and so they are for losses of tokens; and the rows of preference pairs as pairs.
    """
    of_tokens = isinstance(likelihood, TokenLosses)
    chosen = CausalLM() if of_tokens else likelihood  # which says where a document has labels

    def packed(content: Batch, number: int, is_shared: Callable[[Place], bool]) -> PackedExamples | None:
        if likelihood is None:
            refuse_unnamed_pairs(content, number)
        labelled = _labelled(model, chosen, content, number)
        examples = None if labelled is None else packed_examples(content, labelled, number, is_shared)
        if examples is not None:
            check_lengths(model, examples, number)
        return examples

    if not (likelihood is None or isinstance(likelihood, Likelihood)):
        return Reader(shared, packed=packed if of_tokens else None)
    several = likelihood.read if isinstance(likelihood, Preference) else packed
    return Reader(shared, only_pairs=True, dropped=("num_items_in_batch",), packed=several)


def _labelled(model: nn.Module, likelihood: Likelihood | None, content: Batch, number: int) -> Tensor | None:
    """Say which positions of packed rows have a label, or refuse them; ``None`` where each row is one example."""
    if document_numbers(content) is None:
        return None
    chosen = recognise_likelihood(model, content) if likelihood is None else likelihood
    labelled = chosen.labelled(content)
    if labelled is None:
        raise ValueError(
            f"batch {number} is packed: a row holds several documents, and {type(chosen).__name__} has no labels of "
            "positions, by which documents have losses of their own. Use a collator that keeps one example in each row."
        )
    return labelled

"""``estimate``: from a model and batches to statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern import backend as backends
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
from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import Estimator, ParameterInfo, sums
from fishkern.statistics.batches import Examples, Reader, Shared
from fishkern.statistics.captured_pass import CapturedPass
from fishkern.statistics.choosing import Requested, requested_names
from fishkern.statistics.coverage import Covered, slowest_paths
from fishkern.statistics.cutting import answering_parts
from fishkern.statistics.data import Data, Progress
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.held import Held
from fishkern.statistics.independence import Independence
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.likelihood_argument import OWN_TOKENS
from fishkern.statistics.planning import Planner
from fishkern.statistics.positions import counted_positions
from fishkern.statistics.precision import Precision
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.randomness import OwnRandomness
from fishkern.statistics.result import Statistics
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States, without_factors
from fishkern.statistics.undisturbed import Entered, undisturbed
from fishkern.warning import warn_caller

_SAME_LOSS = 1e-3  # by which sums of losses over the same examples may differ, in other batches and in 16 bits


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    estimator: Estimator | None = None,
    *,
    likelihood: Likelihood | LossFunction | Drawn | None = None,
    parameters: Requested = None,
    max_examples: int | None = None,
    accumulate_on: str | torch.device | None = None,
    check: bool = True,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    shared: Shared = None,
) -> Statistics | Held:
    """Estimate a statistic of a model's gradients over data.

    The model runs in evaluation mode (activation checkpointing stays on). Its modes, ``requires_grad``, ``.grad``,
    hooks and torch's random number generators are left as found, also after an exception. Before the first batch, two
    examples run together and each alone, and a loss that depends on the other example is refused, whatever ``check``
    says. They also run through capture and through ordinary autograd; parameters on which the two differ take a slower
    exact path, with a warning.

    Under an initialised process group every rank estimates on its own part of the data, as a ``DistributedSampler`` or
    accelerate splits it; sums and counts are reduced, examples that the sampler repeats to even out the ranks count
    once, and every rank gets the same statistics.

    Cost of the default: one forward and one backward pass, without the weights' ordinary gradients; memory for the
    activations of a training step and one float32 accumulator for each requested parameter.

    Args:
        model: A module; wrappers (DDP, ``torch.compile``) are removed.
        batches: An iterable of batches, such as a ``DataLoader``: mappings (keyword arguments of the model) or
            ``(inputs, labels)``; a loss function may take longer tuples. Tensors and arrays have the example axis
            first, lists one entry for each example. Tensors are moved to the model's device. Batches of one are never
            cut.
        estimator: The recipe; ``None`` for :class:`DiagonalFisher`, the exact per-example empirical Fisher.
        likelihood: The loss of an example. ``None``: recognised from a transformers model. A :class:`Likelihood`. Or a
            function ``(model, batch) -> losses [N]``, which gives the empirical Fisher only; as :class:`Drawn` where
            it draws random numbers.
        parameters: ``None``: every parameter with ``requires_grad``; for :class:`DirectionEnergy` the weights of linear
            maps among them. ``"all"``: every parameter, also those stored as
            integers, float8 or in packed form by a quantised linear, whose key is ``<module>.weight`` and whose shape
            is ``[O, I]``. Patterns of canonical names. Or a predicate of canonical name and parameter (for a stored
            weight: the tensor that stores it).
        max_examples: Stop after so many examples, of all ranks together.
        accumulate_on: Device of the accumulators; ``None`` for each parameter's own.
        check: Whether to compare with ordinary autograd. It is the only way to detect a parameter that is used without
            calling its module.
        backend: ``None`` for the current default, see :mod:`fishkern.backend`.
        progress: ``True`` writes a line to standard error; or a function of the number of examples done and of the
            total, where known.
        shared: Entries that all examples of a batch share: patterns of names, or positions in a tuple.

    Returns:
        The mean over examples. Its coverage says which path computed each parameter.

    Raises:
        TypeError: A batch is neither a mapping nor a pair, or an argument is of another type than described.
        ValueError: There are no data, no trainable parameters or no labels; a loss is not finite or is not the model's
            own; the examples of a batch interact; or an entry of a batch cannot be assigned to examples.
        UnsupportedModuleError: The gradients of a module cannot be exact; the message says how to avoid it.
        RuntimeError: It runs under ``torch.inference_mode()``; or another rank has failed, or estimates other
            parameters.
    """
    estimator = DiagonalFisher() if estimator is None else estimator
    model = hosts.unwrap(model)
    check_estimable(model, estimator, max_examples)
    maps = linear_maps(model) if estimator.reads == "factors" else {}
    requested = requested_tensors(model, parameters, estimator, maps)
    infos = parameter_infos(model, requested, estimator, accumulate_on, maps)
    groups = _passes(estimator, requested, batches)
    ranks = Ranks()
    ranks.demand_equal({key: tuple(info.shape) for key, info in infos.items()}, "the parameters to estimate")
    device = next(iter(requested.values())).device
    reader = reader_for(likelihood, shared)
    answering = Answering(model, likelihood)
    backend = backends.current() if backend is None else backend
    results: dict[str, Any] = {}
    paths: dict[str, tuple[str, str]] = {}
    passed: list[_Passed] = []
    for number, names in enumerate(groups):
        data = Data(batches, reader, device, max_examples, ranks)
        report = Progress(progress if ranks.rank == 0 else False, data.total, number, len(groups))
        states = States({name: infos[name] for name in names}, estimator, backend)
        part = {name: requested[name] for name in names}
        passed.append(_Pass(model, part, estimator, states, answering).over(data, ranks, check=check, report=report))
        paths |= slowest_paths(ranks.gathered(passed[-1].paths))
        results |= _results(states, estimator, ranks, passed[-1].counts.units)
    results = {name: results[name] for name in requested}
    _demand_same_data(passed, ranks)
    _note_zeros(results)
    description = f"{answering.description}{_note_own_tokens(reader)}"
    return estimator.collect(
        model,
        results,
        count=passed[0].counts.units,
        provenance={
            "definition": {**estimator.definition, "likelihood": description},
            "runs": [_described(model, requested, estimator, passed, ranks, likelihood, check=check)],
        },
        coverage=_coverage(model, requested, paths, parameters, estimator, maps),
    )


class _Counts(NamedTuple):
    """What all ranks together have added up in a pass."""

    units: int
    examples: int
    batches: int


class _Passed(NamedTuple):
    """What is remembered of a pass.

    Args:
        counts: Of all ranks together.
        loss: Sum of this rank's losses.
        paths: Path and reason for each parameter.
        note: A remark for the provenance about how examples of a batch interact.
    """

    counts: _Counts
    loss: float
    paths: Mapping[str, tuple[str, str]]
    note: str | None


@dataclass
class _Pass:
    """One pass over the data.

    Args:
        model: Without running wrappers.
        requested: The parameters of this pass, by canonical name.
        estimator: The recipe.
        states: The states that it adds to.
        answering: Runs the model on a batch.
    """

    model: nn.Module
    requested: Mapping[str, Tensor]
    estimator: Estimator
    states: States
    answering: Answering

    def over(self, data: Data, ranks: Ranks, *, check: bool, report: Progress) -> _Passed:
        """Add every batch, on every rank."""
        with ranks.failing_together(), undisturbed(self.model, self.requested.values()) as entered:
            units, one_pass, note = self._run(data, entered, check=check, report=report)
        report.close()
        all_counts = ranks.gathered((units, data.examples, data.batches))
        counts = _Counts(*(sum(each) for each in zip(*all_counts, strict=True)))
        _demand_gradients(self.requested, one_pass, counts, ranks)
        return _Passed(counts, float(one_pass.loss), one_pass.paths, note)

    def _run(
        self, data: Data, entered: Entered, *, check: bool, report: Progress
    ) -> tuple[int, AutogradPass | CapturedPass, str | None]:
        """Add this rank's batches; return the number of units, the pass, and a remark for the provenance."""
        answer_parts = answering_parts(self.answering)

        def answer(batch: Examples) -> Predictive | Tensor:
            entered.restore()
            return answer_parts(batch)

        by_labels = self.estimator.definition.get("fisher_type", "empirical") == "empirical"
        independence = Independence(self.model, answer, Precision(self.model), by_labels=by_labels)
        one_pass = self._pass(answer, entered, independence, check=check)
        randomness = OwnRandomness(data.device)
        units = 0
        for batch in data:
            with randomness.drawing():  # the model's draws, not those of the data, come from the pass's own stream
                if not self.answering.prepared:
                    self.answering.prepare(batch)
                one_pass.run(batch)
            units += self.estimator.units(batch.num_examples)
            report(data.examples)
        return units, one_pass, independence.note

    def _pass(
        self, answer: Callable, entered: Entered, independence: Independence, *, check: bool
    ) -> AutogradPass | CapturedPass:
        common = (self.requested, answer, self.estimator, self.states)
        connection = entered.connection
        if self.estimator.reads in ("sums", "batches"):
            return AutogradPass(*common, independence=independence, connection=connection)
        planner = Planner(
            self.model,
            *common,
            counted=partial(counted_positions, self.model, self.estimator, self.answering),
            check=check,
            independence=independence,
            connection=connection,
        )
        return CapturedPass(*common, planner)


def reader_for(likelihood: Likelihood | LossFunction | Drawn | None, shared: Shared) -> Reader:
    """Make the reader of batches that a likelihood needs.

    Args:
        likelihood: As for :func:`estimate`.
        shared: As for :func:`estimate`.

    Returns:
        The reader. A loss function gets the whole batch. A model does not get the number of the batch's items, because
        it would divide the loss of each example by it.
    """
    by_function = not (likelihood is None or isinstance(likelihood, Likelihood))
    return Reader(shared, only_pairs=not by_function, dropped=() if by_function else ("num_items_in_batch",))


def _passes(estimator: Estimator, requested: Mapping[str, Tensor], batches: Iterable[Any]) -> list[list[str]]:
    """Split the parameters into passes over the data, and refuse data that can be read only once for several."""
    groups = estimator.passes(tuple(requested))
    if sorted(name for names in groups for name in names) != sorted(requested):
        raise ValueError(f"{type(estimator).__name__}.passes must give every requested parameter once, got {groups}.")
    if len(groups) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"{type(estimator).__name__} takes {len(groups)} passes over the data, and batches is an iterator, which "
            "can be read once: give a DataLoader or a list, or estimate all layers in one pass."
        )
    return groups


def _demand_same_data(passed: Sequence[_Passed], ranks: Ranks) -> None:
    """Refuse several passes that have seen different examples, as a loader that shuffles gives them."""
    if len(passed) == 1:
        return
    losses = [sum(ranks.gathered(one.loss)) for one in passed]
    examples = [one.counts.examples for one in passed]
    for number, (count, loss) in enumerate(zip(examples, losses, strict=True), 1):
        if count != examples[0] or not abs(loss - losses[0]) <= _SAME_LOSS * max(abs(loss), abs(losses[0])):
            raise ValueError(
                f"pass {number} of {len(passed)} saw other data than the first: {count} examples with a mean loss of "
                f"{loss / count:.6g}, after {examples[0]} with {losses[0] / examples[0]:.6g}. Give the same data in "
                "every pass, such as a DataLoader without shuffle, or estimate all layers in one pass."
            )


def parameter_infos(
    model: nn.Module,
    requested: Mapping[str, Tensor],
    estimator: Estimator,
    accumulate_on: str | torch.device | None,
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
    stored = {key: weight_shape(module) for key, (_, module) in stored_weights(model).items()}
    _refuse_without_gradient(stored, requested, estimator)
    return {
        key: ParameterInfo(
            key,
            one,
            stored.get(key, one.shape),
            # the gradient of a stored weight is float32, whatever it is stored in
            accumulates_in(one.dtype) if has_gradient_dtype(one) else torch.float32,
            torch.device(accumulate_on or one.device),
            maps.get(key),
        )
        for key, one in requested.items()
    }


def _results(states: States, estimator: Estimator, ranks: Ranks, units: int) -> dict[str, Any]:
    """Reduce each state over the ranks and turn it into the statistic, one at a time."""
    results = {}
    for key in states.names:
        state = states.pop(key)  # states are freed one by one as results take their place
        for total in sums(state):
            ranks.sum_(total)
        results[key] = estimator.result(state, units)
        if not all(bool(leaf.isfinite().all()) for leaf in tree_leaves(results[key]) if isinstance(leaf, Tensor)):
            raise ValueError(
                f"the statistic of {key} is not finite although every loss is: its gradients overflow in "
                f"{states.info(key).value.dtype}. Run the model in float32 or bfloat16."
            )
    return results


def _note_zeros(results: Mapping[str, Any]) -> None:
    if not any(bool(leaf.any()) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)):
        warn_caller("every entry is exactly zero: no parameter moves this loss.")


def _demand_gradients(
    requested: Mapping[str, Tensor], one_pass: AutogradPass | CapturedPass, counts: _Counts, ranks: Ranks
) -> None:
    """Refuse a result of no examples, or of a loss without a gradient."""
    if not counts.units:
        raise ValueError("the data holds no example: batches was empty (an exhausted iterator, or max_examples=0).")
    if not any(ranks.gathered(one_pass.connected)):
        raise ValueError(
            f"the loss depends on none of the {len(requested)} requested parameters "
            f"({', '.join(list(requested)[:3])}, ...): it was computed without gradients, or these parameters are "
            "not used."
        )


def _described(
    model: nn.Module,
    requested: Mapping[str, Tensor],
    estimator: Estimator,
    passed: Sequence[_Passed],
    ranks: Ranks,
    likelihood: Likelihood | LossFunction | Drawn | None,
    *,
    check: bool,
) -> dict[str, Any]:
    """Describe the passes for the provenance."""
    counts, note = passed[0].counts, passed[0].note
    return {
        "model": type(model).__name__,
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in requested.values()}),
        "examples": counts.examples,
        "batches": counts.batches,
        **({"passes": len(passed)} if len(passed) > 1 else {}),
        **({"ranks": ranks.count} if ranks.count > 1 else {}),
        "checked": None if estimator.reads in ("sums", "batches") else check,
        "torch": torch.__version__,
        **estimator.settings,
        **({"draws_seed": likelihood.seed} if isinstance(likelihood, Drawn) else {}),
        **({"note": note} if note else {}),
    }


def _note_own_tokens(reader: Reader) -> str:
    """Note entries that are withheld from the model, because they would make an example's loss depend on its batch."""
    if not reader.withheld:
        return ""
    warn_caller(
        f"the batches hold {', '.join(map(repr, sorted(reader.withheld)))}, which the model does not get: the loss of "
        "an example is that of its own tokens."
    )
    return OWN_TOKENS


def check_estimable(
    model: nn.Module, estimator: Estimator, max_examples: int | None = None, *, on_meta: bool = False
) -> None:
    """Refuse what no pass can be made of.

    Args:
        model: Without running wrappers.
        estimator: The recipe.
        max_examples: As for :func:`estimate`.
        on_meta: Whether all of its parameters may be on the meta device.

    Raises:
        TypeError: The estimator is something else.
        ValueError: A parameter has no shape yet, or ``max_examples`` is below 1.
        RuntimeError: It runs under ``torch.inference_mode()``, or the model was made under it.
        UnsupportedModuleError: The model is sharded, scripted or dispatched, or its examples have no gradient of their
            own.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be an Estimator such as DiagonalFisher(), got {estimator!r}.")
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
    if reason := hosts.sharded(model) or hosts.scripted(model) or hosts.lost_prefix(model):
        raise UnsupportedModuleError(f"{reason}.")
    whole_on_meta = on_meta and all(parameter.is_meta for parameter in model.parameters())
    if not whole_on_meta and (reason := hosts.dispatched(model)):
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be estimated as it is dispatched: {reason}. Load it onto one device, "
            "without device_map='auto'."
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


def _coverage(
    model: nn.Module,
    requested: Mapping[str, Tensor],
    paths: Mapping[str, tuple[str, str]],
    which: Requested,
    estimator: Estimator,
    maps: Mapping[str, LinearMap],
) -> dict[str, Covered]:
    excluded_by = "requires_grad is False" if which is None else "the parameters argument"
    stored = stored_weights(model)
    coverage = {}
    for key, parameter in scored_tensors(model).items():
        path, reason = paths[key] if key in requested else ("left out", excluded_by)
        if key not in requested and which is None and estimator.by_default == "linear" and key not in maps:
            reason = "not the weight of a linear map, so it has no activations and output gradients"
        storage, module = stored.get(key, (key, None))
        numel = parameter.numel() if module is None else weight_shape(module).numel()
        coverage[key] = Covered(path, numel, reason)
        if storage != key:
            coverage[storage] = Covered("left out", 0, f"stored for {key}")
    return coverage

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
from fishkern.backend import Backend
from fishkern.layers import (
    linear_maps,
)
from fishkern.statistics.answering import Answering
from fishkern.statistics.autograd_pass import AutogradPass
from fishkern.statistics.base import Estimator, sums
from fishkern.statistics.batches import Examples, Reader, Shared
from fishkern.statistics.captured_pass import CapturedPass
from fishkern.statistics.choosing import Requested
from fishkern.statistics.coverage import slowest_paths
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
from fishkern.statistics.request import (
    check_estimable,
    coverage_of,
    parameter_infos,
    reader_for,
    requested_tensors,
)
from fishkern.statistics.result import Statistics
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.undisturbed import Entered, undisturbed
from fishkern.warning import warn_caller

# By which sums of losses over the same examples may differ, in another order and in other batches.
_SAME_LOSS, _SAME_LOSS_16_BIT = 1e-5, 1e-3


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
    maps = linear_maps(model) if estimator.reads_factors else {}
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
        coverage=coverage_of(model, requested, paths, parameters, estimator, maps),
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
        half: Whether a part of the model computes in 16 bits.
    """

    counts: _Counts
    loss: float
    paths: Mapping[str, tuple[str, str]]
    note: str | None
    half: bool


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
            units, one_pass, independence = self._run(data, entered, check=check, report=report)
        report.close()
        all_counts = ranks.gathered((units, data.examples, data.batches))
        counts = _Counts(*(sum(each) for each in zip(*all_counts, strict=True)))
        _demand_gradients(self.requested, one_pass, counts, ranks)
        half = independence.precision.half
        return _Passed(counts, float(one_pass.loss), one_pass.paths, independence.note, half)

    def _run(
        self, data: Data, entered: Entered, *, check: bool, report: Progress
    ) -> tuple[int, AutogradPass | CapturedPass, Independence]:
        """Add this rank's batches; return the number of units, the pass, and what is known of its precision."""
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
        return units, one_pass, independence

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
    tolerance = _SAME_LOSS_16_BIT if any(one.half for one in passed) else _SAME_LOSS
    for number, (count, loss) in enumerate(zip(examples, losses, strict=True), 1):
        if count != examples[0] or not abs(loss - losses[0]) <= tolerance * max(abs(loss), abs(losses[0])):
            raise ValueError(
                f"pass {number} of {len(passed)} saw other data than the first: {count} examples with a mean loss of "
                f"{loss / count:.6g}, after {examples[0]} with {losses[0] / examples[0]:.6g}. Give the same data in "
                "every pass, such as a DataLoader without shuffle, or estimate all layers in one pass."
            )


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

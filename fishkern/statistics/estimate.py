"""``estimate``: from a model and batches to statistics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern import backend as backends
from fishkern import hosts
from fishkern.backend import Backend
from fishkern.names import listed
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Shared
from fishkern.statistics.call_facts import facts_of_call
from fishkern.statistics.choosing import Requested
from fishkern.statistics.coverage import slowest_paths
from fishkern.statistics.data import Progress
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.division import Division
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.following import Until, follows
from fishkern.statistics.held import Held
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.likelihood_argument import OWN_TOKENS, described
from fishkern.statistics.long_run import LongRun
from fishkern.statistics.notes import note_own_tokens
from fishkern.statistics.one_pass import Passed
from fishkern.statistics.out_of_memory import saying_what_sums_take
from fishkern.statistics.parting import Parts
from fishkern.statistics.precision import Precision
from fishkern.statistics.prepared import Prepared
from fishkern.statistics.request import Options, Request, coverage_of, reader_for, request_of
from fishkern.statistics.result import Statistics
from fishkern.statistics.sharded_pass import check_sharded
from fishkern.statistics.sharding import sharding_of
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States
from fishkern.statistics.storage import Storage, Where, storage_of
from fishkern.statistics.tensor_parallel import check_tensor_parallel, refuse_for_parts_of_models, tensor_parallel
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
    accumulate_on: Where = None,
    parts: Parts = None,
    results_on: Where = None,
    check: bool = True,
    backend: Backend | None = None,
    progress: bool | Callable[[int, int | None], None] = False,
    shared: Shared = None,
    prepared: Prepared | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: float = 600,
    until: float | tuple[float, float] | None = None,
) -> Statistics | Held:
    """Estimate a statistic of a model's gradients over data.

    The model runs in evaluation mode (activation checkpointing stays on). Its modes, ``requires_grad``, ``.grad``,
    hooks and torch's random number generators are left as found, also after an exception. Before the first batch, two
    examples run together and each alone, and a loss that depends on the other example is refused, whatever ``check``
    says. What capture makes of them is compared with ordinary autograd; parameters on which the two differ take a
    slower exact path, with a warning. The two examples count with what was captured of them there.

    Under an initialised process group every rank estimates on its own part of the data, as a ``DistributedSampler`` or
    accelerate splits it; sums and counts are reduced, examples that the sampler repeats to even out the ranks count
    once, and every rank gets the same statistics. Where FSDP2 shards the model (``fully_shard`` over all ranks), each
    rank gets the part that belongs to its shards, as ``DTensor``, and all take the same steps: one that has no batch
    left runs examples that do not count. Ranks that compute one model together (tensor parallel: ``parallelize_module``
    of torch, ``tp_plan`` of transformers) must be given the same batches, and each gets the part that belongs to its
    part of the model.

    Cost of the default: one forward and one backward pass, without the weights' ordinary gradients; memory for the
    activations of a training step and one float32 accumulator for each requested parameter.

    Args:
        model: A module; wrappers (DDP, ``torch.compile``) are removed.
        batches: An iterable of batches, such as a ``DataLoader``: mappings (keyword arguments of the model) or
            ``(inputs, labels)``; a loss function may take longer tuples. Tensors and arrays have the example axis
            first, lists one entry for each example. Tensors are moved to the model's device. Batches of one are never
            cut. In packed rows (``position_ids`` that restart, ``cu_seq_lens_q`` or ``seq_idx``) each document with a
            label is an example.
        estimator: The recipe; ``None`` for :class:`DiagonalFisher`, the exact per-example empirical Fisher.
        likelihood: The loss of an example. ``None``: recognised from a transformers model. A :class:`Likelihood`. Or a
            function ``(model, batch) -> losses [N]``, which gives the empirical Fisher only; as :class:`Drawn` where
            it draws random numbers, as :class:`TokenLosses` where it gives the loss of each token.
        parameters: ``None``: every parameter with ``requires_grad``; for :class:`DirectionEnergy` the weights of linear
            maps among them. ``"all"``: every parameter, also those stored as
            integers, float8 or in packed form by a quantised linear, whose key is ``<module>.weight`` and whose shape
            is ``[O, I]``. Patterns of canonical names. Or a predicate of canonical name and parameter (for a stored
            weight: the tensor that stores it).
        max_examples: Stop after so many examples, of all ranks together.
        accumulate_on: Where the accumulators are: a device, or a folder, where they lie in files that are mapped into
            memory, without a name, and end with the result. ``None`` for each parameter's device. The bits are the same
            on one device, in memory and in files.
        parts: Names of the parameters of each pass over the data, as :meth:`fishkern.PassPlan.parts` gives them, so
            that the accumulators of one part are in memory at a time. The data must be the same in every pass. ``None``
            for as few passes as the estimator takes.
        results_on: Where the result of a pass goes when it has ended: a device, or a folder as for ``accumulate_on``;
            ``None`` for where its accumulators are.
        check: Whether to compare with ordinary autograd. It is the only way to detect a parameter that is used without
            calling its module.
        backend: ``None`` for the current default, see :mod:`fishkern.backend`.
        progress: ``True`` writes a line to standard error; or a function of the number of examples done and of the
            total, where known.
        shared: Entries that all examples of a batch share: patterns of names, or positions in a tuple.
        prepared: From :func:`fishkern.prepare`, which has done what comes before the first batch. ``estimator``,
            ``likelihood``, ``parameters``, ``accumulate_on``, ``backend`` and ``shared`` are then as prepared where
            they are ``None``, and so is ``check`` in any case.
        checkpoint: File of a checkpoint, such as ``"fisher.part"``, written every so often and removed at the end. If
            it is there, the call goes on from it, to the bits of a call that was never interrupted: it reads the
            batches that were counted and compares them, or restores a loader that has ``state_dict`` and
            ``load_state_dict``. The pass must be the same: estimator, parameters, weights, structure of the model,
            likelihood, ``check``, ``max_examples``, backend, version of torch, number of ranks. Several ranks or
            passes have a file each, with a suffix; those of a sharded model go on from the last turn that all ranks
            have written. The file takes the memory of the accumulators; all weights and batches are read for
            their digests.
        save_every: Seconds between two writes of the checkpoint. It is written as well when ``batches`` raises.
        until: Stop as soon as this part of the top entries is expected to be right, such as 0.9 of the top 0.5 % of
            all entries, or with ``(0.9, density)`` of another top: to be in the top of infinitely many such examples
            (:meth:`Precision.overlap`). It is looked at after eight batches, and whenever there are a sixteenth more
            examples. ``max_examples``, or the end of the data, may come first; then a warning says what was reached.
            The examples must come in random order. Several ranks stop together.

    Returns:
        The mean over examples. Its coverage says which path computed each parameter; for a :class:`DiagonalFisher` of
        several batches its :attr:`precision <Statistics.precision>` says how far it depends on these examples.

    Raises:
        TypeError: A batch is neither a mapping nor a pair, or an argument is of another type than described.
        ValueError: There are no data, no trainable parameters or no labels; a loss is not finite or is not the model's
            own; the examples of a batch interact, or the model does not keep the documents of packed rows apart; ranks
            that compute one model together have other batches; an entry of a batch cannot be assigned to examples;
            model, batch or request are not those of ``prepared``; call or data are not those of the checkpoint; or
            ``until`` is given for another recipe, a tensor parallel model or a small pool.
        UnsupportedModuleError: The gradients of a module cannot be exact; the message says how to avoid it.
        RuntimeError: It runs under ``torch.inference_mode()``; or another rank has failed, or has other arguments
            (estimator, likelihood, parameters, ``check``, ``max_examples``), or plans other paths.
        OSError: The checkpoint cannot be written; one that was written before is unchanged.
    """
    model = hosts.unwrap(model)
    ranks = Ranks()
    ranks.demand_equal(prepared is not None, "whether a prepared pass is given")
    options = Options(estimator, likelihood, parameters, accumulate_on, check, backend, shared, parts, results_on)
    with ranks.failing_together():
        if not isinstance(prepared, Prepared | None):
            raise TypeError(f"prepared must come from fishkern.prepare(model, batch, ...), got {prepared!r:.80}.")
        sharding = sharding_of(model, ranks)  # which lets FSDP2 hold shards alone, as a prepared model did
        if prepared is not None:
            prepared.demand_model(model)
            options = prepared.completed(options)
        request = request_of(model, options, max_examples, in_parts=True)
        if sharding is not None:
            check_sharded(request.estimator)
        if hosts.mesh_of(model) is not None:
            check_tensor_parallel(request.estimator)
            given = {"parts": options.parts, "results_on": options.results_on}
            refuse_for_parts_of_models({**given, "prepared": prepared, "checkpoint": checkpoint, "until": until})
        goal = None if until is None else _checked_until(until, request, divided=options.parts is not None)
        # the sums of shards are those of all ranks, and all ranks stop at the same batch
        in_step = ranks if sharding is not None or goal is not None else Ranks.alone()
        if prepared is not None:
            prepared.demand_request(request, options)
        backend = backends.current() if options.backend is None else options.backend
        if checkpoint is not None:
            long_run = LongRun(checkpoint, save_every, len(request.groups), ranks, in_step)
            facts = facts_of_call(request, options, backend, max_examples, ranks, goal)
    further = {"until": goal, "whether there is a checkpoint": checkpoint is not None}
    _demand_same_request(request, options, ranks, {"max_examples": max_examples, **further})
    with ranks.failing_together():
        _refuse_one_reading(request, batches)
        storage = storage_of(options.results_on, "results_on")
        reader = reader_for(model, options.likelihood, options.shared)
    estimator, groups = request.estimator, request.groups
    answering = Answering(model, options.likelihood) if prepared is None else prepared.answering
    results: dict[str, Any] = {}
    paths: dict[str, tuple[str, str]] = {}
    passed: list[Passed] = []
    with tensor_parallel(model, ranks) as team:
        if team is not None and sharding is not None:
            sharding.beside(team.data)
        division = Division(ranks, sharding, team)
        # several passes, and models that tensor parallel splits, are not followed
        followed = options.parts is None and len(groups) == 1 and team is None and follows(estimator)
        for number, names in enumerate(groups):
            with saying_what_sums_take(request, options):
                with ranks.failing_together():
                    data = division.data(batches, reader, request.device, max_examples)
                    states = division.states({name: request.infos[name] for name in names}, estimator, backend)
                report = Progress(progress if ranks.rank == 0 else False, data.total, number, len(groups))
                following = None
                if followed:
                    watching = in_step.gathered(report.shows)[0]  # the first rank's alone has a line
                    following = division.following(states, until=goal, watching=watching, ranks=ranks, in_step=in_step)
                one = division.one_pass(
                    model,
                    {name: request.tensors[name] for name in names},
                    estimator,
                    states,
                    answering,
                    options.check,
                    known=None if prepared is None else prepared.known[number],
                    keeper=None if checkpoint is None else long_run.keeper(number, facts, states),
                    following=following,
                    in_step=in_step,
                )
                passed.append(one.over(data, ranks, report))
                precision = None if following is None else following.precision(ranks)
                paths |= slowest_paths(ranks.gathered(passed[-1].paths))
                results |= _results(states, ranks, passed[-1].counts.units, storage)
    results = {name: results[name] for name in request.tensors}
    _demand_same_data(passed, ranks)
    _note_zeros(results, ranks)
    note_own_tokens(reader.withheld - (set() if prepared is None else prepared.withheld))
    description = _description(answering, withheld=bool(reader.withheld), ranks=ranks)
    collected = estimator.collect(
        model,
        results,
        count=passed[0].counts.units,
        provenance={
            "definition": {**estimator.definition, "likelihood": description, **hosts.alterations(model)},
            "runs": [_described(request, passed, ranks, options.likelihood, answering, check=options.check)],
        },
        coverage=coverage_of(request, paths),
    )
    if precision is not None:
        contents = {name: getattr(collected, name) for name in ("count", "provenance", "coverage")}
        collected = type(collected)(collected.blocks, **contents, precision=precision)
    if checkpoint is not None:
        long_run.remove()
    if goal is not None:
        _note_missed(goal, precision)
    return collected


def _checked_until(until: float | tuple[float, float], request: Request, *, divided: bool) -> Until:
    """Read ``until``, which ends a single pass."""
    if divided or (isinstance(request.estimator, DiagonalFisher) and len(request.groups) > 1):
        raise ValueError(
            "until= is for a single pass over the data, without parts=: give the number of examples, max_examples=."
        )
    return Until.of(until, request.estimator)


def _note_missed(goal: Until, precision: Precision | None) -> None:
    """Warn if the data, or ``max_examples``, has ended before the goal was reached."""
    if precision is None:
        warn_caller("until= compares batches with each other, and the data was a single one: give smaller batches.")
    elif (overlap := precision.overlap(goal.density)) < goal.overlap:
        warn_caller(
            f"until= was not reached: after all {precision.count:,} examples an overlap of {overlap:.1%} of the top "
            f"{goal.density:.2%} is expected, not {goal.overlap:.1%}. Give more examples."
        )


def _demand_same_request(request: Request, options: Options, ranks: Ranks, further: Mapping[str, Any]) -> None:
    """Refuse ranks that do not ask for the same: sums of several recipes are none, and the ranks take other steps."""
    estimator, likelihood = request.estimator, options.likelihood
    asked = {
        "the parameters to estimate": {key: tuple(info.shape) for key, info in request.infos.items()},
        "the estimator": f"{type(estimator).__name__} {estimator.definition} {estimator.settings}",
        "the likelihood": None if likelihood is None else described(likelihood),
        "check": options.check,
        "the parameters of each pass": request.groups,
        **further,
    }
    for what, value in asked.items():
        ranks.demand_equal(value, what)


def _description(answering: Answering, *, withheld: bool, ranks: Ranks) -> str:
    """Describe the likelihood, which a rank without data has not seen, as all ranks have met it."""
    texts, of_tokens = zip(
        *ranks.gathered((answering.description if answering.prepared else None, withheld)), strict=True
    )
    known = {text for text in texts if text is not None}
    if len(known) != 1:
        raise RuntimeError(f"the ranks have recognised several likelihoods: {listed(sorted(known))}.")
    return f"{known.pop()}{OWN_TOKENS if any(of_tokens) else ''}"


def _refuse_one_reading(request: Request, batches: Iterable[Any]) -> None:
    """Refuse data that can be read only once for several passes."""
    if len(request.groups) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"{type(request.estimator).__name__} takes {len(request.groups)} passes over the data, and batches is an "
            "iterator, which can be read once: give a DataLoader or a list, or estimate everything in one pass."
        )


def _demand_same_data(passed: Sequence[Passed], ranks: Ranks) -> None:
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
                "every pass, such as a DataLoader without shuffle, or estimate everything in one pass."
            )


def _results(states: States, ranks: Ranks, units: int, storage: Storage) -> dict[str, Any]:
    """Reduce each state over the ranks, turn it into the statistic and put that away, one at a time."""
    results: dict[str, Any] = {}
    infinite: list[str] = []
    dtypes = {key: states.info(key).value.dtype for key in states.names}
    for key in states.names:
        results[key] = states.result(key, ranks, units)  # states are freed one by one as results take their place
        if not all(bool(leaf.isfinite().all()) for leaf in _tensors(results[key])):
            infinite.append(key)
        results[key] = storage.keep(results[key])
    if infinite := list(chain.from_iterable(ranks.gathered(infinite))):  # a rank may hold a part of a statistic
        raise ValueError(
            f"the statistic of {infinite[0]} is not finite although every loss is: its gradients overflow in "
            f"{dtypes[infinite[0]]}. Run the model in float32 or bfloat16."
        )
    return results


def _note_zeros(results: Mapping[str, Any], ranks: Ranks) -> None:
    if not any(ranks.gathered(any(bool(leaf.any()) for leaf in _tensors(results)))):
        warn_caller("every entry is exactly zero: no parameter moves this loss.")


def _tensors(results: Any) -> list[Tensor]:
    """List the tensors of a nest of results, of sharded ones the local parts."""
    return [hosts.local_part(leaf) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _described(
    request: Request, passed: Sequence[Passed], ranks: Ranks, likelihood: object, answering: Answering, *, check: bool
) -> dict[str, Any]:
    """Describe the passes for the provenance."""
    counts = passed[0].counts
    notes, every_logits = zip(*ranks.gathered((passed[0].note, answering.said_of_logits)), strict=True)
    note = next(filter(None, notes), None)
    logits = "; ".join(dict.fromkeys(filter(None, every_logits)))
    estimator = request.estimator
    return {
        "model": type(request.model).__name__,
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in request.tensors.values()}),
        "examples": counts.examples,
        "batches": counts.batches,
        **({"documents_without_labels": counts.dropped} if counts.dropped else {}),
        **({"passes": len(passed)} if len(passed) > 1 else {}),
        **({"ranks": counts.ranks} if counts.ranks > 1 else {}),
        "checked": None if estimator.reads in ("sums", "batches") else check,
        "torch": torch.__version__,
        **estimator.settings,
        **({"draws_seed": likelihood.seed} if isinstance(likelihood, Drawn) else {}),
        **({"logits": logits} if logits else {}),
        **({"note": note} if note else {}),
    }

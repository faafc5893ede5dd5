"""``plan``: what a pass over data will take, before it runs: bytes, passes and the path of each parameter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import at_least
from fishkern.layers import UnsupportedModuleError, is_wrapped, linear_maps
from fishkern.names import listed
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples, Shared
from fishkern.statistics.choosing import Requested
from fishkern.statistics.coverage import ONLY_A_RUN
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.following import followed_bytes, follows
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.parting import Parts, groups_of
from fishkern.statistics.pass_plan import PassPlan
from fishkern.statistics.ranks_plan import plan_for_ranks
from fishkern.statistics.request import (
    Options,
    check_estimable,
    parameter_infos,
    reader_for,
    requested_tensors,
)
from fishkern.statistics.sharded_pass import check_sharded
from fishkern.statistics.staging import IN_FLIGHT
from fishkern.statistics.storage import Storage, Where, storage_of

if TYPE_CHECKING:
    from fishkern.statistics.rehearsal import Rehearsal
    from fishkern.statistics.valueless import Valueless


def plan(
    model: nn.Module,
    batch: Any = None,
    estimator: Estimator | None = None,
    *,
    likelihood: Likelihood | LossFunction | Drawn | None = None,
    parameters: Requested = None,
    accumulate_on: Where = None,
    parts: Parts = None,
    results_on: Where = None,
    check: bool = True,
    shared: Shared = None,
    ranks: int | None = None,
) -> PassPlan:
    """Plan a pass of :func:`fishkern.estimate`: its bytes on one device, its passes, the path of each parameter.

    The pass is rehearsed on tensors without values, which take no memory: its own code runs, from the set-up to the
    results, and the bytes that are alive are counted at every operation. So the model may be on the meta device, where
    it is planned as on a CPU; of a model on another device nothing is computed. It is left as found.

    What a plan does not contain is said in ``unknown``: the scratch of kernels and libraries, and whatever depends on
    values, such as how many tokens a router sends to an expert.

    Args:
        model: A module, on any device; wrappers (DDP, ``torch.compile``) are removed.
        batch: One batch as :func:`fishkern.estimate` takes it, on any device. Of its floating tensors only the shapes
            are read. Its integers (tokens, labels, masks) may matter, and are ones if they are on the meta device.
            ``None``: no activations are planned.
        estimator: The recipe; ``None`` for :class:`fishkern.DiagonalFisher`.
        likelihood: As for :func:`fishkern.estimate`.
        parameters: As for :func:`fishkern.estimate`.
        accumulate_on: As for :func:`fishkern.estimate`. Accumulators elsewhere are left out of the peak, but for
            the largest few of those on another device, which are made on the model's device and copied.
        parts: As for :func:`fishkern.estimate`.
        results_on: As for :func:`fishkern.estimate`. Results elsewhere are left out of the peak.
        check: As for :func:`fishkern.estimate`.
        shared: As for :func:`fishkern.estimate`.
        ranks: Also plan for so many ranks over which FSDP2 shards the model, each with such a batch.

    Returns:
        The plan.

    Raises:
        TypeError: The batch is neither a mapping nor a pair, or an argument is of another type than described.
        ValueError: There are no trainable parameters or no labels, or an entry of the batch cannot be assigned to
            examples; or the rows of the batch are packed.
        UnsupportedModuleError: The gradients of a module cannot be exact, or ``ranks`` is asked for with another
            estimator than a :class:`fishkern.DiagonalFisher`; the message says how to avoid it.
        RuntimeError: It runs under ``torch.inference_mode()``.
    """
    # not at the top: torch's tensors without values are no public part of it
    from fishkern.statistics.valueless import Valueless, device_of

    estimator = DiagonalFisher() if estimator is None else estimator
    model = hosts.unwrap(model)
    if ranks is not None:
        check_sharded(estimator)
        if not isinstance(estimator, DiagonalFisher):
            raise UnsupportedModuleError(
                f"ranks= counts the sums of a DiagonalFisher, a number for each entry, and {type(estimator).__name__} "
                "has others: plan it without ranks=."
            )
    check_estimable(model, estimator, on_meta=True)
    weight_bytes = sum(map(_nbytes, [*model.parameters(), *model.buffers()]))
    maps = linear_maps(model) if estimator.reads_factors else {}
    first = next(iter(requested_tensors(model, parameters, estimator, maps).values()))
    device = device_of(first)
    mode = Valueless()
    examples = None
    if isinstance(batch, list) and batch and all(isinstance(one, Mapping | tuple | list) for one in batch):
        raise TypeError(f"batch is one batch, got a list of {len(batch)}: pass the largest of them.")
    if batch is not None:
        examples = reader_for(model, likelihood, shared)(batch, 0)
        if examples.documents is not None:
            raise ValueError(
                "the batch has packed rows, and where their documents end is read off values, which a plan does not "
                "have. Leave out what says so ('position_ids', 'seq_idx', 'cu_seq_lens_q'): a row is then planned as "
                "one example."
            )
        examples = examples.with_tensors(lambda tensor: mode.input_like(tensor, device))
    sums_away = _away(storage_of(accumulate_on, "accumulate_on"), first)
    results_stay = (sums_away if results_on is None else _away(storage_of(results_on, "results_on"), first)) is None
    with torch.random.fork_rng([device] if device.type == "cuda" else []), mode.model(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values, which there are none of
        options = Options(estimator, likelihood, parameters, accumulate_on, check, None, shared, parts, results_on)
        rehearsals = _rehearsed(mode, model, options, examples, keeps_results=results_stay)
    common = (model, estimator, rehearsals, weight_bytes, examples, device, sums_away)
    planned = _planned(*common, divided=parts is not None)
    if ranks is None:
        return planned
    requested = requested_tensors(model, parameters, estimator, maps)
    numbers = [(one, 8 if one.dtype == torch.float64 else 4) for one in requested.values()]
    per_rank = plan_for_ranks(at_least(1, ranks, "ranks"), model, numbers, planned.activation_bytes)
    return replace(planned, per_rank=per_rank)


def _rehearsed(
    mode: Valueless, model: nn.Module, options: Options, examples: Examples | None, *, keeps_results: bool
) -> list[Rehearsal]:
    """Rehearse each pass over the data, while the results of those before it are alive."""
    from fishkern.statistics.rehearsal import Rehearsal

    estimator = options.estimator
    maps = linear_maps(model) if estimator.reads_factors else {}
    requested = requested_tensors(model, options.parameters, estimator, maps)
    infos = parameter_infos(model, requested, estimator, None, maps)
    answering = Answering(model, options.likelihood)
    rehearsals: list[Rehearsal] = []
    results: dict[str, Any] = {}
    for names in groups_of(estimator, list(requested), options.parts):
        part = {name: requested[name] for name in names}
        part_infos = {name: infos.pop(name) for name in names}
        one = Rehearsal(mode, model, part, part_infos, estimator, answering, options.check, keeps_results)
        rehearsals.append(one)
        results |= one.over(examples)
    return rehearsals


def _planned(
    model: nn.Module,
    estimator: Estimator,
    rehearsals: list[Rehearsal],
    weight_bytes: int,
    examples: Examples | None,
    device: torch.device,
    sums_away: Storage | None,
    *,
    divided: bool,
) -> PassPlan:
    """Combine the passes: bytes are those of the pass that takes the most; in parts nothing is followed."""
    phases: dict[str, int] = {}
    paths: dict[str, tuple[str, str]] = {}
    activations: list[int] = []
    flops = {"pass": 0, "estimator": 0, "set-up": 0}
    state_bytes: dict[str, int] = {}
    beside = 0
    for one in rehearsals:
        sizes = one.sums_of.values()
        # sums of a parameter are made where its gradients are, while those before it move to another device
        moves = sums_away is not None and not _is(device, sums_away.device)
        staged = sum(sorted(sizes)[-1 - IN_FLIGHT :]) if moves else 0
        outside = sum(sizes) - staged if sums_away is not None else 0
        own = {name: one.bases_of[name] + (one.sums_of[name] if sums_away is None else 0) for name in one.sums_of}
        state_bytes |= own
        # entries are followed from the first batch on, where their sums are
        follows_here = len(rehearsals) == 1 and follows(estimator) and not moves and not divided
        followed = followed_bytes(sum(info.shape.numel() for info in one.infos.values())) if follows_here else 0
        peaks = {name: phase.peak + (followed if name != "states" else 0) for name, phase in one.phases.items()}
        most = max(phase.peak for phase in one.phases.values()) - outside  # in parts nothing is followed
        beside = max(beside, most - sum(own.values()), one.workspace)
        for name, phase in one.phases.items():
            phases[name] = max(phases.get(name, 0), peaks[name] - outside)
            flops["pass" if name == "batch" else "set-up"] += phase.flops
            if name not in ("states", "results"):
                activations.append(peaks[name] - one.states)
        flops["estimator"] += one.estimating
        paths |= one.paths
    moved = max(sum(one.sums_of.values()) for one in rehearsals)
    return PassPlan(
        model=type(model).__name__,
        estimator=type(estimator).__name__,
        weight_bytes=weight_bytes,
        accumulator_bytes=moved,
        basis_bytes=max(sum(one.bases_of.values()) for one in rehearsals),
        activation_bytes=max(activations, default=None),
        phases=phases,
        paths={key: path for key, (path, _) in paths.items()},
        passes=len(rehearsals),
        flops=flops,
        examples=examples.num_examples if examples else 0,
        unknown=tuple(_unknown(model, rehearsals, paths, examples)),
        state_bytes=state_bytes,
        beside_bytes=beside,
        traffic_bytes={"device": 0, "cpu": moved, "file": 2 * moved},
        logits=next((said for one in rehearsals if (said := one.answering.said_of_logits)), ""),
    )


def _unknown(
    model: nn.Module, rehearsals: list[Rehearsal], paths: Mapping[str, tuple[str, str]], examples: Examples | None
) -> Iterator[str]:
    """Say what the plan does not contain."""
    if examples is None:
        yield "activations, since there is no batch"
    reasons: dict[str, list[str]] = {}
    for key, (path, reason) in paths.items():
        if path == ONLY_A_RUN:
            reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        yield f"the path of {listed(keys)}: {reason}"
    yield from dict.fromkeys(words for one in rehearsals for words in one.unknown)
    if any(parameter.is_meta for parameter in model.parameters()):
        yield "which attention and which kernels another device than a CPU takes, since the model is on the meta device"
    yield "what kernels and libraries take beside their results, and the slack of the allocator"


def _away(storage: Storage, tensor: Tensor) -> Storage | None:
    """Return a place if what is kept there takes no memory where a tensor is."""
    device = storage.device
    if storage.folder is None and (device is None or _is(tensor.device, device)):
        return None
    return storage


def _is(device: torch.device, named: torch.device) -> bool:
    """Tell whether a tensor's device is what a user names; an accelerator without a number is the current one."""
    if device.type != named.type or device.type in ("cpu", "meta"):
        return device.type == named.type
    return device.index == (torch.accelerator.current_device_index() if named.index is None else named.index)


def _nbytes(tensor: Tensor) -> int:
    """Count the bytes of a tensor; a subclass with its own arithmetic is made of others."""
    if not is_wrapped(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

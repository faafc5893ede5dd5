"""``verify``: statistics against a batch-size-1 loop, on the user's own model and data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import integer
from fishkern.layers import UnsupportedModuleError, is_wrapped, scored_tensors, stored_weights
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples, Reader, Shared
from fishkern.statistics.choosing import Requested, requested_names
from fishkern.statistics.comparable import check_kind, check_loss, check_names, check_recipe, check_shapes
from fishkern.statistics.coverage import Covered
from fishkern.statistics.data import demand_several
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.estimate import estimate
from fishkern.statistics.group_fisher import GroupFisher
from fishkern.statistics.judgement import TOLERANCE, Noise, error, judged, largest, overlap
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.likelihood_argument import checked_likelihood
from fishkern.statistics.loop import Loop
from fishkern.statistics.request import reader_for
from fishkern.statistics.result import Statistics
from fishkern.statistics.routing import Routing
from fishkern.statistics.sharded_pass import check_sharded
from fishkern.statistics.sharding import sharding_of
from fishkern.statistics.shards import Ranks
from fishkern.statistics.tensor_parallel import Team, check_tensor_parallel, demand_same, tensor_parallel
from fishkern.statistics.verification import Verification

_NOISE_EXAMPLES = 8


def verify(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Mapping[str, Tensor] | None = None,
    parameters: Requested = None,
    *,
    estimator: Estimator | None = None,
    likelihood: Likelihood | LossFunction | Drawn | None = None,
    max_examples: int | None = None,
    shared: Shared = None,
    density: float = 0.005,
    progress: Callable[[int, int | None], None] | bool = False,
) -> Verification:
    """Compare statistics of single examples with a loop that back-propagates one at a time.

    The loop takes each row of a batch with its padding, runs the model on it alone, and passes the whole gradient in
    ``.grad`` to the recipe. For the empirical Fisher it uses the loss that the model itself returns, if it returns one.
    A difference is judged against the model's own batch noise: on the first batch (up to 8 examples) the gradient of
    each example in its batch is compared with that of the example alone. A parameter passes while its error stays below
    rounding plus twice that noise. Noise too large to be rounding is a failure: the examples of a batch interact. So is
    a loop without any gradient. Rounding is that of the coarsest dtype that a parameter or a module's output has.
    Where a position chooses other experts in a batch than alone, its gradients differ by more than rounding; the report
    counts such choices on the same examples, and names modules of experts whose calls do not match.

    Where FSDP2 shards the model or tensor parallel splits it, every rank calls it with its own batches, as for
    :func:`estimate`, and all of them run every example. The loop then forms its sums on the parts, and each parameter
    is compared whole, on every rank.

    Cost: the loop, once, and one backward pass of the first batch for each of its examples. Memory: two float32
    accumulators for each parameter, three for the first batch; one gradient at a time.

    Args:
        model: A module; left as found.
        batches: As for :func:`estimate`; read once and kept.
        statistics: The statistics to verify, estimated on the same examples; or a plain mapping from elsewhere.
            ``None``: estimated here.
        parameters: Which to compare, as for :func:`estimate`; ``None``: those in the statistics, and those that require
            a gradient and were not left out on request.
        estimator: The recipe of the statistics, also one of your own; ``None``: :class:`DiagonalFisher`, the empirical
            Fisher.
        likelihood: As for :func:`estimate`.
        max_examples: Stop after so many examples.
        shared: As for :func:`estimate`.
        density: Fraction of the entries for the comparison of selections.
        progress: A function of the number of examples that the loop has done, and of all; or ``True`` for that of
            :func:`estimate`.

    Returns:
        The report; ``.ok`` says whether the statistics pass.

    Raises:
        TypeError: As :func:`estimate`.
        ValueError: The statistics have another recipe, loss or data; the recipe is not one of single examples; or no
            parameter can be compared. And as :func:`estimate`.
        UnsupportedModuleError: As :func:`estimate`.
    """
    model = hosts.unwrap(model)
    ranks = Ranks()
    if reason := hosts.sharded(model, fsdp2=True, tensor_parallel=True) or hosts.scripted(model):
        raise UnsupportedModuleError(f"{reason}.")
    sharding = sharding_of(model, ranks)
    estimator = DiagonalFisher() if estimator is None else estimator
    check_recipe(estimator)
    likelihood = checked_likelihood(likelihood)
    with tensor_parallel(model, ranks) as team:
        if sharding is not None:
            sharding.beside(ranks if team is None else team.data)
        in_parts = team is not None or sharding is not None
        apart = ranks if team is None else team.data  # the processes with examples of their own
        if in_parts:
            _check_in_parts(estimator, max_examples, team, apart)
        with ranks.failing_together() if in_parts else nullcontext():
            own = _read(batches, max_examples, reader_for(model, likelihood, shared))
        if team is not None:
            with ranks.failing_together():
                demand_same(team, own)
        data = _of_all_ranks(own, apart) if in_parts else own
        estimate_seconds = None
        if statistics is None:
            options = {"estimator": estimator, "likelihood": likelihood, "parameters": parameters, "shared": shared}
            statistics, estimate_seconds = _estimated(model, own, progress=progress is True, **options)
        elif isinstance(statistics, Statistics):
            check_kind(statistics, estimator, sum(batch.num_examples for batch in data))
        check_names(statistics)
        loops = partial(
            Loop, model, likelihood=likelihood, estimator=estimator, sharding=sharding, in_parts=team is not None
        )
        report = progress if callable(progress) else lambda done, total: None
        return _compared(model, data, statistics, parameters, loops, density, report, estimate_seconds)


def _compared(
    model: nn.Module,
    data: Sequence[Examples],
    statistics: Mapping[str, Tensor],
    parameters: Requested,
    loops: Callable[[Mapping[str, Tensor]], Loop],
    density: float,
    report: Callable[[int, int | None], None],
    estimate_seconds: float | None,
) -> Verification:
    """Compare statistics with the loop over these examples, which ``loops`` makes of the parameters to compare."""
    examples = sum(batch.num_examples for batch in data)
    statistics = statistics.whole() if isinstance(statistics, Statistics) else statistics
    named = scored_tensors(model)
    requested = _requested(named, statistics, parameters)
    included = [name for name in requested if name in statistics]
    comparable = _comparable(model, named, included)
    loop = loops(comparable)
    with loop.collecting():
        if estimate_seconds is None:
            check_loss(statistics, model, loop.likelihood, next(_rows(data, loop.device)))
        routing = Routing(model)
        with routing.noting():
            noise, shapes = _batch_noise(
                loop, data[0], density, routing
            )  # first: shapes that differ end it before the long loop
        check_shapes(statistics, shapes)
        start = _clock(model)
        _run_alone(loop, data, report)
        loop_seconds = _clock(model) - start
        truth = loop.results(examples)
    choices = routing.choices()
    # a tensor subclass may say that it requires a gradient, and still get none
    for name in [name for name in comparable if is_wrapped(named[name]) and name not in loop.arrived]:
        del comparable[name], truth[name]
    _demand_any(comparable, included, model)
    covered = statistics.coverage if isinstance(statistics, Statistics) else {}
    return Verification(
        compared=judged(comparable, statistics, truth, noise, covered=covered, dtypes=loop.precision.dtypes),
        missing=tuple(name for name in requested if name not in statistics),
        integers=tuple(name for name in included if name not in comparable),
        coverage=_by_path(covered),
        size=sum(covered[name].numel if name in covered else named[name].numel() for name in named),
        examples=examples,
        noise_examples=noise.examples,
        density=density,
        overlap=overlap(statistics.blocks if isinstance(statistics, Statistics) else statistics, truth, density),
        noise_overlap=noise.overlap,
        choices=choices.compared,
        changed_choices=choices.changed,
        unmatched_choices=choices.unmatched,
        largest=max(map(largest, truth.values())),
        loop_seconds=loop_seconds,
        estimate_seconds=estimate_seconds,
    )


def _check_in_parts(estimator: Estimator, max_examples: int | None, team: Team | None, apart: Ranks) -> None:
    if team is not None:
        check_tensor_parallel(estimator)
    else:
        check_sharded(estimator)
    if isinstance(estimator, GroupFisher):
        raise UnsupportedModuleError(
            "FSDP2 shards the parameters, and verify compares entries, of which each rank has its own: verify "
            "DiagonalFisher, whose sums over groups GroupFisher gives, or load the whole model in each process."
        )
    if max_examples is not None and apart.count > 1:
        raise ValueError(
            f"max_examples counts the examples of one process, and {apart.count} have examples of their own: give "
            "fewer batches."
        )


def _of_all_ranks(data: Sequence[Examples], ranks: Ranks) -> list[Examples]:
    """Give every rank the examples of all: a gradient of FSDP2 is a mean over ranks, which must run the same one."""
    cpu = torch.device("cpu")
    parts = ranks.gathered([replace(batch.to(cpu), cut_from=None) for batch in data])
    batches, place = [], 0
    for batch in (batch for part in parts for batch in part):
        batches.append(replace(batch, places=range(place, place + batch.num_examples)))
        place += batch.num_examples
    return batches


def _estimated(model: nn.Module, data: Sequence[Examples], **options: Any) -> tuple[Statistics, float]:
    """Estimate the statistics to verify, and time it."""
    contents = [batch.content for batch in data]
    start = _clock(model)
    statistics = estimate(model, contents, **options)
    return statistics, _clock(model) - start


def _comparable(model: nn.Module, named: Mapping[str, Tensor], included: Collection[str]) -> dict[str, Tensor]:
    """List the parameters, of those in the statistics, to which autograd gives a gradient."""
    stored = {name for name in stored_weights(model).keys() & named.keys() if not is_wrapped(named[name])}
    comparable = {name: named[name] for name in included if name not in stored and named[name].dtype in TOLERANCE}
    _demand_any(comparable, included, model)
    return comparable


def _demand_any(comparable: Mapping[str, Tensor], included: Collection[str], model: nn.Module) -> None:
    if not comparable:
        name = type(model).__name__
        stored = f"of {name} only stored weights, to which a loop gets no gradient"
        raise ValueError(
            f"nothing to verify: the statistics hold {stored if included else f'no requested parameter of {name}'}."
        )


def _run_alone(loop: Loop, batches: Sequence[Examples], report: Callable[[int, int | None], None]) -> None:
    """Add every example, each run alone."""
    examples = sum(batch.num_examples for batch in batches)
    for n, row in enumerate(_rows(batches, loop.device)):
        loop.add_alone(row)
        report(n + 1, examples)


def _by_path(covered: Mapping[str, Covered]) -> dict[str, int]:
    """Add up the coordinates that each path computed."""
    numels: Counter[str] = Counter()
    for one in covered.values():
        numels[one.path] += one.numel
    return dict(numels)


def _batch_noise(loop: Loop, batch: Examples, density: float, routing: Routing) -> tuple[Noise, dict[str, torch.Size]]:
    """Measure how far gradients move in a batch; return the shapes of the statistics as well."""
    N = min(_NOISE_EXAMPLES, batch.num_examples)
    batch = batch.take(0, N).to(loop.device)
    for row in _rows([batch], loop.device):
        loop.add_alone(row)
        routing.end_example()
    alone = loop.results(N)
    if N == 1:  # then the noise is that between two runs of the same example
        loop.add_alone(batch)
    else:
        loop.add_in_batch(batch)
    together = loop.results(N)
    errors = {name: error(together[name], alone[name]) for name in alone}
    sizes = {name: largest(value) for name, value in together.items()}
    noise = Noise(errors, sizes, overlap(together, alone, density), N)
    return noise, {name: value.shape for name, value in together.items()}


def _read(batches: Iterable[Any], max_examples: int | None, reader: Reader) -> list[Examples]:
    """Read all batches into memory, up to ``max_examples``."""
    demand_several(batches)
    data: list[Examples] = []
    remaining, place = None if max_examples is None else integer(max_examples, "max_examples"), 0
    for number, raw in enumerate(batches):
        if remaining is not None and remaining <= 0:
            break
        batch = reader(raw, number)
        batch = replace(batch, places=range(place, place + batch.num_examples))
        data.append(batch if remaining is None else batch.take(0, min(remaining, batch.num_examples)))
        remaining = None if remaining is None else remaining - data[-1].num_examples
        place += data[-1].num_examples
    if not data:
        raise ValueError("the data holds no example: batches was empty (an exhausted iterator, or max_examples=0).")
    return data


def _rows(batches: Iterable[Examples], device: torch.device) -> Iterator[Examples]:
    for batch in batches:
        for one in batch.singly():
            yield one.to(device)


def _requested(
    named: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    parameters: Requested,
) -> list[str]:
    if parameters is None:
        covered = statistics.coverage if isinstance(statistics, Statistics) else {}
        left_out = {name for name, one in covered.items() if one.path == "left out"}
        return [
            name
            for name, parameter in named.items()
            if name in statistics or (parameter.requires_grad and name not in left_out)
        ]
    return requested_names(named, parameters)


def _clock(model: nn.Module) -> float:
    """Read the clock once the device has finished all work."""
    if (device := next(model.parameters()).device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

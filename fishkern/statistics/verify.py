"""``verify``: statistics against a batch-size-1 loop, on the user's own model and data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError, is_wrapped, scored_tensors, stored_weights
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples, Reader, Shared
from fishkern.statistics.choosing import Wanted, chosen_names
from fishkern.statistics.comparable import check_kind, check_loss, check_names, check_recipe, check_shapes
from fishkern.statistics.data import demand_several
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.estimate import estimate, reader_for
from fishkern.statistics.judgement import ROUNDING, Noise, error, judged, largest, overlap
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.likelihood_argument import checked_likelihood
from fishkern.statistics.loop import Loop
from fishkern.statistics.result import Statistics
from fishkern.statistics.verification import Verification

_NOISE_EXAMPLES = 8


def verify(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Mapping[str, Tensor] | None = None,
    parameters: Wanted = None,
    *,
    estimator: Estimator | None = None,
    likelihood: Likelihood | LossFunction | Drawn | None = None,
    max_examples: int | None = None,
    shared: Shared = None,
    density: float = 0.005,
    progress: Callable[[int, int | None], None] | bool = False,
) -> Verification:
    """Compare statistics of single examples with a loop that back-propagates one at a time.

    The loop takes each row of a batch as it stands, runs the model on it alone, and hands the recipe the whole gradient
    that autograd leaves in ``.grad``; for the empirical Fisher it takes the loss that the model itself returns, where
    it returns one, and squares. A difference is judged by what the
    model does by itself: on the first batch (up to 8 examples) the gradient of each example in its batch is compared
    with that of the example alone, and a parameter holds while its error stays below rounding plus twice that noise.
    Noise that no rounding explains is a failure: then the examples of a batch are not independent. So is a loop that
    finds no gradient at all. Rounding is that of the lowest dtype that a parameter or a module's output has.

    Cost: the loop, once, and one backward pass of the first batch for each of its examples. Memory: two float32
    accumulators for each parameter, three for the first batch; one gradient at a time.

    Args:
        model: A module; left as found.
        batches: As for :func:`estimate`; read once and kept.
        statistics: What to verify, estimated on these very examples; also a plain mapping made by other means.
            ``None``: estimated here.
        parameters: Which to compare, as for :func:`estimate`; ``None``: those that the statistics hold, and those that
            require a gradient and were not left out by somebody's word.
        estimator: The recipe of the statistics, also one of your own; ``None``: :class:`DiagonalFisher`, the empirical
            Fisher.
        likelihood: As for :func:`estimate`.
        max_examples: Stop after so many examples.
        shared: As for :func:`estimate`.
        density: Fraction of the entries for the comparison of selections.
        progress: A function of the examples done by the loop and of their number; or ``True`` for that of
            :func:`estimate`.

    Returns:
        The report; ``.ok`` says whether it holds.

    Raises:
        TypeError: As :func:`estimate`.
        ValueError: The statistics are of another kind, loss or data, the recipe is none of single examples, or no
            parameter can be compared; and as :func:`estimate`.
        UnsupportedModuleError: As :func:`estimate`.
    """
    model = hosts.unwrap(model)
    if reason := hosts.sharded(model) or hosts.scripted(model):
        raise UnsupportedModuleError(f"{reason}.")
    estimator = DiagonalFisher() if estimator is None else estimator
    check_recipe(estimator)
    likelihood = checked_likelihood(likelihood)
    kept = _kept(batches, max_examples, reader_for(likelihood, shared))
    examples = sum(batch.num_examples for batch in kept)
    estimate_seconds = None
    if statistics is None:
        start = _clock(model)
        statistics = estimate(
            model,
            [batch.content for batch in kept],
            estimator=estimator,
            likelihood=likelihood,
            parameters=parameters,
            progress=progress is True,
            shared=shared,
        )
        estimate_seconds = _clock(model) - start
    elif isinstance(statistics, Statistics):
        check_kind(statistics, estimator, examples)
    check_names(statistics)
    named = scored_tensors(model)
    stored = {name for name in stored_weights(model).keys() & named.keys() if not is_wrapped(named[name])}
    wanted = _wanted(named, statistics, parameters)
    held = [name for name in wanted if name in statistics]
    chosen = {name: named[name] for name in held if name not in stored and named[name].dtype in ROUNDING}
    _demand_any(chosen, held, model)
    loop = Loop(model, chosen, likelihood, estimator)
    with loop.collecting():
        if estimate_seconds is None:
            check_loss(statistics, model, likelihood, next(_rows(kept, loop.device)))
        noise, shapes = _batch_noise(loop, kept[0], density)
        check_shapes(statistics, shapes)
        start = _clock(model)
        for n, row in enumerate(_rows(kept, loop.device)):
            loop.add_alone(row)
            if callable(progress):
                progress(n + 1, examples)
        loop_seconds = _clock(model) - start
        units = examples * estimator.units(1)
        truth = {name: estimator.result(state, units) for name, state in loop.taken().items()}
    for name in [name for name in chosen if is_wrapped(named[name]) and name not in loop.arrived]:
        del chosen[name], truth[name]
    _demand_any(chosen, held, model)
    covered = statistics.coverage if isinstance(statistics, Statistics) else {}
    compared = judged(chosen, statistics, truth, noise, covered, loop.precision.dtypes)
    coverage: Counter[str] = Counter()
    for one in covered.values():
        coverage[one.path] += one.numel
    return Verification(
        compared=compared,
        missing=tuple(name for name in wanted if name not in statistics),
        integers=tuple(name for name in wanted if name in statistics and name not in chosen),
        coverage=dict(coverage),
        size=sum(covered[name].numel if name in covered else named[name].numel() for name in named),
        examples=examples,
        noise_examples=noise.examples,
        density=density,
        overlap=overlap(statistics.blocks if isinstance(statistics, Statistics) else statistics, truth, density),
        noise_overlap=noise.overlap,
        largest=max(map(largest, truth.values())),
        loop_seconds=loop_seconds,
        estimate_seconds=estimate_seconds,
    )


def _demand_any(chosen: Mapping[str, Tensor], held: Collection[str], model: nn.Module) -> None:
    if not chosen:
        name = type(model).__name__
        stored = f"of {name} only stored weights, to which no loop has a gradient"
        raise ValueError(
            f"nothing to verify: the statistics hold {stored if held else f'no parameter of {name} asked for'}."
        )


def _batch_noise(loop: Loop, batch: Examples, density: float) -> tuple[Noise, dict[str, torch.Size]]:
    """Measure how far gradients move in a batch, and tell the shapes of the statistics on the way."""
    N = min(_NOISE_EXAMPLES, batch.num_examples)
    batch = batch.take(0, N).to(loop.device)

    def taken() -> dict[str, Tensor]:
        units = N * loop.estimator.units(1)
        return {name: loop.estimator.result(state, units) for name, state in loop.taken().items()}

    for row in _rows([batch], loop.device):
        loop.add_alone(row)
    alone = taken()
    if N == 1:
        loop.add_alone(batch)
    else:
        loop.add_in_batch(batch)
    together = taken()
    errors = {name: error(together[name], alone[name]) for name in alone}
    sizes = {name: largest(value) for name, value in together.items()}
    noise = Noise(errors, sizes, overlap(together, alone, density), N)
    return noise, {name: value.shape for name, value in together.items()}


def _kept(batches: Iterable[Any], max_examples: int | None, reader: Reader) -> list[Examples]:
    demand_several(batches)
    kept: list[Examples] = []
    left, place = max_examples, 0
    for number, raw in enumerate(batches):
        if left is not None and left <= 0:
            break
        batch = reader(raw, number)
        batch = replace(batch, places=range(place, place + batch.num_examples))
        kept.append(batch if left is None else batch.take(0, min(left, batch.num_examples)))
        left = None if left is None else left - kept[-1].num_examples
        place += kept[-1].num_examples
    if not kept:
        raise ValueError("the data holds no example: batches was empty (an exhausted iterator, or max_examples=0).")
    return kept


def _rows(batches: Iterable[Examples], device: torch.device) -> Iterator[Examples]:
    for batch in batches:
        for one in batch.singly():
            yield one.to(device)


def _wanted(
    named: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    parameters: Wanted,
) -> list[str]:
    if parameters is None:
        covered = statistics.coverage if isinstance(statistics, Statistics) else {}
        left_out = {name for name, one in covered.items() if one.path == "left out"}
        return [
            name
            for name, parameter in named.items()
            if name in statistics or (parameter.requires_grad and name not in left_out)
        ]
    return chosen_names(named, parameters)


def _clock(model: nn.Module) -> float:
    """Tell the time at which all that was asked for is done."""
    if (device := next(model.parameters()).device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""``verify``: statistics against a batch-size-1 loop, on the user's own model and data."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.files import AnyTensor
from fishkern.names import canonical_name
from fishkern.ops.streaming_topk import NaNScoreError, streaming_topk
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Batch, checked_batch, num_examples, take, to_device
from fishkern.statistics.coverage import Covered
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.estimate import Predicate, estimate
from fishkern.statistics.likelihood import Likelihood, recognise_likelihood
from fishkern.statistics.likelihood_argument import LossFunction, checked_likelihood, described
from fishkern.statistics.loop import Loop
from fishkern.statistics.result import Statistics
from fishkern.statistics.verification import SLACK, Compared, Verification

# What rounding alone may do to a squared gradient, relative to the parameter's largest.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
# Batch noise above this is no rounding any more: the examples of a batch see each other.
_NOISE = {torch.float64: 1e-3, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
_NOISE_EXAMPLES = 8


def verify(
    model: nn.Module,
    batches: Iterable[Any],
    statistics: Mapping[str, Tensor] | None = None,
    parameters: Predicate | Literal["all"] | None = None,
    *,
    estimator: Estimator | None = None,
    likelihood: Likelihood | LossFunction | None = None,
    max_examples: int | None = None,
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
    """  # noqa: DOC502
    model = hosts.unwrap(model)
    estimator = DiagonalFisher() if estimator is None else estimator
    _check_recipe(estimator)
    likelihood = checked_likelihood(likelihood)
    kept = _kept(batches, max_examples)
    examples = sum(map(num_examples, kept))
    estimate_seconds = None
    if statistics is None:
        start = _clock(model)
        statistics = estimate(
            model, kept, estimator, likelihood=likelihood, parameters=parameters, progress=progress is True
        )
        estimate_seconds = _clock(model) - start
    elif isinstance(statistics, Statistics):
        _check_kind(statistics, estimator, examples)
    named = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    wanted = _wanted(named, statistics, parameters)
    chosen = {name: named[name] for name in wanted if name in statistics and named[name].dtype in _ROUNDING}
    if not chosen:
        raise ValueError(f"nothing to verify: the statistics hold no parameter of {type(model).__name__} asked for.")
    loop = Loop(model, chosen, likelihood, estimator)
    with loop.collecting():
        if estimate_seconds is None:
            _check_loss(statistics, model, likelihood, next(_rows(kept, loop.device)))
        noise = _batch_noise(loop, kept[0], density)
        _check_shapes(statistics, noise.together)
        start = _clock(model)
        for n, row in enumerate(_rows(kept, loop.device)):
            loop.add_alone(row, n)
            if callable(progress):
                progress(n + 1, examples)
        loop_seconds = _clock(model) - start
        units = examples * estimator.units(1)
        truth = {name: estimator.result(state, units) for name, state in loop.taken().items()}
    covered = statistics.coverage if isinstance(statistics, Statistics) else {}
    compared = _judged(chosen, statistics, truth, noise, covered, loop.dtypes)
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
        overlap=_overlap(statistics.blocks if isinstance(statistics, Statistics) else statistics, truth, density),
        noise_overlap=noise.overlap,
        largest=max(map(_largest, truth.values())),
        loop_seconds=loop_seconds,
        estimate_seconds=estimate_seconds,
    )


@dataclass(frozen=True)
class _Noise:
    """How far the model's own gradients move when an example runs in a batch."""

    errors: dict[str, float]
    together: dict[str, Tensor]
    overlap: float
    examples: int


def _batch_noise(loop: Loop, batch: Batch, density: float) -> _Noise:
    batch = to_device(take(batch, slice(0, _NOISE_EXAMPLES)), loop.device)
    N = num_examples(batch)
    estimator = loop.estimator
    for n, row in enumerate(_rows([batch], loop.device)):
        loop.add_alone(row, n)
    alone = {name: estimator.result(state, N * estimator.units(1)) for name, state in loop.taken().items()}
    if N == 1:
        loop.add_alone(batch, 0)
    else:
        loop.add_in_batch(batch, range(N))
    together = {name: estimator.result(state, N * estimator.units(1)) for name, state in loop.taken().items()}
    errors = {name: _error(together[name], alone[name]) for name in alone}
    return _Noise(errors, together, _overlap(together, alone, density), N)


def _judged(
    chosen: Mapping[str, nn.Parameter],
    statistics: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    noise: _Noise,
    covered: Mapping[str, Covered],
    dtypes: Collection[torch.dtype],
) -> tuple[Compared, ...]:
    largest = max(map(_largest, truth.values()))
    compared = []
    for name, parameter in chosen.items():
        dtype = _lowest({parameter.dtype, *dtypes})
        error, moved = _error(statistics[name], truth[name]), noise.errors[name]
        limit, most = _ROUNDING[dtype], _NOISE[dtype]
        # the gradient of a key's bias is zero but for rounding, and all of it is noise
        steps = 256 if dtype in (torch.float32, torch.float64) else 16
        tiny = (steps * torch.finfo(dtype).eps) ** 2 * largest
        vanishes = largest > 0 and all(
            _largest(values[name]) <= tiny for values in (truth, statistics, noise.together)
        )
        allowed = limit + SLACK * min(moved, most)
        note = ""
        if vanishes:
            note = "zero but for rounding"
        elif moved > most:
            note = (
                f"its gradient moves by {moved:.1e} when an example runs in a batch, more than rounding does: "
                "examples of a batch are not independent in this model"
            )
        holds = vanishes or (error <= allowed and moved <= most)
        path = covered[name].path if name in covered else ""
        compared.append(Compared(name, path, parameter.numel(), error, moved, allowed, holds, note))
    return tuple(compared)


def _lowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Name the coarsest of some floating dtypes, of those that are computed in."""
    return max((dtype for dtype in dtypes if dtype in _ROUNDING), key=lambda dtype: torch.finfo(dtype).eps)


def _error(actual: Tensor, truth: Tensor) -> float:
    if not truth.numel():
        return 0.0
    difference = _largest(actual.to(truth.device, truth.dtype) - truth)
    scale = _largest(truth)
    if not math.isfinite(difference) or (difference and not scale):
        return math.inf
    return difference / scale if scale else 0.0


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _overlap(ours: Mapping[str, AnyTensor], theirs: Mapping[str, Tensor], density: float) -> float:
    """Tell which part of the largest ``density`` of all entries two mappings have in common."""
    k = max(1, int(density * sum(value.numel() for value in theirs.values())))
    try:
        chosen = [streaming_topk([scores[name] for name in theirs], k) for scores in (ours, theirs)]
    except NaNScoreError:  # its parameter fails by its error
        return 0.0
    return sum(int(torch.isin(a.cpu(), b.cpu()).sum()) for a, b in zip(*chosen, strict=True)) / k


def _kept(batches: Iterable[Any], max_examples: int | None) -> list[Batch]:
    kept: list[Batch] = []
    left = max_examples
    for number, raw in enumerate(batches):
        if left is not None and left <= 0:
            break
        batch = checked_batch(raw, number)
        kept.append(batch if left is None else take(batch, slice(0, min(left, num_examples(batch)))))
        left = None if left is None else left - num_examples(kept[-1])
    if not kept:
        raise ValueError("the data holds no example: batches was empty (an exhausted iterator, or max_examples=0).")
    return kept


def _rows(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        for n in range(num_examples(batch)):
            yield to_device(take(batch, slice(n, n + 1)), device)


def _check_recipe(estimator: Estimator) -> None:
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be an Estimator such as DiagonalFisher(), got {estimator!r}.")
    if not estimator.per_example or estimator.definition.get("unit", "example") != "example":
        raise ValueError(
            f"verify compares with whole gradients of single examples, from which {estimator.definition} cannot be "
            "made: take a recipe of unit='example'."
        )


def _check_kind(statistics: Statistics, estimator: Estimator, examples: int) -> None:
    definition = statistics.provenance["definition"]
    expected = estimator.definition
    wrong = {key: definition[key] for key in expected if definition.get(key, expected[key]) != expected[key]}
    for run in statistics.provenance["runs"]:
        wrong |= {key: run[key] for key, value in estimator.settings.items() if run.get(key, value) != value}
    if wrong:
        raise ValueError(
            f"verify was asked about {({**expected, **estimator.settings})}, these statistics are of {wrong}: pass the "
            "recipe that they were estimated with as estimator=."
        )
    if statistics.count != examples * estimator.units(1):
        raise ValueError(
            f"the statistics are the mean over {statistics.count} examples and the data holds {examples}: give the "
            "examples that they were estimated on."
        )


def _check_loss(
    statistics: Mapping[str, Tensor], model: nn.Module, likelihood: Likelihood | LossFunction | None, batch: Batch
) -> None:
    """Refuse statistics of a known loss that is not the one asked about, or not the model's own where none was."""
    theirs = statistics.provenance["definition"].get("likelihood") if isinstance(statistics, Statistics) else None
    if theirs is None or theirs.startswith("function ") or (likelihood is None and hosts.task(model) is None):
        return
    ours = described(recognise_likelihood(model, batch) if likelihood is None else likelihood)
    if ours != theirs and not ours.startswith("function "):
        raise ValueError(
            f"the statistics are of the loss {theirs}, and verify was asked about {ours}: pass the likelihood= that "
            "they were estimated with."
        )
    if likelihood is None:
        Answering(model, None).prepare(batch)


def _check_shapes(statistics: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        if statistics[name].shape != value.shape:
            raise ValueError(
                f"the statistics hold {name} with shape {tuple(statistics[name].shape)}, of the model it is "
                f"{tuple(value.shape)}: they are of another model."
            )


def _wanted(
    named: Mapping[str, nn.Parameter],
    statistics: Mapping[str, Tensor],
    parameters: Predicate | Literal["all"] | None,
) -> list[str]:
    if parameters is None:
        covered = statistics.coverage if isinstance(statistics, Statistics) else {}
        left_out = {name for name, one in covered.items() if one.path == "left out"}
        return [
            name
            for name, parameter in named.items()
            if name in statistics or (parameter.requires_grad and name not in left_out)
        ]
    if parameters == "all":
        return list(named)
    return [name for name, parameter in named.items() if parameters(name, parameter)]


def _clock(model: nn.Module) -> float:
    """Tell the time at which all that was asked for is done."""
    if (device := next(model.parameters()).device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

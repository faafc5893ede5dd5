"""``verify``: statistics against a batch-size-1 loop, on the user's own model and data."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.files import AnyTensor
from fishkern.layers import UnsupportedModuleError, has_gradient_dtype, is_wrapped, scored_tensors, stored_weights
from fishkern.ops.streaming_topk import NaNScoreError, streaming_topk
from fishkern.statistics.answering import LossFunction
from fishkern.statistics.batches import Batch, checked_batch, num_examples, take, to_device
from fishkern.statistics.coverage import Covered
from fishkern.statistics.estimate import Predicate, estimate
from fishkern.statistics.likelihood import Likelihood
from fishkern.statistics.result import Statistics
from fishkern.statistics.squares import Squares
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
    likelihood: Likelihood | LossFunction | None = None,
    max_examples: int | None = None,
    density: float = 0.005,
    progress: Callable[[int, int | None], None] | bool = False,
) -> Verification:
    """Compare the diagonal empirical Fisher with a loop that back-propagates one example at a time.

    The loop takes each row of a batch as it stands, runs the model on it alone, takes the loss that the model itself
    returns where it returns one, and squares what autograd leaves in ``.grad``. A difference is judged by what the
    model does by itself: on the first batch (up to 8 examples) the gradient of each example in its batch is compared
    with that of the example alone, and a parameter holds while its error stays below rounding plus twice that noise.
    Noise that no rounding explains is a failure: then the examples of a batch are not independent.

    Cost: the loop, once, and one backward pass of the first batch for each of its examples. Memory: two float32
    accumulators for each parameter, three for the first batch; one gradient at a time.

    Args:
        model: A module; left as found.
        batches: As for :func:`estimate`; read once and kept.
        statistics: What to verify, estimated on these very examples; also a plain mapping made by other means.
            ``None``: estimated here.
        parameters: Which to compare, as for :func:`estimate`; ``None``: those that the statistics hold, and those that
            require a gradient and were not left out by somebody's word.
        likelihood: As for :func:`estimate`.
        max_examples: Stop after so many examples.
        density: Fraction of the entries for the comparison of selections.
        progress: A function of the examples done by the loop and of their number; or ``True`` for that of
            :func:`estimate`.

    Returns:
        The report; ``.ok`` says whether it holds.

    Raises:
        ValueError: The statistics are of another kind or of other examples, or no parameter can be compared; and as
            :func:`estimate`.
        UnsupportedModuleError: As :func:`estimate`.
    """
    model = hosts.unwrap(model)
    if reason := hosts.sharded(model):
        raise UnsupportedModuleError(f"{reason}.")
    kept = _kept(batches, max_examples)
    examples = sum(map(num_examples, kept))
    estimate_seconds = None
    if statistics is None:
        start = _clock(model)
        statistics = estimate(model, kept, likelihood=likelihood, parameters=parameters, progress=progress is True)
        estimate_seconds = _clock(model) - start
    _check_kind(statistics, examples)
    named = scored_tensors(model)
    stored = {name for name in stored_weights(model).keys() & named.keys() if not is_wrapped(named[name])}
    wanted = _wanted(named, statistics, parameters)
    held = [name for name in wanted if name in statistics]
    chosen = {name: named[name] for name in held if name not in stored and has_gradient_dtype(named[name])}
    _demand_any(chosen, held, model)
    for name, parameter in chosen.items():
        if statistics[name].shape != parameter.shape:
            raise ValueError(
                f"the statistics hold {name} with shape {tuple(statistics[name].shape)}, the model has "
                f"{tuple(parameter.shape)}: they are of another model."
            )
    squares = Squares(model, chosen, likelihood)
    with squares.collecting():
        noise, noise_overlap, noise_examples = _batch_noise(squares, kept[0], density)
        start = _clock(model)
        for n, row in enumerate(_rows(kept, squares.device)):
            squares.add_alone(row, n)
            if callable(progress):
                progress(n + 1, examples)
        loop_seconds = _clock(model) - start
        truth = {name: total.div_(examples) for name, total in squares.taken().items()}
    for name in [name for name in chosen if is_wrapped(named[name]) and name not in squares.arrived]:
        del chosen[name], truth[name]
    _demand_any(chosen, held, model)
    covered = statistics.coverage if isinstance(statistics, Statistics) else {}
    compared = _judged(chosen, statistics, truth, noise, covered)
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
        noise_examples=noise_examples,
        density=density,
        overlap=_overlap(statistics.blocks if isinstance(statistics, Statistics) else statistics, truth, density),
        noise_overlap=noise_overlap,
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


def _batch_noise(squares: Squares, batch: Batch, density: float) -> tuple[dict[str, float], float, int]:
    """Measure how far the model's own gradients move when an example runs in a batch."""
    batch = to_device(take(batch, slice(0, _NOISE_EXAMPLES)), squares.device)
    N = num_examples(batch)
    for n, row in enumerate(_rows([batch], squares.device)):
        squares.add_alone(row, n)
    alone = squares.taken()
    if N == 1:
        squares.add_alone(batch, 0)
    else:
        squares.add_in_batch(batch)
    together = squares.taken()
    return {name: _error(together[name], alone[name]) for name in alone}, _overlap(together, alone, density), N


def _judged(
    chosen: Mapping[str, nn.Parameter],
    statistics: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    noise: Mapping[str, float],
    covered: Mapping[str, Covered],
) -> tuple[Compared, ...]:
    largest = max(_largest(value) for value in truth.values())
    compared = []
    for name, parameter in chosen.items():
        error = _error(statistics[name], truth[name])
        limit, most = _ROUNDING[parameter.dtype], _NOISE[parameter.dtype]
        # the gradient of a key's bias is zero but for rounding, and all of it is noise
        steps = 256 if parameter.dtype in (torch.float32, torch.float64) else 16
        tiny = (steps * torch.finfo(parameter.dtype).eps) ** 2 * largest
        vanishes = _largest(truth[name]) <= tiny and _largest(statistics[name]) <= tiny
        allowed = limit + SLACK * min(noise[name], most)
        note = ""
        if vanishes:
            note = "zero but for rounding"
        elif noise[name] > most:
            note = (
                f"its gradient moves by {noise[name]:.1e} when an example runs in a batch, more than rounding does: "
                "examples of a batch are not independent in this model"
            )
        holds = vanishes or (error <= allowed and noise[name] <= most)
        path = covered[name].path if name in covered else ""
        compared.append(Compared(name, path, parameter.numel(), error, noise[name], allowed, holds, note))
    return tuple(compared)


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


def _check_kind(statistics: Mapping[str, Tensor], examples: int) -> None:
    if not isinstance(statistics, Statistics):
        return
    definition = statistics.provenance["definition"]
    expected = {"estimator": "DiagonalFisher", "fisher_type": "empirical", "unit": "example"}
    if wrong := {key: definition[key] for key in expected if definition.get(key, expected[key]) != expected[key]}:
        raise ValueError(
            f"verify compares the empirical Fisher of single examples, these statistics are of {wrong}: estimate with "
            "DiagonalFisher()."
        )
    if statistics.count != examples:
        raise ValueError(
            f"the statistics are the mean over {statistics.count} examples and the data holds {examples}: give the "
            "examples that they were estimated on."
        )


def _wanted(
    named: Mapping[str, Tensor],
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

"""Judge statistics against a loop: how large a difference is, and how much rounding and batch noise explain."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishkern.files import AnyTensor
from fishkern.ops.streaming_topk import NaNScoreError, streaming_topk
from fishkern.statistics.coverage import Covered
from fishkern.statistics.verification import SLACK, Compared

# The error of a squared gradient by rounding alone, relative to the parameter's largest.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
# Batch noise above this is too large to be rounding: the examples of a batch interact.
_NOISE = {torch.float64: 1e-3, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
# A gradient below so many units of rounding of the model's largest is zero but for rounding (a key's bias). Fewer in 16
# bits, where one unit is already a percent.
_ZERO = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}


@dataclass(frozen=True)
class Noise:
    """How far the model's own gradients change when an example runs in a batch instead of alone.

    Args:
        errors: The error of each parameter, as :func:`error`.
        largest: The largest entry of each parameter's statistic in a batch.
        overlap: The fraction that the selections in a batch and alone have in common.
        examples: The number of examples.
    """

    errors: dict[str, float]
    largest: dict[str, float]
    overlap: float
    examples: int


def judged(
    parameters: Mapping[str, nn.Parameter],
    statistics: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    noise: Noise,
    *,
    covered: Mapping[str, Covered],
    dtypes: Collection[torch.dtype],
) -> tuple[Compared, ...]:
    """Judge each parameter by rounding and by the model's own noise.

    Args:
        parameters: The parameters, by name.
        statistics: Their statistics to judge, by name.
        truth: The statistics of the loop.
        noise: The model's own batch noise.
        covered: The path of each parameter, if known.
        dtypes: The dtypes that the model's modules returned.

    Returns:
        One judgement for each parameter.
    """
    top = max(map(largest, truth.values()))
    compared = []
    for name, parameter in parameters.items():
        dtype = _coarsest({parameter.dtype, *dtypes})
        own = statistics[name]
        off, moved = error(own, truth[name]), noise.errors[name]
        limit, most = TOLERANCE[dtype], _NOISE[dtype]
        tiny = (_ZERO[dtype] * torch.finfo(dtype).eps) ** 2 * top
        sizes = largest(truth[name]), largest(own), noise.largest[name]
        vanishes = top > 0 and all(size <= tiny for size in sizes)  # False for NaN
        allowed = limit + SLACK * min(moved, most) + _rounding_of_a_file(own)
        note = ""
        if vanishes:
            note = "zero but for rounding"
        elif moved > most:
            note = (
                f"its gradient changes by {moved:.1e} when an example runs in a batch, which is more than rounding: "
                "examples of a batch are not independent in this model"
            )
        holds = vanishes or (off <= allowed and moved <= most)
        path = covered[name].path if name in covered else ""
        compared.append(Compared(name, path, parameter.numel(), off, moved, allowed, holds, note))
    return tuple(compared)


def error(actual: Tensor, truth: Tensor) -> float:
    """Measure the largest difference, relative to the largest entry.

    Args:
        actual: The values to judge.
        truth: The correct values.

    Returns:
        The relative error; infinite for a difference from all zeros, or one that is not finite.
    """
    if not truth.numel():
        return 0.0
    difference = largest(actual.to(truth.device, truth.dtype) - truth)
    scale = largest(truth)
    if not math.isfinite(difference) or (difference and not scale):
        return math.inf
    return difference / scale if scale else 0.0


def largest(values: Tensor) -> float:
    """Find the largest magnitude.

    Args:
        values: Of any shape.

    Returns:
        The magnitude, or 0 if there is no entry.
    """
    return values.abs().max().item() if values.numel() else 0.0


def overlap(ours: Mapping[str, AnyTensor], theirs: Mapping[str, Tensor], density: float) -> float:
    """Give the fraction that two mappings have in common of their largest ``density`` of all entries.

    Args:
        ours: Scores by name; includes all names of ``theirs``.
        theirs: Scores by name.
        density: Fraction of the entries to select.

    Returns:
        The fraction in common, 0 to 1.
    """
    k = max(1, int(density * sum(value.numel() for value in theirs.values())))
    try:
        selected = [streaming_topk([scores[name] for name in theirs], k) for scores in (ours, theirs)]
    except NaNScoreError:  # the parameter with NaN fails by its own error
        return 0.0
    return sum(int(torch.isin(a.cpu(), b.cpu()).sum()) for a, b in zip(*selected, strict=True)) / k


def _rounding_of_a_file(values: Tensor) -> float:
    """Give half a unit of the 16-bit dtype that a statistic was saved in, if all its entries have one."""
    for dtype in (torch.bfloat16, torch.float16):  # most numbers of the first are numbers of the second as well
        if values.any() and torch.equal(values.to(dtype).to(values.dtype), values):
            return torch.finfo(dtype).eps / 2
    return 0.0


def _coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Name the coarsest of the dtypes that arithmetic is done in."""
    return max((dtype for dtype in dtypes if dtype in TOLERANCE), key=lambda dtype: torch.finfo(dtype).eps)

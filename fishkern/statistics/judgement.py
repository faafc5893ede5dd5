"""Statistics against a loop: how large a difference is, and how much of one is rounding or the model's own noise."""

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

# What rounding alone may do to a squared gradient, relative to the parameter's largest.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
# Batch noise above this is no rounding any more: the examples of a batch see each other.
_NOISE = {torch.float64: 1e-3, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}


@dataclass(frozen=True)
class Noise:
    """How far the model's own gradients move when an example runs in a batch.

    Args:
        errors: For each parameter, as :func:`error`.
        largest: For each parameter the largest entry of its statistic in a batch.
        overlap: What the selections in a batch and alone have in common.
        examples: How many examples.
    """

    errors: dict[str, float]
    largest: dict[str, float]
    overlap: float
    examples: int


def judged(
    chosen: Mapping[str, nn.Parameter],
    statistics: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    noise: Noise,
    covered: Mapping[str, Covered],
    dtypes: Collection[torch.dtype],
) -> tuple[Compared, ...]:
    """Judge each parameter by rounding and by the model's own noise.

    Args:
        chosen: The parameters.
        statistics: What is judged, by name.
        truth: What the loop found.
        noise: What the model does by itself.
        covered: The path of each, where it is known.
        dtypes: What the model's modules returned.

    Returns:
        One judgement for each parameter.
    """
    top = max(map(largest, truth.values()))
    compared = []
    for name, parameter in chosen.items():
        dtype = _lowest({parameter.dtype, *dtypes})
        own = statistics[name]
        off, moved = error(own, truth[name]), noise.errors[name]
        limit, most = ROUNDING[dtype], _NOISE[dtype]
        # the gradient of a key's bias is zero but for rounding, and all of it is noise
        steps = 256 if dtype in (torch.float32, torch.float64) else 16
        tiny = (steps * torch.finfo(dtype).eps) ** 2 * top
        sizes = largest(truth[name]), largest(own), noise.largest[name]
        vanishes = top > 0 and all(size <= tiny for size in sizes)  # NaN is not
        allowed = limit + SLACK * min(moved, most) + _rounding_of_a_file(own)
        note = ""
        if vanishes:
            note = "zero but for rounding"
        elif moved > most:
            note = (
                f"its gradient moves by {moved:.1e} when an example runs in a batch, more than rounding does: "
                "examples of a batch are not independent in this model"
            )
        holds = vanishes or (off <= allowed and moved <= most)
        path = covered[name].path if name in covered else ""
        compared.append(Compared(name, path, parameter.numel(), off, moved, allowed, holds, note))
    return tuple(compared)


def error(actual: Tensor, truth: Tensor) -> float:
    """Measure the largest difference, relative to the largest entry.

    Args:
        actual: What is judged.
        truth: What it should be.

    Returns:
        The relative error; infinite where there is a difference from zeros, or one that is not finite.
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
        It, or 0 where there is no entry.
    """
    return values.abs().max().item() if values.numel() else 0.0


def overlap(ours: Mapping[str, AnyTensor], theirs: Mapping[str, Tensor], density: float) -> float:
    """Tell which part of the largest ``density`` of all entries two mappings have in common.

    Args:
        ours: Scores by name, at least those of the other.
        theirs: Scores by name.
        density: The fraction.

    Returns:
        The part, 0 to 1.
    """
    k = max(1, int(density * sum(value.numel() for value in theirs.values())))
    try:
        chosen = [streaming_topk([scores[name] for name in theirs], k) for scores in (ours, theirs)]
    except NaNScoreError:  # its parameter fails by its error
        return 0.0
    return sum(int(torch.isin(a.cpu(), b.cpu()).sum()) for a, b in zip(*chosen, strict=True)) / k


def _rounding_of_a_file(values: Tensor) -> float:
    """Give half a unit of the 16-bit dtype that a statistic was saved in: that of which every entry is a number."""
    for dtype in (torch.bfloat16, torch.float16):  # most numbers of the first are numbers of the second as well
        if values.any() and torch.equal(values.to(dtype).to(values.dtype), values):
            return torch.finfo(dtype).eps / 2
    return 0.0


def _lowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Name the coarsest of some floating dtypes, of those that are computed in."""
    return max((dtype for dtype in dtypes if dtype in ROUNDING), key=lambda dtype: torch.finfo(dtype).eps)

"""The one tolerance rule of this suite."""

import torch
from torch import Tensor

from fishkern.statistics.held import Held

# Relative error that a GPU's matrix units may add with each product of 16 positions: they truncate where plain float32
# rounds, and the square doubles it.
CUT_OFF = 2.0**-23


def matrix_steps(inputs: Tensor, positions: int) -> int:
    """How many products of 16 positions the matrix units of a GPU add up for an example: none elsewhere."""
    multiplied = inputs.is_cuda and inputs.dtype in (torch.float16, torch.bfloat16)
    return -(-positions // 16) if multiplied else 0


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, slack: float = 2.0, steps: int = 0) -> None:
    """Demand an error of at most ``slack`` times that of plain PyTorch in the same dtype.

    Errors are relative to the largest entry of ``truth``; 1e-6 is allowed on top, and the truncation of matrix units.

    Args:
        actual: The result of the code under test.
        plain: The same quantity by plain PyTorch in the inputs' dtype.
        truth: The same quantity by plain PyTorch in float64.
        slack: How many times the plain error is allowed.
        steps: As :func:`matrix_steps` counts them.
    """
    assert actual.isfinite().all()
    assert actual.shape == plain.shape == truth.shape
    if truth.numel() == 0:
        return
    truth = truth.double()
    scale = truth.abs().max()
    error = (actual.double() - truth).abs().max()
    allowed = slack * (plain.double() - truth).abs().max() + (1e-6 + steps * CUT_OFF) * scale
    assert error <= allowed, f"relative error {error / scale:.2e}, allowed {allowed / scale:.2e}"


def alike(one: Held, other: Held) -> bool:
    """Tell whether two results are of the same examples by the same paths, and equal up to the rounding of sums.

    A pass that makes its plans begins with two examples, one that is prepared runs its first batch whole.

    Args:
        one: A result in float32.
        other: Another one.

    Returns:
        Whether count, provenance and coverage are equal, and each entry to 1e-5 of its parameter's largest, or to 1e-12
        of the largest of all: the gradient of a bias of keys is zero but for rounding.
    """
    said = [(type(each), each.count, each.shapes, each.coverage, each.provenance) for each in (one, other)]
    pairs = [pair for name in one._entries for pair in zip(one.pieces(name), other.pieces(name), strict=True)]
    least = 1e-12 * max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    return said[0] == said[1] and all(
        torch.allclose(a, b, rtol=0.0, atol=max(least, 1e-5 * float(b.abs().max())), equal_nan=True)
        for a, b in pairs
        if b.numel()
    )

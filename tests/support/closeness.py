"""The one tolerance rule of this suite."""

from torch import Tensor


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, slack: float = 2.0) -> None:
    """Demand an error of at most ``slack`` times that of plain PyTorch in the same dtype.

    Errors are relative to the largest entry of ``truth``; 1e-6 is allowed on top.

    Args:
        actual: What the code under test returned.
        plain: The same quantity by plain PyTorch in the inputs' dtype.
        truth: The same quantity by plain PyTorch in float64.
        slack: How many times the plain error is allowed.
    """
    assert actual.isfinite().all()
    assert actual.shape == plain.shape == truth.shape
    if truth.numel() == 0:
        return
    truth = truth.double()
    scale = truth.abs().max()
    error = (actual.double() - truth).abs().max()
    allowed = slack * (plain.double() - truth).abs().max() + 1e-6 * scale
    assert error <= allowed, f"relative error {error / scale:.2e}, allowed {allowed / scale:.2e}"

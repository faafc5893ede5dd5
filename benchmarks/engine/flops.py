"""The FLOPs of a call, counted as it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(run: Callable[[], object]) -> int:
    """Count the FLOPs of matrix products and convolutions in one call: twice the multiplications.

    Attention is computed by plain matrix products meanwhile: torch does not count what a CPU's own kernel does, and a
    GPU's kernels compute parts again in the backward pass, which would count, too.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


class _NoModules(nullcontext):
    """In the place of torch's tracker of modules, whose hooks forbid ``torch.autograd.grad`` by a leaf."""

    parents = frozenset({"Global"})

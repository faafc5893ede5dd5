"""Linear maps: ``nn.Linear``, transformers' ``Conv1D``, and linears whose frozen weight is quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers.base import Call, Layer, is_patched, positions, runs
from fishkern.layers.generic import module_grads
from fishkern.layers.grads import OuterProductGrads, PerExampleGrads, PositionGrads
from fishkern.layers.quantized import stored_weight


class Linear(Layer):
    """``y = x W^T + b`` with ``W [O, I]``: ``grad_n W = sum_t output_grads[n, t] (x) activations[n, t]``."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        plain = runs(module, nn.Linear) and stored_weight(module) is None
        return frozenset({"weight", "bias"}) if plain else frozenset()

    def reads_input(self, names: frozenset[str]) -> bool:
        return "weight" in names

    def gives_factors(self, name: str) -> bool:
        return name == "weight"

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        g = positions(output_grads)
        if "weight" in names:
            x = positions(call.input).to(g.dtype)  # under autocast the input is wider
            yield "weight", OuterProductGrads(x, g, weight_shape(call.module))
        if "bias" in names:
            yield "bias", PositionGrads(g)


class QuantizedLinear(Linear):
    """A linear whose weight autograd does not differentiate: the statistic is that of the weight it multiplies by.

    The weight itself is not read, so one rule works for every storage: the module's attributes give the shape
    ``[O, I]``, and :meth:`confirms` checks on a real call that the module is linear.
    """

    def covers(self, module: nn.Module) -> frozenset[str]:
        stored = stored_weight(module)
        return frozenset() if stored is None else frozenset({stored, "bias"})

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if not names:
            return names
        O, I = weight_shape(call.module)
        x = call.input
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not x.is_floating_point():
            return frozenset()
        fits = x.shape[-1] == I and output.shape == (*x.shape[:-1], O)
        if not fits or not _is_linear(call):
            return frozenset()
        return names if "bias" not in names or _adds_bias(call, output) else names - {"bias"}

    def reads_input(self, names: frozenset[str]) -> bool:
        return bool(names - {"bias"})

    def gives_factors(self, name: str) -> bool:
        return name != "bias"

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        stored = stored_weight(call.module)
        renamed = frozenset("weight" if name == stored else name for name in names)
        for name, grads in super().per_example_grads(call, output_grads, renamed):
            yield stored if name == "weight" else name, grads


class Conv1D(Layer):
    """transformers' transposed linear, ``y = x W + b`` with ``W [I, O]``, as in GPT-2."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        named = type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not is_patched(module)
        return frozenset({"weight", "bias"}) if named else frozenset()

    def reads_input(self, names: frozenset[str]) -> bool:
        return "weight" in names

    def gives_factors(self, name: str) -> bool:
        return name == "weight"

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        g = positions(output_grads)
        if "weight" in names:
            x = positions(call.input).to(g.dtype)
            yield "weight", OuterProductGrads(activations=g, output_grads=x, shape=call.module.weight.shape)
        if "bias" in names:
            yield "bias", PositionGrads(g)


def weight_shape(module: Any) -> torch.Size:
    """Give the shape of a linear's weight in the product, whatever form it is stored in.

    Args:
        module: A linear with ``in_features`` and ``out_features``.

    Returns:
        ``[O, I]``.
    """
    return torch.Size((module.out_features, module.in_features))


@torch.enable_grad()
def _is_linear(call: Call, scale: float = -8.0, tolerance: float = 0.05) -> bool:
    """Tell whether a module computes ``x W^T + b`` and the gradient ``g W``, up to its own rounding of ``x``."""
    # Two checks: the derivative along x equals the module's output without b, and a multiple of x scales that output by
    # the same factor. The factor is negative, since an activation such as ReLU agrees on positive multiples. LLM.int8
    # rounds its input, so both hold to a few percent only.

    def run(x: Tensor) -> Tensor:
        args, kwargs = (x, *call.args[1:]), call.kwargs
        if not call.args:
            args, kwargs = (), {**kwargs, next(iter(kwargs)): x}
        return replace(call, args=args, kwargs=kwargs).run()

    x = call.input.detach().requires_grad_()
    y = run(x.view_as(x))  # FlopCounterMode takes no leaf as an input
    if not y.requires_grad:
        return False
    b = run(torch.zeros_like(x)).detach()
    product = (y - b).detach()
    (grad,) = torch.autograd.grad(y, x, product)
    product, scaled = product.double(), (run(scale * x).detach() - b).double()
    squared = product.square().sum()
    along = (grad.double() * x.detach().double()).sum()
    gap = (scaled - scale * product).norm()
    return bool((along - squared).abs() <= tolerance * squared and gap <= tolerance * (scale * product).norm())


def _adds_bias(call: Call, output: Tensor) -> bool:
    """Tell whether a module adds its bias unchanged: a gain after it would scale the bias as well."""
    # a different weight for each output entry, so that no two errors cancel in the sum over positions
    weights = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output).to(output.dtype)
    grad = module_grads(call, [weights], {"bias": "bias"}).get("bias")
    expected = weights.double().flatten(0, -2).sum(0)
    # no gradient at all is left to the self-check, which refuses an ordinary parameter without one by name
    return grad is None or torch.allclose(grad.double(), expected, rtol=0.02)

"""Modules that scale or shift each feature by an entry of its own, recognised by what they compute."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fishkern.layers.base import Call, Layer, own_parameters, positions
from fishkern.layers.grads import Factors, PerExampleGrads, PositionGrads
from fishkern.layers.quantized import has_gradient_dtype
from fishkern.ops.dtypes import accumulates_in
from fishkern.ops.scale_sum_grad_squared import Norm, scale_factors

# The two derivatives come from one formula, evaluated twice, and are a few roundings apart. A coupling between features
# would be as large as the derivative itself.
_SAME_DERIVATIVE = 16  # in units of rounding
_EPS = ("eps", "variance_epsilon", "epsilon")


class Scale(Layer):
    """Feature ``i`` of the output depends on entry ``i`` of the parameter and on no other.

    So ``d output[n, t, i] / d w[i]`` is one number for each output entry, and one forward-mode derivative in the
    direction of all ones gives them all. This holds for RMSNorm in every spelling (also ``1 + w``), for the vectors of
    (IA)^3 after a linear, for DoRA's magnitudes and for layer scales. :meth:`confirms` checks it on a real call; no
    class is recognised by name.
    """

    reruns = True
    _coarsest = torch.float32  # norms compute in it even for float64 inputs

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset(
            name
            for name, parameter in own_parameters(module).items()
            if has_gradient_dtype(parameter) and parameter.numel() == max(parameter.shape, default=0)
        )

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        parameters = own_parameters(call.module)
        return frozenset(name for name in names if self._is_elementwise(call, output, name, parameters[name]))

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        parameters = own_parameters(call.module)
        for name in sorted(names):
            parameter = parameters[name]
            slope = self._slope(call, name, parameter)
            yield name, _products(output_grads, Factors(slope), parameter)

    def _slope(self, call: Call, name: str, parameter: Tensor) -> Tensor:
        """``d output[n, t, i] / d w[i]``."""
        return _derivative(call, name, torch.ones_like(parameter))

    def _is_elementwise(self, call: Call, output: Tensor, name: str, parameter: Tensor) -> bool:
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[-1] != parameter.numel():
            return False
        # entries all different, and in no order: a shift or a permutation of features must not look like a scale
        direction = torch.linspace(0.5, 1.5, parameter.numel(), device=parameter.device).to(parameter.dtype)
        direction = direction[_shuffled(parameter.numel(), parameter.device)].view_as(parameter)
        try:
            by_ones = _derivative(call, name, torch.ones_like(parameter))
            by_direction = _derivative(call, name, direction)
        except (RuntimeError, NotImplementedError):
            return False  # no forward-mode derivative: the generic path needs none
        slope = self._slope(call, name, parameter)
        expected = by_ones.to(accumulates_in(by_ones.dtype)) * direction.flatten()
        return _equal(slope, by_ones, self._coarsest) and _equal(by_direction, expected, self._coarsest)


class RMSScale(Scale):
    """The factor is the module's only input over its root mean square, so that the module need not run once more.

    That its ``eps`` is the one that the module has is checked on the call, and on smaller inputs, where it shows.
    """

    # Where a module rounds float64 to float32, the factor that it has is not the one that is computed here.
    _coarsest = torch.float64
    _norm: ClassVar[Norm] = "rms"

    def covers(self, module: nn.Module) -> frozenset[str]:
        return frozenset() if _eps(module) is None else super().covers(module)

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if not names or call.module._forward_pre_hooks or not _has_one_input(call):
            return frozenset()
        x = call.input
        if not isinstance(output, Tensor) or (x.shape, x.dtype) != (output.shape, output.dtype):
            return frozenset()
        mean_square = x.to(accumulates_in(x.dtype)).square().mean()
        small = replace(call, args=((x * (_eps(call.module) / mean_square).sqrt()).to(x.dtype),), kwargs={})
        return super().confirms(small, output, super().confirms(call, output, names))

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        if not _has_one_input(call):  # as no call was that the rule was confirmed by
            yield from super().per_example_grads(call, output_grads, names)
            return
        factors = Factors(call.input, self._norm, _eps(call.module), rounded_to=call.input.dtype)
        parameters = own_parameters(call.module)
        for name in sorted(names):
            yield name, _products(output_grads, factors, parameters[name])

    def _slope(self, call: Call, name: str, parameter: Tensor) -> Tensor:
        if not _has_one_input(call):
            return super()._slope(call, name, parameter)
        x = call.input
        factors = scale_factors(x, accumulates_in(x.dtype), norm=self._norm, eps=_eps(call.module), rounded_to=x.dtype)
        return factors.to(x.dtype)


class LayerNormScale(RMSScale):
    """The same of a norm that takes the mean away first, other than torch's own."""

    _norm = "layer"


class Factor(Scale):
    """The output is the parameter times something. That factor is the output for all ones, which is far quicker."""

    def _slope(self, call: Call, name: str, parameter: Tensor) -> Tensor:
        return call.run({name: torch.ones_like(parameter)})


class OnePlusFactor(Scale):
    """The output is ``1 + w`` times something, as in Gemma's norms. That factor is the output for all zeros."""

    def _slope(self, call: Call, name: str, parameter: Tensor) -> Tensor:
        return call.run({name: torch.zeros_like(parameter)})


def _products(output_grads: Tensor, factors: Factors, parameter: Tensor) -> PositionGrads:
    """Flatten the positions of both, and give their features the parameter's shape."""
    inputs = factors.inputs.expand_as(output_grads)  # one call may be shared by all examples
    g, inputs = (positions(one).unflatten(-1, parameter.shape) for one in (output_grads, inputs))
    return PositionGrads(g, factors=replace(factors, inputs=inputs))


def _eps(module: nn.Module) -> float | None:
    """Read what a norm adds before it divides, by the names that norms have for it."""
    values = (getattr(module, name, None) for name in _EPS)
    return next((value for value in values if isinstance(value, float)), None)


def _has_one_input(call: Call) -> bool:
    """Tell whether a call has nothing but one floating tensor."""
    inputs = *call.args, *call.kwargs.values()
    return len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point()


def _derivative(call: Call, name: str, direction: Tensor) -> Tensor:
    """Forward-mode derivative of the output along ``direction`` in one parameter."""
    parameter = own_parameters(call.module)[name].detach()
    with forward_ad.dual_level():  # inside torch.func.jvp no tensor could be made to require a gradient
        output = call.run({name: _dual(parameter, direction)})
        tangent = forward_ad.unpack_dual(output).tangent
    return torch.zeros_like(output) if tangent is None else tangent


def _dual(parameter: Tensor, direction: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # torch warns of its own rules, which it loads with the first dual tensor
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return forward_ad.make_dual(parameter, direction)


def _equal(actual: Tensor, expected: Tensor, coarsest: torch.dtype) -> bool:
    """Tell whether two derivatives, not both zero, agree to the rounding of their dtype, or of a coarser one."""
    scale = expected.abs().max()
    eps = max(torch.finfo(dtype).eps for dtype in (actual.dtype, coarsest))
    return bool(scale > 0) and bool((actual - expected).abs().max() <= _SAME_DERIVATIVE * eps * scale)


def _shuffled(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator).to(device)

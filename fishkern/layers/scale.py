"""Modules that scale or shift each feature by an entry of its own, recognised by what they compute."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import log10
from typing import Any, ClassVar

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
# Drawn inputs of a norm: so many rows, from small ones, beside which its eps shows, to ones as large as this.
_ROWS, _LARGEST = 8, 1e4
_POSITIONS = 3  # at most, and one more than the call has


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
        return frozenset(name for name in names if self._is_elementwise(call, output, name, parameters))

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
        return _derivative(call, name, torch.ones_like(parameter), {name: parameter})

    def _is_elementwise(self, call: Call, output: Tensor, name: str, values: Mapping[str, Tensor]) -> bool:
        """Check one parameter, where the module has these values in the place of its parameters."""
        parameter = values[name]
        if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[-1] != parameter.numel():
            return False
        direction = _direction(parameter)
        try:
            slope = self._slope(call, name, parameter)
            by_direction = _derivative(call, name, direction, values)
        except (RuntimeError, NotImplementedError):
            return False  # no forward-mode derivative: the generic path needs none
        expected = slope.to(accumulates_in(slope.dtype)) * direction.flatten()
        return _equal(by_direction, expected, self._coarsest)


class RMSScale(Scale):
    """The factor is the module's only input over its root mean square, so that the module need not run once more.

    A call has too little to tell: its rows may have no mean or be one position each, an eps does not show beside large
    values, and 16 bits hide what is small beside the largest feature. So the module also runs on drawn inputs of
    another shape and many sizes, with drawn parameters, all of them float32 or float64.
    """

    # Where a module rounds float64 to float32, the factor that it has is not the one that is computed here.
    _coarsest = torch.float64
    _norm: ClassVar[Norm] = "rms"

    def covers(self, module: nn.Module) -> frozenset[str]:
        has_state = next(module.buffers(), None) is not None
        return frozenset() if has_state or _eps(module) is None else super().covers(module)

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if not _is_plain(call, output) or call.input.shape != output.shape:
            return frozenset()
        names = super().confirms(call, output, names)
        return self._confirmed_on_drawn(call, names) if names else names

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        if not _is_plain(call, output_grads):  # as no call was that the rule was confirmed by
            yield from Scale().per_example_grads(call, output_grads, names)
            return
        factors = Factors(call.input, self._norm, _eps(call.module), rounded_to=call.input.dtype)
        parameters = own_parameters(call.module)
        for name in sorted(names):
            yield name, _products(output_grads, factors, parameters[name])

    def _slope(self, call: Call, name: str, parameter: Tensor) -> Tensor:
        x = call.input
        factors = scale_factors(x, accumulates_in(x.dtype), norm=self._norm, eps=_eps(call.module), rounded_to=x.dtype)
        return factors.to(x.dtype)

    def _confirmed_on_drawn(self, call: Call, names: frozenset[str]) -> frozenset[str]:
        """Check the names on a call with drawn values, see the class."""
        generator = torch.Generator().manual_seed(0)
        x, eps = call.input, _eps(call.module)
        dtype = accumulates_in(x.dtype)
        between = (min(size, _POSITIONS) + 1 for size in x.shape[1:-1])
        drawn = 1 + torch.randn(_ROWS, *between, x.shape[-1], generator=generator, dtype=dtype)
        sizes = torch.logspace(log10(max(eps, torch.finfo(dtype).tiny)) / 2 - 1, log10(_LARGEST), _ROWS, dtype=dtype)
        drawn = (drawn * sizes.view(-1, *[1] * (x.ndim - 1))).to(x.device)
        values = {
            name: _of_both_signs(one.shape, dtype, generator).to(one.device)
            for name, one in call.module.named_parameters()
        }
        args, kwargs = ((drawn,), {}) if call.args else ((), dict.fromkeys(call.kwargs, drawn))
        call = replace(call, args=args, kwargs=kwargs)
        try:
            return frozenset(name for name in names if self._is_elementwise(call, drawn, name, values))
        except Exception:  # any error of a module that does not take such inputs
            return frozenset()


class LayerNormScale(RMSScale):
    """The same of a norm that takes the mean away first, other than torch's own."""

    _norm = "layer"


class Factor(Scale):
    """The output is the parameter times something. That factor is the output for all ones, which is far quicker.

    So the output has to be zero for all zeros: what is added to the product would count as the factor, and 16 bits do
    not tell it from rounding. And its derivative is the factor wherever training may bring the parameter.
    """

    _one: ClassVar[float] = 1.0
    _zero: ClassVar[float] = 0.0

    def _slope(self, call: Call, name: str, parameter: Tensor) -> Tensor:
        return call.run({name: torch.full_like(parameter, self._one)})

    def _is_elementwise(self, call: Call, output: Tensor, name: str, values: Mapping[str, Tensor]) -> bool:
        if not super()._is_elementwise(call, output, name, values):
            return False
        if call.run({name: torch.full_like(values[name], self._zero)}).any():
            return False
        return super()._is_elementwise(call, output, name, {**values, name: _direction(values[name])})


class OnePlusFactor(Factor):
    """The output is ``1 + w`` times something, as in Gemma's norms. That factor is the output for all zeros."""

    _one, _zero = 0.0, -1.0


def _products(output_grads: Tensor, factors: Factors, parameter: Tensor) -> PositionGrads:
    """Flatten the positions of both, and give their features the parameter's shape."""
    inputs = factors.inputs.expand_as(output_grads)  # one call may be shared by all examples
    g, inputs = (positions(one).unflatten(-1, parameter.shape) for one in (output_grads, inputs))
    return PositionGrads(g, factors=replace(factors, inputs=inputs))


def _eps(module: nn.Module) -> float | None:
    """Read what a norm adds before it divides, by the names that norms have for it."""
    values = (getattr(module, name, None) for name in _EPS)
    return next((value for value in values if isinstance(value, float)), None)


def _is_plain(call: Call, output: Any) -> bool:
    """Tell whether a call has nothing but one floating tensor, which no hook changes, and gives one of its dtype."""
    inputs = *call.args, *call.kwargs.values()
    if len(inputs) != 1 or call.module._forward_pre_hooks or not all(isinstance(x, Tensor) for x in (*inputs, output)):
        return False
    return inputs[0].is_floating_point() and inputs[0].dtype == output.dtype


def _derivative(call: Call, name: str, direction: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Forward-mode derivative of the output along ``direction`` in one parameter, at these values of parameters."""
    values = {other: value.detach() for other, value in values.items()}
    with forward_ad.dual_level():  # inside torch.func.jvp no tensor could be made to require a gradient
        output = call.run(values | {name: _dual(values[name], direction)})
        tangent = forward_ad.unpack_dual(output).tangent
    return torch.zeros_like(output) if tangent is None else tangent


def _dual(parameter: Tensor, direction: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # torch warns of its own rules, which it loads with the first dual tensor
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return forward_ad.make_dual(parameter, direction)


def _equal(actual: Tensor, expected: Tensor, coarsest: torch.dtype) -> bool:
    """Tell whether two derivatives, not both zero, agree to the rounding of their dtype, or of a coarser one."""
    dtype = actual.dtype
    # In 16 bits each feature has to agree beside its own largest value: in language models a few features are a hundred
    # times larger than the others, and the rounding of those is as large as these.
    of_features = expected.abs().flatten(0, -2).amax(0)
    of_all = max(torch.finfo(one).eps for one in (accumulates_in(dtype), coarsest)) * of_features.max()
    allowed = _SAME_DERIVATIVE * torch.maximum(torch.finfo(dtype).eps * of_features, of_all)
    return bool(of_features.max() > 0) and bool(((actual - expected).abs() <= allowed).all())


def _direction(parameter: Tensor) -> Tensor:
    """Draw entries of both signs, all different and in no order.

    The derivative along them alone tells whether features are coupled: a matrix that is not diagonal gives other values
    than its diagonal would, unless it were made for these entries.

    Returns:
        The entries, with the shape and dtype of the parameter.
    """
    count, device = parameter.numel(), parameter.device
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    return torch.linspace(-1.37, 1.61, count, device=device)[order].to(parameter.dtype).view_as(parameter)


def _of_both_signs(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw entries between 0.5 and 1.5, with either sign."""
    sizes, signs = (torch.rand(shape, generator=generator, dtype=dtype) for _ in range(2))
    return torch.where(signs < 0.5, -0.5 - sizes, 0.5 + sizes)

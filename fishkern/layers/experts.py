"""Fused experts: the weights of all experts of a layer in one tensor each, as transformers stores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fishkern.layers.base import Call, Layer, is_patched
from fishkern.layers.expert_call import ExpertCall, demanded, maps_of
from fishkern.layers.grads import PerExampleGrads
from fishkern.layers.quantized import has_gradient_dtype, is_wrapped
from fishkern.layers.routed import RoutedBiasGrads, RoutedGrads

# what transformers says of every such module (use_experts_implementation)
_SAID = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


class Experts(Layer):
    """``y[t] = sum_k share[t, k] (W2[e] gate(W1[e] x[t] + b1[e]) + b2[e])`` with ``e = index[t, k]``.

    ``W1`` is ``gate_up_proj``, or ``up_proj`` with an activation in place of the gate; ``W2`` is ``down_proj``. They
    are ``[E, O, I]``, or ``[E, I, O]`` where the module says that they are transposed. The gradients are made of the
    call's tensors alone, so it does not matter which kernel computes the output, or whether it is recomputed;
    :meth:`confirms` checks on a real call that the formula is the module's.
    """

    def covers(self, module: nn.Module) -> frozenset[str]:
        if not are_experts(module):
            return frozenset()
        return frozenset(name for name, _ in module.named_parameters())

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if not names or not isinstance(output, Tensor):
            return frozenset()
        computed = ExpertCall.of(call, call.module, call.module._parameters)
        return names if computed is not None and computed.gives(output) else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        computed = demanded(ExpertCall.of(call, call.module, call.module._parameters), call.module)
        factors = computed.factors(output_grads)
        for name in sorted(names):
            yield name, grads_of(computed, name, factors, len(output_grads))


def grads_of(
    computed: ExpertCall, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], rows: int
) -> RoutedGrads | RoutedBiasGrads:
    """Make the gradients of a weight, or of a bias, of the factors of its map.

    Args:
        computed: The call.
        name: Its name in the module of experts.
        factors: Activations and output gradients of both maps.
        rows: How many rows the output of the call has; each counts as an example.

    Returns:
        The gradients.
    """
    x, g = factors[name.removesuffix("_bias")]
    shape = computed.module._parameters[name].shape
    common: dict[str, Any] = dict(output_grads=g, routes=computed.routes(rows), shape=shape, sizes=tuple(shape))
    if name.endswith("_bias"):
        return RoutedBiasGrads(**common, axes=(0, 1))
    return RoutedGrads(**common, axes=(0, 2, 1) if computed.module.is_transposed else (0, 1, 2), activations=x)


def are_experts(module: nn.Module) -> bool:
    """Recognise fused experts by what transformers says of them.

    Args:
        module: Any module.

    Returns:
        Whether it holds the weights of experts ``[E, ., .]``, which autograd differentiates, and nothing else.
    """
    if not all(hasattr(module, name) for name in _SAID) or is_patched(module):
        return False
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return False
    own = dict(module.named_parameters())
    names = {name for one in maps_of(module) for name in ([one, f"{one}_bias"] if module.has_bias else [one])}
    if own.keys() != names:  # the gradient of any other one, of the gate, say, would be missing
        return False
    axes = all(one.ndim == 3 - name.endswith("_bias") for name, one in own.items())
    return axes and all(has_gradient_dtype(one) and not is_wrapped(one) for one in own.values())

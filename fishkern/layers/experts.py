"""Fused experts: the weights of all experts of a layer in one tensor each, as transformers stores them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fishkern.layers.base import Call, Layer, is_patched
from fishkern.layers.expert_call import ExpertCall, maps_of
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
        names = {name for one in maps_of(module) for name in ([one, f"{one}_bias"] if module.has_bias else [one])}
        # any other parameter, of the gate, say, would have no gradient here
        return frozenset(names) if names == dict(module.named_parameters()).keys() else frozenset()

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if not names or not isinstance(output, Tensor):
            return frozenset()
        computed = ExpertCall.of(call, call.module, call.module._parameters)
        return names if computed is not None and computed.gives(output) else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        module = call.module
        computed = ExpertCall.of(call, module, module._parameters)
        factors = dict(zip(maps_of(module), computed.factors(output_grads), strict=True))
        routes = computed.routes(len(output_grads))
        for name in sorted(names):
            x, g = factors[name.removesuffix("_bias")]
            shape = module._parameters[name].shape
            common: dict[str, Any] = dict(output_grads=g, routes=routes, shape=shape, sizes=tuple(shape))
            if name.endswith("_bias"):
                yield name, RoutedBiasGrads(**common, axes=(0, 1))
            else:
                yield name, RoutedGrads(**common, axes=(0, 2, 1) if module.is_transposed else (0, 1, 2), activations=x)


def are_experts(module: nn.Module) -> bool:
    """Recognise fused experts by what transformers says of them.

    Args:
        module: Any module.

    Returns:
        Whether it holds the weights of experts ``[E, ., .]``, which autograd differentiates.
    """
    if not all(hasattr(module, name) for name in _SAID) or is_patched(module):
        return False
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return False
    weights = [module._parameters.get(name) for name in maps_of(module)]
    return all(
        isinstance(one, Tensor) and one.ndim == 3 and has_gradient_dtype(one) and not is_wrapped(one) for one in weights
    )

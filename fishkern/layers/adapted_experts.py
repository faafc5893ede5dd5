"""LoRA on fused experts, as PEFT's ``target_parameters`` puts it there: factors for each expert, stored in a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.layers.base import Call, Layer
from fishkern.layers.expert_call import ExpertCall, demanded, maps_of
from fishkern.layers.experts import are_experts, grads_of
from fishkern.layers.grads import PerExampleGrads
from fishkern.layers.routed import RoutedGrads

# what PEFT's wrapper of a parameter has (lora.ParamWrapper)
_HAS = ("parameter_name", "base_layer", "lora_A", "lora_B", "scaling", "active_adapters", "merged", "disable_adapters")


class AdaptedExperts(Layer):
    """Experts whose weights are ``W[e] + scaling B[e] A[e]`` during a call, ``[E, O, I]`` each, or transposed.

    ``A`` is stored as ``[E r, I]`` and ``B`` as ``[O, r E]``. PEFT puts the wrappers of two weights around each other;
    the outermost one answers for all of them and for the experts inside, since only there it shows which weights are
    in force.
    """

    def covers(self, module: nn.Module) -> frozenset[str]:
        wrappers, inside = _wrappers(module)
        if not wrappers or not are_experts(inside):
            return frozenset()
        return frozenset(name for name, _ in module.named_parameters())

    def confirms(self, call: Call, output: Any, names: frozenset[str]) -> frozenset[str]:
        served = names & {*_own(call.module), *(name for name, *_ in _factors(call.module))}
        if not served or not isinstance(output, Tensor):
            return frozenset()
        computed = _computed(call)
        return served if computed is not None and computed.gives(output) else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        computed, rows = demanded(_computed(call), call.module), len(output_grads)
        factors = computed.factors(output_grads)
        for name, own in _own(call.module).items():
            if name in names:
                yield name, grads_of(computed, own, factors, rows)
        for name, weight, wrapper, adapter in _factors(call.module):
            if name in names:
                shape = call.module.get_parameter(name).shape
                yield name, _grads_of_factor(computed, wrapper, adapter, factors[weight], name, shape, rows)


def _grads_of_factor(
    computed: ExpertCall,
    wrapper: nn.Module,
    adapter: str,
    factors: tuple[Tensor, Tensor],
    name: str,
    shape: torch.Size,
    rows: int,
) -> RoutedGrads:
    """By ``W = scaling B A``, ``A`` maps the input to ``A x``, with the gradient ``scaling B^T g`` there, and so on."""
    x, g = factors
    A, B = _stacked(wrapper, adapter)
    E, O, R = B.shape
    if "lora_A" in name:
        g, sizes, axes = wrapper.scaling[adapter] * computed.each(g, B.mT), tuple(A.shape), (0, 1, 2)
    else:
        x, sizes, axes = wrapper.scaling[adapter] * computed.each(x, A), (O, R, E), (2, 0, 1)
    dtype = torch.promote_types(x.dtype, g.dtype)
    routes = computed.routes(rows)
    return RoutedGrads(
        output_grads=g.to(dtype), activations=x.to(dtype), routes=routes, shape=shape, sizes=sizes, axes=axes
    )


def _wrappers(module: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
    """List wrappers around each other, by their paths in the outermost, and name the module inside all of them."""
    wrappers, path = {}, ""
    while all(hasattr(module, name) for name in _HAS):
        wrappers[path] = module
        module, path = module.base_layer, f"{path}base_layer."
    return wrappers, module


def _own(module: nn.Module) -> dict[str, str]:
    """Names of the experts' own parameters in the experts, by their names in the outermost wrapper."""
    wrappers, inside = _wrappers(module)
    return {f"{'base_layer.' * len(wrappers)}{name}": name for name, _ in inside.named_parameters()}


def _factors(module: nn.Module) -> list[tuple[str, str, nn.Module, str]]:
    """List the factors in force: name in the outermost wrapper, name of the weight, its wrapper, and the adapter."""
    wrappers, inside = _wrappers(module)
    listed = []
    for path, wrapper in wrappers.items():
        weight = wrapper.parameter_name
        for adapter in _in_force(wrapper):
            if weight in maps_of(inside) and _stacked(wrapper, adapter) is not None:
                listed += [(f"{path}{one}.{adapter}.weight", weight, wrapper, adapter) for one in ("lora_A", "lora_B")]
    return listed


def _in_force(wrapper: nn.Module) -> list[str]:
    if wrapper.merged or wrapper.disable_adapters:
        return []
    return [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]


def _stacked(wrapper: nn.Module, adapter: str) -> tuple[Tensor, Tensor] | None:
    """View the factors as ``[E, r, I]`` and ``[E, O, r]``; ``None`` if they are stored in another way."""
    _, inside = _wrappers(wrapper)
    E, O, I = inside._parameters[wrapper.parameter_name].shape
    if inside.is_transposed:
        O, I = I, O
    A, B = (one[adapter].weight.detach() for one in (wrapper.lora_A, wrapper.lora_B))
    R = A.shape[0] // E
    if A.shape != (E * R, I) or B.shape != (O, R * E):
        return None
    return A.view(E, R, I), B.view(O, R, E).permute(2, 0, 1)


def _computed(call: Call) -> ExpertCall | None:
    """Compute the call with the weights in force; ``None`` if they are made in another way than here."""
    wrappers, inside = _wrappers(call.module)
    weights: dict[str, Tensor] = dict(inside._parameters)
    for wrapper in wrappers.values():
        name = wrapper.parameter_name
        for adapter in _in_force(wrapper):
            if name not in maps_of(inside) or (stacked := _stacked(wrapper, adapter)) is None:
                return None
            A, B = (one.to(weights[name].dtype) for one in stacked)
            left, right = (A.mT, B.mT) if inside.is_transposed else (B, A)
            weights[name] = torch.baddbmm(weights[name].detach(), left, right, alpha=wrapper.scaling[adapter])
    return ExpertCall.of(call, inside, weights)

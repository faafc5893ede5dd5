"""Routers: a linear map whose outputs, the logits, choose and weigh the experts of each position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fishkern.layers.base import Call, Layer, is_patched
from fishkern.layers.generic import host_outputs, module_grads
from fishkern.layers.grads import OuterProductGrads, PerExampleGrads, PositionGrads
from fishkern.layers.quantized import has_gradient_dtype, is_wrapped
from fishkern.layers.unsupported import UnsupportedModuleError

_MAP = ("weight", "bias")
_CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double)
_SAME_GRADIENT = 1e-3
_SAME_GRADIENT_16_BIT = 0.05


class Router(Layer):
    """``logits = x W^T + b``, and outputs that are functions of them, indices of experts among them.

    The module runs once more for the gradient at the logits, at all positions at once. :meth:`confirms` checks on a
    real call that the outputs depend on the weight through these logits alone; no class is recognised by name.
    """

    reruns = True
    several = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        # others may be there, such as a correction of the choice, which gets no gradient
        own = {name: one for name, one in module._parameters.items() if name in _MAP and one is not None}
        weight = own.get("weight")
        plain = all(has_gradient_dtype(one) and not is_wrapped(one) for one in own.values())
        fits = weight is not None and weight.ndim == 2 and plain
        return frozenset(own) if fits and not is_patched(module) else frozenset()

    def confirms(self, call: Call, output: Any, names: frozenset[str]) -> frozenset[str]:
        leaves = tree_leaves(output)
        chooses = any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in leaves)
        if not names or isinstance(output, Tensor) or not chooses:
            return frozenset()
        floating = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        # a different weight for each entry, so that no two errors cancel in the sum over positions
        grads = [torch.linspace(1, 2, one.numel(), device=one.device).view_as(one).to(one.dtype) for one in floating]
        at_logits = _at_logits(call, grads)
        if at_logits is None or at_logits.grads is None or at_logits.x.shape[:-1] != at_logits.grads.shape[:-1]:
            return frozenset()
        expected = module_grads(call, grads, {name: name for name in names})
        x, g = (one.flatten(0, -2).double() for one in (at_logits.x, at_logits.grads))
        actual = {"weight": g.mT @ x, "bias": g.sum(0)}
        # a cast of the weight may be what is mapped, and autograd's gradient is rounded to the weight's own dtype
        rounded = (*floating, at_logits.x, *expected.values())
        half = call.autocast[1] or any(torch.finfo(one.dtype).bits == 16 for one in rounded)
        allowed = _SAME_GRADIENT_16_BIT if half else _SAME_GRADIENT
        same = all(
            name in expected and (actual[name] - expected[name]).abs().max() <= allowed * expected[name].abs().max()
            for name in names
        )
        return names if same else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Sequence[Tensor | None], names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        rows = next(len(grad) for grad in output_grads if grad is not None)
        if (at_logits := _at_logits(call, output_grads)) is None:
            raise UnsupportedModuleError(
                f"{type(call.module).__name__} maps its input once by its weight in the first examples, and not so "
                "here. Let it do the same in every batch, or leave its parameters out with "
                "parameters=lambda name, parameter: ..."
            )
        if at_logits.grads is None:
            return  # no gradient goes on to the logits
        dtype = torch.promote_types(at_logits.grads.dtype, call.module.weight.dtype)
        x, g = (one.reshape(rows, -1, one.shape[-1]).to(dtype) for one in (at_logits.x, at_logits.grads))
        if "weight" in names:
            yield "weight", OuterProductGrads(x, g, call.module.weight.shape)
        if "bias" in names:
            yield "bias", PositionGrads(g)


class _AtLogits(NamedTuple):
    """Input of the linear map, ``[..., I]``, and gradient at its output, ``[..., O]``, if any arrives there."""

    x: Tensor
    grads: Tensor | None


def _at_logits(call: Call, output_grads: Sequence[Tensor | None]) -> _AtLogits | None:
    """Run a router once more; ``None`` if its weight is not used in one linear map."""
    uses = _Uses(call.module.weight)

    def back_propagated(output: Any) -> Tensor | None:
        pairs = host_outputs(output, output_grads)
        if len(uses.found) != 1 or not pairs:
            return None
        outputs, grads = zip(*pairs, strict=True)
        with torch.autocast(call.autocast[0], enabled=False):
            return torch.autograd.grad(outputs, uses.found[0][1], grads, allow_unused=True)[0]

    with torch.enable_grad(), uses:
        grads = call.run(then=back_propagated)
    return _AtLogits(uses.found[0][0], grads) if len(uses.found) == 1 else None


class _Uses(TorchFunctionMode):
    """While it is entered, zeros that require a gradient are added wherever a weight, or a cast of it, maps something.

    Attributes:
        found: Input and zeros of each such linear map.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._same = [weight]
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and any(args[0] is one for one in self._same):
            self._same.append(result)
        if func is F.linear and len(args) > 1 and any(args[1] is one for one in self._same):
            zeros = torch.zeros_like(result, requires_grad=True)
            self.found.append((args[0].detach(), zeros))
            return result + zeros
        return result

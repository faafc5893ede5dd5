"""Weights that autograd does not differentiate: how to recognise, name and call them.

A quantised linear stores its weight ``[O, I]`` as integers, as float8, packed, or inside a tensor subclass. Its
statistic is that of the weight it multiplies by, computed from activations and output gradients alone. Its key is
``<module>.weight``, whatever the storage is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from fishkern.layers.base import own_parameters
from fishkern.layers.tap import floating_places, is_tapped
from fishkern.layers.unsupported import UnsupportedModuleError
from fishkern.names import without_wrappers

_DIFFERENTIABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# HQQ; GPTQ and AWQ; compressed-tensors
_STORED_AS = ("W_q", "qweight", "weight_packed")


def has_gradient_dtype(tensor: Tensor) -> bool:
    """Tell whether autograd computes gradients in a tensor's dtype: not for integers, bits, float8, complex numbers.

    Args:
        tensor: Any tensor.

    Returns:
        Whether its dtype is float64, float32, bfloat16 or float16.
    """
    return tensor.dtype in _DIFFERENTIABLE


def is_wrapped(tensor: Tensor) -> bool:
    """Tell whether a tensor is a subclass with its own arithmetic, such as torchao's and quanto's quantised weights.

    Args:
        tensor: Any tensor.

    Returns:
        Whether it is; autograd may give it no gradient even if it requires one. torch's tensors without values are not:
        they stand for ordinary ones. Nor are shards (``DTensor``), whose modules compute with ordinary ones.
    """
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not hasattr(tensor, "fake_mode") and not hasattr(tensor, "device_mesh")


def is_stored(tensor: Tensor) -> bool:
    """Tell by a tensor alone whether it stores values in a form that no optimizer can change entry by entry.

    Args:
        tensor: Any tensor.

    Returns:
        Whether it holds integers or float8, or has its own arithmetic and is not a shard.
    """
    numbers = not has_gradient_dtype(tensor) and not tensor.is_complex()
    return numbers or is_wrapped(tensor)


def stored_weight(module: nn.Module) -> str | None:
    """Find where a quantised linear stores its weight.

    Args:
        module: Any module.

    Returns:
        The name of the parameter or buffer in the module; ``None`` if it is not a linear (``in_features``,
        ``out_features``), or if its weight is an ordinary parameter.
    """
    tensors = {**module._buffers, **module._parameters}  # not getattr, which would run a parametrization
    # most modules of an adapted model hold none, and to ask a module for an attribute that it lacks takes long
    if not tensors or (sizes := _sizes(module)) is None:
        return None
    if (weight := tensors.get("weight")) is not None:
        if is_wrapped(weight) or not has_gradient_dtype(weight):
            return "weight"
        # bitsandbytes packs bytes into a floating dtype as well; fewer entries alone could be, say, blocks of heads
        return "weight" if hasattr(weight, "quant_state") and weight.numel() < sizes[0] * sizes[1] else None
    return next((name for name in _STORED_AS if tensors.get(name) is not None), None)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Read ``(O, I)`` from a module that has these attributes, as linears do."""
    sizes = tuple(getattr(module, name, None) for name in ("out_features", "in_features"))
    return sizes if all(isinstance(size, int) for size in sizes) else None


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """List the tensors of a module that can be scored: its own parameters, and a weight that is stored as a buffer.

    Args:
        module: Any module.

    Returns:
        Tensors by their names in the module.
    """
    own: dict[str, Tensor] = dict(own_parameters(module))
    name = stored_weight(module)
    if name is not None and name not in own:
        own[name] = module._buffers[name]
    return own


def stored_weights(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """List the weights of a model's quantised linears.

    Args:
        model: Any module.

    Returns:
        Canonical name of the storage and its module, by the key of the weight, ``<module>.weight``.
    """
    stored = {}
    for path, module in model.named_modules():
        if (name := stored_weight(module)) is not None:
            key, storage = (without_wrappers(f"{path}.{own}".removeprefix(".")) for own in ("weight", name))
            stored[key] = storage, module
    return stored


def scored_tensors(model: nn.Module, stored: Mapping[str, tuple[str, nn.Module]] | None = None) -> dict[str, Tensor]:
    """Name every parameter of a model, and every weight of a quantised linear by the key of the weight.

    Args:
        model: Any module.
        stored: Its :func:`stored_weights`, if they are at hand.

    Returns:
        Parameters and stored weights by key, in the model's order; those stored as buffers come last.
    """
    stored = stored_weights(model) if stored is None else stored
    keys = {storage: key for key, (storage, _) in stored.items()}
    scored: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = without_wrappers(name)
        scored[keys.get(name, name)] = parameter
    for name, buffer in model.named_buffers():
        if (name := without_wrappers(name)) in keys:
            scored[keys[name]] = buffer
    return scored


@contextmanager
def gradient_kept(model: nn.Module) -> Iterator[None]:
    """Call modules with quantised weights as in training, and refuse those that cut off the gradient.

    Some choose their code by whether the input requires a gradient. If it does not and they are not training,
    bitsandbytes' 4-bit linears on a CPU repack their weight for good, into a form through which no gradient passes.
    While a pass has frozen the model, or runs a module once more without gradients, their inputs may not require one.
    So these modules always get inputs that do; an output whose gradient is not needed is detached again.

    Args:
        model: A module; its hooks are removed on exit, also after an exception.

    Yields:
        Nothing.
    """
    guards = [_Guard(path, module) for path, module in model.named_modules() if _is_quantized(module)]
    try:
        yield
    finally:
        for guard in guards:
            guard.remove()


class _Guard:
    """Hooks on one module, for :func:`gradient_kept`."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path = path
        self._is_leaf = next(module.children(), None) is None
        self._connected = self._requires_grad = False
        self._passes_gradient = False
        self._handles = [
            module.register_forward_pre_hook(self._connect, with_kwargs=True),
            # before the user's hooks and after a tap: the results of these hooks need a gradient if the output does
            module.register_forward_hook(self._check, with_kwargs=True, prepend=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _connect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = floating_places(leaves)
        self._requires_grad = any(leaves[place].requires_grad for place in places)
        self._connected = bool(places) and not self._requires_grad
        if not self._connected:
            return None
        for place in places:
            leaves[place] = _requiring_grad(leaves[place])
        return tree_unflatten(leaves, spec)

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        leaves, spec = tree_flatten(output)
        places = floating_places(leaves)
        if self._requires_grad:
            self._demand_gradient(module, args, kwargs, [leaves[place] for place in places])
        # parameters of the module, and modules inside it that may be tapped, need the graph that begins at this input
        if not self._connected or not self._is_leaf or any(one.requires_grad for one in module.parameters()):
            return None
        for place in places:
            if not is_tapped(leaves[place]):
                leaves[place] = _detached(leaves[place])
        return tree_unflatten(leaves, spec)

    def _demand_gradient(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
    ) -> None:
        if outputs and not self._passes_gradient:
            self._passes_gradient = any(output.requires_grad for output in outputs)
            if self._passes_gradient and self._is_leaf:  # the survey would count a second call of modules inside
                self._passes_gradient = _back_propagates(module, args, kwargs)
            if not self._passes_gradient:
                raise UnsupportedModuleError(
                    f"{self._path!r} ({type(module).__name__}) cuts the gradient: its input requires one and gets "
                    "none, so nothing before it can be scored or trained. Linears that quantise their activations "
                    "have no backward pass: quantise the weights alone. bitsandbytes' 4-bit ones lose it on a CPU for "
                    "good when they run in evaluation mode without gradients: load the model again, and estimate "
                    "before that."
                )


def _back_propagates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Back-propagate through a module: an output may require a gradient and yet pass none on."""
    leaves, spec = tree_flatten((args, kwargs))
    inputs = floating_places(leaves)
    for place in inputs:
        leaves[place] = _requiring_grad(leaves[place])
    args, kwargs = tree_unflatten(leaves, spec)
    # a graph of its own: the hooks of activation checkpointing, if it is on, must not see its tensors
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        returned, _ = tree_flatten(module.forward(*args, **kwargs))
        outputs = [returned[place] for place in floating_places(returned) if returned[place].requires_grad]
        if not outputs:
            return False
        ones = [torch.ones_like(output) for output in outputs]
        grads = torch.autograd.grad(outputs, [leaves[place] for place in inputs], ones, allow_unused=True)
    return any(grad is not None for grad in grads)


def _is_quantized(module: nn.Module) -> bool:
    """Recognise modules to guard: those with stored values, and linears whose weight is stored in an unknown place."""
    if stored_weight(module) is not None:
        return True
    hidden = _sizes(module) is not None and dict(module._parameters).get("weight") is None
    if hidden and next(module.children(), None) is None:
        return True
    return any(is_wrapped(one) or not has_gradient_dtype(one) for one in own_parameters(module).values())


def _requiring_grad(tensor: Tensor) -> Tensor:
    # a rule may be running this module in forward mode, and detach() alone would drop the tangent
    primal, tangent = forward_ad.unpack_dual(tensor)
    leaf = primal.detach().requires_grad_()
    return leaf if tangent is None else forward_ad.make_dual(leaf, tangent)


def _detached(tensor: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal.detach() if tangent is None else forward_ad.make_dual(primal.detach(), tangent)

"""The tap: an identity on a call's output that reports its gradient, with the call's tensors, during backward.

The tensors are saved with ``save_for_backward``, so activation checkpointing (both kinds), offloading and
``retain_graph`` treat them like any saved tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fishkern.layers.base import Call


@dataclass(frozen=True)
class FrozenCall:
    """A call without its tensors, which autograd saves.

    Args:
        module: The module.
        leaves: Arguments in the order of ``spec``, ``None`` where a tensor was.
        places: Where in ``leaves`` the tensors were.
        spec: Structure of ``(args, kwargs)``; ``None`` where ``leaves`` are the positional arguments themselves.
        autocast: See :class:`fishkern.layers.base.Call`.
        tensors: The tensors, until autograd has saved them.
    """

    module: nn.Module
    leaves: tuple[Any, ...]
    places: tuple[int, ...]
    spec: TreeSpec | None
    autocast: tuple[str, bool, torch.dtype]
    tensors: list[Tensor]

    def thaw(self, tensors: Sequence[Tensor]) -> Call:
        """Put tensors back into the call.

        Args:
            tensors: In the order of ``places``; empty if the call saved none.

        Returns:
            The call.
        """
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=False):
            leaves[place] = tensor
        args, kwargs = (tuple(leaves), {}) if self.spec is None else tree_unflatten(leaves, self.spec)
        return Call(self.module, args, kwargs, self.autocast)


def frozen_call(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], *, keep: bool = True) -> FrozenCall:
    """Separate a call into its tensors and the rest.

    Args:
        module: The module called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        keep: Whether the tensors are needed later.

    Returns:
        The call with the detached tensors in ``tensors``.
    """
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):  # most calls are, and it is far quicker
        (only,) = args
        return FrozenCall(module, (None,), (0,), None, _autocast(only.device.type), [only.detach()] if keep else [])
    plain = not kwargs and all(isinstance(arg, Tensor) for arg in args)
    leaves, spec = (args, None) if plain else tree_flatten((args, dict(kwargs)))
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    tensors = [leaves[place].detach() for place in places] if keep else []
    autocast = _autocast(leaves[places[0]].device.type if places else "cpu")
    rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return FrozenCall(module, rest, places, spec, autocast, tensors)


def _autocast(device_type: str) -> tuple[str, bool, torch.dtype]:
    return device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def copied(values: Any) -> Any:
    """Copy the tensors of a nest, because the model writes into them later.

    Args:
        values: Any nest.

    Returns:
        The same nest with detached copies.
    """
    leaves, spec = tree_flatten(values)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def tapped(output: Any, anchor: Tensor, receive: Callable[..., None], call: FrozenCall) -> Any:
    """Pass an output through the identity that reports its gradient.

    Args:
        output: A tensor or any nest of tensors; only its floating tensors are tapped.
        anchor: A tensor that requires a gradient, to keep the graph alive.
        receive: Called in backward with the saved tensors of the call and the gradients, in order.
        call: The call; autograd saves its tensors, and the call loses them.

    Returns:
        The output, connected to the graph.
    """
    saved = tuple(call.tensors)
    call.tensors.clear()
    if isinstance(output, Tensor) and output.is_floating_point():
        return _Tap.apply(anchor, receive, saved, output)[0]
    leaves, spec = tree_flatten(output)
    places = floating_places(leaves)
    for place, leaf in zip(
        places, _Tap.apply(anchor, receive, saved, *(leaves[place] for place in places)), strict=True
    ):
        leaves[place] = leaf
    return tree_unflatten(leaves, spec)


def floating_places(leaves: Sequence[Any]) -> list[int]:
    """List the leaves of an output that can have a gradient.

    Args:
        leaves: Flattened output.

    Returns:
        Their indices.
    """
    return [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def leading_shape(arguments: Any) -> torch.Size:
    """Find the shape of the first tensor with an axis among the arguments of a call.

    Args:
        arguments: Any nest.

    Returns:
        The shape, empty if there is no such tensor.
    """
    first = _first(arguments)
    return torch.Size() if first is None else first.shape


class Entered:
    """The input of a module while it runs: the first tensor with an axis among its arguments.

    Args:
        arguments: Any nest; kept alive by the call of the module alone.

    Attributes:
        rows_and_length: ``(N, T)`` of ``[N, T, ...]``, also of tokens ``[N, T]``; ``None`` for features ``[N, I]``,
            which have no positions, and if there is no such tensor.
    """

    def __init__(self, arguments: Any) -> None:
        first = _first(arguments)
        self._tensor = None if first is None else weakref.ref(first)
        self._version = _version(first)
        without = first is None or first.ndim < 2 or (first.ndim == 2 and first.is_floating_point())
        self.rows_and_length = None if without else (first.shape[0], first.shape[1])

    def is_reshaped(self, arguments: Any) -> bool:
        """Tell whether a module inside gets the same entries in the same order, by the memory that they are in.

        Args:
            arguments: Those of the module inside, while both run.

        Returns:
            Whether its first tensor with an axis is this one or a reshape of it.
        """
        around, inside = None if self._tensor is None else self._tensor(), _first(arguments)
        if around is None or inside is None or around.dtype != inside.dtype or around.numel() != inside.numel():
            return False
        if not around.is_contiguous() or not inside.is_contiguous() or _version(inside) != self._version:
            return False
        storages = [one.untyped_storage()._cdata for one in (around, inside)]
        return storages[0] == storages[1] and around.storage_offset() == inside.storage_offset()


def _first(arguments: Any) -> Tensor | None:
    """Find the first tensor with an axis."""
    leaves, _ = tree_flatten(arguments)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)


def _version(tensor: Tensor | None) -> int | None:
    """Count how often a tensor's memory has been written into; inference tensors do not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def is_tapped(tensor: Tensor) -> bool:
    """Tell whether a tensor is the direct result of :func:`tapped`, so its gradient is needed.

    Args:
        tensor: A module's output.

    Returns:
        Whether it is.
    """
    return isinstance(tensor.grad_fn, _Tap._backward_cls)


class _Tap(torch.autograd.Function):
    """The identity; backward reports the output gradients together with the saved tensors."""

    @staticmethod
    def forward(ctx, anchor, receive, saved, *outputs):
        ctx.set_materialize_grads(False)  # an output without a gradient reports None, not zeros
        ctx.save_for_backward(*saved)
        ctx.receive = receive
        # not views: an in-place activation after a captured layer would rebase a view's history
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx, *grads):
        ctx.receive(ctx.saved_tensors, grads)
        return None, None, None, *grads

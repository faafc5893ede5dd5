"""What training still costs under a selection: state, gradients, and the layers that are back-propagated through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern import hosts
from fishkern.layers import as_found
from fishkern.optim.base import MaskedOptimizer


class SkippedLayers(NamedTuple):
    """How many of the lowest layers of a stack are not back-propagated through.

    Attributes:
        count: So many layers from the input on, since nothing at or below them requires a gradient.
        of: Number of layers in the stack.
        held_by: What requires a gradient at or below the lowest of the other layers: names of parameters, and
            ``"an input"`` for a tensor that was made to require one, as by ``enable_input_require_grads`` of
            transformers, which PEFT calls for gradient checkpointing. Empty if all layers are skipped.
    """

    count: int
    of: int
    held_by: tuple[str, ...]


@dataclass(frozen=True)
class TrainingCost:
    """What training still costs under the selection of an optimizer; made by :func:`training_cost`.

    Attributes:
        entries: Selected entries of the pool.
        total: All entries of the pool.
        state_bytes: Memory of the optimizer's state, see :attr:`fishkern.optim.MaskedOptimizer.state_bytes`.
        frozen: Names of the parameters that the optimizer froze: no product computes the gradients of these weights.
        skipped: By the path of each stack of layers, which of them are no longer back-propagated through; ``None``
            without a batch.
    """

    entries: int
    total: int
    state_bytes: int
    frozen: tuple[str, ...]
    skipped: Mapping[str, SkippedLayers] | None


def training_cost(optimizer: MaskedOptimizer, model: nn.Module | None = None, batch: Any = None) -> TrainingCost:
    """Tell what training costs as it stands; called before and after a :meth:`MaskedOptimizer.reselect`, what it saves.

    Whether a layer is back-propagated through is seen in a forward pass, not guessed from names. It is one in
    evaluation mode and without activation checkpointing, after which the model is as it was. With reentrant
    checkpointing a layer that trains gets no gradient where nothing below it requires one, which this does not see;
    the optimizer's next step warns of it.

    Args:
        optimizer: A masked optimizer.
        model: The model that it trains; needed for ``skipped``.
        batch: One batch, of any size: a mapping of keyword arguments, or a sequence of which the model gets the first.

    Returns:
        The cost.

    Raises:
        ValueError: Only one of model and batch is given.
    """
    if (model is None) != (batch is None):
        raise ValueError("which layers are skipped shows in a forward pass: give both model and batch, or neither.")
    selection = optimizer.selection
    skipped = None if model is None else _skipped_layers(hosts.unwrap(model), batch)
    return TrainingCost(selection.count, selection.total, optimizer.state_bytes, optimizer.frozen, skipped)


def _skipped_layers(model: nn.Module, batch: Any) -> dict[str, SkippedLayers]:
    stacks = hosts.stacks(model)
    outputs: dict[nn.Module, list[Tensor]] = {}  # that require a gradient

    def watch(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(layer, []).extend(_that_require_grad(output))

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = [layer.register_forward_hook(watch) for layers in stacks.values() for layer in layers]
    try:
        with (
            hosts.evaluation_mode(model, checkpointing=False),
            torch.compiler.set_stance("force_eager"),
            as_found(model),
            torch.enable_grad(),
        ):
            for parameter, requires in required.items():
                parameter.requires_grad_(requires)
            _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    names = {parameter: name for name, parameter in hosts.named_parameters(model).items()}
    return {path: _skipped(layers, outputs, names) for path, layers in stacks.items()}


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**{**hosts.call_options(model), **batch})
    else:
        model(batch[0] if isinstance(batch, Sequence) else batch)


def _skipped(
    layers: Sequence[nn.Module], outputs: Mapping[nn.Module, list[Tensor]], names: Mapping[Tensor, str]
) -> SkippedLayers:
    for number, layer in enumerate(layers):
        if reached := outputs.get(layer):
            held_by = dict.fromkeys(names.get(leaf, "an input") for leaf in _leaves(reached))
            return SkippedLayers(number, len(layers), tuple(held_by))
    return SkippedLayers(len(layers), len(layers), ())


def _that_require_grad(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _leaves(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Find the leaves that tensors are computed from and that require a gradient."""
    seen: set[Any] = set()
    waiting = []
    for tensor in tensors:
        if tensor.grad_fn is None:
            yield tensor
        else:
            waiting.append(tensor.grad_fn)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # it accumulates the gradient of a leaf
            yield node.variable
        waiting += [following for following, _ in node.next_functions]

"""The generic path: run a module once more for each example, and back-propagate through that module alone.

It works for any module whose inputs and outputs keep the examples apart, whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fishkern import hosts
from fishkern.layers.base import Call
from fishkern.layers.documents import Documents
from fishkern.layers.quantized import is_wrapped
from fishkern.layers.row_order import ONE_EACH, RowOrder
from fishkern.layers.tap import floating_places
from fishkern.layers.unsupported import without_gradient

# One row alone is computed in another order than among others: some tens of roundings of the largest entry may differ.
_SAME_ROWS = 64  # in units of the dtype's rounding


def module_grads(call: Call, output_grads: Sequence[Tensor | None], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Run a module once more and back-propagate through it alone.

    Args:
        call: The call of one example.
        output_grads: Gradient of the example's loss by each floating tensor of the output, or ``None``.
        names: Canonical names of the parameters, by their names in the module.

    Returns:
        Gradients by name in the module, without parameters that the example does not reach.

    Raises:
        UnsupportedModuleError: A parameter is of a tensor subclass to which autograd gives no gradient.
    """
    # under each of its names: a module may register a parameter that also belongs to a module inside it
    registered = dict(call.module.named_parameters(remove_duplicate=False))
    # as parameters, because PEFT's wrappers of a parameter register it anew during their call
    parameters = {name: nn.Parameter(registered[name].detach()) for name in names}

    def gradients(output: Any) -> dict[str, Tensor]:
        pairs = host_outputs(output, output_grads)
        if not pairs:
            return {}
        with torch.autocast(call.autocast[0], enabled=False):
            grads = torch.autograd.grad(
                [output for output, _ in pairs],
                list(parameters.values()),
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        for name, grad in zip(parameters, grads, strict=True):
            if grad is None and is_wrapped(parameters[name]):
                raise without_gradient(names[name], parameters[name])
        return {
            name: hosts.own_part(grad, registered[name])
            for name, grad in zip(parameters, grads, strict=True)
            if grad is not None
        }

    with torch.enable_grad():
        return call.run(parameters, gradients)


def host_outputs(output: Any, output_grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Pair the floating tensors of a module's output with their gradients.

    Args:
        output: What the module returned.
        output_grads: Gradient of the loss by each of its floating tensors, or ``None``.

    Returns:
        Those that depend on something and have a gradient.
    """
    leaves, _ = tree_flatten(output)
    outputs = [leaves[place] for place in floating_places(leaves)]
    pairs = zip(outputs, output_grads, strict=True)
    return [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]


@torch.no_grad()
def same_rows_alone(
    call: Call, output: Any, num_examples: int, documents: Documents | None = None, order: RowOrder = ONE_EACH
) -> bool:
    """Check that a module that runs on the rows of one example alone returns that example's rows.

    Args:
        call: A call.
        output: The module's output.
        num_examples: How many examples it was called on.
        documents: The examples, if they are documents of packed rows: then its positions are compared.
        order: Which rows an example has, where it has several.

    Returns:
        Whether it does; ``False`` also if an argument is an object with a state, which the first run has changed.
    """
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    if any(_is_stateful(leaf) for leaf in leaves):
        return False
    expected, _ = tree_flatten(output)

    def is_cut(tensor: Tensor) -> bool:
        return has_example_axis(tensor, order.count(num_examples)) if documents is None else documents.fit(tensor)

    def part(tensor: Tensor, n: int) -> Tensor:
        if not is_cut(tensor):
            return tensor
        return tensor[order.rows(n, num_examples)] if documents is None else documents.cut(tensor, n)

    for n in range(num_examples):
        row = [part(leaf, n).clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # it may write into them
        args, kwargs = tree_unflatten(row, spec)
        try:
            actual, _ = tree_flatten(Call(call.module, args, kwargs, call.autocast).run())
        except (RuntimeError, ValueError, IndexError):
            return False
        if len(actual) != len(expected):
            return False
        for place in floating_places(expected):
            whole = expected[place]
            if not is_cut(whole) or actual[place].shape != part(whole, n).shape:
                return False
            gap = (actual[place] - part(whole, n)).abs()
            # an output without entries has no largest one
            if whole.numel() and gap.max() > _SAME_ROWS * torch.finfo(whole.dtype).eps * whole.abs().max():
                return False
    return True


def _is_stateful(leaf: Any) -> bool:
    """Recognise an object that the first run may have changed, such as a key-value cache."""
    return leaf is not None and not isinstance(leaf, Tensor | nn.Module | bool | int | float | str | torch.dtype)


def has_example_axis(tensor: Tensor, rows: int) -> bool:
    """Tell by its size whether a tensor of a call holds the rows of the examples.

    Args:
        tensor: Any tensor; :func:`same_rows_alone` checks the answer.
        rows: How many rows the module was called on.

    Returns:
        Whether its first axis has that length.
    """
    return tensor.ndim > 0 and tensor.shape[0] == rows


def tensors_of(call: Call) -> list[Tensor]:
    """List the tensors of a call.

    Args:
        call: A call.

    Returns:
        The tensors, in the order in which a tap saves them.
    """
    leaves, _ = tree_flatten((call.args, dict(call.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

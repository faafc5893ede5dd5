"""The linear maps of a model: the modules that compute ``x M^T + b``, and their matrices, however these are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers.linear import Conv1D, weight_shape
from fishkern.layers.quantized import (
    gradient_kept,
    has_gradient_dtype,
    is_wrapped,
    own_weights,
    scored_tensors,
    stored_weight,
)
from fishkern.layers.rules import rule_of
from fishkern.layers.unsupported import UnsupportedModuleError
from fishkern.names import without_wrappers

_ROWS = 1024  # of the identity that a quantised linear is applied to at a time


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A module that computes ``y = x M^T + b``.

    Args:
        name: Canonical name of its weight; for a quantised linear the key ``<path>.weight``.
        path: Path of the module, without wrappers.
        module: The module. If several modules share the weight, the first.
        weight: The weight as it is stored.
        transposed: Whether the weight is stored as ``[I, O]``, as in transformers' ``Conv1D``.
        stored: Whether the weight is stored in a form that autograd does not differentiate (quantised).
    """

    name: str
    path: str
    module: nn.Module
    weight: Tensor
    transposed: bool
    stored: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``: number of features that leave and that enter the module, however the weight is stored."""
        if self.stored:
            O, I = weight_shape(self.module)
            return O, I
        O, I = self.weight.flatten(1).shape
        return (I, O) if self.transposed else (O, I)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return ``M``.

        Returns:
            ``[O, I]``: the weight itself, transposed for ``Conv1D``, and flattened to patches for a convolution. For a
            quantised linear the matrix that it multiplies by, in the dtype that it computes in. It may be a view of
            the weight: do not write into it. Of a weight that processes hold together all get the whole, by a
            collective operation.

        Raises:
            UnsupportedModuleError: The quantised linear cannot be applied to the rows of an identity.
        """
        if self.stored:
            return _dequantized(self)
        matrix = hosts.whole(self.weight.detach()).flatten(1)
        return matrix.T if self.transposed else matrix


def linear_maps(model: nn.Module) -> dict[str, LinearMap]:
    """List the linear maps of a model, whose gradients are outer products of activations and output gradients.

    A weight that an embedding shares is not among them, since the embedding's part of its gradient is no such product.

    Args:
        model: A module, without running wrappers.

    Returns:
        One for each weight, by its name, in the model's order: linears, also quantised ones, transformers' ``Conv1D``,
        and convolutions without groups.
    """
    names = {tensor: name for name, tensor in scored_tensors(model).items()}
    maps: dict[str, LinearMap] = {}
    others: set[str] = set()  # weights that another kind of module uses
    for path, module in model.named_modules():
        layer = rule_of(module)
        for own, tensor in own_weights(module).items():
            if (name := names.get(tensor)) is None:
                continue
            if layer is None or own not in layer.covers(module) or not layer.gives_factors(own):
                others.add(name)
            elif name not in maps:
                transposed, stored = isinstance(layer, Conv1D), own == stored_weight(module)
                maps[name] = LinearMap(name, _path(path), module, tensor, transposed, stored)
    order = [name for name in names.values() if name in maps and name not in others]
    return {name: maps[name] for name in order}


def _path(path: str) -> str:
    """Remove the wrappers from a module's path, whose last component is no parameter's."""
    return without_wrappers(f"{path}.weight").removesuffix(".weight")


def _dequantized(linear: LinearMap) -> Tensor:
    """Apply a quantised linear to the rows of an identity, and subtract its bias."""
    O, I = linear.shape
    module = linear.module
    with gradient_kept(module):
        for dtype in _dtypes(linear):
            try:
                zero = _applied(module, torch.zeros(1, I, dtype=dtype, device=linear.weight.device))
            except RuntimeError:  # the dtype of the input must be that of scales, which no attribute names in common
                continue
            matrix = torch.empty(O, I, dtype=zero.dtype, device=zero.device)
            for start in range(0, I, _ROWS):
                stop = min(start + _ROWS, I)
                rows = torch.zeros(stop - start, I, dtype=dtype, device=linear.weight.device)
                rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
                matrix[:, start:stop] = (_applied(module, rows) - zero).T
            return matrix
    raise UnsupportedModuleError(
        f"the weight of {linear.path!r} ({type(module).__name__}) is quantised, and the module could not be applied to "
        f"an input [1, {I}] in float32, bfloat16 or float16, which gives the matrix that it multiplies by."
    )


def _applied(module: nn.Module, rows: Tensor) -> Tensor:
    with torch.enable_grad():  # bitsandbytes' 4-bit linears repack themselves for good without
        return module.forward(rows.requires_grad_()).detach()


def _dtypes(linear: LinearMap) -> list[torch.dtype]:
    """List the dtypes that a quantised linear may compute in, that of its scales or bias first."""
    tensors = (*linear.module.parameters(), *linear.module.buffers())
    own = [one.dtype for one in tensors if has_gradient_dtype(one) and (one is not linear.weight or is_wrapped(one))]
    return list(dict.fromkeys([*own, torch.float32, torch.bfloat16, torch.float16]))

"""Ways to the sum of squared per-example gradients of a linear, from its inputs and output gradients.

``x`` is ``[N, T, I]``, ``g`` is ``[N, T, O]``, and the result ``[O, I]`` is added to ``out`` where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F


def loop(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of one example after the other, squared and added."""
    total = torch.zeros(g.shape[-1], x.shape[-1], device=x.device)
    for inputs, grads in zip(x, g, strict=True):
        total += (grads.mT @ inputs).square_()
    return total


def vmap_products(x: Tensor, g: Tensor) -> Tensor:
    """All of them at once, ``[N, O, I]``."""
    return vmap(lambda inputs, grads: grads.mT @ inputs)(x, g).square_().sum(0)


def einsum_squares(x: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """Opacus' ``grad_sample`` of a linear layer, in the dtype of its inputs, squared in float32."""
    return out.add_(torch.einsum("n...i,n...j->nij", g, x).float().square_().sum(0))


def vmap_squares(x: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """``vmap(grad(...))`` of torch.func, of a loss whose gradient with respect to the outputs is ``g``."""
    weight = torch.zeros(out.shape, dtype=x.dtype, device=x.device)
    grads = vmap(grad(lambda weight, x, g: (F.linear(x, weight) * g).sum()), in_dims=(None, 0, 0))(weight, x, g)
    return out.add_(grads.float().square_().sum(0))


def bmm_squares(x: Tensor, g: Tensor, out: Tensor, rows: int) -> Tensor:
    """Per-example gradients of some rows at a time, ``[N, rows, I]``, squared and added up.

    With all rows of the result at once this is what ``kronfluence`` and ``nngeometry`` do for a layer. Products of
    16-bit inputs come out in float32, as the operation requires.
    """
    wide = {} if x.dtype is torch.float32 else {"out_dtype": torch.float32}
    for start in range(0, g.shape[-1], rows):
        grads = torch.bmm(g[..., start : start + rows].mT, x, **wide)
        out[start : start + rows].add_(grads.square_().sum(0))
    return out

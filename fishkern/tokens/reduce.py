"""The mathematics of token reduction, on tensors."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishkern.ops.dtypes import accumulates_in


class Split(NamedTuple):
    """Which tokens of a layer stay.

    Attributes:
        kept: Their places in the sequence, ascending, ``[N, n]`` int64; class and other special tokens are not listed.
        rest: Places of the others, ``[N, T - n]`` int64.
        weights: The class token's attention to the rest, ``[N, T - n]``, of at least float32.
    """

    kept: Tensor
    rest: Tensor
    weights: Tensor


def class_attention(hidden: Tensor, q_proj: nn.Module, k_proj: nn.Module, head_dim: int, scaling: float) -> Tensor:
    """Compute the class token's attention, without the attention of any other token.

        a = mean over heads of softmax(q_class k^T * scaling)

    Where ``k_proj`` is a plain linear layer, the keys are not computed again: ``q k_t = (W_k^T q) x_t + q b_k``, and
    the last term is the same for all tokens. This costs T * I operations for each head instead of T * I * I. Both ways
    round alike in float32; the ranking of tokens whose attention differs by less than rounding is arbitrary.

    Args:
        hidden: What enters attention, ``[N, T, I]``; the class token is the first one.
        q_proj: The layer of the queries, ``[..., I] -> [..., H * head_dim]``.
        k_proj: The layer of the keys, of the same shapes.
        head_dim: Size of a head.
        scaling: Factor of the products.

    Returns:
        Attention to all tokens, ``[N, T]``, without gradient; float32, or float64 where the products are.
    """
    hidden = hidden.detach()  # its views would claim to require a gradient, which FlopCounterMode takes at its word
    with torch.no_grad():
        first = hidden[:, :1].contiguous()  # torch multiplies a slice in another way where the weights are frozen
        query = q_proj(first).squeeze(1).unflatten(-1, (-1, head_dim))
        if type(k_proj) is nn.Linear and type(k_proj.weight) in (nn.Parameter, Tensor):
            weight = k_proj.weight.unflatten(0, (-1, head_dim))
            products = torch.einsum("nhd,hdi->nhi", query, weight) @ hidden.transpose(1, 2)
        else:  # LoRA, quantised or sharded
            products = torch.einsum("nhd,nthd->nht", query, k_proj(hidden).unflatten(-1, (-1, head_dim)))
        products = products.to(accumulates_in(products.dtype))
        return (products * scaling).softmax(-1).mean(1)


def kept_count(tokens: int, share: Fraction) -> int:
    """Count the image tokens that stay.

    Args:
        tokens: Image tokens that enter the layer.
        share: Of them.

    Returns:
        ``max(1, floor(share * tokens))``.
    """
    return max(1, tokens * share.numerator // share.denominator)


def split_tokens(attention: Tensor, special: int, count: int) -> Split:
    """Rank the image tokens, and choose those that stay. Ties go to the earlier token.

    Args:
        attention: As from :func:`class_attention`, ``[N, special + T]``.
        special: Number of class, distillation and register tokens, which come first.
        count: How many image tokens stay.

    Returns:
        The split.
    """
    ranked = attention[:, special:].argsort(dim=1, descending=True, stable=True) + special
    kept, rest = ranked[:, :count].sort(dim=1).values, ranked[:, count:]
    return Split(kept, rest, attention.gather(1, rest))


def reduce_tokens(tokens: Tensor, split: Split, special: int, *, merge: bool) -> Tensor:
    """Drop the tokens that do not stay.

    Gradients flow through the values of all tokens, and not through the weights.

    Args:
        tokens: The whole sequence, ``[N, special + T, I]``.
        split: Which image tokens stay.
        special: Number of tokens before the image tokens.
        merge: Whether to append the mean of the rest, weighted by ``split.weights``; where they are all 0, the plain
            mean.

    Returns:
        ``[N, special + n + merge, I]`` of the same dtype: special tokens, kept ones in their order, the merged one.
    """
    parts = [tokens[:, :special], _taken(tokens, split.kept)]
    if merge:
        total = split.weights.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, split.weights / total, 1 / split.weights.shape[1])
        merged = (weights[..., None] * _taken(tokens, split.rest)).sum(dim=1, keepdim=True)
        parts.append(merged.to(tokens.dtype))
    return torch.cat(parts, dim=1)


def _taken(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))

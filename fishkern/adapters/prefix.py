"""Prefix tuning on chosen layers (Li and Liang, 2021, arXiv:2101.00190), without a reparameterising network."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishkern import hosts
from fishkern.adapters.base import Adapter, Wrapper
from fishkern.names import without_wrappers

# Last linear layers of the attention modules in which a prefix is tested: BERT's and LLaMA's. Others also take
# past_key_values, but may shift positions by its length or expect another mask.
_TESTED = ("attention.output.dense", "self_attn.o_proj")


@dataclass(frozen=True)
class PrefixAdapter(Adapter):
    """Trained keys and values before those of the text, in every head of a layer.

    PEFT's prefix tuning keeps the prefixes of all layers in one tensor and needs all layers; this one has a tensor for
    each layer, and can leave layers out. Keys get no rotary embedding, as in PEFT.

    Args:
        length: Prefix positions.
        layers: Numbers of the layers, from the input, starting at 0; ``None`` for all.
    """

    length: int = 30

    def wrappers(self, layer: nn.Module, points: hosts.InsertionPoints) -> dict[str, Wrapper]:
        attention, (_, key, value) = prefixed_attention(layer, points)
        return {points.attention.module: Prefixed(attention, self.length, key, value)}


def prefixed_attention(layer: nn.Module, points: hosts.InsertionPoints) -> tuple[nn.Module, list[nn.Module]]:
    """Get attention and its projections, if a prefix can be put in.

    Args:
        layer: A transformer layer.
        points: The paths of its parts.

    Returns:
        The attention module, and the linear layers of queries, keys and values.

    Raises:
        ValueError: Attention does not take a prefix.
    """
    attention = layer.get_submodule(points.attention.module)
    name, instead = type(attention).__name__, "use a BottleneckAdapter, or one of PEFT's adapters"
    if "past_key_values" not in inspect.signature(attention.forward).parameters:  # **kwargs would ignore it silently
        raise ValueError(f"a prefix goes into attention as past_key_values, which {name} does not take: {instead}.")
    if len(points.projections) != 3 or without_wrappers(points.attention.output) not in _TESTED:
        raise ValueError(
            f"{name} is not built like the attention of BERT or LLaMA, the only ones known to read a prefix: {instead}."
        )
    return attention, [layer.get_submodule(path) for path in points.projections]


class Prefixed(Wrapper):
    """An attention module with a prefix.

    The prefix is an embedding of its positions ``[length, keys + values]``, so that each example has a row of its own.

    Args:
        base_layer: The attention module: takes ``attention_mask`` and ``past_key_values`` by keyword.
        length: Prefix positions.
        key: Its key projection.
        value: Its value projection.
    """

    def __init__(self, base_layer: nn.Module, length: int, key: nn.Linear, value: nn.Linear) -> None:
        super().__init__(base_layer)
        self.sizes = (key.out_features, value.out_features)
        self.prefix = nn.Embedding(length, sum(self.sizes))
        nn.init.normal_(self.prefix.weight, std=0.02)

    def forward(
        self, *args: Any, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        keys, values = self.rows(hidden).split(self.sizes, dim=-1)
        cache = _Prefix(keys, values, past_key_values)
        cached = past_key_values.get_seq_length(self.base_layer.layer_idx) if past_key_values is not None else 0
        mask = self._with_prefix(attention_mask, hidden.shape[1], cached, hidden.device)
        return self.base_layer(*args, attention_mask=mask, past_key_values=cache, **kwargs)

    def rows(self, hidden: Tensor) -> Tensor:
        """Give each example its prefix.

        Args:
            hidden: Input of the attention module, ``[N, T, D]``.

        Returns:
            ``[N, length, keys + values]``.
        """
        positions = torch.arange(self.prefix.num_embeddings, device=hidden.device)
        return self.prefix(positions.expand(len(hidden), -1))

    def _with_prefix(self, mask: Tensor | None, T: int, cached: int, device: torch.device) -> Tensor | None:
        """Extend a mask so that every position attends to the prefix."""
        length = self.prefix.num_embeddings
        if mask is None:
            if not getattr(self.base_layer, "is_causal", False) or T == 1:
                return None
            # without a mask, attention would apply is_causal, which takes the prefix for later positions
            mask = torch.ones(T, cached + T, dtype=torch.bool, device=device).tril(cached)[None, None]
        if mask.ndim != 4:
            raise ValueError(
                f"a prefix needs an attention mask [N, 1, T, S], got {tuple(mask.shape)}: load the model with "
                "attn_implementation='sdpa' or 'eager'."
            )
        return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


class _Prefix:
    """A cache, as far as attention uses it: ``update`` puts the prefix before the keys and values."""

    def __init__(self, keys: Tensor, values: Tensor, inner: Any) -> None:
        self._keys = keys
        self._values = values
        self._inner = inner

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the prefix before keys and values ``[N, heads, T, head size]``."""
        if self._inner is not None:
            keys, values = self._inner.update(keys, values, layer, *args, **kwargs)
        return _before(self._keys, keys), _before(self._values, values)


def _before(prefix: Tensor, text: Tensor) -> Tensor:
    heads, size = text.shape[1], text.shape[3]
    return torch.cat([prefix.unflatten(-1, (heads, size)).transpose(1, 2).to(text.dtype), text], dim=2)

"""Prefix tuning on chosen layers (Li and Liang, 2021, arXiv:2101.00190), without a reparameterising network."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishkern.adapters.base import Adapter, Places, Wrapper


@dataclass(frozen=True)
class PrefixAdapter(Adapter):
    """Trained keys and values in front of those of the text, in every head of a layer.

    PEFT's prefix tuning keeps all layers in one tensor and serves all of them; this one has a tensor for each layer,
    and leaves the others alone. Keys get no rotary embedding, as in PEFT.

    Args:
        length: Prefix positions.
        layers: Numbers of the layers, from the bottom; ``None`` for all.
    """

    length: int = 30

    def wrappers(self, layer: nn.Module, places: Places) -> dict[str, Wrapper]:
        _, key, value = (layer.get_submodule(path) for path in places.query_key_value)
        return {places.attention: Prefixed(layer.get_submodule(places.attention), self.length, key, value)}


class Prefixed(Wrapper):
    """An attention module that sees a prefix.

    The prefix is an embedding of its positions ``[length, keys + values]``, so that each example has a row of its own.

    Args:
        base_layer: The attention module: takes ``attention_mask`` and ``past_key_values`` by keyword.
        length: Prefix positions.
        key: Its key projection.
        value: Its value projection.

    Raises:
        ValueError: The module takes no ``past_key_values``.
    """

    def __init__(self, base_layer: nn.Module, length: int, key: nn.Linear, value: nn.Linear) -> None:
        super().__init__(base_layer)
        if "past_key_values" not in inspect.signature(base_layer.forward).parameters:  # **kwargs would swallow it
            raise ValueError(
                f"a prefix goes into attention as past_key_values, which {type(base_layer).__name__} does not take: "
                "take a BottleneckAdapter, or one of PEFT's adapters."
            )
        self.sizes = (key.out_features, value.out_features)
        self.prefix = nn.Embedding(length, sum(self.sizes))
        nn.init.normal_(self.prefix.weight, std=0.02)

    def forward(
        self, *args: Any, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        keys, values = self.rows(hidden).split(self.sizes, dim=-1)
        cache = _Prefix(keys, values, past_key_values)
        seen = past_key_values.get_seq_length(self.base_layer.layer_idx) if past_key_values is not None else 0
        mask = self._with_prefix(attention_mask, hidden.shape[1], seen, hidden.device)
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

    def _with_prefix(self, mask: Tensor | None, T: int, seen: int, device: torch.device) -> Tensor | None:
        """Let every position see the prefix."""
        length = self.prefix.num_embeddings
        if mask is None:
            if not getattr(self.base_layer, "is_causal", False) or T == 1:
                return None
            # without a mask attention is told is_causal, which would count the prefix among the later positions
            mask = torch.ones(T, seen + T, dtype=torch.bool, device=device).tril(seen)[None, None]
        if mask.ndim != 4:
            raise ValueError(
                f"a prefix needs an attention mask [N, 1, T, S], got {tuple(mask.shape)}: load the model with "
                "attn_implementation='sdpa' or 'eager'."
            )
        return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


class _Prefix:
    """The one thing that attention asks of a cache: to put in front what came before."""

    def __init__(self, keys: Tensor, values: Tensor, inner: Any) -> None:
        self._keys = keys
        self._values = values
        self._inner = inner

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the prefix in front of keys and values ``[N, heads, T, head size]``."""
        if self._inner is not None:
            keys, values = self._inner.update(keys, values, layer, *args, **kwargs)
        return _in_front(self._keys, keys), _in_front(self._values, values)


def _in_front(prefix: Tensor, text: Tensor) -> Tensor:
    heads, size = text.shape[1], text.shape[3]
    return torch.cat([prefix.unflatten(-1, (heads, size)).transpose(1, 2).to(text.dtype), text], dim=2)

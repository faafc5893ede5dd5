"""A layer that reduces tokens: a subclass of its own class, so that names, hooks and ``isinstance`` still work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.tokens.recipe import TokenReduction
from fishkern.tokens.reduce import Split, class_attention, kept_count, reduce_tokens, split_tokens


@dataclass(frozen=True)
class Parts:
    """Names of the modules of a layer whose branches add ``drop(scale(module(norm(x))))`` to ``x``.

    Attributes:
        attention: Self-attention.
        feed_forward: The MLP.
        norms: Before attention, and before the MLP.
        scales: Layer scales behind them, ``None`` where there are none.
        drop: Dropout or stochastic depth behind both, ``None`` where there is none.
    """

    attention: str
    feed_forward: str
    norms: tuple[str, str]
    scales: tuple[str | None, str | None]
    drop: str | None


class ReducingLayer:
    """First base class of a layer that reduces tokens; the second one is the class that the layer had.

    Class attributes:
        original: The class that the layer had.
        recipe: The whole recipe, that of all layers.
        parts: The layer's modules.
        special: Number of tokens before the image tokens.
        alteration: The recipe in words, which statistics of such a model have in their definition.
    """

    original: type[nn.Module]
    recipe: TokenReduction
    parts: Parts
    special: int
    alteration: str

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run the layer, and reduce the tokens in it or behind it.

        Args:
            hidden_states: ``[N, special + T, I]``.
            attention_mask: Must be ``None``.
            **kwargs: As for the layer.

        Returns:
            ``[N, special + n + 1, I]``; of as many tokens as came where none is dropped.

        Raises:
            ValueError: There is a mask, as under ``torch.export`` too.
        """
        if attention_mask is not None:
            raise ValueError(
                f"{self.original.__name__} reduces tokens and got an attention_mask, which would not fit the tokens "
                "that are left: call the model without one. torch.export makes one of its own, so it cannot export "
                "such a model; fishkern.tokens.detach it before."
            )
        if self.recipe.place == "after_layer":
            output = super().forward(hidden_states, attention_mask, **kwargs)
            return self._reduced(output, self.split(hidden_states))
        attention, feed_forward = getattr(self, self.parts.attention), getattr(self, self.parts.feed_forward)
        normed = self._norm(0)(hidden_states)
        hidden_states = self._added(0, attention(normed, attention_mask, **kwargs)[0], hidden_states)
        hidden_states = self._reduced(hidden_states, self.split(normed, normed=True))
        return self._added(1, feed_forward(self._norm(1)(hidden_states)), hidden_states)

    def split(self, hidden_states: Tensor, *, normed: bool = False) -> Split | None:
        """Choose the tokens that stay.

        Args:
            hidden_states: What enters the layer, ``[N, special + T, I]``.
            normed: Whether the norm before attention has been applied.

        Returns:
            The split; ``None`` if all stay.
        """
        tokens = hidden_states.shape[1] - self.special
        count = kept_count(tokens, self.recipe.share)
        if count >= tokens:
            return None
        with torch.no_grad():
            hidden_states = hidden_states if normed else self._norm(0)(hidden_states)
        attention = getattr(self, self.parts.attention)
        while not hasattr(attention, "k_proj"):  # in a wrapper of fishkern.adapters
            attention = attention.base_layer
        scaling = attention.scaling if hasattr(attention, "scaling") else attention.scale  # so in CLIP
        weights = class_attention(hidden_states, attention.q_proj, attention.k_proj, attention.head_dim, scaling)
        return split_tokens(weights, self.special, count)

    def extra_repr(self) -> str:
        """Say that the layer reduces tokens, in the printed model."""
        own = super().extra_repr()
        return f"{own}, " * bool(own) + f"keep={self.recipe.keep}, place={self.recipe.place!r}"

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickle the classes that this one is made of, since it has no name to be imported by."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_empty, (self.original, self.recipe, self.parts, self.special), *state)

    def _norm(self, branch: int) -> nn.Module:
        return getattr(self, self.parts.norms[branch])

    def _added(self, branch: int, output: Tensor, hidden_states: Tensor) -> Tensor:
        for name in (self.parts.scales[branch], self.parts.drop):
            output = output if name is None else getattr(self, name)(output)
        return output + hidden_states

    def _reduced(self, hidden_states: Tensor, split: Split | None) -> Tensor:
        if split is None:
            return hidden_states
        return reduce_tokens(hidden_states, split, self.special, merge=self.recipe.merge)


@lru_cache(maxsize=64)  # so layers of one kind have one class, as they had before, for which torch compiles once
def reducing_class(original: type[nn.Module], recipe: TokenReduction, parts: Parts, special: int) -> type[nn.Module]:
    """Make the class of a layer that reduces tokens.

    Args:
        original: The layer's own class.
        recipe: The recipe.
        parts: The layer's modules.
        special: Number of tokens before the image tokens.

    Returns:
        A subclass of ``original``, with the same attributes of instances.
    """
    attributes = {
        "original": original,
        "recipe": recipe,
        "parts": parts,
        "special": special,
        "alteration": repr(recipe),
    }
    described = {"__doc__": original.__doc__, "__module__": __name__}
    return type(f"Reducing{original.__name__}", (ReducingLayer, original), attributes | described)


def _empty(*made_of: Any) -> nn.Module:
    cls = reducing_class(*made_of)
    return cls.__new__(cls)

"""Embedding tables, with or without a constant scale after them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishkern.layers.base import Call, Layer, is_patched, positions
from fishkern.layers.grads import EmbeddingGrads, PerExampleGrads


class Embedding(Layer):
    """``y = scale * W[indices]`` with ``W [V, D]``: the rows of the tokens get the gradient, added up per example."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        plain = isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
        plain = plain and not is_patched(module)
        return frozenset({"weight"}) if plain else frozenset()

    def confirms(self, call: Call, output: Tensor, names: frozenset[str]) -> frozenset[str]:
        if type(call.module).forward is nn.Embedding.forward:
            return names
        indices = call.input
        if indices.is_floating_point() or output.shape[:-1] != indices.shape:
            return frozenset()
        inside = bool(((indices >= 0) & (indices < call.module.num_embeddings)).all())
        return names if inside and torch.equal(self._output(call), output) else frozenset()

    def per_example_grads(
        self, call: Call, output_grads: Tensor, names: frozenset[str]
    ) -> Iterator[tuple[str, PerExampleGrads]]:
        module = call.module
        g = positions(output_grads)
        if (scale := _scale(module)) is not None:
            g = g * scale
        indices = call.input.reshape(g.shape[:2])
        yield "weight", EmbeddingGrads(indices, g, module.num_embeddings, module.padding_idx)

    def own_tokens(self, module: nn.Module, indices: Tensor) -> Tensor:
        """Say which rows of this process's part of the table the tokens of a call have.

        Args:
            module: The embedding.
            indices: The input of the call.

        Returns:
            Indices of the same shape.
        """
        return indices

    @staticmethod
    def _output(call: Call) -> Tensor:
        rows = F.embedding(call.input, call.module.weight)
        return rows if (scale := _scale(call.module)) is None else rows * scale


def _scale(module: nn.Module) -> Tensor | float | None:
    """Read the ``embed_scale`` of transformers' scaled word embeddings (Gemma, BART), in the weight's dtype."""
    if type(module).forward is nn.Embedding.forward:
        return None
    scale = getattr(module, "embed_scale", None)
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale

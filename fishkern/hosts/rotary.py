"""Rotary embeddings whose frequencies depend on the longest example of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class LengthLimit(NamedTuple):
    """Beyond a length, a rotary embedding of transformers turns all examples of a batch by other frequencies.

    Args:
        length: Up to so many positions in the longest example, nothing depends on it.
        kind: ``"longrope"``: beyond it there is one other set of frequencies. ``"dynamic"``: there is one for each
            length.
    """

    length: int
    kind: str


def length_limits(model: nn.Module) -> set[LengthLimit]:
    """Find the rotary embeddings that choose their frequencies by the longest example (Phi-3, dynamic NTK).

    Args:
        model: A module, with or without wrappers.

    Returns:
        Their limits; empty for all other models.
    """
    limits = set()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, Mapping) else {None: kinds}).items():
            if isinstance(kind, str) and (length := _length(module, layer, kind)) is not None:
                limits.add(LengthLimit(length, "longrope" if kind == "longrope" else "dynamic"))
    return limits


def _length(module: nn.Module, layer: str | None, kind: str) -> Any:
    if "dynamic" in kind:
        return getattr(module, "original_max_seq_len", None)
    if kind != "longrope":
        return None
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    return (parameters if layer is None else parameters.get(layer, {})).get("original_max_position_embeddings")

"""Which positions of a batch count, for estimators that read activations: those of padding are not zero."""

from __future__ import annotations

from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples


def counted_positions(model: nn.Module, estimator: Estimator, batch: Examples) -> Tensor | None:
    """Say which positions count, where an estimator reads factors and not all do.

    Args:
        model: The model.
        estimator: The recipe.
        batch: Its ``attention_mask`` says it.

    Returns:
        ``[N, T]``, bool; ``None`` where all count or nobody asks.

    Raises:
        UnsupportedModuleError: The model has an encoder and a decoder, and one mask is not that of both.
    """
    attended = batch.attended if estimator.reads == "factors" else None
    if attended is None or bool(attended.all()):
        return None
    if getattr(getattr(hosts.base_model(model), "config", None), "is_encoder_decoder", False):
        raise UnsupportedModuleError(
            f"{type(model).__name__} has an encoder and a decoder, and attention_mask says which positions count in "
            f"the encoder alone: {type(estimator).__name__} reads activations, which are not zero at padding. Give it "
            "batches without padding."
        )
    return attended

"""Which positions of a batch count, for estimators that read activations: those of padding are not zero."""

from __future__ import annotations

from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.likelihood import Likelihood


def counted_positions(model: nn.Module, estimator: Estimator, answering: Answering, batch: Examples) -> Tensor | None:
    """Say which positions count, where an estimator reads factors and not all do.

    Args:
        model: The model.
        estimator: The recipe, whose ``positions`` says which count.
        answering: Knows the likelihood.
        batch: Its ``attention_mask`` or its labels say which these are.

    Returns:
        ``[N, T]``, bool; ``None`` where all count or nobody asks.

    Raises:
        UnsupportedModuleError: The model has an encoder and a decoder, and one mask is not that of both.
        ValueError: The loss has no labels of positions.
    """
    if estimator.reads != "factors" or estimator.positions == "all":
        return None
    if estimator.positions == "labelled":
        counted, what = _labelled(answering, batch), "labels say which positions count in the decoder alone"
    else:
        counted, what = batch.attended, "attention_mask says which positions count in the encoder alone"
    if counted is None or bool(counted.all()):
        return None
    if getattr(getattr(hosts.base_model(model), "config", None), "is_encoder_decoder", False):
        raise UnsupportedModuleError(
            f"{type(model).__name__} has an encoder and a decoder, and {what}: {type(estimator).__name__} reads "
            "activations, which are not zero at padding. Give it batches without padding, or count positions='all'."
        )
    return counted


def _labelled(answering: Answering, batch: Examples) -> Tensor:
    likelihood = answering.likelihood
    if not isinstance(likelihood, Likelihood):
        raise ValueError(
            "positions='labelled' needs a likelihood with labels of positions, such as fishkern.CausalLM(), and not a "
            "function: a function does not say which positions its losses are of."
        )
    labelled = likelihood.labelled(batch.content)
    if labelled is None:
        raise ValueError(
            f"{type(likelihood).__name__} has no labels of positions, which positions='labelled' counts: count those "
            "that attention_mask marks, positions='attended', or positions='all'."
        )
    return labelled

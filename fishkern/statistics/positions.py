"""Which positions of a batch count, for estimators that read activations: those of padding are not zero."""

from __future__ import annotations

from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import UnsupportedModuleError
from fishkern.statistics.answering import Answering
from fishkern.statistics.base import Estimator
from fishkern.statistics.batches import Examples
from fishkern.statistics.borders import is_pairs
from fishkern.statistics.likelihood import Likelihood


def counted_positions(model: nn.Module, estimator: Estimator, answering: Answering, batch: Examples) -> Tensor | None:
    """Say which positions count, where an estimator reads factors and not all do.

    Args:
        model: The model.
        estimator: The recipe, whose ``positions`` says which count.
        answering: Knows the likelihood.
        batch: Its ``attention_mask`` or its labels say which these are.

    Returns:
        ``[N, T]``, for packed rows ``[R, T]``, for examples of several rows ``[G N, T]``, bool; ``None`` where all
        count or nobody asks.

    Raises:
        UnsupportedModuleError: The model has an encoder and a decoder, and there is padding in one of them.
        ValueError: ``attention_mask`` is not of the shape of the positions, or the loss has no labels of positions.
    """
    if not estimator.reads_factors or estimator.positions == "all":
        return None
    if estimator.positions == "labelled":
        counted, source = _labelled(answering, batch), "labels say which positions count in the decoder alone"
    else:
        counted, source = _attended(batch), "attention_mask says which positions count in the encoder alone"
    two = getattr(getattr(hosts.base_model(model), "config", None), "is_encoder_decoder", False)
    if counted is None or bool(counted.all()):
        counted, source = None, _decoder_padding(batch) if two else None
    if two and source:
        raise UnsupportedModuleError(
            f"{type(model).__name__} has an encoder and a decoder, and {source}: {type(estimator).__name__} reads "
            "activations, which are not zero at padding. Give it batches without padding, or count positions='all'."
        )
    return counted


def _attended(batch: Examples) -> Tensor | None:
    """Read the attention mask of a batch, if it has one."""
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        return None
    rows = batch.num_rows
    if batch.documents is not None and is_pairs(mask, batch.documents.shape[1]):
        return None  # it says which positions see each other, and packed documents have no padding
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] not in (1, rows):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"positions='attended' counts what an attention_mask [N, T] marks, and this one is {found}: give such a "
            "tensor, or count positions='labelled' or positions='all'."
        )
    return (mask != 0).expand(rows, -1)


def _decoder_padding(batch: Examples) -> str | None:
    """Say where a batch has padding for the decoder, whose inputs are made of the labels if they are not given."""
    mask, labels = batch.inputs.get("decoder_attention_mask"), batch.inputs.get("labels")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        return "decoder_attention_mask says which positions count in the decoder alone"
    made_of_labels = isinstance(labels, Tensor) and labels.ndim == 2 and "decoder_input_ids" not in batch.inputs
    if mask is None and made_of_labels and bool((labels == -100).any()):
        return "labels of -100 are padding in the decoder alone"
    return None


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

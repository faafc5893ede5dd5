"""Proof that a model keeps the documents of packed rows apart: the loss of one touches no position of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers import Documents
from fishkern.statistics.autograd import backward
from fishkern.statistics.base import losses_of
from fishkern.statistics.packing import PackedExamples
from fishkern.statistics.predictive import Predictive


def demand_separate(
    model: nn.Module, answer: Callable[[PackedExamples], Predictive | Tensor], few: PackedExamples
) -> None:
    """Back-propagate the loss of each document alone, down to the embeddings of the tokens.

    Args:
        model: In evaluation mode; gradients of its parameters are not touched.
        answer: Runs it on the batch.
        few: Packed rows with one or two documents that count.

    Raises:
        ValueError: The loss of a document depends on positions outside of it; or no embedding was called on the tokens,
            so that nothing shows.
    """
    documents = few.documents
    with _without_weights(model), _embedded(model, documents) as embedded, _caching(model) as caching:
        losses = losses_of(answer(few))
        for n, loss in enumerate(losses):
            backward(loss, retain_graph=n + 1 < len(losses))
            for leaf in embedded:
                grad, leaf.grad = leaf.grad, None
                if grad is not None and (others := documents.touched(grad, 1) - {n}):
                    raise ValueError(_leak(model, few, n, others, cached=any(caching)))
    if not embedded:
        raise ValueError(
            f"{type(model).__name__} calls no nn.Embedding on the positions of packed rows, so nothing shows whether "
            "it keeps their documents apart. Use a collator that keeps one example in each row."
        )


def _leak(model: nn.Module, few: PackedExamples, n: int, others: set[int], *, cached: bool) -> str:
    what = f"document {few.places[max(others)]}" if max(others) >= 0 else "padding or a document without a label"
    says = (
        f"the rows are packed, and the loss of document {few.places[n]} depends on {what} of the same batch: "
        f"{type(model).__name__} does not keep documents apart"
    )
    if few.inputs.get("attention_mask") is not None:
        return (
            f"{says}. The batch has an attention_mask, beside which transformers does not look where position_ids "
            "restart: leave it out of packed batches, or give one of shape [R, 1, T, T] that separates the documents."
        )
    if few.inputs.get("position_ids") is None:
        return (
            f"{says}. The batch has no position_ids, by which most attention tells them apart: add those that restart "
            "with each document, or take an attention that reads cu_seq_lens_q or seq_idx."
        )
    if cached:
        return (
            f"{says}. The loss function lets the model fill a key-value cache, beside which transformers does not look "
            "where position_ids restart: call it with use_cache=False, as training does."
        )
    return (
        f"{says}, as recurrent layers (Mamba, linear attention) and convolutions along the row do not, nor attention "
        "that ignores position_ids (Qwen2-VL's reads [4, R, T] alone, positions of the text in front). Use a collator "
        "that keeps one example in each row."
    )


@contextmanager
def _caching(model: nn.Module) -> Iterator[list[bool]]:
    """Note of every call of the model whether it fills a key-value cache that it has been spared elsewhere."""
    calls: list[bool] = []
    spared = bool(hosts.call_options(model))

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(spared and kwargs.get("use_cache", True) is not False)

    handle = hosts.base_model(hosts.unwrap(model)).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, and restore all afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _embedded(model: nn.Module, documents: Documents) -> Iterator[list[Tensor]]:
    """Collect a leaf in front of the output of every embedding that is called on the positions of the rows."""
    leaves: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not (isinstance(output, Tensor) and torch.is_grad_enabled() and documents.fit(output)):
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # which the model may change in place

    handles = [one.register_forward_hook(note) for one in model.modules() if isinstance(one, nn.Embedding)]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()

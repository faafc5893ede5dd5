"""nngeometry: ``PMatDiag``, from rules for layers that it knows by the names of their classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals.loops import Batches

SETTINGS = "PMatDiag over a loss for each example, from embedded tokens, unknown layers ignored"


def nngeometry(model: nn.Module, batches: Batches, *, ignore_unknown: bool = True) -> dict[str, Tensor]:
    """The diagonal of the covariance of per-example losses' gradients.

    It differentiates by the model's input, which must therefore be embedded already: embeddings are not covered.

    Args:
        model: A model of transformers.
        batches: Full rows of one size.
        ignore_unknown: Leave out layers that the library does not know, instead of raising.
    """
    embed = model.get_input_embeddings()
    with torch.no_grad():
        inputs = torch.cat([embed(batch["input_ids"]) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])

    def losses(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(inputs_embeds=inputs).logits
        if labels.ndim == 1:
            return nn.functional.cross_entropy(logits, labels, reduction="none")[:, None]
        tokens = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        return tokens.mean(1, keepdim=True)

    data, size = (inputs, labels), len(batches[0]["labels"])
    return covariance_diagonal(model.eval(), losses, data, size, ignore_unknown=ignore_unknown)


def covariance_diagonal(model, losses, data, batch_size, *, ignore_unknown=True) -> dict[str, Tensor]:
    """Call the library, and name the pieces of its flat result."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection.from_model(model, ignore_unsupported_layers=ignore_unknown)
    generator = TorchHooksJacobianBackend(model=model, function=losses, layer_collection=layers)
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size)
    flat = PMatDiag(generator=generator, examples=loader).get_diag() * len(data[0])  # a mean over examples
    squares, start = {}, 0
    for name, parameter in layers.named_parameters(layers.get_layerid_module_maps(model)[0]):
        squares[name] = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return squares

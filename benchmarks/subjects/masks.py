"""Parameters of which a part is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import fishkern as fk
from benchmarks.subjects.transformers import LLAMA_7B, LLAMA_104M, Shape, with_lora

RANK = 16
# By name, a shape, and whether the factors of LoRA on its linears are trained instead of its weights.
MODELS: dict[str, tuple[Shape, bool]] = {
    "lora": (LLAMA_104M, True),
    "llama": (LLAMA_104M, False),
    "7B lora": (LLAMA_7B, True),
    "7B": (LLAMA_7B, False),
}


@dataclass(frozen=True)
class MaskedStep:
    """A model and the selected fraction of it.

    Args:
        model: A key of :data:`MODELS`.
        density: Selected fraction.
        dtype: Of the weights.
        device: Where they are.
    """

    model: str
    density: float
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.model},density={self.density}"

    @property
    def fields(self) -> dict[str, object]:
        """The case of a record."""
        return {"model": self.model, "density": self.density}

    def trained(self) -> nn.Module:
        """All weights, or the factors without a model, with gradients that stay the same."""
        shape, lora = MODELS[self.model]
        dtype = getattr(torch, self.dtype)
        torch.manual_seed(0)
        if lora:
            sizes = [size for O, I in shape.linears() for size in ((RANK, I), (O, RANK))] * shape.layers
            factors = [torch.randn(size, device=self.device).to(dtype) for size in sizes]
            trained: nn.Module = nn.ParameterList([nn.Parameter(factor) for factor in factors])
        else:
            trained = shape.model(self.device, dtype).train()
        for parameter in trained.parameters():
            parameter.grad = torch.randn_like(parameter)
        return trained

    def in_its_model(self) -> tuple[nn.Module, nn.Module]:
        """A model that computes losses, and the trained part of it."""
        shape, lora = MODELS[self.model]
        model = shape.model(self.device, getattr(torch, self.dtype)).train()
        if not lora:
            return model, model
        model = with_lora(model, RANK).train()
        return model, nn.ParameterList([parameter for parameter in model.parameters() if parameter.requires_grad])

    def selection(self, trained: nn.Module) -> fk.Selection:
        """Entries at random."""
        scores = {name: parameter.detach() for name, parameter in trained.named_parameters()}
        return fk.select(scores, fk.Random(density=self.density, seed=0))

"""Ways to train selected entries by AdamW: each makes ``step()``, called after a backward pass, for model and mask."""

from __future__ import annotations

import math

import torch
from torch import nn

import fishkern as fk
from benchmarks.engine.turns import Run


def fishkern(model: nn.Module, selection: fk.Selection) -> Run:
    """As a user calls it, without clipping, which the others do not have either."""
    return fk.MaskedAdamW(model, selection, max_grad_norm=math.inf).step


def six_lines(model: nn.Module, selection: fk.Selection) -> Run:
    """Gather into one flat vector, fused AdamW, scatter."""
    trained = [
        (p, selection.indices(n).long().to(p.device)) for n, p in model.named_parameters() if selection.counts[n]
    ]
    flat = torch.cat([p.detach().view(-1)[i] for p, i in trained]).requires_grad_()
    optimizer = torch.optim.AdamW([flat], fused=True)

    @torch.no_grad()
    def step() -> None:
        flat.grad = torch.cat([p.grad.view(-1)[i] for p, i in trained])
        optimizer.step()
        for (p, i), values in zip(trained, flat.split([len(i) for _, i in trained]), strict=True):
            p.view(-1)[i] = values

    return step


def masked_fused(model: nn.Module, selection: fk.Selection) -> Run:
    """Masked gradients and torch's fused AdamW, whose decay moves all weights."""
    return _masked_gradients(model, selection, fused=True)


def masked_foreach(model: nn.Module, selection: fk.Selection) -> Run:
    """Masked gradients and torch's multi-tensor AdamW, likewise."""
    return _masked_gradients(model, selection, foreach=True)


def dense_fused(model: nn.Module, selection: fk.Selection) -> Run:
    """Everything trained, by torch's fused AdamW."""
    return torch.optim.AdamW(model.parameters(), fused=True).step


def _masked_gradients(model: nn.Module, selection: fk.Selection, **options: bool) -> Run:
    masks = [(p, selection.mask(n).to(p.device)) for n, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def step() -> None:
        for parameter, mask in masks:
            parameter.grad *= mask
        optimizer.step()

    return step

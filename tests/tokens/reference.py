"""Models with class tokens, and a layer with token reduction by the formula, which shares no code with the package."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from fishkern import tokens
from fishkern.tokens import TokenReduction
from tests.support.layered import VISION, Family, image

_VIT = VISION["vit"].settings
_STACK = VISION["vit"].stacks

# In these families each token in front of the patches has a name here.
SPECIAL = {"vit": 1, "vit-msn": 1, "deit": 2, "dinov2": 1, "dinov2-gated": 1, "dinov2-registers": 5, "clip-vision": 1}
SUPPORTED: dict[str, Family] = {
    "vit": VISION["vit"],
    "vit-msn": Family("ViTMSNForImageClassification", _VIT, image, _STACK),
    "deit": VISION["deit"],
    "dinov2": VISION["dinov2"],
    "dinov2-gated": VISION["dinov2-gated"],
    "dinov2-registers": VISION["dinov2-registers"],
    "clip-vision": VISION["clip-vision"],
}


def made(name: str, dtype: torch.dtype = torch.float64, **settings) -> tuple[nn.Module, dict]:
    """A model whose weights are far from 0, so that attention is far from uniform, with its inputs."""
    family = SUPPORTED[name]
    model = replace(family, settings={**family.settings, **settings}).model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype), {key: value.to(dtype) for key, value in family.inputs().items()}


def classifier(dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Module, dict]:
    """A ViT with three classes, and images with labels."""
    model, _ = made("vit", dtype, num_labels=3, **settings)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return model, {"pixel_values": images, "labels": torch.tensor([0, 1, 2, 2, 1, 0])}


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the one vision transformer."""
    return next(list(module) for module in model.modules() if isinstance(module, nn.ModuleList))


def module(layer: nn.Module, *names: str) -> nn.Module | None:
    """The part of a layer that has one of these names."""
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def reduced_layer(layer: nn.Module, hidden: Tensor, special: int, recipe: TokenReduction) -> Tensor:
    """One layer in evaluation mode, one example and one head at a time."""
    return torch.stack([_one_example(layer, one, special, recipe) for one in hidden])


def _one_example(layer: nn.Module, x: Tensor, special: int, recipe: TokenReduction) -> Tensor:
    T = len(x)
    scale_1, scale_2 = (module(layer, name) or nn.Identity() for name in ("layer_scale1", "layer_scale2"))
    norm_1 = module(layer, "layernorm_before", "norm1", "layer_norm1")
    norm_2 = module(layer, "layernorm_after", "norm2", "layer_norm2")
    attention = module(layer, "attention", "self_attn")
    h = norm_1(x)
    q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
    outputs, rows = [], []
    for head in range(q.shape[1] // attention.head_dim):
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        probabilities = (q[:, part] @ k[:, part].T / math.sqrt(attention.head_dim)).softmax(dim=1)
        outputs.append(probabilities @ v[:, part])
        rows.append(probabilities[0].tolist())
    y = x + scale_1(module(attention, "o_proj", "out_proj")(torch.cat(outputs, dim=1)))
    if recipe.place == "after_layer":
        y = y + scale_2(layer.mlp(norm_2(y)))
    a = {t: sum(row[t] for row in rows) / len(rows) for t in range(special, T)}
    n = max(1, math.floor(recipe.keep * (T - special) + 1e-9))
    best = sorted(a, key=lambda t: (-a[t], t))
    kept, rest = sorted(best[:n]), best[n:]
    sequence = [y[t] for t in [*range(special), *kept]]
    if rest and recipe.merge:
        sequence.append(sum(a[t] * y[t] for t in rest) / sum(a[t] for t in rest))
    y = torch.stack(sequence)
    return y if recipe.place == "after_layer" else y + scale_2(layer.mlp(norm_2(y)))


def worst_layer(name: str, recipe: TokenReduction, **settings) -> float:
    """Largest error of the reducing layers of a model and of their gradients by what enters them."""
    model, inputs = made(name, **settings)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    reducing = [layers(model)[number] for number in recipe.layers]
    for layer in reducing:
        layer.register_forward_hook(lambda layer, args, output: calls.append((layer, args[0], output)))
    model(**inputs)
    tokens.attach(model, recipe)
    calls.clear()
    model(**inputs)
    assert [layer for layer, _, _ in calls] == reducing
    worst = 0.0
    for layer, hidden, output in calls:
        expected = reduced_layer(layer, hidden, SPECIAL[name], recipe)
        if expected.shape != output.shape:
            return math.inf
        pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
        grads = [torch.autograd.grad((y * pull).sum(), hidden, retain_graph=True)[0] for y in (output, expected)]
        for one, other in ((output, expected), grads):
            worst = max(worst, ((one - other).abs().max() / other.abs().max()).item())
    return worst

"""Entries of the base's own weights instead of an adapter's: as many, chosen by what people name for it.

The pool is the query, key and value weights of the lowest layers, and the classifier trains whole, as with the adapter.
All arms rank the whole pool but *mask-lift*, which takes its share of each matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import fishkern as fk
from benchmarks.studies.comparing.low_rank import low_rank
from benchmarks.studies.glue.setting import Setting

HEAD = "classifier.*"
PARTS = ("query", "key", "value")

Batches = list[dict[str, Tensor]]


def freeze_all_but_pool(model: nn.Module, setting: Setting) -> None:
    """Let the pool and the classifier train."""
    pooled = tuple(f".layer.{n}.attention.self.{part}.weight" for n in range(setting.pool) for part in PARTS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(pooled) or name.startswith("classifier."))


def budget(model: nn.Module, setting: Setting) -> int:
    """The entries of a LoRA of rank 1 on query, key and value of the lowest layers."""
    own = tuple(f".layer.{n}.attention.self.{part}.weight" for n in range(setting.layers) for part in PARTS)
    return sum(sum(p.shape) for name, p in model.named_parameters() if name.endswith(own))


def select(arm: str, model: nn.Module, batches: Batches, k: int, seed: int) -> fk.Selection:
    """Choose ``k`` entries of the pool, and the classifier.

    Args:
        arm: One of :data:`MASKS`.
        model: Whose parameters that require a gradient are pool and classifier.
        batches: Examples of the task.
        k: Entries beside the classifier.
        seed: Of the random choice.
    """
    pool = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return MASKS[arm](model, pool, batches, k, seed)


def _fish(model: nn.Module, pool: dict[str, nn.Parameter], batches: Batches, k: int, seed: int) -> fk.Selection:
    return fk.select(fk.estimate(model, batches), fk.GlobalTopK(k=k, always=HEAD))


def _lift(model: nn.Module, pool: dict[str, nn.Parameter], batches: Batches, k: int, seed: int) -> fk.Selection:
    """Magnitudes after an approximation of low rank (LIFT, arXiv:2506.00772), chosen once."""
    ranked = [name for name in pool if not name.startswith("classifier.")]
    scores = {name: (low_rank(p) if name in ranked else p.detach()).abs() for name, p in pool.items()}
    return fk.select(scores, fk.PerTensorTopK(k=k // len(ranked), always=HEAD))


def _wanda(model: nn.Module, pool: dict[str, nn.Parameter], batches: Batches, k: int, seed: int) -> fk.Selection:
    """Weight times the norm of its input (arXiv:2306.11695)."""
    weights = [name for name in pool if name.endswith(".weight")]
    norms = fk.estimate(model, batches, fk.InputNorms(), parameters=weights)
    scores = dict(fk.saliency(model, norms)) | {name: p.detach().abs() for name, p in pool.items() if p.ndim == 1}
    return fk.select(scores, fk.GlobalTopK(k=k, always=HEAD))


def _magnitude(model: nn.Module, pool: dict[str, nn.Parameter], batches: Batches, k: int, seed: int) -> fk.Selection:
    return fk.select({name: p.detach().abs() for name, p in pool.items()}, fk.GlobalTopK(k=k, always=HEAD))


def _random(model: nn.Module, pool: dict[str, nn.Parameter], batches: Batches, k: int, seed: int) -> fk.Selection:
    return fk.select({name: p.detach() for name, p in pool.items()}, fk.Random(k=k, seed=seed, always=HEAD))


MASKS: dict[str, Callable[..., fk.Selection]] = {
    "mask-fish": _fish,
    "mask-lift": _lift,
    "mask-wanda": _wanda,
    "mask-magnitude": _magnitude,
    "mask-random": _random,
}

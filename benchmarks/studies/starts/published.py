"""The published formulas of FARSS and FILet with their quirks, which the library does not have.

They are arms of the comparison and no part of the library, whose ``farss`` and ``filet`` leave these quirks out. Both
keep whole covariances, so they are for small models. Written from the equations; what is not in them (bfloat16
residuals, parsing of arguments) is left out.

FARSS (Chen et al., Findings of ACL 2026), its quirks by the names of the functions' arguments and steps:

* few tokens: 16 sequences in batches of 2, at most 1024 random tokens of each call, drawn for ``h`` and ``d`` apart;
* padding is counted: rows are padded to the full length, and all positions are in both averages;
* batch means: the gradients are those of the mean loss of a batch, in training mode;
* a matrix without a covariance has the importance mean(W^2), which is another unit;
* round, then clip, and no renormalisation: the ranks miss their average;
* the switch: ranks below 128 take the lowest scores, whatever layer they are in;
* uncompensated scaling: the runtime multiplies by alpha / rank, the singular values do not know of it.

FILet (Feng, Lin, Kao, ICML 2026), as far as it is known:

* power basis: V is W^T W and U is W V, both with normalised columns: no singular vectors, not orthogonal;
* batches have equal weight, whatever they hold, and padding is counted;
* batch means: gradients of the mean loss, so energies fall with the square of the batch size;
* the clamp: energies below 1e-8 become 1e-8, so most directions start with the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.studies.starts.attach import Factors

SWITCH = 128  # ranks below it take the lowest scores
SUBSAMPLE = 1024
CLAMP = 1e-8
Calls = Callable[[str, Tensor, Tensor], None]  # path, inputs [N, T, I], output gradients [N, T, O]


def farss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Mapping[str, nn.Linear],
    *,
    shallow: Callable[[str], bool],
    rank: int,
    average: float,
    seed: int,
    switch: int = SWITCH,
    subsample: int = SUBSAMPLE,
) -> dict[str, Factors]:
    """The start of FARSS as published.

    Args:
        model: In any mode; it comes back in evaluation mode.
        batches: With labels, padded to the full length, as the model takes them.
        modules: The adapted modules by path.
        shallow: Whether a path is in a shallow layer.
        rank: Of the deep matrices, and alpha of all.
        average: Rank of the shallow ones before rounding; the largest is half of ``rank``.
        seed: Of the tokens that are drawn.
        switch: Ranks below it take the lowest scores.
        subsample: Tokens of a call that are kept.
    """
    inputs, gradients = covariances(model, batches, modules, seed=seed, subsample=subsample, training=True)
    weights = {path: module.weight.detach().float() for path, module in modules.items()}
    importances = {path: importance(weights[path], inputs.get(path), gradients.get(path)) for path in modules}
    shallow_ranks = ranks_of({path: importances[path] for path in modules if shallow(path)}, average, rank // 2)
    starts = {}
    for path, weight in weights.items():
        own = min(shallow_ranks.get(path, rank), *weight.shape)
        U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
        lam = ((Vh @ inputs[path]) * Vh).sum(1).clamp(min=0)
        gamma = ((U.T @ gradients[path]) * U.T).sum(1).clamp(min=0)
        scores = sigma.square() * lam * gamma
        chosen = scores.topk(own, largest=own >= switch).indices.sort().values
        root = sigma[chosen].sqrt()
        starts[path] = Factors(root[:, None] * Vh[chosen], U[:, chosen] * root, scaling=rank / own)
    return starts


def covariances(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Mapping[str, nn.Linear],
    *,
    seed: int,
    subsample: int,
    training: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``E[h h^T]`` and ``E[d d^T]`` over the tokens that are drawn of each call, by path."""
    draws = torch.Generator().manual_seed(seed)
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    counts: tuple[dict[str, int], dict[str, int]] = ({}, {})

    def add(path: str, *sides: Tensor) -> None:
        for side, total, count in zip(sides, sums, counts, strict=True):
            tokens = side.flatten(0, -2).float()
            if len(tokens) > subsample:
                tokens = tokens[torch.randperm(len(tokens), generator=draws)[:subsample].to(tokens.device)]
            total[path] = total.get(path, 0) + tokens.T @ tokens
            count[path] = count.get(path, 0) + len(tokens)

    model.train(training)
    with tapped(modules, add):
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()
    model.eval()
    return tuple(
        {path: total / count[path] for path, total in side.items()} for side, count in zip(sums, counts, strict=True)
    )


def importance(weight: Tensor, inputs: Tensor | None, gradients: Tensor | None) -> float:
    """Tr(Sd W Sh W^T) / (m n), or mean(W^2) where there is no covariance."""
    if inputs is None or gradients is None:
        return weight.square().mean().item()
    return ((gradients @ weight @ inputs) * weight).sum().item() / weight.numel()


def ranks_of(importances: Mapping[str, float], average: float, most: int, least: int = 1) -> dict[str, int]:
    """Ranks inverse to the importances: rounded, then clipped, so that their mean is not ``average``."""
    average = min(average, most)
    values = torch.tensor(list(importances.values()), dtype=torch.float64)
    if not bool(values.isfinite().all()) or values.sum() <= 0:
        values = torch.ones_like(values)
    inverse = 1 / (values / values.sum() + 1e-12)
    ranks = (average * len(values) * inverse / inverse.sum()).round().clamp(least, most)
    return dict(zip(importances, map(int, ranks.tolist()), strict=True))


def filet(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Mapping[str, nn.Linear],
    *,
    rank: int,
    clamp: float = CLAMP,
) -> dict[str, Factors]:
    """The start of FILet with the smallest energies, as far as it is published.

    Args:
        model: Used in evaluation mode.
        batches: With labels, as the model takes them; each has the same weight.
        modules: The adapted modules by path.
        rank: Of all matrices; also alpha.
        clamp: Smallest energy that a size is made of.
    """
    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def add(path: str, *sides: Tensor) -> None:
        for side, total in zip(sides, sums, strict=True):
            tokens = side.flatten(0, -2).float()
            total[path] = total.get(path, 0) + tokens.T @ tokens / len(tokens)

    model.eval()
    count = 0
    with tapped(modules, add):
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()
            count += 1
    starts = {}
    for path, module in modules.items():
        weight = module.weight.detach().float()
        V = nn.functional.normalize(weight.T @ weight, dim=0)
        U = nn.functional.normalize(weight @ V, dim=0)
        inputs, gradients = (total[path] / count for total in sums)
        energies = ((inputs @ V) * V).sum(0) * ((gradients @ U) * U).sum(0)
        chosen = energies.topk(rank, largest=False).indices
        size = energies[chosen].clamp(min=clamp).sqrt()
        starts[path] = Factors(size[:, None] * V[:, chosen].T, U[:, chosen] * size)
    return starts


@contextmanager
def tapped(modules: Mapping[str, nn.Linear], calls: Calls) -> Iterator[None]:
    """Call ``calls`` with what each module was given and the gradient at its output, at every backward pass."""

    def tap(path: str) -> Callable:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given = inputs[0].detach()
            output.register_hook(lambda gradient: calls(path, given, gradient.detach()))

        return forward

    handles = [module.register_forward_hook(tap(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""A short training of an adapter from its start, without PEFT and the Trainer: how well does it begin?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishkern import hosts
from fishkern.initialization.init import AdapterInit
from fishkern.layers import linear_maps
from fishkern.names import listed
from fishkern.statistics import Likelihood
from fishkern.statistics.answering import Answering
from fishkern.statistics.batches import Examples, Shared
from fishkern.statistics.data import Data
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.randomness import OwnRandomness
from fishkern.statistics.request import reader_for
from fishkern.statistics.shards import Ranks
from fishkern.statistics.undisturbed import undisturbed


def probe_losses(
    model: nn.Module,
    init: AdapterInit,
    train: Iterable[Any],
    evaluate: Mapping[str, Iterable[Any]],
    *,
    steps: int,
    lr: float,
    likelihood: Likelihood | Callable[[nn.Module, Any], Tensor] | None = None,
    shared: Shared = None,
) -> dict[str, float]:
    """Train an adapter for a few steps from its start, and measure losses after them.

    The adapter runs beside the frozen weights, in hooks that are removed again: each module's output becomes ``y +
    scaling * (x A^T B^T - x A_0^T B_0^T)``, with the start ``A_0, B_0`` subtracted, so that the first step is that of
    the model itself. ``A`` and ``B`` are float32 and move by Adam, without weight decay. The model is in evaluation
    mode, without dropout, and is left as found.

    Args:
        model: The model that the start was made for.
        init: The start.
        train: Batches, read again from the beginning when they end.
        evaluate: Batches by name.
        steps: Number of batches to train on; 0 measures the model itself.
        lr: Learning rate.
        likelihood: As for :func:`fishkern.estimate`. A step's loss is the mean over the examples of its batch.
        shared: As for :func:`fishkern.estimate`.

    Returns:
        By name of ``evaluate``, the mean loss of its examples.

    Raises:
        RuntimeError: There are several ranks.
        ValueError: A module of the start is no linear map of the model, or is a convolution; there are no batches; or a
            loss is not finite.
    """
    if Ranks().count > 1:
        raise RuntimeError("a probe trains in one process, and here several have formed a group: run it in one alone.")
    model = hosts.unwrap(model)
    adapted = _adapted(model, init)
    reader = reader_for(model, likelihood, shared)
    answering, prepared = Answering(model, likelihood), False
    device = next(model.parameters()).device

    def read(batches: Iterable[Any]) -> Iterator[Examples]:
        return iter(Data(batches, reader, device, None, Ranks()))

    def losses(batch: Examples) -> Tensor:
        nonlocal prepared
        entered.restore()
        if not prepared:
            with torch.enable_grad():
                answering.prepare(batch)
            prepared = True
        answer = answering(batch)
        losses = answer.losses() if isinstance(answer, Predictive) else answer
        if not losses.isfinite().all():
            raise ValueError(f"a loss is not finite after training with lr={lr:g}: take a lower one.")
        return losses

    with ExitStack() as stack:
        entered = stack.enter_context(undisturbed(model, [], checkpointing=False))
        stack.enter_context(OwnRandomness(device).drawing())
        stack.enter_context(_attached(adapted))
        optimizer = torch.optim.Adam([factor for one in adapted for factor in (one.A, one.B)], lr=lr)
        for batch in _repeated(lambda: read(train), steps):
            optimizer.zero_grad()
            losses(batch).mean().backward()
            optimizer.step()
        with torch.no_grad():
            return {name: _mean(map(losses, read(batches)), name) for name, batches in evaluate.items()}


class _Adapted(NamedTuple):
    """A module with an adapter beside it."""

    module: nn.Module
    start: tuple[Tensor, Tensor]
    A: Tensor  # [R, I]
    B: Tensor  # [O, R]
    scaling: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add what the adapter has learnt to the module's output: ``(B - B0) A + B0 (A - A0)``, at first exactly 0."""
        x = next(iter((*args, *kwargs.values()))).to(self.A.dtype)
        A0, B0 = self.start
        added = F.linear(F.linear(x, torch.cat([self.A, self.A - A0])), torch.cat([self.B - B0, B0], dim=1))
        return output + (self.scaling * added).to(output.dtype)


def _adapted(model: nn.Module, init: AdapterInit) -> list[_Adapted]:
    maps = {one.path: one for one in linear_maps(model).values()}
    if missing := [path for path in init if path not in maps]:
        raise ValueError(f"the start of the adapter does not fit the model: it has no linear map {listed(missing)}.")
    if convolutions := [path for path in init if not maps[path].stored and maps[path].weight.ndim > 2]:
        raise ValueError(f"a probe trains adapters of linear modules; {listed(convolutions)} are convolutions.")
    adapted = []
    for path, start in init.items():
        weight = maps[path].weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A0, B0 = (factor.to(weight.device, dtype) for factor in (start.A, start.B))
        A, B = (factor.clone().requires_grad_() for factor in (A0, B0))
        adapted.append(_Adapted(maps[path].module, (A0, B0), A, B, start.scaling))
    return adapted


@contextmanager
def _attached(adapted: Iterable[_Adapted]) -> Iterator[None]:
    handles = [one.module.register_forward_hook(one, with_kwargs=True) for one in adapted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeated(read: Callable[[], Iterator[Examples]], steps: int) -> Iterator[Examples]:
    """Read batches again from the beginning, until there are so many."""
    count = 0
    while count < steps:
        before = count
        for batch in read():
            if count == steps:
                return
            count += 1
            yield batch
        if count == before:
            raise ValueError(
                f"the batches to train the probe on ended after {count} of {steps} steps and cannot be read again: "
                "pass a list or a DataLoader."
            )


def _mean(losses: Iterable[Tensor], name: str) -> float:
    parts = [part.double() for part in losses]
    if not parts:
        raise ValueError(f"there are no batches to measure the loss of the {name} on.")
    return torch.cat(parts).mean().item()

"""Which experts the positions of an example choose, in a batch and alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern.layers import are_experts
from fishkern.layers.training import in_backward


class Choices(NamedTuple):
    """Choices of experts in a batch, compared with those of its examples alone.

    Args:
        compared: How often a position chose experts, each time it came to a module of experts.
        changed: How many of these choices fell on other experts than alone.
        unmatched: Names of modules of experts that were called on other numbers of positions in the batch than alone,
            or another number of times, so that their choices are not compared.
    """

    compared: int
    changed: int
    unmatched: tuple[str, ...]


class Routing:
    """Note the experts that positions are sent to, wherever a module holds the weights of several.

    Args:
        model: A module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._experts = {module: name for name, module in model.named_modules() if are_experts(module)}
        self._sent: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self._alone: dict[nn.Module, list[list[Tensor]]] = defaultdict(list)
        self._examples = 0

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the calls inside the ``with`` block, but not those that activation checkpointing repeats."""
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_example(self) -> None:
        """Note that the latest calls were those of an example alone."""
        self._examples += 1
        for module, calls in self._sent.items():
            self._alone[module].append(calls)
        self._sent.clear()

    def choices(self) -> Choices:
        """Compare the latest calls, of a batch, with those of its examples alone.

        Returns:
            What they have in common.
        """
        changed = total = 0
        unmatched = []
        for module, name in self._experts.items():
            together, alone = self._sent.get(module, []), self._alone.get(module, [])
            calls = [torch.cat(calls) for calls in zip(*alone, strict=False)]
            same = len(alone) in (0, self._examples) and {len(calls) for calls in alone} <= {len(together)}
            if not same or [call.shape for call in calls] != [call.shape for call in together]:
                unmatched.append(name)
                continue
            changed += sum(int((one != other).any(-1).sum()) for one, other in zip(calls, together, strict=True))
            total += sum(map(len, together))
        return Choices(total, changed, tuple(unmatched))

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        leaves = tree_leaves((args, kwargs))
        index = next((one for one in leaves if isinstance(one, Tensor) and not one.is_floating_point()), None)
        if index is not None and not in_backward():
            chosen = index.detach().reshape(-1, index.shape[-1] if index.ndim > 1 else 1)
            self._sent[module].append(chosen.sort(-1).values)  # their order does not matter

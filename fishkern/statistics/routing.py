"""Which experts the positions of an example choose, in a batch and alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishkern.layers import are_experts


class Routing:
    """Note the experts that positions are sent to, wherever a module holds the weights of several.

    Args:
        model: A module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._experts = [module for module in model.modules() if are_experts(module)]
        self._sent: dict[nn.Module, Tensor] = {}
        self._alone: dict[nn.Module, list[Tensor]] = defaultdict(list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the calls inside the ``with`` block; of several calls of a module the last counts."""
        handles = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._experts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_example(self) -> None:
        """Note that the latest calls were those of an example alone."""
        for module, index in self._sent.items():
            self._alone[module].append(index)
        self._sent.clear()

    def changed(self) -> tuple[int, int]:
        """Compare the latest calls, of a batch, with those of its examples alone.

        Returns:
            How many choices, of a position at a module, fell on other experts, and of how many.
        """
        changed = total = 0
        for module, together in self._sent.items():
            alone = torch.cat([*self._alone[module], together[:0]])
            if alone.shape == together.shape:
                changed += int((alone != together).any(-1).sum())
                total += len(together)
        return changed, total

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        leaves = tree_leaves((args, kwargs))
        index = next((one for one in leaves if isinstance(one, Tensor) and not one.is_floating_point()), None)
        if index is not None:
            self._sent[module] = index.detach().flatten(0, -2).sort(-1).values  # their order does not matter

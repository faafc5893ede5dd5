"""The dtypes that a model computes in, which under autocast, also inside the model, are not those of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_HALF = (torch.float16, torch.bfloat16)


class ComputedDtypes:
    """Record the floating dtypes that a model's modules return.

    Args:
        model: The model.

    Attributes:
        dtypes: Those of its parameters, including integers of quantised ones, and those recorded so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
        self.dtypes = {parameter.dtype for parameter in model.parameters()}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Record the output dtypes of modules with parameters of their own; hooks are removed afterwards."""
        handles = [module.register_forward_hook(self._note) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def half(self) -> bool:
        """Whether anything is computed in 16 bits: then rounding depends on the rest of a batch."""
        return not self.dtypes.isdisjoint(_HALF)

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        leaves = tree_leaves(output)
        self.dtypes |= {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}

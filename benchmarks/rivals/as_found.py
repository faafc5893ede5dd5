"""A model that several libraries use in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Remove what was left on the model: hooks, wrappers, modes, attributes of modules and parameters, gradients.

    BackPACK cannot be taken off a model, kronfluence replaces its modules, and both would slow down the next provider.
    """
    modules = [(module, _copy(vars(module))) for module in model.modules()]
    parameters = [(parameter, dict(vars(parameter)), parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for owner, attributes, *wanted in [*modules, *parameters]:
            vars(owner).clear()
            vars(owner).update(attributes)
            for requires_grad in wanted:
                owner.requires_grad_(requires_grad)
                owner.grad = None


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    """Hooks, children and parameters are dictionaries that change in place."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}

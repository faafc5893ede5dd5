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
        for module, attributes in modules:
            _restore(module, attributes)
        for parameter, attributes, requires_grad in parameters:
            _restore(parameter, attributes)
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _copy(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and those that are dictionaries too: hooks, children and parameters change in place."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}


def _restore(owner: nn.Module | nn.Parameter, attributes: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(attributes)

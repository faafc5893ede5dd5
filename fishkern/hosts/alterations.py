"""What has been put into a model that computes something else with the same parameters."""

from __future__ import annotations

from torch import nn


def alterations(model: nn.Module) -> dict[str, list[str]]:
    """Describe what a model computes otherwise than another one with the same parameters, for a definition.

    The class of a module says so in its attribute ``alteration``, as that of a layer that drops tokens does.

    Args:
        model: A model.

    Returns:
        ``{"alterations": [...]}`` with what its modules say, each once, in their order; ``{}`` where none says any.
    """
    said = (getattr(type(module), "alteration", None) for module in model.modules())
    texts = list(dict.fromkeys(text for text in said if isinstance(text, str)))
    return {"alterations": texts} if texts else {}

"""Which keyword arguments a model takes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fishkern.hosts.wrappers import base_model, unwrap


def accepts(model: nn.Module, keyword: str) -> bool:
    """Check whether a model takes a keyword argument.

    Args:
        model: A module.
        keyword: The argument's name.

    Returns:
        ``True`` if its ``forward`` has this parameter, or ``**kwargs``.
    """
    parameters = inspect.signature(model.forward).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def call_options(model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that spare a model work not needed in a pass over data.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        ``{"use_cache": False}`` for a model that would fill a key-value cache, else an empty dictionary.
    """
    model = base_model(unwrap(model))
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None):
        # **kwargs may pass it on to nobody
        return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    # a model of images and text passes what it is given on to the one of text, whose config is part of its own
    texts = getattr(config, "get_text_config", lambda: None)()
    return {"use_cache": False} if getattr(texts, "use_cache", None) and accepts(model, "use_cache") else {}

"""The model under its wrappers, and the names of its parameters without them."""

from __future__ import annotations

from torch import nn

from fishkern.names import renamed, without_wrappers

# Wrappers of torch that hold the model as ``module``.
_RUNNING = ("DistributedDataParallel", "DataParallel", "AveragedModel")


def unwrap(model: nn.Module) -> nn.Module:
    """Remove the wrappers that only run or average a model (DDP, ``torch.compile``, torch's EMA).

    Args:
        model: Any module.

    Returns:
        The model, whose parameters have canonical names. PEFT's wrappers stay: they are part of the names.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        advice = ": a function has no parameters to differentiate by; wrap it in a module that owns them"
        raise TypeError(
            f"model must be a torch.nn.Module, got {getattr(model, '__qualname__', type(model).__name__)!r}"
            f"{advice if callable(model) else ''}."
        )
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif any(base.__name__ in _RUNNING for base in type(model).__mro__):
            model = model.module
        else:
            return model


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """List the parameters of a model by canonical name.

    Args:
        model: Any module, wrapped or not.
        remove_duplicate: List a shared parameter only once, by its first name.

    Returns:
        Parameters by the names that they have in the unwrapped model, without the components that torch's wrappers
        add. A submodule called ``module`` keeps its name.

    Raises:
        ValueError: Two parameters would have the same name.
    """
    return renamed(dict(unwrap(model).named_parameters(remove_duplicate=remove_duplicate)), without_wrappers)


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model.

    Args:
        model: A module, unwrapped by :func:`unwrap`.

    Returns:
        The wrapped model, or ``model`` itself if it is not a PEFT model.
    """
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model

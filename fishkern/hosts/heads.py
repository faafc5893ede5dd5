"""The head of a language model: the module that gives its logits, and what the model makes of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.hosts.wrappers import base_model, unwrap

# Attributes of a config: a bound c of c * tanh(z / c) (Gemma, RecurrentGemma), a divisor (Granite), factors (Cohere,
# Falcon-H1). Each is named with the operations by which autograd shows it.
_BOUNDS = ("final_logit_softcapping", "logits_soft_cap")
_DIVISORS = ("logits_scaling",)
_FACTORS = ("logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class Head:
    """The module that gives a model's logits.

    Args:
        module: The module.
        bound: ``c`` of ``c * tanh(z / c)``, which the model applies to its output ``z``; ``None`` for no bound.
        divisor: By which the model divides it.
        factor: By which it multiplies it.
    """

    module: nn.Module
    bound: float | None = None
    divisor: float | None = None
    factor: float | None = None

    def then(self, output: Tensor) -> Tensor:
        """Make logits of the module's output, as the model's config says.

        Args:
            output: ``[..., V]``.

        Returns:
            Of the same shape and dtype.
        """
        if self.divisor is not None:
            output = output / self.divisor
        if self.factor is not None:
            output = output * self.factor
        if self.bound is not None:
            output = torch.tanh(output / self.bound) * self.bound
        return output

    @property
    def operations(self) -> frozenset[str]:
        """Names, in autograd's graph, of the operations of :meth:`then`."""
        named = set()
        if self.divisor is not None:
            named.add("DivBackward0")
        if self.factor is not None:
            named.add("MulBackward0")
        if self.bound is not None:
            named |= {"DivBackward0", "TanhBackward0", "MulBackward0"}
        return frozenset(named)


def head_of(model: nn.Module) -> Head | None:
    """Find the head of a language model of transformers.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        What ``get_output_embeddings()`` gives, or ``lm_head``, with what the config says of its output. Whether that is
        all that the model does is for a real call to show. ``None`` if there is no such module.
    """
    base = base_model(unwrap(model))
    module = _given(base) or getattr(base, "lm_head", None)
    if not isinstance(module, nn.Module) or module not in set(model.modules()):
        return None
    config = getattr(base, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    bound, divisor, factor = (_number(text, names) for names in (_BOUNDS, _DIVISORS, _FACTORS))
    return Head(module, bound, divisor, factor)


def _given(base: nn.Module) -> Any:
    give: Callable[[], Any] | None = getattr(base, "get_output_embeddings", None)
    try:
        return None if give is None else give()
    except (AttributeError, NotImplementedError):  # a model without a head
        return None


def _number(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if isinstance(value, int | float) and value), None)

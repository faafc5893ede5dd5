"""Check the ``likelihood=`` argument: an instance or a function; for anything else, say what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fishkern.statistics.contents import is_single
from fishkern.statistics.drawn import Drawn, LossFunction
from fishkern.statistics.likelihood import (
    CausalLM,
    Classification,
    Likelihood,
    MaskedLM,
    MultiLabel,
    QuestionAnswering,
    Regression,
    Seq2SeqLM,
    TokenClassification,
)
from fishkern.statistics.preference import Preference
from fishkern.statistics.token_losses import TokenLosses

# Suffix of a likelihood in the provenance if the number of the batch's labels was withheld from the model.
OWN_TOKENS = ", own tokens"

_KINDS = (
    CausalLM, MaskedLM, Seq2SeqLM, Classification, Regression, MultiLabel, TokenClassification, QuestionAnswering,
    Preference,
)  # fmt: skip
# other names in use, in lower case without hyphens
_SYNONYMS: dict[str, type[Likelihood]] = {
    "clm": CausalLM,
    "mlm": MaskedLM,
    "seq2seq": Seq2SeqLM,
    "sequenceclassification": Classification,
    "imageclassification": Classification,
    "crossentropy": Classification,
    "mse": Regression,
    "bce": MultiLabel,
    "multilabelclassification": MultiLabel,
    "dpo": Preference,
}
_BY_TORCH_LOSS: dict[str, tuple[type[Likelihood], str]] = {
    "crossentropy": (Classification, "cross_entropy"),
    "nll": (Classification, "nll_loss"),
    "bcewithlogits": (MultiLabel, "binary_cross_entropy_with_logits"),
    "binarycrossentropywithlogits": (MultiLabel, "binary_cross_entropy_with_logits"),
    "mse": (Regression, "mse_loss"),
}
# names of a first parameter that cannot be a model
_OUTPUTS = frozenset(
    ("input", "inputs", "logits", "output", "outputs", "pred", "preds", "prediction", "predictions", "y_hat", "y_pred")
)
_EXPECTED = "likelihood must be an instance such as fishkern.CausalLM() or a function (model, batch) -> losses [N]"


def checked_likelihood(likelihood: Any) -> Likelihood | LossFunction | Drawn | None:
    """Refuse anything but a likelihood.

    Args:
        likelihood: The argument of the caller.

    Returns:
        The same.

    Raises:
        TypeError: It is a class, a string, a loss of torch, or cannot be called with ``(model, batch)``.
    """
    if likelihood is None or isinstance(likelihood, Likelihood | Drawn | TokenLosses):
        return likelihood
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
        raise TypeError(f"{_EXPECTED}, got the class {likelihood.__name__}: call it, {_written(likelihood)}.")
    if isinstance(likelihood, str):
        raise TypeError(f"{_EXPECTED}, got {likelihood!r}: {_meant(likelihood)}.")
    if name := _torch_loss(likelihood):
        raise TypeError(f"{_EXPECTED}, got torch's {name}, which takes (outputs, labels): {_instead(name)}.")
    if not callable(likelihood):
        raise TypeError(f"{_EXPECTED}, got {likelihood!r:.80}.")
    signature = _signature(likelihood)
    if signature is not None and not _takes_two(signature):
        raise TypeError(f"{_EXPECTED}, got {name_of_function(likelihood)}{signature}.")
    if signature is not None and next(iter(signature.parameters)) in _OUTPUTS:
        raise TypeError(
            f"{_EXPECTED}, got {name_of_function(likelihood)}{signature}: write lambda model, batch: "
            "the_loss(model(batch[0]), batch[1]), with one value for each example."
        )
    return likelihood


def described(likelihood: Likelihood | LossFunction | Drawn | None) -> str:
    """Describe a likelihood for the provenance.

    Args:
        likelihood: A likelihood or loss function.

    Returns:
        Its own description, or the function's name.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood.description
    if isinstance(likelihood, Drawn):
        return f"function {name_of_function(likelihood.function)}, drawn for each example"
    if isinstance(likelihood, TokenLosses):
        return f"function {name_of_function(likelihood.function)}, of each token"
    return f"function {name_of_function(likelihood)}"


def _written(kind: type[Likelihood]) -> str:
    prefix = "fishkern." if kind in _KINDS else ""
    return f"likelihood={prefix}{kind.__name__}()"


def _meant(word: str) -> str:
    plain = _plain(word)
    kinds = {kind.__name__.lower(): kind for kind in _KINDS} | _SYNONYMS
    kind = kinds.get(plain.removesuffix("loss")) or kinds.get(plain)
    if kind:
        return f"write {_written(kind)}"
    return "write one of " + ", ".join(f"fishkern.{kind.__name__}()" for kind in _KINDS)


def _torch_loss(likelihood: Any) -> str | None:
    """Name a loss of torch, given as a module or a function, also with bound arguments."""
    while isinstance(likelihood, functools.partial):
        likelihood = likelihood.func
    if isinstance(likelihood, nn.modules.loss._Loss):
        return type(likelihood).__name__
    if isinstance(likelihood, type) and issubclass(likelihood, nn.modules.loss._Loss):
        return likelihood.__name__
    if getattr(likelihood, "__module__", None) in ("torch.nn.functional", "torch._C._nn"):
        return likelihood.__name__
    return None


def _instead(name: str) -> str:
    kind, function = _BY_TORCH_LOSS.get(_plain(name).removesuffix("loss"), (None, "the_loss"))
    own = f'lambda model, batch: torch.nn.functional.{function}(model(batch[0]), batch[1], reduction="none")'
    with_options = "with weights or options of its own" if kind else "with one value for each example"
    return f"{f'write {_written(kind)}, or ' if kind else 'write '}{own} {with_options}"


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Read the signature of a function, or of a module's ``forward``; one written in C may have none."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:
        return None


def _takes_two(signature: inspect.Signature) -> bool:
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def name_of_function(function: Any) -> str:
    """Name a function, for the provenance.

    Args:
        function: A function or another object that can be called.

    Returns:
        Its name, with what ``functools.partial`` binds; that of the class of another object.
    """
    if isinstance(function, functools.partial):  # with what is bound, so that others do not merge with it
        bound = [*map(_shown, function.args), *(f"{key}={_shown(value)}" for key, value in function.keywords.items())]
        return f"partial({', '.join([name_of_function(function.func), *bound])})"
    return getattr(function, "__qualname__", type(function).__name__)


def _shown(value: Any) -> str:
    return repr(value) if is_single(value) else type(value).__name__


def _plain(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum())

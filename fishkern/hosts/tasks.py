"""Which task a transformers model serves, and which of its modules and tokens belong to the task."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from fishkern.hosts.wrappers import base_model, unwrap

Task = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
]

_TASK_BY_SUFFIX: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_CLASSIFIER_SUFFIXES = ("ForSequenceClassification", "ForImageClassification")

HEADS = ("classifier", "pre_classifier", "score", "qa_outputs", "classification_head")
"""Names that transformers gives to the layers of a task, which start at random; a language model's head is not one."""


def task(model: nn.Module, labels: Tensor | None = None) -> Task | None:
    """Recognise the task of a transformers model by its config and the name of its class or of a base class.

    Args:
        model: A module, with or without PEFT around it.
        labels: The batch's labels, whose dtype decides between one label and several where the config leaves it open,
            as in transformers.

    Returns:
        The task, or ``None`` if the name does not say.
    """
    model = base_model(unwrap(model))
    config = getattr(model, "config", None)
    if config is None:
        return None
    # a subclass of a known class keeps its head
    by_class = (_named_task(base.__name__, config, labels) for base in type(model).__mro__)
    return next(filter(None, by_class), None)


def _named_task(name: str, config: Any, labels: Tensor | None) -> Task | None:
    if name.endswith("ForConditionalGeneration"):
        return "seq2seq-lm" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
    if name.endswith(_CLASSIFIER_SUFFIXES):
        return _classifier_task(config, labels)
    return next((task for suffix, task in _TASK_BY_SUFFIX.items() if name.endswith(suffix)), None)


def _classifier_task(config: Any, labels: Tensor | None) -> Task:
    problem = getattr(config, "problem_type", None)
    if problem is None:
        if config.num_labels == 1:
            problem = "regression"
        elif labels is None or not labels.is_floating_point():
            problem = "single_label_classification"
        else:
            problem = "multi_label_classification"
    by_problem: dict[str, Task] = {
        "regression": "regression",
        "single_label_classification": "classification",
        "multi_label_classification": "multi-label",
    }
    return by_problem[problem]


def is_head(name: str, heads: tuple[str, ...] = HEADS) -> bool:
    """Check whether a parameter belongs to the head of a model, which fine-tuning trains whole.

    Args:
        name: The parameter's name.
        heads: Names of modules that are heads.

    Returns:
        ``True`` if a module on the parameter's path has one of these names.
    """
    return not set(heads).isdisjoint(name.split(".")[:-1])


def padding_token(model: nn.Module) -> int | None:
    """Return the token of a language model that is used for padding only.

    Args:
        model: A module, with or without PEFT around it.

    Returns:
        Its number; ``None`` if there is none, or if it also ends texts.
    """
    config = getattr(base_model(unwrap(model)), "config", None)
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    return None if pad in (ends if isinstance(ends, list | tuple) else [ends]) else pad

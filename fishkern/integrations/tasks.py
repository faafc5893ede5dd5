"""The tasks that models and data are prepared for, and everything that differs between them: one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from fishkern.statistics import CausalLM, Likelihood, MaskedLM, Seq2SeqLM, TokenClassification


@dataclass(frozen=True)
class Task:
    """What a model is trained for, as ``--task`` names it.

    It says which head and which columns are needed. Which loss a classifier has depends on its config as well:
    :data:`fishkern.hosts.Task` tells apart classes, several labels and regression.

    Attributes:
        auto_class: The class of transformers that loads such a model.
        architectures: How the names of its classes end. Those in ``ForConditionalGeneration`` depend on the config, see
            :func:`task_of_config`.
        columns: The roles of columns that an example needs.
        optional: The roles that it can use in addition.
        peft_type: PEFT's ``task_type``, or ``None`` if PEFT has none.
        likelihood: That of examples with several labels, whose losses can be summed instead of averaged; else ``None``.
    """

    auto_class: str
    _: KW_ONLY
    architectures: tuple[str, ...]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    peft_type: str | None = None
    likelihood: type[Likelihood] | None = None


TASKS: dict[str, Task] = {
    "causal-lm": Task(
        "AutoModelForCausalLM",
        architectures=("ForCausalLM", "LMHeadModel"),
        peft_type="CAUSAL_LM",
        columns=("text",),
        optional=("target",),
        likelihood=CausalLM,
    ),
    "masked-lm": Task(
        "AutoModelForMaskedLM",
        architectures=("ForMaskedLM",),
        columns=("text",),
        optional=("text_pair",),
        likelihood=MaskedLM,
    ),
    "seq2seq-lm": Task(
        "AutoModelForSeq2SeqLM",
        architectures=(),
        peft_type="SEQ_2_SEQ_LM",
        columns=("text", "target"),
        likelihood=Seq2SeqLM,
    ),
    "sequence-classification": Task(
        "AutoModelForSequenceClassification",
        architectures=("ForSequenceClassification",),
        peft_type="SEQ_CLS",
        columns=("text", "label"),
        optional=("text_pair",),
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification",
        architectures=("ForTokenClassification",),
        peft_type="TOKEN_CLS",
        columns=("words", "label"),
        likelihood=TokenClassification,
    ),
    "image-classification": Task(
        "AutoModelForImageClassification",
        architectures=("ForImageClassification",),
        columns=("image", "label"),
    ),
}
"""Every task by its name. :class:`fishkern.integrations.examples.Encoder` has a method for each."""


def example_batch(task: str, config: Any, size: int, length: int) -> dict[str, Tensor]:
    """Make a batch of the shapes that a task has, of full rows without padding.

    Args:
        task: One of :data:`TASKS`.
        config: A config of transformers, with the sizes of vocabulary or image.
        size: Number of examples ``N``.
        length: Number of tokens ``T``; images have the size of the config.

    Returns:
        Keyword arguments of the model. Tokens are drawn at random, always the same.
    """
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    single = torch.zeros(size, config.num_labels) if several else torch.zeros(size, dtype=torch.int64)
    if getattr(config, "num_labels", 0) == 1:
        single = torch.zeros(size)
    if task == "image-classification":
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        return {"pixel_values": torch.zeros(size, getattr(config, "num_channels", 3), height, width), "labels": single}
    tokens = torch.randint(1, text.vocab_size, (size, length), generator=generator)
    labels = {"sequence-classification": single, "token-classification": torch.zeros_like(tokens)}.get(task, tokens)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def task_of_config(config: Any) -> str | None:
    """Read the task off the architecture that a config names.

    Args:
        config: A config of transformers.

    Returns:
        One of :data:`TASKS`, or ``None``.
    """
    for architecture in getattr(config, "architectures", None) or ():
        if architecture.endswith("ForConditionalGeneration"):
            return "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
        for name, task in TASKS.items():
            if architecture.endswith(task.architectures):
                return name
    return None


def task_of_adapter(settings: Mapping[str, Any]) -> str | None:
    """Read the task off the settings of a PEFT adapter.

    Args:
        settings: The contents of its ``adapter_config.json``.

    Returns:
        One of :data:`TASKS`, or ``None``.
    """
    peft_type = settings.get("task_type")
    return next((name for name, task in TASKS.items() if peft_type and task.peft_type == peft_type), None)

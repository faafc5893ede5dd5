"""Models and adapters by folder or id, with the head that a task needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishkern.integrations.hub import explained, locate

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""The tasks that a model can be loaded for, and the class of transformers that loads it."""

_BY_ARCHITECTURE = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
_BY_TASK_TYPE = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}


@dataclass(frozen=True)
class Source:
    """A model, or an adapter and its base, before it is loaded.

    Attributes:
        folder: Folder or id of the model, or of the adapter's base.
        adapter: Folder or id of the adapter, or ``None``.
        config: The model's config.
        task: The task that the config or the adapter tells, or ``None``.
        reason: Why the hub is not asked for it, or ``None``.
    """

    folder: str
    adapter: str | None
    config: Any
    task: str | None
    reason: str | None


@dataclass(frozen=True)
class Head:
    """What a classifier's labels are, read from the data.

    Attributes:
        size: How many.
        problem: transformers' ``problem_type``, or ``None`` for its own choice.
        names: Their names, where the data has them.
    """

    size: int
    problem: str | None = None
    names: tuple[str, ...] = ()


def find(source: str, base: str | None = None) -> Source:
    """Read the config of a model or an adapter.

    Args:
        source: Folder or id of a model or of a PEFT adapter.
        base: Folder or id of the adapter's base, where the adapter names another place.

    Returns:
        What it is.

    Raises:
        FileNotFoundError: It is neither here nor to be had.
        NotADirectoryError: It is a file.
        ValueError: It holds no model, or ``base`` is given for something that is no adapter.
    """
    from transformers import AutoConfig

    folder, reason = locate(source, "model")
    adapter, task = None, None
    if (settings := _adapter_config(folder, reason)) is not None:
        adapter = folder
        named = base or settings.get("base_model_name_or_path")
        if not named:
            raise ValueError(f"the adapter {source} does not name its base model: name it with --base.")
        try:
            folder, reason = locate(named, "model")
        except OSError:
            raise FileNotFoundError(
                f"the base model of the adapter {source} is not at {named}: name its place with --base."
            ) from None
        task = _BY_TASK_TYPE.get(settings.get("task_type"))
    elif base is not None:
        raise ValueError(f"{source} is no PEFT adapter (it has no adapter_config.json): --base has no use for it.")
    with explained(folder, "model", reason):
        config = AutoConfig.from_pretrained(folder, local_files_only=reason is not None, trust_remote_code=False)
    return Source(folder, adapter, config, task or task_of(config), reason)


def task_of(config: Any) -> str | None:
    """Read a task off the architecture that a config names.

    Args:
        config: A config of transformers.

    Returns:
        One of :data:`TASKS`, or ``None``.
    """
    for name in getattr(config, "architectures", None) or ():
        if name.endswith("ForConditionalGeneration"):
            return "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
        for suffix, task in _BY_ARCHITECTURE.items():
            if name.endswith(suffix):
                return task
    return None


def check_task(source: Source, task: str) -> None:
    """Find out before anything is loaded whether a model can serve a task.

    Args:
        source: What :func:`find` returned.
        task: One of :data:`TASKS`.

    Raises:
        ValueError: It cannot.
    """
    import transformers

    served = getattr(transformers, TASKS[task])._model_mapping.keys()  # no dict: its "in" does not see new models
    if type(source.config) not in served:
        raise ValueError(f"a {source.config.model_type} model cannot serve the task {task}: choose another --task.")


def load(
    source: Source, task: str, *, head: Head | None = None, dtype: str = "auto", device: str, seed: int = 0
) -> tuple[nn.Module, list[str]]:
    """Load the model for a task, the adapter on top.

    Args:
        source: What :func:`find` returned.
        task: One of :data:`TASKS`.
        head: The labels of the data, for a checkpoint without a head of this task; its weights are then random.
        dtype: ``"auto"`` for the checkpoint's own, or the name of a torch dtype.
        device: Where it shall lie.
        seed: Seed of weights that the checkpoint lacks.

    Returns:
        The model, and the parameters that the checkpoint lacks: they have random weights.

    Raises:
        ValueError: The files are damaged.
        RuntimeError: The device is out of memory.
    """
    import transformers

    auto = getattr(transformers, TASKS[task])
    options: dict[str, Any] = {}
    if head is not None:
        names = head.names or tuple(f"LABEL_{n}" for n in range(head.size))
        options = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: n for n, name in enumerate(names)},
            "problem_type": head.problem,
        }
    with explained(source.folder, "model", source.reason), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        model, report = auto.from_pretrained(
            source.folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=source.reason is not None,
            trust_remote_code=False,  # said outright, else it asks on the terminal
            output_loading_info=True,
            **options,
        )
    fresh = sorted(report["missing_keys"])
    if source.adapter is not None:
        from peft import PeftModel

        with explained(source.adapter, "adapter", source.reason):
            model = PeftModel.from_pretrained(model, source.adapter, is_trainable=True)
        wrapped = {name.partition("base_model.model.")[2] for name, _ in model.named_parameters()}
        fresh = [name for name in fresh if name in wrapped]  # a head that the adapter brought is not random
    return model.to(device), fresh


def _adapter_config(folder: str, reason: str | None) -> dict[str, Any] | None:
    if Path(folder).is_dir():
        file: Any = Path(folder) / "adapter_config.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(folder, "adapter_config.json", local_files_only=reason is not None))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            return None
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): save the adapter again.") from None

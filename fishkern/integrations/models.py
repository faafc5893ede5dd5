"""Models and adapters of a folder or an id, loaded with the head that a task needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishkern.integrations.columns import Head
from fishkern.integrations.hub import explained, locate
from fishkern.integrations.tasks import TASKS, task_of_adapter, task_of_config


@dataclass(frozen=True)
class Source:
    """A model, or an adapter and its base, before it is loaded.

    Attributes:
        folder: Folder or id of the model, or of the adapter's base.
        adapter: Folder or id of the adapter, or ``None``.
        config: The model's config.
        task: The task according to the adapter or the config, or ``None`` if neither says.
        reason: Why the hub is not asked for it, or ``None``.
    """

    folder: str
    adapter: str | None
    config: Any
    task: str | None
    reason: str | None


def find(source: str, base: str | None = None) -> Source:
    """Read the config of a model or an adapter.

    Args:
        source: Folder or id of a model or of a PEFT adapter.
        base: Folder or id of the adapter's base, instead of the one that the adapter names.

    Returns:
        Where model and adapter are, and for which task.

    Raises:
        FileNotFoundError: It is not on this machine, and the hub does not have it or cannot be asked.
        NotADirectoryError: It is a file.
        ValueError: It holds no model, or ``base`` is given for something other than an adapter.
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
        task = task_of_adapter(settings)
    elif base is not None:
        raise ValueError(f"{source} is not a PEFT adapter (it has no adapter_config.json): leave out --base.")
    with explained(folder, "model", reason):
        config = AutoConfig.from_pretrained(folder, local_files_only=reason is not None, trust_remote_code=False)
    return Source(folder, adapter, config, task or task_of_config(config), reason)


def check_task(source: Source, task: str) -> None:
    """Check that a model can serve a task, before its weights are read.

    Args:
        source: What :func:`find` returned.
        task: One of :data:`fishkern.integrations.tasks.TASKS`.

    Raises:
        ValueError: It cannot.
    """
    import transformers

    # The mapping is no dict: its own "in" misses new models, its keys do not.
    served = getattr(transformers, TASKS[task].auto_class)._model_mapping.keys()
    if type(source.config) not in served:
        raise ValueError(f"a {source.config.model_type} model cannot serve the task {task}: choose another --task.")


def load(
    source: Source, task: str, *, head: Head | None = None, dtype: str = "auto", device: str, seed: int = 0
) -> tuple[nn.Module, list[str]]:
    """Load a model for a task, with its adapter if it has one.

    Args:
        source: What :func:`find` returned.
        task: One of :data:`fishkern.integrations.tasks.TASKS`.
        head: The labels of the data, for a checkpoint without a head of this task; its weights are then random.
        dtype: ``"auto"`` for the checkpoint's own, or the name of a torch dtype.
        device: Device to move it to.
        seed: Seed of weights that the checkpoint lacks.

    Returns:
        The model, and the names of the parameters that the checkpoint lacks, whose weights are random.

    Raises:
        ValueError: The files are damaged.
        RuntimeError: The device is out of memory.
    """
    import transformers

    auto = getattr(transformers, TASKS[task].auto_class)
    with explained(source.folder, "model", source.reason), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # that of the CPU: only it is restored
        model, report = auto.from_pretrained(
            source.folder,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=source.reason is not None,
            trust_remote_code=False,  # without it transformers asks on the terminal
            output_loading_info=True,
            **({} if head is None else _head_options(head)),
        )
    fresh = sorted(report["missing_keys"])
    if source.adapter is not None:
        from peft import PeftModel

        with explained(source.adapter, "adapter", source.reason):
            model = PeftModel.from_pretrained(model, source.adapter, is_trainable=True)
        wrapped = {name.partition("base_model.model.")[2] for name, _ in model.named_parameters()}
        fresh = [name for name in fresh if name in wrapped]  # a head that the adapter brought is not random
    return model.to(device), fresh


def without_values(source: Source, task: str, dtype: str = "auto") -> nn.Module:
    """Make a model on the meta device, from its config alone.

    Args:
        source: What :func:`find` returned.
        task: One of :data:`fishkern.integrations.tasks.TASKS`.
        dtype: ``"auto"`` for the one that the config names, or the name of a torch dtype.

    Returns:
        The model, whose weights have no values and take no memory.

    Raises:
        ValueError: It is an adapter, or cannot serve the task.
    """
    import transformers

    if source.adapter is not None:
        raise ValueError(f"{source.adapter} is an adapter, of which the config says no shapes: name its base model.")
    check_task(source, task)
    chosen = getattr(source.config, "dtype", None) if dtype == "auto" else dtype
    chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    with torch.device("meta"):
        return getattr(transformers, TASKS[task].auto_class).from_config(source.config, dtype=chosen or torch.float32)


def _head_options(head: Head) -> dict[str, Any]:
    names = head.names or tuple(f"LABEL_{n}" for n in range(head.size))
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: n for n, name in enumerate(names)},
        "problem_type": head.problem,
    }


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

"""Files of fishkern in the checkpoints of transformers' Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fishkern.names import listed


def saved_in(args: Any, step: int, name: str) -> Path | None:
    """Find a file of the checkpoint that a training resumes from; a Trainer does not tell its callbacks.

    Args:
        args: The Trainer's arguments.
        step: The step at which it resumes.
        name: Of the file.

    Returns:
        The file, or ``None`` if it is neither where the arguments say nor in the checkpoint of this step in
        ``output_dir``.
    """
    named = args.resume_from_checkpoint
    folders = [Path(named)] if isinstance(named, str) else []
    folders.append(Path(args.output_dir) / f"checkpoint-{step}")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def restore_renamed(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint that a Trainer has not found, because it saved them under other names.

    ``save_pretrained`` writes some models (ViT in transformers 5) under the names that they had in older versions. A
    Trainer that loads such a checkpoint, to resume or for the best model, looks for the present names, leaves all other
    weights as they are, and says so in its log only.

    Args:
        model: Without wrappers; what the Trainer has loaded the checkpoint into.
        folder: The checkpoint.

    Raises:
        ValueError: The checkpoint lacks weights of the model under any name.
    """
    own = model.state_dict()
    if not hasattr(model, "from_pretrained") or _names_in(folder) <= own.keys():
        return
    with torch.random.fork_rng(devices=[]):  # the training goes on as if it had not stopped
        loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {listed(missing)}, of which the Trainer has loaded none: train from the start."
        )
    with torch.no_grad():
        for name, value in loaded.state_dict().items():
            own[name].copy_(value)


def _names_in(folder: Path) -> set[str]:
    """List the names of the weights in a checkpoint; none if it has no such file, as one of an adapter."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads(index.read_bytes())["weight_map"])
    if not (file := folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(file, "pt") as stored:
        return set(stored.keys())

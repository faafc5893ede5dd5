"""Files of fishkern in the checkpoints of transformers' Trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fishkern.names import listed


@contextmanager
def resuming_from(args: Any, folder: str | bool | None) -> Iterator[str | None]:
    """Tell callbacks where a training resumes: until its end the Trainer's arguments say so.

    Args:
        args: The Trainer's arguments.
        folder: What ``train(resume_from_checkpoint=)`` was given: ``True`` is the last checkpoint in ``output_dir``.

    Yields:
        The folder of the checkpoint, or ``None`` where training begins.
    """
    before = args.resume_from_checkpoint
    named = (get_last_checkpoint(args.output_dir) if folder is True else folder) or None
    args.resume_from_checkpoint = before if named is None else str(named)
    try:
        yield named
    finally:
        args.resume_from_checkpoint = before


def resumed_folder(args: Any, state: Any) -> Path:
    """Find the checkpoint that a training resumes from, which a Trainer does not tell its callbacks.

    Args:
        args: The Trainer's arguments.
        state: The Trainer's state, as it was in the checkpoint.

    Returns:
        The folder that the arguments name, or the checkpoint of this step in ``output_dir``: the first one whose state
        is this one.

    Raises:
        ValueError: Neither is.
    """
    named = args.resume_from_checkpoint
    folders = [Path(named)] if isinstance(named, str | Path) else []
    folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
    for folder in folders:
        if _is_state_of(folder, state):
            return folder
    raise ValueError(
        f"training resumes at step {state.global_step}, from a checkpoint that is not {listed(map(str, folders))}, and "
        "a Trainer does not tell its callbacks which: set resume_from_checkpoint= of its TrainingArguments to the "
        "folder, too."
    )


def _is_state_of(folder: Path, state: Any) -> bool:
    """Tell whether a checkpoint has this state, by what was logged up to there."""
    try:
        saved = json.loads((folder / TRAINER_STATE_NAME).read_bytes())
    except FileNotFoundError:
        return False
    logged = saved["log_history"]
    now = state.log_history[: len(logged)]
    return saved["global_step"] == state.global_step and json.dumps(logged) == json.dumps(now)  # NaN are equal there


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

"""Files of fishkern in the checkpoints of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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

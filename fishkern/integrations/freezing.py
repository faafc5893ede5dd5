"""transformers' Trainer with a freezer: it acts after each step of the optimizer, and is in every checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fishkern.freezing import Freezer, Freezing
from fishkern.freezing.saved import FreezerState
from fishkern.freezing.trained import masked
from fishkern.integrations.checkpoints import resumed_folder

FILE = "freezer.safetensors"

_log = logging.getLogger(__name__)


class FreezingCallback(TrainerCallback):
    """Calls a freezer after each step of a Trainer's optimizer, and saves it in every checkpoint.

        freezer = fk.fisher_adaptune(model, probe, optimizer=optimizer, every=300, read_every=30)
        Trainer(model, args, ..., optimizers=(optimizer, None),
                callbacks=[FisherCallback(selection), FreezingCallback(freezer)])

    A training that resumes needs an optimizer of the entries that were in training when the checkpoint was written,
    ``fk.Freezer.saved_selection(checkpoint / "freezer.safetensors")``, and a freezer made with it; the rest is restored
    when training starts.

    Args:
        freezer: The freezer, of the Trainer's own optimizer.

    Attributes:
        events: What has been decided in this training.
    """

    def __init__(self, freezer: Freezer) -> None:
        self._freezer = freezer
        self.events: list[Freezing] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the freezer acts on this Trainer's optimizer, and restore it where training resumes.

        Raises:
            TypeError: The Trainer's optimizer is not a masked one.
            ValueError: It is another one than the freezer's, or the freezer is neither in the checkpoint nor restored
                already.
        """
        if masked(kwargs["optimizer"]) is not self._freezer.optimizer:
            raise ValueError(
                "the Trainer has another optimizer than the freezer: pass the one that the freezer was made with, "
                "optimizers=(optimizer, None)."
            )
        if state.global_step:
            self._restore(args, state)

    def _restore(self, args: Any, state: Any) -> None:
        """Take over the freezer of a checkpoint, also where this one has gone on from there in the same process."""
        try:
            folder = resumed_folder(args, state)
        except ValueError:
            if self._freezer.count:  # it was loaded by hand
                return
            raise
        saved = folder / FILE
        if saved.is_file():
            if FreezerState.count_in(saved) != self._freezer.count:
                self._freezer.load(saved)
        elif not self._freezer.count:
            raise ValueError(
                f"training resumes at step {state.global_step}, and {folder} has no {FILE}: load that of the "
                "checkpoint with freezer.load(path) before train()."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step of the optimizer, and read and decide where that is due."""
        event = self._freezer.step()
        if event is not None:
            self.events.append(event)
            _log.info("%s", event)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the number of entries in training to ``logs`` and to the state's history."""
        if logs is not None and "loss" in logs:
            ours = {"trained_entries": self._freezer.selection.count}
            logs |= ours
            state.log_history[-1] |= ours  # written before the callbacks are called

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the freezer in the folder of the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._freezer.save(folder / FILE)

"""transformers' Trainer with a masked optimizer, without a subclass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fishkern.optim import MaskedOptimizer
from fishkern.selection import Selection

FILE = "selection.safetensors"

_log = logging.getLogger(__name__)


class FisherCallback(TrainerCallback):
    """What a Trainer must do besides, when its optimizer is a masked one.

        optimizer = fk.MaskedAdamW(model, selection, lr=5e-5)
        Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[FisherCallback(selection)])

    It hands ``max_grad_norm`` over to the optimizer, which clips by the norm of the entries that move, where the
    Trainer would take that of whole gradients; logs what is trained, and the norm; and saves the selection into every
    checkpoint, beside the optimizer's compact state. Works with every Trainer that is built on transformers'.

    Args:
        selection: What is trained.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._optimizer: MaskedOptimizer | None = None
        self._max_grad_norm: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer, take over the clipping, and say what is trained.

        Args:
            args: The Trainer's arguments; ``max_grad_norm`` is 0 until the end of training.
            state: The Trainer's state.
            control: Not used.
            kwargs: The Trainer's parts, the optimizer among them.

        Raises:
            ValueError: The Trainer's optimizer is no masked one, or has another selection.
        """
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, MaskedOptimizer):
            raise ValueError(
                f"FisherCallback needs a masked optimizer, and this Trainer has a {type(optimizer).__name__}: pass "
                "optimizers=(fishkern.MaskedAdamW(model, selection, ...), None)."
            )
        if optimizer.selection != self._selection:
            raise ValueError("the Trainer's optimizer has another selection than this callback: give both the same.")
        self._optimizer, self._max_grad_norm = optimizer, args.max_grad_norm
        if args.max_grad_norm and optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = args.max_grad_norm
        args.max_grad_norm = 0.0
        _log.info("training %s", self._selection)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its clipping back.

        Args:
            args: The Trainer's arguments.
            state: Not used.
            control: Not used.
            kwargs: Not used.
        """
        args.max_grad_norm = self._max_grad_norm

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the norm of the entries that move, and their number.

        Args:
            args: Not used.
            state: Its history is changed, too.
            control: Not used.
            logs: What is logged, changed in place.
            kwargs: Not used.
        """
        if logs is None or self._optimizer is None or "loss" not in logs:
            return
        ours: dict[str, Any] = {"trained_entries": self._selection.count}
        if self._optimizer.grad_norm is not None:
            ours["grad_norm"] = self._optimizer.grad_norm.item()
        logs |= ours
        state.log_history[-1] |= ours  # written before callbacks are asked

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the selection beside the optimizer's state.

        Args:
            args: Says where checkpoints go.
            state: Says which step it is.
            control: Not used.
            kwargs: Not used.
        """
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._selection.save(folder / FILE)

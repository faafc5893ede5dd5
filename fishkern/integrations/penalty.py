"""transformers' Trainer with a penalty beside its loss, such as that of elastic weight consolidation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import TrainerCallback

from fishkern import hosts
from fishkern.files import atomic_write
from fishkern.integrations.checkpoints import resumed_folder, resuming_from
from fishkern.names import listed

FILE = "penalty.json"


@runtime_checkable
class Penalty(Protocol):
    """What is added to a loss, such as :class:`fishkern.QuadraticPenalty`."""

    def __call__(self) -> Tensor:
        """Give the penalty at the present values, a scalar with a gradient."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that it depends on, by name."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell it from another penalty."""


class PenaltyMixin:
    """A Trainer that adds a penalty to its loss, once for each step of the optimizer.

        class PenaltyTrainer(PenaltyMixin, Trainer): ...

        PenaltyTrainer(model, args, train_dataset=rows, penalty=fk.QuadraticPenalty(fisher, model, weight=1000)).train()

    A step minimises what it would without a penalty, plus the penalty: also where it accumulates the gradients of
    several batches. The penalty's gradient is there before gradients are clipped.
    The training log shows the penalty as ``penalty``, and ``loss`` without it; evaluation leaves it out.

    A training that resumes needs the same penalty: make it on the model that training began with, before ``train()``
    loads the checkpoint. Every checkpoint has its fingerprint, with which it is compared.

    Args:
        args: The Trainer's own.
        penalty: A :class:`Penalty` of the Trainer's model.
        kwargs: The Trainer's own.

    Raises:
        TypeError: ``penalty`` is no such penalty.
        ValueError: DeepSpeed or FSDP would shard the parameters that it holds.
    """

    def __init__(self, *args: Any, penalty: Penalty, **kwargs: Any) -> None:
        if isinstance(penalty, type) or not isinstance(penalty, Penalty):
            raise TypeError(
                "penalty must be a penalty such as fishkern.QuadraticPenalty(fisher, model, weight=1000), got "
                f"{penalty!r:.80}."
            )
        self._penalty = penalty
        self._penalties: list[Tensor] = []  # of the steps since the last log
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("the penalty needs whole parameters, which DeepSpeed and FSDP shard: train without them.")
        self.add_callback(_PenaltyCallback(penalty))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or ``True`` for the last one.
            args: The Trainer's own.
            kwargs: The Trainer's own.

        Returns:
            What the Trainer returns.
        """
        with resuming_from(self.args, resume_from_checkpoint):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch as the Trainer does, and add the penalty's gradient at the last batch of a step.

        Args:
            model: The model as the Trainer has wrapped it.
            inputs: The batch.
            args: The Trainer's own.
            kwargs: The Trainer's own.

        Returns:
            The loss of the batch, without the penalty.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:  # else more batches follow before the optimizer's step
            penalty = self._penalty()
            self.accelerator.backward(penalty)
            self._penalties.append(penalty.detach())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the mean penalty since the last log.

        Args:
            logs: What is logged.
            args: The Trainer's own.
            kwargs: The Trainer's own.
        """
        if "loss" in logs and self._penalties:
            logs = {**logs, "penalty": (sum(self._penalties) / len(self._penalties)).item()}
            self._penalties.clear()
        super().log(logs, *args, **kwargs)


class _PenaltyCallback(TrainerCallback):
    """Checks that the penalty is of the model in training, and the same as before where training resumes."""

    def __init__(self, penalty: Penalty) -> None:
        self._penalty = penalty

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = set(hosts.unwrap(kwargs["model"]).parameters())
        if foreign := [name for name, one in self._penalty.parameters.items() if one not in own]:
            raise ValueError(
                f"the penalty is of another model than the Trainer's ({listed(foreign)}): make it of the model that "
                "the Trainer is given; model_init= makes a new one for each training and cannot be used."
            )
        if not state.global_step:
            return
        saved = resumed_folder(args, state) / FILE
        if not saved.is_file():
            raise ValueError(
                f"training resumes at step {state.global_step}, and {saved.parent} has no {FILE}: it was trained "
                "without a penalty, or its saving was interrupted. Resume without one, or from an earlier checkpoint."
            )
        before, now = json.loads(saved.read_bytes()), self._penalty.fingerprint
        if before != now:
            differing = [key for key in now if before.get(key) != now[key]]
            raise ValueError(
                f"training resumes with another penalty than it had ({', '.join(differing)} differ): make it as "
                "before, of the same statistics, on the model that training began with and not on the checkpoint's."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            with atomic_write(folder / FILE, "w") as file:
                json.dump(self._penalty.fingerprint, file, indent=2)

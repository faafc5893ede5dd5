"""transformers' Trainer with a masked optimizer: a callback, and a mixin that also selects inside ``train()``."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from fishkern import hosts, tokens
from fishkern.integrations.checkpoints import restore_renamed, resumed_folder, resuming_from
from fishkern.integrations.reducing import attach_for_training, saved_reduction
from fishkern.layers import UnsupportedModuleError
from fishkern.optim import MaskedAdamW, MaskedOptimizer
from fishkern.selection import Rule, Selection, select
from fishkern.selection.result import check_selection
from fishkern.statistics import estimate
from fishkern.statistics.shards import Ranks
from fishkern.tokens import TokenReduction
from fishkern.tokens.recipe import FILE as REDUCTION


class SelectionAndReduction(Protocol):
    """What :func:`fishkern.tr_pts` returns."""

    @property
    def selection(self) -> Selection:
        """The entries to train."""

    @property
    def reduction(self) -> TokenReduction | None:
        """The tokens that the model trains without."""


Select = Callable[[nn.Module, Iterable[Any]], Selection | SelectionAndReduction]

FILE = "selection.safetensors"

# of whose Trainers the loss is the model's own unless an argument says otherwise (pairs of answers are refused)
_OWN_LOSS = ("transformers", "trl")

_log = logging.getLogger(__name__)


class _HandedOver(float):
    """A ``max_grad_norm`` of 0, so that the Trainer does not clip, which remembers the user's value.

    A training that ends with an exception never restores the arguments; the next one finds the value here. A copy or a
    pickle, as in a checkpoint's arguments, is the user's value.
    """

    requested: float

    def __new__(cls, requested: float) -> _HandedOver:
        zero = super().__new__(cls, 0.0)
        zero.requested = requested
        return zero

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (self.requested,)


class FisherCallback(TrainerCallback):
    """Adjusts a Trainer to a masked optimizer.

        optimizer = fk.MaskedAdamW(model, selection, lr=5e-5)
        Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[FisherCallback(selection)])

    It hands ``max_grad_norm`` over to the optimizer, which clips by the norm of the selected entries, whereas the
    Trainer would clip by the norm of whole gradients. It warns of training arguments that have no effect, since the
    optimizer has its own. It logs the number of trained entries and the norm, and saves the optimizer's selection of
    that moment in every checkpoint, along with its compact state. Works with every Trainer that is built on
    transformers'.

    With a token reduction (:func:`fishkern.tr_pts`) it attaches the recipe when training starts, unless the model has
    it already. It stays attached, since it is part of the trained model. Every checkpoint has the recipe, and a
    training that resumes attaches it again.

    Args:
        selection: The entries that are trained when training starts.
        reduction: Which image tokens the model drops, in training and afterwards.

    Raises:
        TypeError: It is no selection.
    """

    def __init__(self, selection: Selection, reduction: TokenReduction | None = None) -> None:
        check_selection(selection)
        self._selection, self._reduction = selection, reduction
        self._optimizer: MaskedOptimizer | None = None
        self._max_grad_norm: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer, take over the clipping, attach the token reduction, and log what is trained.

        Until the end of training ``args.max_grad_norm`` is 0.

        Raises:
            ValueError: The Trainer's optimizer is not a masked one, or has another selection; the checkpoint that
                training resumes from is not where the arguments say; the token reductions of model, callback and
                checkpoint differ; or the tokens of this model cannot be reduced.
            UnsupportedModuleError: In training the model would not see PEFT's prefix.
        """
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, MaskedOptimizer):
            raise ValueError(
                f"FisherCallback needs a masked optimizer, and this Trainer has a {type(optimizer).__name__}: pass "
                "optimizers=(fishkern.MaskedAdamW(model, selection, ...), None)."
            )
        if optimizer is not self._optimizer and optimizer.selection != self._selection:
            raise ValueError("the Trainer's optimizer has another selection than this callback: give both the same.")
        if reason := hosts.lost_prefix(kwargs["model"], training=True):
            raise UnsupportedModuleError(f"{reason}.")
        model, folder = hosts.unwrap(kwargs["model"]), resumed_folder(args, state) if state.global_step else None
        attach_for_training(model, self._reduction, folder)
        if folder is not None:
            restore_renamed(model, folder)
        requested = args.max_grad_norm
        if isinstance(requested, _HandedOver):
            requested = requested.requested
        self._optimizer, self._max_grad_norm = optimizer, requested
        if optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = requested or math.inf
        args.max_grad_norm = _HandedOver(requested or 0.0)
        _warn_of_ignored(args, optimizer)
        _log.info("training %s", self._selection)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the Trainer its clipping back, and the model all weights of the best checkpoint where it is loaded."""
        args.max_grad_norm = self._max_grad_norm
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore_renamed(hosts.unwrap(kwargs["model"]), Path(state.best_model_checkpoint))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the number of trained entries, and the norm of their gradient, to ``logs`` and to the state's history."""
        if logs is None or self._optimizer is None or "loss" not in logs:
            return
        ours: dict[str, Any] = {"trained_entries": self._optimizer.selection.count}
        if self._optimizer.grad_norm is not None:
            ours["grad_norm"] = self._optimizer.grad_norm.item()
        logs |= ours
        state.log_history[-1] |= ours  # written before the callbacks are called

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the selection in the folder of the checkpoint, and the token reduction if the model has one.

        The selection is the optimizer's, which a freezer may have narrowed. One of which each rank has its own entries
        is gathered for it, by all ranks.
        """
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saves = state.is_world_process_zero and folder.is_dir()
        selection = self._selection if self._optimizer is None else self._optimizer.selection
        if selection.is_sharded and any(Ranks().gathered(saves)):
            selection = selection.gathered()
        if saves:
            selection.save(folder / FILE)
            if (reduction := tokens.attached(hosts.unwrap(kwargs["model"]))) is not None:
                reduction.save(folder / REDUCTION)


class FisherMixin:
    """A Trainer that selects at the start of ``train()``, on its own data, and trains what it selected.

        class FisherTrainer(FisherMixin, Trainer): ...

        FisherTrainer(model, args, train_dataset=rows, select=partial(fk.fish_tuning, density=0.2)).train()

    Use it only to estimate inside ``train()``; if you already have a selection, ``optimizers=`` and a
    :class:`FisherCallback` need no subclass. The model is the one that training starts from (that of ``model_init``,
    too), and the batches come from the Trainer's own ``DataLoader``, with its collator, its shuffling and, with several
    processes, its shards. A training that resumes from a checkpoint loads the selection from there. The optimizer is a
    :class:`fishkern.MaskedAdamW` with the options of the arguments, and with their exceptions from weight decay.

    Where accelerate shards the model by FSDP2 (``fsdp=True``, ``fsdp_config={"version": 2, ...}``), the Trainer takes
    no optimizer that it is given, and this class is also the way to train a selection that you have: ``select=lambda
    model, batches: selection``. The optimizer is made of the whole model, and accelerate puts the shards in the place
    of its parameters.

    The scores are those of the model's own loss, or of the ``likelihood`` that ``select`` is given. They do not include
    what else the Trainer does to a loss (``compute_loss_func``, a ``compute_loss`` of its own, label smoothing), and a
    warning says so.

    Args:
        args: The Trainer's own.
        select: Called as ``select(model, batches)`` at the start of training, for a selection, or for what
            :func:`fishkern.tr_pts` returns, whose token reduction is then attached; or a rule, for the diagonal Fisher
            of everything trainable over all of the batches.
        select_data: Batches to select on, such as a ``DataLoader``, instead of the Trainer's own. (Where training packs
            documents into rows, either will do: each document is an example.)
        kwargs: The Trainer's own.

    Raises:
        TypeError: ``select`` is neither a function nor a rule.
        ValueError: The Trainer is given an optimizer.
    """

    def __init__(
        self, *args: Any, select: Select | Rule, select_data: Iterable[Any] | None = None, **kwargs: Any
    ) -> None:
        self._select, self._select_data = _checked(select), select_data
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError(
                "FisherMixin makes the optimizer of what it selects, and this Trainer was given one: leave optimizers= "
                "and optimizer_cls_and_kwargs= out. To train a selection that you have, use a plain Trainer, "
                "optimizers=(fishkern.MaskedAdamW(model, selection), None) and FisherCallback(selection)."
            )
        self._checkpoint: str | None = None
        self._callback: FisherCallback | None = None

    @property
    def selection(self) -> Selection:
        """The entries that are trained, at this moment.

        Raises:
            ValueError: ``train()`` has not selected them yet.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, MaskedOptimizer):
            raise ValueError("nothing has been selected yet: train() does it when it starts.")
        return optimizer.selection

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or ``True`` for the last one. Its selection is trained.
            args: The Trainer's own.
            kwargs: The Trainer's own.

        Returns:
            What the Trainer returns.
        """
        try:
            with resuming_from(self.args, resume_from_checkpoint) as self._checkpoint:
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:  # which the callback gives back where training ends, but not where it is interrupted
            if isinstance(requested := self.args.max_grad_norm, _HandedOver):
                self.args.max_grad_norm = requested.requested

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Select, and make the optimizer of the selected entries; the Trainer calls it when training starts.

        Args:
            model: The model as the Trainer has wrapped it, or ``None``.

        Returns:
            The masked optimizer.

        Raises:
            ValueError: The arguments ask for an algorithm other than AdamW.
            UnsupportedModuleError: The model is sharded by other means than FSDP2.
            TypeError: ``select`` does not return a selection.
        """
        if self.optimizer is not None:
            return self.optimizer
        name = OptimizerNames(self.args.optim)
        if name not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(f"FisherMixin trains with MaskedAdamW: leave optim='adamw_torch', got {name.value!r}.")
        model = hosts.unwrap(self.model if model is None else model)
        if reason := hosts.sharded(model, fsdp2=True):
            raise UnsupportedModuleError(f"{reason}.")
        selection, reduction = self._selection_at_start(model)
        self.optimizer = MaskedAdamW(
            self._groups(model),
            selection,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            max_grad_norm=self.args.max_grad_norm or None,
        )
        if self._callback is not None:
            self.remove_callback(self._callback)
        self._callback = FisherCallback(selection, reduction)
        self.add_callback(self._callback)
        return self.optimizer

    def _selection_at_start(self, model: nn.Module) -> tuple[Selection, TokenReduction | None]:
        if self._checkpoint is not None:
            folder = Path(self._checkpoint)
            try:
                return Selection.load(folder / FILE), saved_reduction(folder)
            except FileNotFoundError:
                raise ValueError(
                    f"{folder} has no {FILE}: it was saved by a training without FisherMixin, or its saving was "
                    "interrupted. Resume from an earlier checkpoint, or train from the start."
                ) from None
        self._warn_of_another_loss()
        with torch.random.fork_rng(devices=[]):  # so that training shuffles as it would without selecting
            result = self._selected(model)
        selection = getattr(result, "selection", result)
        if not isinstance(selection, Selection):
            raise TypeError(f"select must give a Selection, got {type(result).__name__}.")
        return selection, getattr(result, "reduction", None)

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Divide the trainable parameters as the Trainer does: those that decay, and biases and norms, which do not."""
        decaying = set(self.get_decay_parameter_names(model))
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return [
            {
                "params": [(name, parameter) for name, parameter in trainable if (name in decaying) is decays],
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]

    def _selected(self, model: nn.Module) -> Any:
        if self._select_data is not None:
            return self._select(model, self._select_data)
        batches = self.get_train_dataloader()
        try:
            return self._select(model, batches)
        except ValueError as error:
            error.add_note(
                f"These were the batches that {type(self).__name__} trains on: if the model's own loss cannot use them "
                "(pairs of answers, packed rows of a model that does not separate them), pass other ones as "
                "select_data=."
            )
            raise

    def _warn_of_another_loss(self) -> None:
        whose = type(self).compute_loss.__module__.partition(".")[0]
        ways = {
            f"{type(self).__name__}.compute_loss": whose not in _OWN_LOSS,
            "compute_loss_func": getattr(self, "compute_loss_func", None) is not None,
            f"label_smoothing_factor={self.args.label_smoothing_factor}": bool(self.args.label_smoothing_factor),
            "loss_type='dft'": getattr(self.args, "loss_type", None) == "dft",  # of TRL's SFTTrainer
        }
        used = [way for way, applies in ways.items() if applies]
        named = isinstance(self._select, partial) and "likelihood" in self._select.keywords
        if used and not named:
            warnings.warn(
                f"this Trainer does not train the model's own loss ({', '.join(used)}), and the scores are those of "
                "the model's own: give select a likelihood of the Trainer's, as in partial(fk.fish_tuning, "
                "density=0.2, likelihood=losses).",
                stacklevel=4,
            )


def _checked(select: Any) -> Select:
    """Check that it is a function or a rule, and turn a rule into a function."""
    if isinstance(select, Rule):
        return partial(_estimate_and_select, select)
    if isinstance(select, Selection):
        raise TypeError(
            "select is a function (model, batches) -> Selection or a rule, got a Selection: to train one, use a plain "
            "Trainer, optimizers=(fishkern.MaskedAdamW(model, selection), None) and FisherCallback(selection)."
        )
    if isinstance(select, type) or not callable(select):
        what = f"the class {select.__name__}: call it" if isinstance(select, type) else type(select).__name__
        raise TypeError(
            "select must be a function (model, batches) -> Selection, such as partial(fk.fish_tuning, density=0.2), or "
            f"a rule such as fk.GlobalTopK(density=0.005); got {what}."
        )
    return select


def _estimate_and_select(rule: Rule, model: nn.Module, batches: Iterable[Any]) -> Selection:
    return select(estimate(model, batches), rule)


def _warn_of_ignored(args: Any, optimizer: MaskedOptimizer) -> None:
    """Warn of arguments that were changed from their defaults, and differ from the optimizer's own options."""
    options = {
        "learning_rate": [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups],
        "weight_decay": [group["weight_decay"] for group in optimizer.param_groups],
        "adam_beta1": [group["betas"][0] for group in optimizer.param_groups if "betas" in group],
        "adam_beta2": [group["betas"][1] for group in optimizer.param_groups if "betas" in group],
        "adam_epsilon": [group["eps"] for group in optimizer.param_groups if "eps" in group],
    }
    defaults = {field.name: field.default for field in fields(args)}
    ignored = [
        f"{name}={getattr(args, name)} (the optimizer has {' and '.join(map(str, dict.fromkeys(values)))})"
        for name, values in options.items()
        if values and name in defaults and getattr(args, name) not in (defaults[name], *values)
    ]
    if ignored:
        warnings.warn(
            "these training arguments have no effect, since the Trainer was given its optimizer: "
            f"{', '.join(ignored)}. Set them where the optimizer is made.",
            stacklevel=3,
        )

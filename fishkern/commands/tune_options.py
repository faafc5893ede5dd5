"""The options of ``fishkern tune`` in their groups, and what can be refused before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from fishkern.commands.freezing_options import Freezing
from fishkern.commands.options import Workload
from fishkern.integrations.adapting import ADAPTERS, FILE, FOLDER, check
from fishkern.methods.fish_tuning import ORDERS

DENSITY = 0.2  # of the adapter
FISHER_SAMPLES = 128
PROBE_SAMPLES = 32
METHODS = ("fish", "fisher-adaptune")
BLIND = ("random", "magnitude")  # orders that look at no example

_ADAPTER, _BUDGET, _TRAINING = "Adapter", "Selection", "Training"


@dataclass(frozen=True)
class Adapting:
    """The adapter to add."""

    adapter: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help=f"{', '.join(list(ADAPTERS)[:-1])} or {list(ADAPTERS)[-1]}; none is added if MODEL is an adapter.",
            rich_help_panel=_ADAPTER,
            show_default="lora",
        ),
    ] = None
    size: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help=f"Rank of lora and dora (default {ADAPTERS['lora'].size}), width of bottleneck "
            f"({ADAPTERS['bottleneck'].size}), length of prefix ({ADAPTERS['prefix'].size}).",
            rich_help_panel=_ADAPTER,
        ),
    ] = None
    layers: Annotated[
        str, Option(metavar="RANGE", help="Layers to adapt: 0-4 or 0,2,5; by default all.", rich_help_panel=_ADAPTER)
    ] = ""

    @property
    def kind(self) -> str:
        """The adapter's name, one of :data:`fishkern.integrations.adapting.ADAPTERS`."""
        return self.adapter or "lora"

    @property
    def numbers(self) -> list[int] | None:
        """The layers' numbers, or ``None`` for all."""
        if not self.layers:
            return None
        numbers: list[int] = []
        for part in self.layers.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise ValueError(f"--layers is like 0-4 or 0,2,5, got {self.layers!r}.")
            if dash and int(last) < int(first):  # an empty list would mean all layers to PEFT
                raise ValueError(f"--layers {self.layers} counts down: write {last}-{first}.")
            numbers += range(int(first), int(last or first) + 1)
        return numbers


@dataclass(frozen=True)
class Budget:
    """How many of the adapter's entries are trained, and which."""

    density: Annotated[
        float | None,
        Option(metavar="D", help=f"Train this fraction of the adapter; by default {DENSITY}.", rich_help_panel=_BUDGET),
    ] = None
    k: Annotated[
        int | None, Option("--k", metavar="N", help="Or this many of its entries.", rich_help_panel=_BUDGET)
    ] = None
    trainable: Annotated[
        int | None, Option(metavar="N", help="Or this many entries, head included.", rich_help_panel=_BUDGET)
    ] = None
    order: Annotated[
        str | None,
        Option(
            metavar="ORDER",
            help="largest Fisher information; smallest, random and magnitude are controls.",
            rich_help_panel=_BUDGET,
            show_default=ORDERS[0],
        ),
    ] = None
    allow_zeros: Annotated[
        bool,
        Option(
            "--allow-zeros",
            help="Continue even if half of the entries or more have no Fisher information.",
            rich_help_panel=_BUDGET,
        ),
    ] = False
    fisher_samples: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Number of examples to select by; with fisher-adaptune, to read the Fisher information on.",
            rich_help_panel=_BUDGET,
            show_default=f"{FISHER_SAMPLES}; {PROBE_SAMPLES} with fisher-adaptune",
        ),
    ] = None

    @property
    def ranked(self) -> str:
        """The order, which is the largest Fisher information if no other is given."""
        return self.order or ORDERS[0]


@dataclass(frozen=True)
class Training:
    """How they are trained."""

    epochs: Annotated[int, Option(min=1, metavar="N", help="Number of epochs.", rich_help_panel=_TRAINING)] = 3
    lr: Annotated[float, Option(metavar="LR", help="Learning rate, falling to 0.", rich_help_panel=_TRAINING)] = 5e-4
    weight_decay: Annotated[
        float, Option(metavar="W", help="Weight decay of the selected entries.", rich_help_panel=_TRAINING)
    ] = 0.0
    max_grad_norm: Annotated[
        float,
        Option(metavar="G", help="Clip the gradient of the selected entries to this norm.", rich_help_panel=_TRAINING),
    ] = 1.0
    eval_split: Annotated[
        str,
        Option(metavar="NAME", help="Measure on this part of the data, before and after.", rich_help_panel=_TRAINING),
    ] = ""


@dataclass(frozen=True)
class Settings:
    """All options that decide what a run does.

    Attributes:
        work: Model and data.
        adapting: The adapter.
        method: ``"fish"`` or ``"fisher-adaptune"``.
        budget: The selection, of ``"fish"``.
        freezing: What stops, of ``"fisher-adaptune"``.
        training: The training.
        samples: Number of examples to train on.
    """

    work: Workload
    adapting: Adapting
    method: str
    budget: Budget
    freezing: Freezing
    training: Training
    samples: int

    @property
    def freezes(self) -> bool:
        """Whether everything trains at first, and slices stop."""
        return self.method == METHODS[1]

    @property
    def fisher_samples(self) -> int | None:
        """The most examples that the Fisher information is read on, ``None`` if it is not read."""
        if self.freezes:
            return self.budget.fisher_samples or PROBE_SAMPLES
        return None if self.budget.ranked in BLIND else self.budget.fisher_samples or FISHER_SAMPLES

    def plain(self) -> dict[str, Any]:
        """Give every option by its name: runs with the same ones do the same.

        Returns:
            Plain values.
        """
        groups = (self.work, self.adapting, self.budget, self.freezing, self.training)
        given = {name: value for group in groups for name, value in vars(group).items()}
        given["spare"] = list(self.freezing.spare) or None
        if self.freezes:  # a default is the same as its value
            rule = self.freezing.rule
            given |= {"margin": rule.margin, "most": rule.most, "slices": self.freezing.cut.count}
        return given | {"method": self.method, "order": self.budget.ranked, "samples": self.samples}

    def check(self, out: Path) -> None:
        """Refuse what can be refused before anything is loaded.

        Args:
            out: The output folder.

        Raises:
            ValueError: Options do not fit together.
            FileExistsError: The folder is a file, or holds the adapter of another run.
            FileNotFoundError: The folder's own folder does not exist.
            PermissionError: The folder may not be written to.
        """
        if self.work.parameters:
            raise ValueError("tune trains the adapter and the head: it has no use for --parameters.")
        if self.method not in METHODS:
            raise ValueError(f"--method is {' or '.join(METHODS)}, got {self.method!r}.")
        self._refuse_the_others_options()
        if self.budget.ranked not in ORDERS:
            raise ValueError(f"--order is one of {', '.join(ORDERS)}, got {self.budget.order!r}.")
        if self.budget.fisher_samples is not None and self.budget.ranked in BLIND:
            raise ValueError(f"--order {self.budget.order} looks at no example: leave out --fisher-samples.")
        _ = self.freezing.rule, self.freezing.cut  # raise where they cannot be
        check(self.adapting.kind, self.adapting.size)
        _check_leftover(out, self.adapting.kind)
        _ = self.adapting.numbers  # raises where they cannot be read
        _check_folder(out)

    def _refuse_the_others_options(self) -> None:
        """Refuse options of the selection where nothing is selected, and those of freezing where nothing stops."""
        group = self.budget if self.freezes else self.freezing
        given = [name for name, value in vars(group).items() if _is_given(value)]
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given if name != "fisher_samples")
        if not options:
            return
        if self.freezes:
            raise ValueError(
                f"--method fisher-adaptune trains everything at first and selects nothing: leave out {options}."
            )
        raise ValueError(f"with --method fish nothing stops: leave out {options}, or take --method fisher-adaptune.")


def _is_given(value: Any) -> bool:
    """Tell whether the user named an option; 0 is a value."""
    return bool(value) if isinstance(value, list | tuple) else value is not None and value is not False


def _check_leftover(out: Path, kind: str) -> None:
    """Refuse to save next to the adapter of another run, which would be mistaken for this one's."""
    other = out / (FILE if ADAPTERS[kind].saved_as == FOLDER else FOLDER)
    if other.exists():
        raise FileExistsError(f"{other} is the adapter of another run: choose another --out, or delete it first.")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder with --out.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} does not exist: create it, or choose another --out.")
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        raise PermissionError(f"{out.absolute()} may not be written to: choose another folder with --out.")

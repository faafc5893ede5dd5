"""The options of ``fishkern tune`` in their groups, and what can be refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from fishkern.commands.freezing_options import Freezing
from fishkern.commands.numbers import numbers_in
from fishkern.commands.options import Workload
from fishkern.commands.tr_pts_options import Connections
from fishkern.integrations.adapting import ADAPTERS, FILE, FOLDER, check
from fishkern.methods.fish_tuning import ORDERS
from fishkern.tokens import FILE as REDUCTION

DENSITY = 0.2  # of the adapter
FISHER_SAMPLES = 128
PROBE_SAMPLES = 32
TASK_SAMPLES = 1000  # the whole training split of each task that TR-PTS was published on
METHODS = ("fish", "fisher-adaptune", "tr-pts")
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
        return numbers_in(self.layers, "--layers")


@dataclass(frozen=True)
class Budget:
    """How many of the adapter's entries are trained, and which."""

    density: Annotated[
        float | None,
        Option(
            metavar="D",
            help=f"Train this fraction of the adapter; by default {DENSITY}. With tr-pts, of the model's weights.",
            rich_help_panel=_BUDGET,
        ),
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
            show_default=f"{FISHER_SAMPLES}; {PROBE_SAMPLES} with fisher-adaptune, {TASK_SAMPLES:,} with tr-pts",
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
        method: One of :data:`METHODS`.
        budget: The selection, of ``"fish"``; of ``"tr-pts"`` its density.
        freezing: What stops, of ``"fisher-adaptune"``.
        connections: What of the model trains, and on which tokens, of ``"tr-pts"``.
        training: The training.
        samples: Number of examples to train on.
    """

    work: Workload
    adapting: Adapting
    method: str
    budget: Budget
    freezing: Freezing
    connections: Connections
    training: Training
    samples: int

    @property
    def freezes(self) -> bool:
        """Whether everything trains at first, and slices stop."""
        return self.method == METHODS[1]

    @property
    def adapts(self) -> bool:
        """Whether an adapter is added; if not, entries of the model itself train."""
        return self.method != METHODS[2]

    @property
    def fisher_samples(self) -> int | None:
        """The most examples that the Fisher information is read on, ``None`` if it is not read."""
        if self.freezes:
            return self.budget.fisher_samples or PROBE_SAMPLES
        if not self.adapts:
            return self.budget.fisher_samples or TASK_SAMPLES
        return None if self.budget.ranked in BLIND else self.budget.fisher_samples or FISHER_SAMPLES

    def plain(self) -> dict[str, Any]:
        """Give every option by its name: runs with the same ones do the same.

        Returns:
            Plain values.
        """
        groups = (self.work, self.adapting, self.budget, self.freezing, self.connections, self.training)
        given = {name: value for group in groups for name, value in vars(group).items()}
        given |= {"spare": list(self.freezing.spare) or None, "token_layers": self.connections.token_layers or None}
        if self.freezes:  # a default is the same as its value
            rule = self.freezing.rule
            given |= {"margin": rule.margin, "most": rule.most, "slices": self.freezing.cut.count}
        if not self.adapts:
            given |= self.connections.settings
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
            raise ValueError("tune chooses itself which parameters train: it has no use for --parameters.")
        if self.method not in METHODS:
            raise ValueError(f"--method is {', '.join(METHODS[:-1])} or {METHODS[-1]}, got {self.method!r}.")
        self._refuse_the_others_options()
        if self.budget.ranked not in ORDERS:
            raise ValueError(f"--order is one of {', '.join(ORDERS)}, got {self.budget.order!r}.")
        if self.budget.fisher_samples is not None and self.budget.ranked in BLIND:
            raise ValueError(f"--order {self.budget.order} looks at no example: leave out --fisher-samples.")
        _ = self.freezing.rule, self.freezing.cut, self.connections.arguments  # raise where they cannot be
        check(self.adapting.kind, self.adapting.size)
        _check_leftover(out, ADAPTERS[self.adapting.kind].saved_as if self.adapts else None)
        _ = self.adapting.numbers  # raises where they cannot be read
        _check_folder(out)

    def _refuse_the_others_options(self) -> None:
        """Refuse the options of the other methods."""
        if self.adapts:
            if options := _given(self.connections):
                raise ValueError(
                    f"with --method {self.method} an adapter is trained: leave out {options}, or take --method tr-pts."
                )
        elif options := _given(self.adapting):
            raise ValueError(
                f"--method tr-pts trains entries of the model itself, with no adapter: leave out {options}."
            )
        elif options := _given(self.budget, but=("density", "fisher_samples")):
            raise ValueError(f"--method tr-pts chooses by --top or --density: leave out {options}.")
        elif self.connections.top is not None and self.budget.density is not None:
            raise ValueError("--top and --density decide the same: give one of them.")
        if self.freezes and (options := _given(self.budget, but=("fisher_samples",))):
            raise ValueError(
                f"--method fisher-adaptune trains everything at first and selects nothing: leave out {options}."
            )
        if not self.freezes and (options := _given(self.freezing)):
            raise ValueError(
                f"with --method {self.method} nothing stops: leave out {options}, or take --method fisher-adaptune."
            )


def _given(group: Any, but: Iterable[str] = ()) -> str:
    """List the options of a group that the user has named."""
    names = [name for name, value in vars(group).items() if _is_given(value) and name not in but]
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def _is_given(value: Any) -> bool:
    """Tell whether the user named an option; 0 is a value."""
    return bool(value) if isinstance(value, list | tuple | str) else value is not None and value is not False


def _check_leftover(out: Path, saved_as: str | None) -> None:
    """Refuse to save next to what another run has trained, which would be mistaken for this one's."""
    saves = {FOLDER: "adapter", FILE: "adapter", REDUCTION: "token reduction"}
    own = REDUCTION if saved_as is None else saved_as
    for other in (out / name for name in saves if name != own):
        if other.exists():
            raise FileExistsError(
                f"{other} is the {saves[other.name]} of another run: choose another --out, or delete it first."
            )


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another folder with --out.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} does not exist: create it, or choose another --out.")
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        raise PermissionError(f"{out.absolute()} may not be written to: choose another folder with --out.")

"""The options of ``fishkern tune --method fisher-adaptune``: when something stops training, and what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

from typer import Option

from fishkern.freezing import FreezeRule, Slices
from fishkern.hosts import is_head
from fishkern.selection.base import exactly, matching

# By default, as the help says: decisions in a training, and readings from one to the next. So the readings of a long
# training cost no more than those of a short one: about 20 passes over the same few examples.
DECISIONS, READINGS = 5, 4

_FREEZING = "Freezing"


@dataclass(frozen=True)
class Freezing:
    """When slices of the adapter stop training, and which; of ``--method fisher-adaptune``."""

    read_every: Annotated[
        int | None,
        Option(
            min=1,
            metavar="STEPS",
            help="Read the Fisher information every so many steps: a pass over --fisher-samples examples.",
            rich_help_panel=_FREEZING,
            show_default="a quarter of --freeze-every",
        ),
    ] = None
    freeze_every: Annotated[
        int | None,
        Option(
            min=1,
            metavar="STEPS",
            help="Decide every so many steps which slices stop.",
            rich_help_panel=_FREEZING,
            show_default="a fifth of the training",
        ),
    ] = None
    margin: Annotated[
        float | None,
        Option(
            metavar="M",
            help="A slice's score is how much its Fisher information has changed so far. Slices below mean + M "
            "standard deviations of all scores stop: the higher, the more.",
            rich_help_panel=_FREEZING,
            show_default=str(FreezeRule.margin),
        ),
    ] = None
    most: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            help="One decision stops at most this share of the adapter and head.",
            rich_help_panel=_FREEZING,
            show_default=str(FreezeRule.most),
        ),
    ] = None
    spare: Annotated[
        list[str],
        Option(
            metavar="PATTERN",
            help="Never stop these parameters, such as '*.layers.0.*'; may be repeated.",
            rich_help_panel=_FREEZING,
            show_default="the head",
        ),
    ] = ()
    slices: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Cut each matrix into this many slices of rows.",
            rich_help_panel=_FREEZING,
            show_default=str(Slices.count),
        ),
    ] = None

    @property
    def rule(self) -> FreezeRule:
        """Which slices stop, of parameters that are not spared."""
        given = {"margin": self.margin, "most": self.most}
        return FreezeRule(**{name: value for name, value in given.items() if value is not None})

    def rule_for(self, names: Iterable[str]) -> FreezeRule:
        """Say which slices of a pool stop.

        Args:
            names: Of the pool.

        Returns:
            The rule, which spares what the user names, or else the head.

        Raises:
            ValueError: A pattern matches none of the names.
        """
        names = list(names)
        spare = matching(self.spare, names, "--spare") if self.spare else [name for name in names if is_head(name)]
        return replace(self.rule, spare=exactly(spare))

    @property
    def cut(self) -> Slices:
        """How matrices are cut."""
        return Slices() if self.slices is None else Slices(self.slices)

    def times(self, steps: int) -> tuple[int, int]:
        """Say when to read and to decide.

        Args:
            steps: Of the whole training.

        Returns:
            Steps from one reading to the next, and from one decision to the next.

        Raises:
            ValueError: No decision would be due, or one without a reading before it.
        """
        decide = self.freeze_every or max(1, steps // DECISIONS)
        read = self.read_every or max(1, decide // READINGS)
        if decide > steps:
            raise ValueError(
                f"--freeze-every {decide:,} is more than the {steps:,} steps of this training, and nothing would stop: "
                f"take at most {steps:,}, or train longer."
            )
        if read > decide:
            raise ValueError(
                f"--read-every {read:,} is more than the {decide:,} steps from one decision to the next, which would "
                f"be made without a reading: take at most {decide:,}, or a larger --freeze-every."
            )
        return read, decide

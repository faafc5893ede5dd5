"""The options of ``fishkern select`` that make a rule."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from typer import Option

import fishkern as fk
from fishkern.selection.contribution_topk import BY, SHARES, USUAL_TOP

DENSITY = 0.005

_BUDGET = ("k", "density", "smallest")
# The options that each rule takes.
_TAKES = {
    "global": _BUDGET,
    "per-tensor": _BUDGET,
    "per-row": _BUDGET,
    "n-of-m": ("n", "m", "smallest"),
    "contribution": ("top", "density", "least_per_row", "by", "share", "most_per_row", "smallest"),
    "random": ("k", "density", "seed"),
}
RULES = tuple(_TAKES)


@dataclass(frozen=True)
class RuleOptions:
    """A rule, as the command line names it."""

    density: Annotated[
        float | None,
        Option(
            metavar="D",
            help="Fraction of the coordinates to select; of each row with per-row.",
            show_default=str(DENSITY),
        ),
    ] = None
    k: Annotated[int | None, Option(metavar="N", help="Or this many coordinates; of each row with per-row.")] = None
    rule: Annotated[
        str,
        Option(
            metavar="RULE",
            help="global, per-tensor, per-row, n-of-m, contribution (more of each row in the layers that have more of "
            "the top scores), random.",
        ),
    ] = "global"
    smallest: Annotated[bool, Option("--smallest", help="The smallest scores instead of the largest.")] = False
    top: Annotated[
        float | None,
        Option(
            metavar="D",
            help="contribution: fraction of the ranked entries whose places are counted by layer.",
            show_default=f"{USUAL_TOP} without --density",
        ),
    ] = None
    least_per_row: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="contribution: coordinates of each row where a layer has the fewest.",
            show_default="1",
        ),
    ] = None
    by: Annotated[
        str | None, Option(metavar="WHAT", help=f"contribution: count by {' or '.join(BY)}.", show_default=BY[0])
    ] = None
    share: Annotated[
        str | None,
        Option(metavar="WHAT", help=f"contribution: count by {', '.join(SHARES)}.", show_default=SHARES[0]),
    ] = None
    most_per_row: Annotated[
        int | None, Option(min=1, metavar="N", help="contribution: at most so many coordinates of a row.")
    ] = None
    n: Annotated[int | None, Option("--n", min=0, metavar="N", help="n-of-m: so many, ...")] = None
    m: Annotated[int | None, Option("--m", min=1, metavar="M", help="... of each M neighbours in a row.")] = None
    always: Annotated[list[str], Option(metavar="PATTERN", help="Parameters to select whole; repeatable.")] = ()
    never: Annotated[list[str], Option(metavar="PATTERN", help="Parameters to select nothing of; repeatable.")] = ()
    seed: Annotated[int | None, Option(metavar="N", help="Seed of the random rule.", show_default="0")] = None

    @property
    def reads(self) -> int:
        """How often the rule reads the scores, at least."""
        return {"random": 0, "contribution": 2 if self.density is None else 3}.get(self.rule, 1)

    def made(self) -> fk.Rule:
        """Make the rule.

        Returns:
            The rule.

        Raises:
            ValueError: There is no such rule, it does not take an option that is given, or it needs another.
        """
        if self.rule not in RULES:
            raise ValueError(f"--rule is one of {', '.join(RULES)}, got {self.rule!r}.")
        self._refuse_others()
        order = "smallest" if self.smallest else "largest"
        patterns: dict[str, Any] = {"always": self.always, "never": self.never}
        if self.rule == "n-of-m":
            if self.n is None or self.m is None:
                raise ValueError("--rule n-of-m takes --n and --m, such as --n 2 --m 4: give both.")
            return fk.NofM(self.n, self.m, order, **patterns)
        if self.rule == "contribution":
            given = {name: getattr(self, name) for name in ("least_per_row", "by", "share", "most_per_row")}
            given = {name: value for name, value in given.items() if value is not None}
            top = USUAL_TOP if self.top is None and self.density is None else self.top
            return fk.ContributionTopK(top, self.density, **given, order=order, **patterns)
        if self.rule == "per-row":
            if (self.k is None) == (self.density is None):
                raise ValueError("--rule per-row takes --k, the number of coordinates of each row, or --density.")
            return fk.PerRowTopK(self.k, self.density, order, **patterns)
        density = DENSITY if self.k is None and self.density is None else self.density
        if self.rule == "random":
            return fk.Random(self.k, density, self.seed or 0, **patterns)
        return (fk.GlobalTopK if self.rule == "global" else fk.PerTensorTopK)(self.k, density, order, **patterns)

    def _refuse_others(self) -> None:
        """Refuse options that have no effect on this rule."""
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            if name in ("rule", "always", "never", *_TAKES[self.rule]) or value is None or value is False:
                continue
            option = f"--{name.replace('_', '-')}"
            if (self.rule, name) == ("random", "smallest"):
                raise ValueError(f"--rule random looks at no score: leave out {option}.")
            if name == "seed":
                raise ValueError(f"--rule {self.rule} draws nothing: leave out {option}.")
            *others, last = (rule for rule, names in _TAKES.items() if name in names)
            rules = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{option} is for --rule {rules}: leave it out with --rule {self.rule}.")

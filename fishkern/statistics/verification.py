"""The report of a verification: each parameter against the loop, and whether it passes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fishkern.names import listed

SLACK = 2
"""This multiple of the model's own batch noise is allowed, because it is measured on fewer examples than the error."""
SHOWN = 12
"""The number of parameters in a printed report."""


@dataclass(frozen=True)
class Compared:
    """One parameter, by the statistics and by the loop.

    Attributes:
        name: Its name.
        path: The path that computed it, as in :class:`Covered`; empty if the statistics do not say.
        numel: Its coordinates.
        error: Largest difference from the loop, relative to the loop's largest entry.
        noise: The same between the model's own gradients of an example in a batch and of the example alone.
        allowed: The largest error that passes.
        holds: Whether it passes.
        note: A remark, in words.
    """

    name: str
    path: str
    numel: int
    error: float
    noise: float
    allowed: float
    holds: bool
    note: str = ""


@dataclass(frozen=True, repr=False)
class Verification:
    """The report of :func:`verify`.

    Attributes:
        compared: Every parameter that was compared, in the model's order.
        missing: Requested parameters that are not in the statistics.
        integers: Stored weights (integers, float8, packed, in a tensor subclass) in the statistics, which a loop cannot
            compute: autograd gives them no gradient.
        coverage: Coordinates of the model by the path that computed them, those left out included.
        size: Coordinates of the model.
        examples: Number of examples that the loop ran over.
        noise_examples: Number of them that the batch noise was measured on.
        density: The fraction of entries that is selected for :attr:`overlap`.
        overlap: The fraction of that selection that statistics and loop have in common.
        noise_overlap: The same between the model's own gradients in a batch and alone.
        choices: On the examples of the noise, how often a position chose experts, each time it came to such a module.
        changed_choices: How many of these choices were others in a batch than alone.
        unmatched_choices: Modules of experts whose choices are not compared, because they were called on other numbers
            of positions in the batch than alone, or another number of times.
        loop_seconds: Time of the loop.
        estimate_seconds: Time of ``estimate``, its survey and self-check included; ``None`` for given statistics.
        largest: Largest entry, in magnitude, of the loop's statistics.
    """

    compared: tuple[Compared, ...]
    missing: tuple[str, ...]
    integers: tuple[str, ...]
    coverage: Mapping[str, int]
    size: int
    examples: int
    noise_examples: int
    density: float
    overlap: float
    noise_overlap: float
    choices: int
    changed_choices: int
    unmatched_choices: tuple[str, ...]
    loop_seconds: float
    estimate_seconds: float | None
    largest: float

    @property
    def ok(self) -> bool:
        """Whether all passes: nothing is missing, and every parameter and the selection are within what is allowed."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons why not, in words; empty if all passes."""
        failures = [f"{name} is missing from the statistics" for name in self.missing]
        if not self.largest:
            failures.append("the loop finds no gradient anywhere: there is nothing to compare")
        for one in self.compared:
            if not one.holds:
                failures.append(f"{one.name}: {one.note or f'error {one.error:.1e}, allowed {one.allowed:.1e}'}")
        if self.overlap < self.allowed_overlap:
            failures.append(
                f"the selections of the top {self.density:.2%} have {self.overlap:.1%} in common, "
                f"at least {self.allowed_overlap:.1%} was expected"
            )
        if self.coverage and sum(self.coverage.values()) != self.size:
            failures.append(f"the coverage accounts for {sum(self.coverage.values()):,} of {self.size:,} coordinates")
        return tuple(failures)

    @property
    def allowed_overlap(self) -> float:
        """The smallest overlap that passes: one percent, and twice the change by batch noise, may differ."""
        return max(0.0, 0.99 - SLACK * (1 - self.noise_overlap))

    @property
    def worst_first(self) -> list[Compared]:
        """The compared parameters, by their error relative to the allowed one; zeros but for rounding come last."""
        return sorted(self.compared, key=lambda one: (one.holds and one.note != "", -one.error / one.allowed))

    def to_json(self) -> str:
        """Write the report as JSON.

        Returns:
            An object with ``ok``, ``failures`` and every attribute.
        """
        plain = {"ok": self.ok, "failures": self.failures, "allowed_overlap": self.allowed_overlap, **asdict(self)}
        for one in plain["compared"]:
            for key in ("error", "noise", "allowed"):
                one[key] = one[key] if one[key] < math.inf else None  # JSON has no infinity
        plain["largest"] = self.largest if self.largest < math.inf else None
        return json.dumps(plain, indent=2)

    def __repr__(self) -> str:
        outcome = "it holds" if self.ok else f"it does not hold, {len(self.failures)} failures"
        return f"Verification({outcome}: {len(self.compared)} parameters, {self.examples} examples)"

    def __str__(self) -> str:
        worst_first = self.worst_first[:SHOWN]
        width = max(len(one.name) for one in worst_first)
        lines = [self.headline(len(worst_first)), f"{'parameter':{width}}  path     error    noise    allowed"]
        lines += [
            f"{one.name:{width}}  {one.path:7}  {one.error:.1e}  {one.noise:.1e}  {one.allowed:.1e}"
            f"{(one.note and f'  {one.note}') if one.holds else '  FAILS'}"
            for one in worst_first
        ]
        return "\n".join([*lines, *self.summary])

    def headline(self, shown: int) -> str:
        """Say how many of the parameters are shown.

        Args:
            shown: Their number, the worst first.

        Returns:
            A heading.
        """
        if shown < len(self.compared):
            return f"the {shown} largest errors of {len(self.compared)}, with the errors that are allowed"
        return f"all {shown} errors, the largest first"

    @property
    def summary(self) -> list[str]:
        """The outcome, in a few lines."""
        lines = [f"{len(self.compared)} parameters compared with a loop over {self.examples} examples"]
        if self.integers:
            lines.append(f"{len(self.integers)} stored weights not compared: autograd gives them no gradient")
        if self.coverage:
            paths = ", ".join(f"{path} {numel:,}" for path, numel in self.coverage.items())
            lines.append(f"coverage: {paths} of {self.size:,} coordinates")
        lines.append(f"the largest {self.density:.2%} of all entries: {self.overlap:.2%} in common")
        if self.choices:
            lines.append(
                f"{self.changed_choices} of {self.choices} choices of experts are others in a batch than alone"
                f"{', which no rounding explains' if self.changed_choices else ''}"
            )
        if self.unmatched_choices:
            lines.append(
                "choices of experts not compared, since the calls in a batch are others than alone: "
                f"{listed(self.unmatched_choices)}"
            )
        if self.estimate_seconds is not None:
            lines.append(f"fishkern took {self.estimate_seconds:.2f} s, the loop {self.loop_seconds:.2f} s")
        return lines + (["It does not hold:", *self.failures] if self.failures else ["It holds."])

"""Every estimator that the study of exactness compares, and the setting of all measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import fishkern as fk
from benchmarks.studies.exactness.subjects import Subject
from fishkern.statistics.base import Estimator


@dataclass(frozen=True)
class Setting:
    """The setting of all measurements.

    Args:
        pairs: Pairs of disjoint sets.
        batch_sizes: Of the squared batch gradient; size 1, which is exact, is measured along with them as a check.
        passes: Batch size of all other passes, which only the sketch depends on.
        densities: Selected fractions.
        seed: Of rows and draws.
    """

    pairs: int = 3
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    passes: int = 32
    densities: tuple[float, ...] = (0.005, 0.05)
    seed: int = 0


@dataclass(frozen=True)
class Bfloat16Sums(fk.DiagonalFisher):
    """The loop with batches of one, exact except for its accumulator, which is rounded to bfloat16 after each."""

    reads: ClassVar[str] = "batches"
    unit: str = "batch"

    @property
    def definition(self) -> dict[str, Any]:
        return {**super().definition, "accumulator": "bfloat16"}

    def update_(self, state: Tensor, *gradients: Any, **options: Any) -> None:
        super().update_(state, *gradients, **options)
        state.copy_(state.bfloat16())


@dataclass(frozen=True)
class Arm:
    """One way to estimate.

    Args:
        label: In records and table.
        estimator: From a seed to the recipe.
        batch_size: Rows in a batch.
        sizes: Numbers of examples, ascending; a larger one continues the smaller.
        likelihood: ``None`` for the model's own loss.
    """

    label: str
    estimator: Callable[[int], Estimator]
    batch_size: int
    sizes: tuple[int, ...]
    likelihood: fk.Likelihood | None = None


def arms(subject: Subject, setting: Setting) -> list[Arm]:
    sizes, passes = subject.sizes, setting.passes
    ways = [Arm("batch gradient, N = 1", _squared_batch, 1, sizes[:1])]
    for size in setting.batch_sizes:
        fits = tuple(n for n in sizes if n % size == 0)
        ways.append(Arm(f"batch gradient, N = {size}", _squared_batch, size, fits))
    ways += [
        Arm(f"sketch of 1 draw, N = {passes}", lambda seed: fk.SketchedFisher(1, seed), passes, sizes),
        Arm(f"sketch of 8 draws, N = {passes}", lambda seed: fk.SketchedFisher(8, seed), passes, sizes[:-1] or sizes),
        Arm("each position squared", lambda _: fk.DiagonalFisher(unit="position"), passes, sizes),
        Arm("drawn labels (mc)", lambda seed: fk.DiagonalFisher(fisher_type="mc", seed=seed), passes, sizes),
    ]
    if subject.language:
        summed = fk.CausalLM(reduction="sum")
        ways.append(Arm("token-sum losses", lambda _: fk.DiagonalFisher(), passes, sizes, summed))
        ways.append(Arm("sums in bfloat16, N = 1", lambda _: Bfloat16Sums(), 1, sizes[-1:]))
    return ways


def _squared_batch(_: int) -> Estimator:
    return fk.DiagonalFisher(unit="batch")

"""Everything that is timed, by the name it has in the records."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

import fishkern as fk
from benchmarks import rivals
from benchmarks.rivals import backpack, kronfluence, nngeometry, opacus

Provider = Callable[[nn.Module, list[dict[str, Tensor]]], Any]


def fishkern(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Statistics:
    """As a user calls it, self-check included."""
    return fk.estimate(model, batches)


def fishkern_unchecked(model: nn.Module, batches: list[dict[str, Tensor]]) -> fk.Statistics:
    """Without the comparison of the first two examples, which is spread over many batches in practice."""
    return fk.estimate(model, batches, check=False)


@dataclass(frozen=True)
class Rival:
    """One provider of the comparison of all.

    Args:
        run: What is measured.
        package: Which distribution it is from; none for what is written here.
        settings: How it is used, in words.
    """

    run: Provider
    package: str | None
    settings: str

    @property
    def version(self) -> str | None:
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None

    @property
    def why_not(self) -> str | None:
        """What keeps it from running, before it is tried."""
        return f"{self.package} is not installed" if self.package and not self.version else None


RIVALS: dict[str, Rival] = {
    "fishkern": Rival(fishkern, None, "estimate with its defaults, self-check included"),
    "fishkern_unchecked": Rival(fishkern_unchecked, None, "estimate with check=False"),
    "one_by_one": Rival(rivals.one_by_one, None, "batch size 1, squared in a hook on each gradient"),
    "vmap_grad": Rival(rivals.vmap_grad, "torch", "torch.func.vmap of grad over the whole batch, squared in place"),
    "opacus": Rival(opacus.opacus, "opacus", opacus.SETTINGS),
    "backpack": Rival(backpack.backpack, "backpack-for-pytorch", backpack.SETTINGS),
    "kronfluence": Rival(kronfluence.kronfluence, "kronfluence", kronfluence.SETTINGS),
    "nngeometry": Rival(nngeometry.nngeometry, "nngeometry", nngeometry.SETTINGS),
}
# Those that need no library but torch.
PROVIDERS: dict[str, Provider] = {name: RIVALS[name].run for name in ("fishkern", "one_by_one", "vmap_grad")}


def squares(result: Any) -> dict[str, Tensor]:
    """Sums over examples of squared gradients; ours are means."""
    if isinstance(result, fk.Statistics):
        return {name: result.count * values for name, values in result.items()}
    return result


def in_short(error: Exception) -> str:
    """An error as a record says it: its class, and the first line of what it says."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {textwrap.shorten(said, 120, placeholder=' ...')}".removesuffix(": ")

"""The diagonal of a Kronecker-factored Fisher: two vectors for each weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fishkern.arguments import one_of
from fishkern.backend import Backend
from fishkern.layers import PerExampleGrads
from fishkern.ops.dtypes import accumulates_in
from fishkern.statistics.base import Estimator, ParameterInfo, Positions, Reads, State
from fishkern.statistics.coverage import Covered
from fishkern.statistics.factored import FactoredStatistics
from fishkern.statistics.parted import entries_of


@dataclass(frozen=True)
class DiagonalKronecker(Estimator):
    r"""The diagonal of a Kronecker-factored Fisher, from mean squares of inputs and of output gradients.

    With ``h`` what enters a linear map at a position, ``d`` the gradient of the example's loss at its output, and means
    over all counted positions of all examples, the weight ``W [O, I]`` and the bias ``b [O]`` get

        F[o, i] = mean_{n,t} d[o]^2 * mean_{n,t} h[i]^2
        F_b[o]  = mean_{n,t} d[o]^2

    (AdaFisher, Martins Gomes et al., 2025, 2405.16397). Convolutions are the linear maps of their
    patches. All other parameters (embeddings, norms, scales, a weight that an embedding shares) have no factors: theirs
    is the mean of the squares of each position's term, over positions and uses, so that none is left at zero.

    It is an approximation, and **not** the Fisher of the examples, in two ways: inputs and output gradients are taken
    to be independent of each other, and each position is squared alone, before the sum over positions. It ranks entries
    otherwise than :class:`DiagonalFisher`. What it has for it is its size: the state and the file hold ``O + I``
    numbers for each matrix, 11 MB for all linear weights of a LLaMA of 7 billion parameters. The result is
    :class:`FactoredStatistics`.

    A parameter whose positions cannot be told apart (on the generic path or the loop) is refused by name. The
    self-check compares the squares of captured gradients with ordinary autograd, 256 MiB of them at a time.

    Args:
        unit: What is squared: ``"position"``, the inputs and output gradients of single positions. There is no other.
        positions: Which positions count: those that ``attention_mask`` marks (``"attended"``), those whose output has a
            label (``"labelled"``), or ``"all"``. A module without positions has one for each example.

    Raises:
        ValueError: An argument is not among the values above.
    """

    reads: ClassVar[Reads] = "factors or positions"
    unit: Literal["position"] = "position"
    positions: Positions = "attended"

    def __post_init__(self) -> None:
        one_of(self.unit, ("position",), "unit")
        one_of(self.positions, ("attended", "labelled", "all"), "positions")

    @property
    def definition(self) -> dict[str, Any]:
        return {
            "estimator": "DiagonalKronecker",
            "fisher_type": "empirical",
            "unit": self.unit,
            "positions": self.positions,
        }

    def init(self, parameter: ParameterInfo) -> State:
        # float64, because these are sums over many positions, and of matrices so few that it costs nothing
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=parameter.device)

        positions = zeros(dtype=torch.int64)
        if parameter.linear is None:
            return {"values": zeros(*parameter.shape, dtype=parameter.dtype), "positions": positions}
        m, *columns = parameter.shape
        return {"rows": zeros(m), "columns": zeros(*columns), "positions": positions}

    def update_(
        self, state: State, grads: PerExampleGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        state["positions"] += grads.num_terms()
        if parameter.linear is None:
            grads.add_position_squares_(state["values"])
            return
        for part, factor in (("rows", grads.output_grads), ("columns", grads.activations)):
            state[part] += _sum_of_squares(factor, grads.counted).view(state[part].shape)

    def result(self, state: State, count: int) -> dict[str, Tensor]:
        positions = (state["positions"].double() / count).float()  # a float32 has no room for large integers
        return {
            **{part: total.div_(count).float() for part, total in state.items() if part != "positions"},
            "positions": positions,
        }

    def collect(
        self,
        model: nn.Module,
        results: Mapping[str, Mapping[str, Tensor]],
        *,
        count: int,
        provenance: Mapping[str, Any],
        coverage: Mapping[str, Covered],
    ) -> FactoredStatistics:
        return FactoredStatistics(entries_of(results), count=count, provenance=provenance, coverage=coverage)


def _sum_of_squares(factor: Tensor, counted: Tensor | None) -> Tensor:
    """Sum the squares of ``[N, T, F]`` over the positions that count: ``[F]``."""
    factor = factor.to(accumulates_in(factor.dtype))
    return (factor if counted is None else factor * counted[..., None]).square().sum((0, 1))

"""The Fisher information of groups of entries, such as channels or layers, in the memory of the groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.backend import Backend
from fishkern.layers import Groups, PerExampleGrads, group_shape, group_squares
from fishkern.statistics.base import Estimator, ParameterInfo, Reads, State
from fishkern.statistics.coverage import Covered
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.predictive import Predictive
from fishkern.statistics.result import Statistics

_NAMED = (*get_args(Groups), "layer")


@dataclass(frozen=True)
class GroupFisher(Estimator):
    r"""Sums of the diagonal Fisher information over groups of entries, exact for every example.

        F[group] = 1/N sum_n sum_{p in group} ( d loss_n / d theta[p] )^2

    They equal the sums of :class:`DiagonalFisher` over the groups, and need memory for the groups only: squares are
    reduced as they are computed (:func:`fishkern.ops.group_sum_grad_squared`). The keys of the result are parameter
    names; by layer or function they are names of groups, and ``provenance["definition"]["groups"]`` lists the
    parameters of each.

    Args:
        by: Which entries make up a group.

            * ``"row"``: the entries with one index of the stored tensor's first axis (an output channel of
              ``nn.Linear``, an input channel of transformers' ``Conv1D``). Each entry of a vector is its own group.
            * ``"column"``: the entries with one index of all other axes. Each entry of a vector is its own group.
            * ``"tensor"``: a parameter.
            * ``"layer"``: a transformer layer, by its path in the model, with every other parameter (embeddings, head,
              final norm) as a group of its own.
            * A function from a parameter's canonical name to the name of its group.

        fisher_type: As for :class:`DiagonalFisher`.
        mc_samples: As for :class:`DiagonalFisher`.
        seed: As for :class:`DiagonalFisher`.
        max_label_passes: As for :class:`DiagonalFisher`.

    Raises:
        ValueError: An argument is not among the values above.
        TypeError: ``mc_samples``, ``seed`` or ``max_label_passes`` is not an integer.
    """

    reads: ClassVar[Reads] = "squares"
    by: Literal["row", "column", "tensor", "layer"] | Callable[[str], str] = "row"
    fisher_type: Literal["empirical", "mc", "type-2"] = "empirical"
    mc_samples: int = 1
    seed: int = 0
    max_label_passes: int = 4096

    def __post_init__(self) -> None:
        if not callable(self.by) and self.by not in _NAMED:
            raise ValueError(f"by must be one of {_NAMED} or a function of a parameter's name, got {self.by!r}.")
        for name in ("mc_samples", "seed", "max_label_passes"):
            object.__setattr__(self, name, getattr(self._diagonal, name))

    @property
    def definition(self) -> dict[str, Any]:
        by = "function" if callable(self.by) else self.by
        return {**self._diagonal.definition, "estimator": "GroupFisher", "by": by}

    @property
    def settings(self) -> dict[str, Any]:
        return self._diagonal.settings

    def objectives(self, answer: Predictive | Tensor, examples: range) -> Iterator[Tensor | None]:
        return self._diagonal.objectives(answer, examples)

    def init(self, parameter: ParameterInfo) -> State:
        # float64, because these are sums over many entries, and so few that it costs nothing
        shape = group_shape(parameter.shape, self._within)
        return torch.zeros(shape, dtype=torch.float64, device=parameter.device)

    def update_(
        self, state: Tensor, grads: PerExampleGrads, parameter: ParameterInfo, backend: Backend | None = None
    ) -> None:
        grads.add_group_squares_(state, self._within, backend)

    def of_gradient(self, grad: Tensor, parameter: ParameterInfo) -> State:
        return group_squares(grad, self._within)

    def result(self, state: Tensor, count: int) -> Tensor:
        # a tied weight's squares are formed as A^2 + (2A + E)E, which rounding may leave just below zero
        return super().result(state.clamp_(min=0), count)

    def collect(
        self,
        model: nn.Module,
        results: Mapping[str, Tensor],
        *,
        count: int,
        provenance: Mapping[str, Any],
        coverage: Mapping[str, Covered],
    ) -> Statistics:
        if not callable(self.by) and self.by != "layer":
            return Statistics(results, count=count, provenance=provenance, coverage=coverage)
        layers = hosts.layer_of(results) if self.by == "layer" else {}
        groups: dict[str, list[str]] = {}
        for name in results:
            layer = layers.get(name)
            group = self.by(name) if callable(self.by) else layer.path if layer else name
            if not isinstance(group, str):
                raise TypeError(f"the function of by= must name a group, by a str, for {name}; it gave {group!r}.")
            groups.setdefault(group, []).append(name)
        tensors = {group: sum(results[name].cpu().double() for name in names) for group, names in groups.items()}
        definition = {**provenance["definition"], "groups": groups}
        return Statistics(tensors, count=count, provenance={**provenance, "definition": definition}, coverage=coverage)

    @property
    def _diagonal(self) -> DiagonalFisher:
        """The recipe of the squares that are summed."""
        return DiagonalFisher(self.fisher_type, "example", self.mc_samples, self.seed, self.max_label_passes)

    @property
    def _within(self) -> Groups:
        """How the entries of one parameter are grouped."""
        return self.by if self.by in get_args(Groups) else "tensor"

"""Merging models by their Fisher information (Matena and Raffel, NeurIPS 2022, arXiv:2111.09832)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import from_file, number, patterns_of, weights_of
from fishkern.files import PIECE, AnyTensor
from fishkern.layers import UnsupportedModuleError, is_stored
from fishkern.methods.weighted_means import Equal, Merged
from fishkern.names import listed, renamed, without_wrappers
from fishkern.selection.base import matching
from fishkern.statistics import Held, Statistics
from fishkern.statistics.merge import check_definitions


def fisher_merge(
    models: Mapping[nn.Module, Statistics | Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 0.0,
    own: str | Iterable[str] = (),
) -> dict[str, Tensor]:
    """Merge models of one architecture: the mean of each weight, weighted by how much each model needs it.

        merged[p] = sum_m weight_m max(F_m[p], floor) w_m[p] / sum_m weight_m max(F_m[p], floor)

    computed in float64. Where all of these weights are zero, and for a parameter without statistics, it is
    ``sum_m weight_m w_m[p] / sum_m weight_m``, with equal weights the plain mean. ``F`` are the means over examples, so
    that a model does not weigh more for having seen more of them. Buffers must be equal.

    Args:
        models: At least two, each with its own statistics: fishkern's, or tensors by parameter name.
        weights: One for each model, at least 0 and not all of them 0; ``None`` for equal ones.
        floor: The least Fisher information of an entry (1e-6 in the authors' code). It draws entries that are hardly
            informative to the plain mean.
        own: Names or patterns of what each model keeps for itself, such as heads of different tasks: it is left out of
            the result.

    Returns:
        A state dict in the order, the dtypes and on the devices of the first model, where tied names share one tensor.
        Each model takes it over by ``model.load_state_dict(merged, strict=not own)``.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: Names, shapes, dtypes or buffers of the models differ; statistics are of other parameters, of other
            definitions, of groups, negative or not finite; ``own`` matches nothing; or a number is out of range.
        UnsupportedModuleError: A model is sharded, or its weights are quantised.
    """
    if not isinstance(models, Mapping) or not all(isinstance(model, nn.Module) for model in models):
        raise TypeError("models are given as {model: statistics, ...}, with their statistics.")
    parts = [_part_of(f"model {n}", model, statistics) for n, (model, statistics) in enumerate(models.items(), start=1)]
    merging = Merging(parts, weights=weights, floor=floor, own=own)
    merged: dict[str, Tensor] = {}
    for name, recipe in merging.recipes.items():
        first = parts[0].tensors[name]
        if (alias := parts[0].aliases.get(name)) in merged:
            merged[name] = merged[alias]
            continue
        merged[name] = torch.empty(first.shape, dtype=first.dtype, device=first.device)
        remaining = merged[name].view(-1)
        for piece in recipe.pieces(PIECE):
            remaining[: len(piece)] = piece
            remaining = remaining[len(piece) :]
    return merged


@dataclass(frozen=True, eq=False)
class Part:
    """One of the models that are merged.

    Args:
        name: What messages call it.
        tensors: Parameters and buffers by name, in memory or on disk.
        fisher: Statistics, or tensors by parameter name.
        parameters: Names of the tensors that are parameters, ``None`` where that is unknown.
        aliases: For each further name of a tied parameter its first one.
    """

    name: str
    tensors: Mapping[str, AnyTensor]
    fisher: Statistics | Mapping[str, AnyTensor]
    parameters: frozenset[str] | None
    aliases: Mapping[str, str]

    @property
    def scores(self) -> dict[str, AnyTensor]:
        """The Fisher information by the first name of each parameter, not read.

        Raises:
            TypeError: It is of another kind.
            ValueError: It is of groups, of no parameter of this model, or of one under two names.
        """
        fisher = self.fisher
        if isinstance(fisher, Statistics):
            if "groups" in fisher.provenance["definition"]:
                raise ValueError(f"the statistics of {self.name} are of groups; merging needs a number for each entry.")
            fisher = fisher.blocks
        elif isinstance(fisher, Held) or not isinstance(fisher, Mapping):
            raise TypeError(
                f"the statistics of {self.name} must be fishkern.Statistics or tensors by parameter name, got "
                f"{type(fisher).__name__}{from_file(fisher)}."
            )
        scores: dict[str, AnyTensor] = {}
        for name, score in renamed(fisher, without_wrappers).items():
            first = self.aliases.get(name, name)
            if first not in self.tensors or (self.parameters is not None and first not in self.parameters):
                raise ValueError(
                    f"the statistics of {self.name} hold {name}, which is no parameter there: they are of another "
                    "model, or their names need statistics.rename(). A checkpoint may also have other names than its "
                    "model, or the experts one by one, as transformers saves ViT and Mixtral: then merge the models in "
                    "memory by fishkern.fisher_merge(), and save the result."
                )
            if score.shape != self.tensors[first].shape:
                raise ValueError(
                    f"the statistics of {self.name} hold {name} with shape {tuple(score.shape)}, the model has "
                    f"{tuple(self.tensors[first].shape)}."
                )
            if first in scores:
                raise ValueError(f"the statistics of {self.name} hold {first} twice, also as {name}: leave one out.")
            scores[first] = score
        return scores


class Merging:
    """What each tensor of the result is made of. Nothing is read before its pieces are.

    Args:
        parts: The models.
        weights: See :func:`fisher_merge`.
        floor: See :func:`fisher_merge`.
        own: See :func:`fisher_merge`.

    Attributes:
        recipes: The tensors of the result by name, in the order of the first model, as :class:`Merged` or
            :class:`Equal`.
        own: The names that are left out.

    Raises:
        TypeError: See :func:`fisher_merge`.
        ValueError: See :func:`fisher_merge`.
    """

    recipes: dict[str, Merged | Equal]
    own: list[str]

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        weights: Sequence[float] | None,
        floor: float,
        own: str | Iterable[str],
    ) -> None:
        if len(parts) < 2:
            raise ValueError(f"merging takes at least two models, got {len(parts)}.")
        shares = _shares(parts, weights)
        floor = number(floor, "floor")
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor must be at least 0, got {floor:g}.")
        _check_definitions(parts)
        every = dict.fromkeys(name for part in parts for name in part.tensors)
        matched = matching(patterns_of(own, "own"), every, "own")
        firsts = {part.aliases.get(name, name) for part in parts for name in matched}
        self.own = [name for name in every if any(part.aliases.get(name, name) in firsts for part in parts)]
        kept = set(self.own)
        names = [name for name in every if name not in kept]
        _check_names(parts, names)
        scores = [{name: one for name, one in part.scores.items() if name not in kept} for part in parts]
        _check_scores(parts, scores)
        self.recipes = {}
        for name in names:
            tensors = [part.tensors[name] for part in parts]
            first = parts[0].aliases.get(name, name)
            known = parts[0].parameters
            if not tensors[0].dtype.is_floating_point or (known is not None and first not in known):
                self.recipes[name] = Equal(name, tensors, [part.name for part in parts])
            else:
                fishers = [one[first] for one in scores] if first in scores[0] else None
                labels = [f"{name} of {part.name}" for part in parts]
                self.recipes[name] = Merged(labels, tensors, fishers, shares, floor)


class _State(NamedTuple):
    tensors: dict[str, Tensor]
    parameters: frozenset[str]
    aliases: dict[str, str]


def _part_of(name: str, model: nn.Module, statistics: Any) -> Part:
    plain = hosts.unwrap(model)
    if reason := hosts.sharded(plain):
        raise UnsupportedModuleError(f"{reason}.")
    state = _state_of(plain)
    return Part(name, state.tensors, statistics, state.parameters, state.aliases)


def _state_of(model: nn.Module) -> _State:
    """Read a model's state dict, without wrappers, and which of its names are parameters and tied."""
    own = hosts.named_parameters(model, remove_duplicate=False)
    firsts: dict[nn.Parameter, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in own.items():
        if is_stored(parameter):
            raise UnsupportedModuleError(
                f"{name} stores its weight as {type(parameter.data).__name__} of {parameter.dtype}, which has no mean: "
                "merge the models before they are quantised."
            )
        if (first := firsts.setdefault(parameter, name)) != name:
            aliases[name] = first
    tensors = renamed(model.state_dict(), without_wrappers)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} in the state of {type(model).__name__} is no tensor, and cannot be merged.")
    return _State(tensors, frozenset(name for name in own if name not in aliases), aliases)


def _shares(parts: Sequence[Part], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1.0] * len(parts)
    return weights_of(weights, len(parts), "models")


def _check_definitions(parts: Sequence[Part]) -> None:
    first, *others = [part.fisher for part in parts if isinstance(part.fisher, Statistics)] or [None]
    for other in others:
        check_definitions(first, other, "are weights of one mean")


def _check_names(parts: Sequence[Part], names: Sequence[str]) -> None:
    """Refuse models whose tensors differ in names, shapes, dtypes or ties."""
    first = parts[0]
    for part in parts:
        if missing := [name for name in names if name not in part.tensors]:
            raise ValueError(
                f"{part.name} has no {listed(missing)}, and another model has: models of one architecture merge; what "
                "belongs to one alone, such as its head, is named in own=."
            )
        for name in names:
            ours, theirs = first.tensors[name], part.tensors[name]
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                described = [f"{tuple(one.shape)} of {one.dtype}" for one in (ours, theirs)]
                raise ValueError(
                    f"{name} is {described[0]} in {first.name} and {described[1]} in {part.name}: cast one of them, or "
                    "name it in own= if each is to keep its own."
                )
            if first.aliases.get(name) != part.aliases.get(name):
                raise ValueError(f"{name} is tied in one of {first.name} and {part.name} and not in the other.")


def _check_scores(parts: Sequence[Part], scores: Sequence[Mapping[str, AnyTensor]]) -> None:
    for part, one in zip(parts, scores, strict=True):
        if missing := [name for other in scores for name in other if name not in one]:
            raise ValueError(
                f"the statistics of {part.name} lack {listed(dict.fromkeys(missing))}, which others have: a weighted "
                "mean needs those of every model. Estimate them, or leave them out of all."
            )

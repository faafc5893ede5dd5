"""Models that several processes compute together (tensor parallel), on the same examples.

Processes are told apart by their places in the model's mesh: those of one mesh compute one model, on the same examples,
and each holds its part of the statistics. Where there are several meshes, each computes a replica of the model on
examples of its own, and sums are reduced over the processes that hold the same part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.backend import Backend
from fishkern.layers import UnsupportedModuleError
from fishkern.statistics.base import Estimator, ParameterInfo
from fishkern.statistics.batches import Examples, Reader
from fishkern.statistics.contents import bytes_of
from fishkern.statistics.data import Data
from fishkern.statistics.diagonal_fisher import DiagonalFisher
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States

# A statistic that several processes compute from equal numbers differs by rounding alone.
_ALIKE, _ALIKE_16_BIT = 1e-3, 0.05


@dataclass(frozen=True, eq=False)
class Team:
    """Which processes compute a model together, and which have examples of their own.

    Args:
        model: The processes with the parts of one model, on the same examples.
        data: The processes that hold the same part, each with examples of its own.
        mesh: The ``DeviceMesh`` of ``model``.
    """

    model: Ranks
    data: Ranks
    mesh: Any


@contextmanager
def tensor_parallel(model: nn.Module, everyone: Ranks) -> Iterator[Team | None]:
    """Tell processes that compute a model together from those with examples of their own.

    A collective operation where there are any.

    Args:
        model: Without running wrappers.
        everyone: All processes.

    Yields:
        The team of this process; ``None`` where it computes the model alone.

    Raises:
        UnsupportedModuleError: The processes are not divided into equal teams.
    """
    mesh = hosts.mesh_of(model)
    if mesh is None:
        yield None
        return
    own = tuple(mesh.mesh.flatten().tolist())
    teams = sorted(set(everyone.gathered(own)))
    members = sorted(rank for team in teams for rank in team)
    if members != list(range(everyone.count)) or len({len(team) for team in teams}) > 1:
        raise UnsupportedModuleError(
            f"the model is split over the processes {', '.join(map(str, teams))} of {everyone.count}: expected teams "
            "of equal size that have all processes in them, each once."
        )
    with Ranks.of([tuple(team[place] for team in teams) for place in range(len(own))]) as data:
        yield Team(Ranks(mesh.get_group()), data, mesh)


def check_tensor_parallel(estimator: Estimator) -> None:
    """Refuse recipes that are not computed on parts of parameters.

    Args:
        estimator: The recipe.

    Raises:
        UnsupportedModuleError: It is another one than the diagonal Fisher of examples or positions.
    """
    if not isinstance(estimator, DiagonalFisher) or estimator.unit == "batch":
        kind = type(estimator).__name__
        raise UnsupportedModuleError(
            f"tensor parallel splits the parameters, and {kind}({estimator.definition}) is not computed on parts of "
            "them: expected DiagonalFisher of unit='example' or 'position'. Load the whole model in each process for "
            "others."
        )


def refuse_for_parts_of_models(given: Mapping[str, Any]) -> None:
    """Refuse what is not built where tensor parallel splits a model.

    Args:
        given: Arguments of :func:`fishkern.estimate` by name.

    Raises:
        ValueError: One of them is not ``None``.
    """
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if names:
        are, it = ("is", "it") if len(names) == 1 else ("are", "them")
        raise ValueError(
            f"{' and '.join(names)} {are} not built for tensor parallel models: leave {it} out. Groups of parameters "
            "may be estimated one after the other (parameters=), each saved, and joined by fishkern.union."
        )


class SameData(Data):
    """Batches that all processes of a model must have alike.

    Args:
        batches: As for :class:`Data`.
        reader: As for :class:`Data`.
        device: As for :class:`Data`.
        max_examples: As for :class:`Data`.
        team: The processes.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        reader: Reader,
        device: torch.device,
        max_examples: int | None,
        team: Team,
    ) -> None:
        super().__init__(batches, reader, device, max_examples, team.data)
        self._team = team

    def __iter__(self) -> Iterator[Examples]:
        batches, number = super().__iter__(), 0
        while True:
            with self._team.model.failing_together():
                batch = next(batches, None)
            _demand_same(self._team, number, batch)
            if batch is None:
                return
            number += 1
            yield batch


def demand_same(team: Team, batches: Sequence[Examples]) -> None:
    """Refuse batches that differ between the processes of a model. A collective operation.

    Args:
        team: The processes.
        batches: This process's.

    Raises:
        ValueError: They differ.
    """
    for number in range(max(team.model.gathered(len(batches)))):
        _demand_same(team, number, batches[number] if number < len(batches) else None)


def _demand_same(team: Team, number: int, batch: Examples | None) -> None:
    said = team.model.gathered((None, b"") if batch is None else _said(batch))
    for rank, other in enumerate(said):
        if other == said[0]:
            continue
        sizes = ["no batch" if one[0] is None else f"{one[0][0]} examples" for one in (said[0], other)]
        what = f"{sizes[0]} and {sizes[1]}" if sizes[0] != sizes[1] else "examples of other values or layouts"
        raise ValueError(
            f"batch {number} differs between processes 0 and {rank} of the {team.model.count} that compute one model "
            f"together ({what}): give them the same batches, by a DataLoader without a sampler for ranks, or, for "
            f"several such teams, by a DistributedSampler with num_replicas={team.data.count} and, here, "
            f"rank={team.data.rank}."
        )


def _said(batch: Examples) -> tuple[Any, bytes]:
    """Say what a batch holds, by its size and a digest of its values."""
    hashed = blake2b(digest_size=16)
    for part in bytes_of(batch.content):
        hashed.update(part or b"")
    return (batch.num_examples, repr(batch.kind), tuple(batch.places)), hashed.digest()


class TensorParallelStates(States):
    """States of parameters, of split ones this process's part.

    Args:
        parameters: As for :class:`States`.
        estimator: Its states have the parameter's shape, and it adds to any part of it alike.
        backend: As for :class:`States`.
        team: The processes.
    """

    read_at_once = False  # a plan of transformers sums some gradients in a hook that comes after ours

    def __init__(
        self,
        parameters: Mapping[str, ParameterInfo],
        estimator: Estimator,
        backend: Backend | None = None,
        *,
        team: Team,
    ) -> None:
        self._team = team
        own = {key: replace(one, shape=hosts.local_part(one.value).shape) for key, one in parameters.items()}
        super().__init__(own, estimator, backend)

    def of_the_same_kind(self, estimator: Estimator, names: Collection[str]) -> States:
        infos = {name: self._parameters[name] for name in names}
        return TensorParallelStates(infos, estimator, self._backend, team=self._team)

    def largest(self, values: Tensor) -> float:
        largest = super().largest(values)
        largest = float("inf") if math.isnan(largest) else largest  # a maximum over ranks may lose NaN
        return self._team.model.largest(torch.tensor(largest, dtype=torch.float64)).item()

    def result(self, name: str, ranks: Ranks, count: int) -> Any:
        value = self.info(name).value
        result = super().result(name, self._team.data, count)
        if not hosts.is_distributed(value):
            demand_alike(name, value, result, self._team.model)
            return result
        return hosts.placed(result, value)


def demand_alike(name: str, parameter: Tensor, result: Tensor, model: Ranks) -> None:
    """Refuse a parameter that each process of a model holds, and of which each has found another statistic.

    A collective operation.

    Args:
        name: Canonical name of the parameter.
        parameter: The parameter.
        result: This process's statistic of it.
        model: The processes.

    Raises:
        UnsupportedModuleError: The statistics differ by more than rounding.
    """
    tolerance = _ALIKE_16_BIT if parameter.dtype.itemsize < 4 else _ALIKE
    said = model.gathered((result.sum().item(), result.max().item() if result.numel() else 0.0))
    for rank, other in enumerate(said):
        if any(abs(a - b) > tolerance * max(abs(a), abs(b)) for a, b in zip(said[0], other, strict=True)):
            raise UnsupportedModuleError(
                f"every process of the model holds {name}, and the processes 0 and {rank} find other gradients of "
                "it: each runs it on a part of the input, such as its own heads or positions, so that none has the "
                "whole gradient. Split its module with the others, as by SequenceParallel() of torch or "
                "replicated_with_grad_allreduce of transformers, or leave it out with parameters=."
            )

"""The states of sharded parameters: each rank adds up the entries of its shard, over the examples of all ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fishkern import hosts
from fishkern.backend import Backend
from fishkern.layers import Columns, PerExampleGrads, SummedGrads, columns_of
from fishkern.statistics.base import Constant, Estimator, ParameterInfo, State
from fishkern.statistics.direction_energy import DirectionEnergy
from fishkern.statistics.group_fisher import GroupFisher
from fishkern.statistics.sharded_factors import FactorExchange, Offer, cheaper, offer, sharing
from fishkern.statistics.sharding import Sharding
from fishkern.statistics.shards import Ranks
from fishkern.statistics.states import States


@dataclass
class _Pending:
    """What has been added on this rank and not yet exchanged.

    Args:
        grads: Gradients of which columns can be taken.
        whole: The squares of all others, of the whole parameter; ``None`` if there are none.
    """

    grads: list[PerExampleGrads] = field(default_factory=list)
    whole: Tensor | None = None


class ShardedStates(States):
    """States of parameters, of sharded ones the local shard.

    What is added waits until all ranks are at the same point of their backward passes (:meth:`exchange`): where an
    example does not reach a module, its rank has nothing to add there, and takes part with zeros.

    Args:
        parameters: As for :class:`States`.
        estimator: Adds to any part of the entries alike; or :class:`GroupFisher` or :class:`DirectionEnergy`, whose
            states are small and whole: each rank adds its own examples, and the sums over ranks are taken at the end.
        backend: As for :class:`States`.
        sharding: How the model is sharded.
    """

    read_at_once = False

    def __init__(
        self,
        parameters: Mapping[str, ParameterInfo],
        estimator: Estimator,
        backend: Backend | None = None,
        *,
        sharding: Sharding,
    ) -> None:
        self._sharding = sharding
        parts = {key: part for key, info in parameters.items() if (part := sharding.part(info.value)) is not None}
        of_entries = not isinstance(estimator, GroupFisher | DirectionEnergy)
        self._parts, self._of_groups = (parts, {}) if of_entries else ({}, parts)
        # under tensor parallel whole is what this rank computes with
        self._whole_shapes = {key: parts[key].whole if key in parts else one.shape for key, one in parameters.items()}
        self._pending: dict[str, _Pending] = {}
        self._error: Exception | None = None
        beside = {key for key, info in parameters.items() if key not in parts and hosts.is_distributed(info.value)}
        shapes = {key: part.shape for key, part in self._parts.items()}
        shapes |= {key: hosts.local_part(parameters[key].value).shape for key in beside}
        local = {key: replace(info, shape=shapes[key]) if key in shapes else info for key, info in parameters.items()}
        super().__init__(local, estimator, backend)

    @property
    def disjoint(self) -> bool:
        """Whether each entry's sum over all ranks is on one rank: no parameter is whole, or has replicas."""
        return self._parts.keys() == self._parameters.keys() and all(
            part.replicas is None for part in self._parts.values()
        )

    def numel(self, name: str) -> int:
        return self._whole_shapes[name].numel() if name in self._parts else super().numel(name)

    def held(self, name: str, indices: Tensor) -> tuple[slice | Tensor, Tensor]:
        if name not in self._parts:
            return super().held(name, indices)
        which, places = self._parts[name].held(indices)
        return which, places.to(self[name].device)

    def of_the_same_kind(self, estimator: Estimator, names: Collection[str]) -> ShardedStates:
        infos = {name: replace(self._parameters[name], shape=self._whole_shapes[name]) for name in names}
        return ShardedStates(infos, estimator, self._backend, sharding=self._sharding)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Keep an error until :meth:`complete`: in the middle of backward the other ranks wait for this one.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:  # any: a rank that raised it here would leave the others waiting
            self._error = self._error or error

    def add(self, name: str, grads: PerExampleGrads) -> None:
        with self.deferring():
            if name in self._parts:
                self._keep(name, grads)
            elif self._sharding.counts:
                super().add(name, grads)

    def add_single(self, name: str, grad: Tensor) -> None:
        """Add the gradient of an example that all ranks run.

        Args:
            name: Canonical name of its parameter.
            grad: The local shard of it.
        """
        part, grad = self._parts.get(name), self.gradient(name, grad)
        if (self._sharding.ranks.rank if part is None else part.replica) == 0:
            super().add_single(name, grad)

    def gradient(self, name: str, grad: Tensor) -> Tensor:
        """Give the part of a gradient that the state is of: all of it for groups, by a collective operation.

        Args:
            name: Canonical name of its parameter.
            grad: This rank's part.

        Returns:
            That part, or the whole gradient.
        """
        part = self._of_groups.get(name)
        return grad if part is None else part.placed(grad).full_tensor()

    def exchange(self) -> None:
        """Add up over the ranks what any of them has to add. A collective operation."""
        if not self._parts:
            return
        flags = torch.tensor([name in self._pending for name in self._parts], dtype=torch.uint8)
        any_has = self._sharding.ranks.largest(flags).tolist()
        pending = {
            name: self._pending.pop(name, _Pending()) for name, has in zip(self._parts, any_has, strict=True) if has
        }
        by_factors = self._exchange_factors(pending)
        for name, one in pending.items():
            if name not in by_factors:
                self._parts[name].add_(self._states[name], partial(self._fill, name, one))

    def complete(self) -> None:
        self.exchange()
        error, self._error = self._error, None
        with self._sharding.everyone.failing_together():
            if error is not None:
                raise error

    def largest(self, values: Tensor) -> float:
        largest = super().largest(values)
        largest = float("inf") if math.isnan(largest) else largest  # a maximum over ranks may lose NaN
        return self._sharding.everyone.largest(torch.tensor(largest, dtype=torch.float64)).item()

    def result(self, name: str, ranks: Ranks, count: int) -> Any:
        if (part := self._parts.get(name)) is None:
            return super().result(name, ranks, count)
        state = self.pop(name)
        part.sum_over_replicas_(state, ranks)
        return part.placed(self._estimator.result(state, count))

    def zero_(self) -> None:
        super().zero_()
        self._pending.clear()

    def _begin(self, parameter: ParameterInfo) -> State:
        """Make a state; what is computed of the parameter, such as a basis, is the same bits on every rank."""
        is_new = not parameter.kept
        state = super()._begin(parameter)
        constants = [leaf.value for leaf in tree_leaves(state) if isinstance(leaf, Constant)]
        for one in tree_leaves((parameter.kept, constants)) if is_new else ():
            if isinstance(one, Tensor) and one.untyped_storage()._cdata != _storage(parameter.value):
                self._sharding.ranks.take_first_(one)
        return state

    def _exchange_factors(self, pending: Mapping[str, _Pending]) -> set[str]:
        """Send the factors of linear maps where they are fewer bytes than the squares; return whose they were."""
        names = [name for name in pending if self._parts[name].axis == 0 and len(self._whole_shapes[name]) > 1]
        if not names:
            return set()
        mine = {name: pending[name].grads for name in names if pending[name].whole is None}
        added = [mine.get(name, []) for name in names]
        own = [offer(mine[name], added, self._parts[name]) if name in mine else Offer(-1) for name in names]
        told = self._sharding.ranks.every(torch.tensor(own, dtype=torch.int32)).tolist()
        sent: set[str] = set()
        for parts, offers in sharing({name: self._parts[name] for name in names}, told, self._sharding.ranks):
            sums = [self._parameters[name].dtype.itemsize for name in parts]
            chosen = cheaper(list(parts.values()), sums, offers)
            parts = {name: part for (name, part), choose in zip(parts.items(), chosen, strict=True) if choose}
            if parts:
                grads = {name: pending[name].grads[0] for name in parts if pending[name].grads}
                FactorExchange(parts, offers, grads).add_(self._states, self._update_block)
                sent.update(parts)
        return sent

    def _update_block(self, name: str, block: Tensor, grads: PerExampleGrads) -> None:
        with self.deferring():
            self._estimator.update_(block, grads, self._parameters[name], self._backend)

    def _keep(self, name: str, grads: PerExampleGrads) -> None:
        """Keep gradients until the ranks exchange what they have to add."""
        if not self._sharding.speaks:
            return
        pending = self._pending.setdefault(name, _Pending())
        if columns_of(grads, slice(0, 0)) is not None and not self._ends_with_pass(grads):
            pending.grads.append(grads)
            return
        if pending.whole is None:
            info = self._parameters[name]
            pending.whole = torch.zeros(self._whole_shapes[name], dtype=info.dtype, device=grads.device)
        self._estimator.update_(pending.whole, grads, self._parameters[name], self._backend)

    def _ends_with_pass(self, grads: PerExampleGrads) -> bool:
        """Tell whether gradients read a parameter that a module gets as its input, such as a table of positions."""
        uses = grads.uses if isinstance(grads, SummedGrads) else (grads,)
        activations = [one.activations for one in uses if hasattr(one, "activations")]
        return any(self._sharding.units.is_gathered(one) for one in activations)

    def _fill(self, name: str, pending: _Pending, block: Tensor, columns: Columns | None) -> None:
        """Add this rank's squares to a block."""
        with self.deferring():
            for grads in pending.grads:
                part = grads if columns is None else columns_of(grads, columns)
                self._estimator.update_(block, part, self._parameters[name], self._backend)
            if pending.whole is not None:
                whole = pending.whole
                block += whole if columns is None else whole.flatten(1)[:, columns]


def _storage(parameter: Tensor) -> int:
    """Tell the memory of a parameter, of a sharded one that of its shard."""
    return hosts.local_part(parameter).untyped_storage()._cdata

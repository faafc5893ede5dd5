"""What a pass has found out about a model, for later passes: its plans, and the data that they are made for.

Only what a pass would find again is kept: what its first batch shows. What later batches contradict (rows that follow
the data) is found out in each pass anew, as in one that knows nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import nn

from fishkern.layers import Connection, Plan
from fishkern.statistics.batches import Examples
from fishkern.statistics.contents import bytes_of
from fishkern.statistics.independence import Independence
from fishkern.statistics.structure import Facts, demand_same, facts_of_batch


class Kind(NamedTuple):
    """A kind of batches that has plans of its own.

    Args:
        lone: Whether there is one example in a batch.
        packed: The batch's own ``kind``: ``None`` unless its rows are packed.
    """

    lone: bool
    packed: Hashable = None


class Known:
    """What earlier passes over some parameters have found out.

    Args:
        batch: The batch whose structure first batches must have.

    Attributes:
        announced: Parameters on the slow path about which a warning was given.
        reasons: Why the self-check sends parameters through the loop, by canonical name.
        distrusted: Paths of modules whose row count turned out to depend on the data.
    """

    def __init__(self, batch: Examples) -> None:
        self._structure: Facts = facts_of_batch(batch.content)
        self._plans: dict[Kind, Plan] = {}
        self._seen: dict[Kind, set[bytes]] = defaultdict(set)
        self._checkpointing: tuple[str, ...] = ()
        self._segments = False
        self._dtypes: set[torch.dtype] = set()
        self._note: str | None = None
        self.announced: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.distrusted: frozenset[str] = frozenset()

    def demand_structure(self, batch: Examples) -> None:
        """Refuse a first batch of another structure.

        Args:
            batch: The batch.

        Raises:
            ValueError: It has other entries, or some of another kind.
        """
        demand_same(self._structure, facts_of_batch(batch.content))

    def begin(self, model: nn.Module, independence: Independence, connection: Connection) -> None:
        """Tell a new pass what it would find out.

        Args:
            model: In the modes of the pass.
            independence: Of the pass.
            connection: Of the pass.
        """
        # modules that train in a pass are those with activation checkpointing, under which a survey may differ
        self._checkpointing = tuple(path for path, module in model.named_modules() if module.training)
        independence.note = self._note
        independence.precision.dtypes |= self._dtypes
        if self._segments:
            connection.connect()

    def keep(self, independence: Independence, connection: Connection) -> None:
        """Keep what a pass has found out about its precision, its examples and its segments.

        Args:
            independence: Of the pass.
            connection: Of the pass.
        """
        self._note = independence.note
        self._dtypes = set(independence.precision.dtypes)
        self._segments |= connection.connected

    def has_seen(self, kind: Kind, few: Examples) -> bool:
        """Tell whether these examples were checked before, value for value.

        Args:
            kind: Of the batch that they are of.
            few: The first examples of a batch.

        Returns:
            Whether they were. Anything but tensors, arrays and single values is not recognised.
        """
        return bool(self._seen[kind]) and self._digest(few) in self._seen[kind]

    def note_seen(self, kind: Kind, few: Examples) -> None:
        """Remember that examples were checked.

        Args:
            kind: Of the batch that they are of.
            few: The examples.
        """
        if (digest := self._digest(few)) is not None:
            self._seen[kind].add(digest)

    def plan_for(self, kind: Kind, few: Examples) -> Plan | None:
        """Return the plan that was made from these examples.

        Args:
            kind: Of the batches that it is for.
            few: The first examples of a batch.

        Returns:
            The plan, or ``None`` if they are new.
        """
        return self._plans.get(kind) if self.has_seen(kind, few) else None

    def learn(self, kind: Kind, few: Examples, plan: Plan, distrusted: Collection[str]) -> None:
        """Keep a plan. If it differs from the earlier one, that was only for the data from which it was made.

        Args:
            kind: Of the batches that it is for.
            few: The examples it was made from.
            plan: The plan.
            distrusted: Paths of modules whose row count turned out to depend on the data.
        """
        self.distrusted = frozenset(distrusted)
        before = self._plans.get(kind)
        if before is None or _described(before) != _described(plan):
            self._plans[kind] = plan
            self._seen[kind].clear()
        self.note_seen(kind, few)

    def has_checked(self, kind: Kind, plan: Plan) -> bool:
        """Tell whether all that a plan captures was compared with autograd, and is captured in the same way.

        Args:
            kind: Of the batches that it is for.
            plan: A new plan.

        Returns:
            Whether it was. Where no gradient but zeros had arrived, nothing was compared.
        """
        before = self._plans.get(kind)
        if before is None or before.unsettled - plan.unsettled:
            return False
        uses = before.uses
        return all(uses.get(key) == each for key, each in plan.uses.items())

    def _digest(self, few: Examples) -> bytes | None:
        hashed = blake2b(repr(self._checkpointing).encode(), digest_size=16)
        for part in bytes_of(few.content):
            if part is None:
                return None
            hashed.update(part)
        return hashed.digest()


def _described(plan: Plan) -> tuple[Any, ...]:
    """Describe all of a plan that decides what is added, and to what rounding."""
    return plan.uses, plan.unsettled, plan.loop.keys(), plan.reused, set(plan.idle)

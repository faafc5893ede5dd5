"""Give a capture what a survey has kept, so that the surveyed examples need not run once more.

The capture does what it would have done in a pass: the same rules get the same calls and gradients, and uses of one
parameter are added up before they are squared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.layers.capture import Capture, Passed
from fishkern.layers.observe import Observation, Record, versions_of
from fishkern.layers.path_plan import Plan
from fishkern.layers.row_order import ONE_EACH
from fishkern.layers.site import Site
from fishkern.layers.uses import Sink


class Replay:
    """The calls of the modules of a plan, and the gradients at their outputs.

    Args:
        records: Of each module of the plan.
        arrivals: For each module and call at which gradients arrived, as the how many-th they came.
        num_examples: ``N`` of the surveyed examples.
    """

    def __init__(
        self, records: Mapping[nn.Module, Record], arrivals: Mapping[tuple[nn.Module, int], int], num_examples: int
    ) -> None:
        self._calls = {
            module: [
                (number, record.calls[call][0], record.entered[call], record.hooks[call], record.kept.get(call))
                for call, number in enumerate(record.numbers)
            ]
            for module, record in records.items()
        }
        self._arrivals = arrivals
        self._num_examples = num_examples
        self._versions = self._written()

    @property
    def is_intact(self) -> bool:
        """Whether the tensors are as they were: not where a model writes its inputs into one memory in every run."""
        return self._written() == self._versions

    def _written(self) -> list[list[int]]:
        """Count how often the tensors of each call have been written into."""
        each = (one for calls in self._calls.values() for _, call, entered, *_ in calls for one in (call, entered))
        return [versions_of(one.tensors) for one in each]

    @classmethod
    def of(cls, plan: Plan, observation: Observation, num_examples: int) -> Replay | None:
        """Keep what the sites of a plan need.

        Args:
            plan: A plan that was made of the observation.
            observation: It has kept gradients.
            num_examples: ``N``.

        Returns:
            ``None`` where a capture needs more than calls and gradients (examples of several rows, inputs that are
            written into, modules that are split over processes), or where they were not kept whole (under activation
            checkpointing, or of a host that owns no parameter).
        """
        records = {site.module: observation.records[site.module] for site in plan.sites}
        if not all(record.is_kept for record in records.values()) or any(map(_needs_a_pass, plan.sites)):
            return None
        return cls(records, observation.arrivals, num_examples)

    def run(
        self, sites: Sequence[Site], sink: Sink, *, counted: Tensor | None = None, **options: Any
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Let a capture take the calls and gradients at some sites.

        Args:
            sites: All sites of some parameters.
            sink: As for :class:`Capture`.
            counted: As for :meth:`Capture.forward`.
            **options: As for :class:`Capture`.

        Returns:
            Names of the parameters whose gradients were held back, and paths of modules whose rows turned out not to be
            the examples' own.
        """
        passed = []
        for site in sites:
            for place, (number, call, entered, hooks, kept) in enumerate(self._calls[site.module]):
                arrival = self._arrivals.get((site.module, place))
                grads = None if kept is None or arrival is None else kept.joined(self._num_examples)
                passed.append(Passed(site, entered if site.reruns else call, grads, hooks, number, arrival or 0))
        capture = Capture(sites, sink, **options)
        with torch.no_grad():
            capture.take(passed, self._num_examples, counted)
        return capture.withheld, frozenset(capture.distrusted)


def groups(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Divide sites into groups that have no parameter in common.

    Args:
        sites: Of a plan.

    Yields:
        The sites of each group, in order.
    """
    of_key: dict[str, list[Site]] = {}
    for site in sites:
        joined: list[Site] = []
        for group in {id(of_key[key]): of_key[key] for key in site.keys.values() if key in of_key}.values():
            joined += group
        joined.append(site)
        of_key |= {key: joined for one in joined for key in one.keys.values()}
    yield from {id(group): group for group in of_key.values()}.values()


def _needs_a_pass(site: Site) -> bool:
    more = site.rewritten or site.entry is not None
    return more or site.order != ONE_EACH or hosts.split_of(site.module) is not None

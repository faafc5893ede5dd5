"""Turn what was observed of packed rows into sites: documents lie within the rows, along an axis of positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from fishkern.layers.base import Call
from fishkern.layers.documents import Documents
from fishkern.layers.generic import same_rows_alone
from fishkern.layers.observe import Observation, Record
from fishkern.layers.planner import Planner, Whole
from fishkern.layers.site import Layout


class PackedPlanner(Planner):
    """Turns the records of packed rows into sites: the rows of a call are those of the batch, and its positions too."""

    def __init__(
        self,
        model: nn.Module,
        owners: Mapping[str, Mapping[str, str]],
        observation: Observation,
        distrusted: Collection[str],
        documents: Documents,
        whole: Whole = nullcontext,
    ) -> None:
        super().__init__(model, owners, observation, distrusted, documents.count, whole=whole)
        self._documents = documents

    def _layout(self, record: Record) -> tuple[Layout | None, bool]:
        settled = any(len(one.nonzero) for one in record.touched)
        return (Layout.BATCHED if self._axes(record) else None), settled

    def _axis(self, record: Record) -> int:
        return min(self._axes(record))

    def _axes(self, record: Record) -> set[int]:
        """List the axes of the positions that fit every output; the last axis is that of the features."""
        outputs = [output for _, output in record.calls]
        if not outputs or not all(isinstance(output, Tensor) for output in outputs):
            return set()
        fitting = set(range(1, min(output.ndim for output in outputs) - 1))
        if record.axes is not None:
            fitting &= record.axes
        return {axis for axis in fitting if all(self._documents.fit(output, axis) for output in outputs)}

    def _are_picked(self, record: Record) -> bool:
        return False

    def _touches_apart(self, record: Record) -> bool:
        return any(len(one.nonzero) for one in record.touched) and 1 in (record.axes or ())

    def _runs_alone(self, record: Record, call: Call, output: Any) -> bool:
        return same_rows_alone(call, output, self._num_examples, self._documents)

    def _is_sliced(self, record: Record, tensor: Tensor) -> bool:
        return self._documents.fit(tensor)

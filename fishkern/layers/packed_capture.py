"""Capture on packed rows: the examples are the documents in them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fishkern.layers.capture import Capture, Deferring
from fishkern.layers.documents import Documents
from fishkern.layers.grads import PerExampleGrads, PositionGrads
from fishkern.layers.hooks import Arrival
from fishkern.layers.packed_grads import one_by_one, packed
from fishkern.layers.site import Site
from fishkern.layers.unsupported import UnsupportedModuleError, leave_out
from fishkern.layers.uses import Sink
from fishkern.names import listed


class PackedCapture(Capture):
    """Hooks on the sites of a model for one batch of packed rows.

    The rules see the rows ``[R, T, ...]``, and the terms of their positions are put into the order of the documents.

    Args:
        sites: From a survey of packed rows.
        sink: As for :class:`Capture`.
        documents: The documents of the batch, ``N``, whose losses are back-propagated.
        squares: As for :class:`Capture`.
        factors: As for :class:`Capture`; the gradients of each document are then delivered alone, unpacked.
        deferring: As for :class:`Capture`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        sink: Sink,
        documents: Documents,
        *,
        squares: bool = True,
        factors: bool = False,
        deferring: Deferring = nullcontext,
    ) -> None:
        self._documents = documents
        sink = one_by_one(sink) if factors else sink
        super().__init__(sites, sink, squares=squares, factors=factors, deferring=deferring)

    def _is_one_row_for_all(self, arrival: Arrival) -> bool:
        return False  # all documents of a batch may be in one row

    def _receive_by_rule(self, arrival: Arrival) -> None:
        (output_grads,) = arrival.grads
        if arrival.site.layer.sums_processes:
            keys = sorted(arrival.site.keys.values())
            raise UnsupportedModuleError(
                f"the rows of this batch are packed, and {listed(keys)} are summed over the positions or heads of "
                "several processes before documents are told apart. Use a collator that keeps one example in each row. "
                f"{leave_out(keys, by_autograd=False)}"
            )
        for key, grads in arrival.per_example_grads():
            axes = output_grads.shape[1 : 1 + self._axes_between(grads, output_grads)]
            if self._counted is not None:
                grads = replace(grads, counted=self._spread_over(axes, arrival.site.axis))
            self._deliver(key, packed(grads, self._documents, axes, arrival.site.axis))

    def _axes_between(self, grads: PerExampleGrads, output_grads: Tensor) -> int:
        """Count the axes of an output between its rows and its features."""
        features = grads.features if isinstance(grads, PositionGrads) else 1
        return output_grads.ndim - 1 - features

    def _spread_over(self, axes: torch.Size, axis: int) -> Tensor:
        """Spread which positions count over the other axes of an output, ``[R, prod(axes)]``."""
        R, T = self._documents.shape
        sizes = [T if place == axis else 1 for place in range(1, len(axes) + 1)]
        return self._counted.view(R, *sizes).expand(R, *axes).reshape(R, -1)

    def _part(self, site: Site, tensor: Tensor, n: int) -> Tensor:
        return self._documents.cut(tensor, n)

    def _has_the_rows(self, arrival: Arrival) -> bool:
        site, saved, grads = arrival.site, arrival.saved, arrival.grads
        if site.layer is not None:
            return self._documents.fit(grads[0], site.axis)
        alike = len(saved) == len(site.sliced)
        alike &= all(self._documents.fit(tensor) for tensor, cut in zip(saved, site.sliced, strict=False) if cut)
        alike &= all(self._documents.fit(grad) for grad in grads if grad is not None)
        return alike and self._uses.calls(site) == 1


def capture_of(
    sites: Sequence[Site],
    sink: Sink,
    documents: Documents | None,
    *,
    squares: bool = True,
    factors: bool = False,
    deferring: Deferring = nullcontext,
) -> Capture:
    """Make the capture for a batch.

    Args:
        sites: As for :class:`Capture`.
        sink: As for :class:`Capture`.
        documents: The documents of packed rows; ``None`` for any other batch.
        squares: As for :class:`Capture`.
        factors: As for :class:`Capture`.
        deferring: As for :class:`Capture`.

    Returns:
        Hooks that are not in place yet.
    """
    options = {"squares": squares, "factors": factors, "deferring": deferring}
    return Capture(sites, sink, **options) if documents is None else PackedCapture(sites, sink, documents, **options)

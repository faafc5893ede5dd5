"""The slices of every parameter of a pool: how many entries of each are in training, and a selection without some."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import reduce
from operator import or_
from typing import Any

import torch

from fishkern.freezing.slices import Key, Slices
from fishkern.selection import Entries, Selection
from fishkern.selection.ranges import Ranges


class SlicedPool:
    """The slices of the parameters of a pool.

    Args:
        slices: How each parameter is cut.
        shapes: The pool.

    Attributes:
        pieces: The rows or columns of each slice, in the order of the pool.
    """

    def __init__(self, slices: Slices, shapes: Mapping[str, torch.Size]) -> None:
        self.pieces: dict[Key, Ranges] = {
            (name, number): piece
            for name, shape in shapes.items()
            for number, piece in enumerate(slices.of(name, shape))
        }
        self._known: tuple[Selection, dict[Key, int]] | None = None

    def sizes(self, selection: Selection) -> dict[Key, int]:
        """Count the entries of each slice that are in training.

        Args:
            selection: What is trained of the pool.

        Returns:
            By slice, of those with at least one.
        """
        if self._known is None or self._known[0] is not selection:  # a freezer asks at every reading
            self._known = selection, self._counted(selection)
        return dict(self._known[1])

    def without(self, selection: Selection, frozen: Collection[Key], provenance: Mapping[str, Any]) -> Selection:
        """Take some slices out of a selection.

        Args:
            selection: What is trained of the pool.
            frozen: The slices to take out.
            provenance: Of the result.

        Returns:
            A selection out of the same pool. Ranges stay ranges along their axis, lists lose the entries.
        """
        by_name: dict[str, list[Ranges]] = defaultdict(list)
        for name, number in frozen:
            by_name[name].append(self.pieces[name, number])
        entries = {name: selection.entries(name) for name in selection.names}
        for name, pieces in by_name.items():
            entries[name] = entries[name] - Entries.of(entries[name].shape, reduce(or_, pieces), name)
        return Selection.from_entries(entries, provenance=provenance)

    def _counted(self, selection: Selection) -> dict[Key, int]:
        counts = {}
        for (name, number), piece in self.pieces.items():
            entries = selection.entries(name)
            if count := entries.count and entries.shared(Entries.of(entries.shape, piece, name)):
                counts[name, number] = count
        return counts

"""A site: one module whose calls are captured, by which rule, and which rows belong to which example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from torch import nn

from fishkern.layers.base import Layer
from fishkern.layers.row_order import ONE_EACH, RowOrder


class Layout(Enum):
    """Which rows of a call belong to which example."""

    BATCHED = "the first axis is the example axis"
    FLATTENED = "the rows are those of [N, T], example after example"
    SHARED = "one output for all examples, expanded so that each has its own gradient"


@dataclass(frozen=True, eq=False)
class Site:
    """One module whose calls are captured.

    Args:
        path: Its name in the model.
        module: The module.
        layer: Its rule; ``None`` for the generic path, which runs the module once more for each example.
        keys: Canonical names of the requested parameters, by their names in the module.
        layout: Whose rows they are.
        block: The enclosing module whose input ``[G N, T, ...]`` says ``T`` for ``FLATTENED``, and how many rows share
            an output for ``SHARED``.
        order: Which rows an example has, where it has several: then there are ``G N`` instead of ``N``.
        entry: For examples of several rows: the module that was called on all of them, by whose output it is checked on
            every batch whose they are, since their numbers may follow the data; ``None`` where the batch says it.
        sliced: For the generic path: which tensors of a call have the example axis.
        picked: Whether the rows are picked from the positions of the examples (a pooler's first token, an expert's
            tokens). Their number may then depend on the data, so whose rows they are is checked on every batch.
        rewritten: Whether the model writes into an input of the module while or after it runs, so a copy is kept.
        axis: For packed rows: which axis of the output is that of the positions.
        settled: Whether a gradient has confirmed the layout. Where none but zeros arrived, it is what the sizes of the
            rows allow.
    """

    path: str
    module: nn.Module
    layer: Layer | None
    keys: Mapping[str, str]
    layout: Layout
    block: nn.Module | None = None
    order: RowOrder = ONE_EACH
    entry: nn.Module | None = None
    sliced: tuple[bool, ...] = ()
    picked: bool = False
    rewritten: bool = False
    axis: int = 1
    settled: bool = True

    @cached_property
    def reads_input(self) -> bool:
        """Whether the tensors of a call are saved until its backward."""
        return self.layer is None or self.layer.reads_input(frozenset(self.keys))

    @cached_property
    def reruns(self) -> bool:
        """Whether the module runs once more to get the gradients."""
        return self.layer is None or self.layer.reruns


class Idle(NamedTuple):
    """A module that shares a parameter with sites, and that the surveyed examples did not call.

    Attributes:
        module: The module.
        path: Its name in the model.
        key: Canonical name of the parameter.
    """

    module: nn.Module
    path: str
    key: str

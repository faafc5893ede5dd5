"""Changed entries of a tensor as engines of inference take them: its name in the checkpoint, flat indices, values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fishkern.names import listed
from fishkern.ops.streaming_topk import index_dtype
from fishkern.selection.entries import Entries
from fishkern.selection.result import Selection


class WeightPatch(NamedTuple):
    """New values of some entries of one tensor of a checkpoint.

    The fields, and their order, are those of vLLM's ``CheckpointWeightPatch``.

    Attributes:
        name: The tensor's name in the checkpoint.
        shape: Its whole shape there.
        dtype: That of the values.
        values: ``[K]``, on the CPU.
        indices: ``[K]``, flat (row-major) indices into the whole tensor, ascending and distinct; int32, or int64 for a
            tensor of more than 2^31 entries.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Placed:
    """Selected entries of one tensor of a checkpoint, and which entries of the model they are.

    Attributes:
        entries: Of the checkpoint's tensor.
        sources: Names of the parameters, whose values one after another are meant by ``order``.
        order: ``[K]``, where the value of each entry is; ``None`` for the order that they have.
    """

    entries: Entries
    sources: tuple[str, ...]
    order: Tensor | None = None

    def values(self, values: Mapping[str, Tensor]) -> Tensor:
        """Take the values of the entries.

        Args:
            values: For each parameter with selected entries ``[K]``, ascending.

        Returns:
            ``[K]``, in the order of the checkpoint's entries.
        """
        given = [values[name] for name in self.sources]
        joined = given[0] if len(given) == 1 else torch.cat(given)
        return joined if self.order is None else joined[self.order]


@dataclass(frozen=True)
class CheckpointLayout:
    """Where the entries of a model's parameters are in its checkpoint.

    Of a model of transformers made by ``fishkern.integrations.layout.checkpoint_layout``.

    Attributes:
        names: The checkpoint's name of each parameter that is stored as it is.
        groups: Parameters that are stored in another form, those together that share a tensor of the checkpoint.
        convert: From all parameters of a group by name to the checkpoint's tensors by name; it moves entries alone.
        shapes: The shape of each parameter of a group.
        absent: Why a parameter is in no checkpoint, by name.
    """

    names: Mapping[str, str]
    groups: Sequence[tuple[str, ...]] = ()
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    def placed(self, entries: Mapping[str, Entries]) -> dict[str, Placed]:
        """Find selected entries in the checkpoint.

        A group is converted once, as numbers of its entries: 8 bytes for each of them meanwhile.

        Args:
            entries: Of parameters by name, of each at least one.

        Returns:
            By the checkpoint's names, those that have selected entries.

        Raises:
            ValueError: A parameter is in no checkpoint, or two are under one name, or a conversion does more than move
                entries.
        """
        grouped = {name for group in self.groups for name in group}
        if absent := [name for name in entries if name not in self.names and name not in grouped]:
            reason = self.absent.get(absent[0], "the layout is of another model")
            raise ValueError(f"{listed(absent)} is in no checkpoint of the model: {reason}.")
        placed: dict[str, Placed] = {}
        for name, selected in entries.items():
            if name in self.names:
                _add(placed, self.names[name], Placed(selected, (name,)))
        for group in self.groups:
            if sources := tuple(name for name in group if name in entries):
                for name, one in self._of_group(group, sources, entries).items():
                    _add(placed, name, one)
        return placed

    def _of_group(
        self, group: tuple[str, ...], sources: tuple[str, ...], entries: Mapping[str, Entries]
    ) -> dict[str, Placed]:
        numbers, first, selected = {}, 0, []
        for name in group:  # every entry gets a number, in all parameters of the group
            count = self.shapes[name].numel()
            numbers[name] = torch.arange(first, first + count).view(self.shapes[name])
            if name in sources:
                selected.append(entries[name].indices().long() + first)
            first += count
        converted = self.convert(numbers)
        stored = torch.cat([tensor.reshape(-1) for tensor in converted.values()])
        if stored.dtype != torch.int64 or not torch.equal(stored.sort().values, torch.arange(first)):
            raise ValueError(
                f"a checkpoint stores {listed(group)} by more than moving entries: stream without the layout, to a "
                "reader that has the same model."
            )
        wanted, placed = torch.cat(selected), {}
        for name, tensor in converted.items():
            flat = tensor.reshape(-1)
            places = torch.searchsorted(wanted, flat).clamp_(max=len(wanted) - 1)
            at = (wanted[places] == flat).nonzero().view(-1)
            if len(at):
                held = Entries.of(tensor.shape, at.to(index_dtype(len(flat))), name)
                placed[name] = Placed(held, sources, places[at])
        return placed


def _add(placed: dict[str, Placed], name: str, one: Placed) -> None:
    if name in placed:
        raise ValueError(f"{listed([*placed[name].sources, *one.sources])} are one tensor {name} of the checkpoint.")
    placed[name] = one


def placed_entries(selection: Selection, layout: CheckpointLayout | None) -> dict[str, Placed]:
    """Find the selected entries in a checkpoint.

    Args:
        selection: What is selected.
        layout: Of the checkpoint; ``None`` for names and indices as the model has them.

    Returns:
        By name, those that have selected entries.

    Raises:
        ValueError: A parameter is in no checkpoint.
    """
    entries = {name: selection.entries(name) for name, count in selection.counts.items() if count}
    if layout is None:
        return {name: Placed(selected, (name,)) for name, selected in entries.items()}
    return layout.placed(entries)


def patch(name: str, entries: Entries, values: Tensor) -> WeightPatch:
    """Make the patch of one tensor.

    Args:
        name: The tensor's.
        entries: Which entries.
        values: ``[K]``, ascending.

    Returns:
        The patch.
    """
    return WeightPatch(name, tuple(entries.shape), values.dtype, values, entries.indices())

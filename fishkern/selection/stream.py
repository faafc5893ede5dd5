"""Trained values sent step by step, from the process that trains to the one that samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.selection.entries import Entries
from fishkern.selection.format import form_of
from fishkern.selection.local import own_entries, own_values
from fishkern.selection.patches import CheckpointLayout, Placed, WeightPatch, patch, placed_entries
from fishkern.selection.result import Selection
from fishkern.selection.start import agreed_tensors, named_tensors
from fishkern.selection.updates import DeltaUpdate
from fishkern.selection.values import check_base, digest_of_others, selected_values


class DeltaStream:
    """Sends what a masked optimizer has changed, without looking for it: :meth:`update` after a step or some steps.

    The first update has entries and values. The following ones have values alone, of those selected entries that have
    changed since, until the selection is another one; then the new entries come, and with them the last values of those
    that are selected no more. The values that were sent last are kept for it: 2 bytes for each selected entry in 16
    bits, where a snapshot takes them for the whole model. Whatever is trained outside the selection, such as by
    ``outside="train"``, is not sent. Of a model that FSDP2 shards all ranks make the
    stream and its updates together, and each gets the whole; one of them sends it.

    Args:
        model: The model that is trained.
        layout: Send names and indices of the checkpoint; ``None`` for those of the model.
        dtype: What values are rounded to, if the sampler has another one; ``None`` for the parameters' own.

    Raises:
        ValueError: ``dtype`` is no floating one.
    """

    def __init__(
        self, model: nn.Module, *, layout: CheckpointLayout | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"values are floating, and dtype= is {dtype}.")
        self._model, self._layout, self._dtype = model, layout, dtype
        self._sent: _Sent | None = None
        self._values: dict[str, Tensor] = {}
        self._number = 0

    @torch.no_grad()
    def update(self, selection: Selection) -> DeltaUpdate:
        """Take the present values.

        Args:
            selection: What is trained now, ``optimizer.selection``.

        Returns:
            The update, to be read after the one before and before the next one.

        Raises:
            ValueError: The selection does not fit the model, its pool has changed, or it has entries that the layout
                does not have.
            RuntimeError: Ranks that shard the model have different selections.
        """
        before = self._sent
        sent = before if before is not None and selection is before.given else self._checked(selection)
        named = named_tensors(self._model)
        values = self._present(named, sent.selection, sent.placed)
        if before is not None and self._number and sent.placed is before.placed:
            changed = {name: _changed(one, self._values[name]) for name, one in values.items()}
            changed = {name: places for name, places in changed.items() if places.count}
            made = DeltaUpdate(
                self._number, {name: places.gather(values[name]) for name, places in changed.items()}, changed=changed
            )
        else:  # to a reader that begins, also the values of all others that have ever moved
            ended = (sent.moved if before is None or not self._number else before.selection) - sent.selection
            places = placed_entries(ended, self._layout)
            made = DeltaUpdate(
                self._number,
                values,
                {name: one.entries for name, one in sent.placed.items()},
                ended={name: one.entries for name, one in places.items()},
                last=self._present(named, ended, places),
                digests=self._digests(named, sent.moved),
            )
        self._sent, self._values, self._number = sent, values, self._number + 1
        return made

    def restart(self) -> None:
        """Let the next update be number 0, for readers that begin with the model that training began with."""
        self._number = 0

    def _checked(self, selection: Selection) -> _Sent:
        agreed_tensors(self._model, selection)
        whole, before = selection.gathered(), self._sent
        whole.check(self._model)
        if before is None:
            return _Sent(selection, whole, whole, placed_entries(whole, self._layout))
        if whole.shapes != before.selection.shapes:
            raise ValueError("the pool of the selection has changed: make another stream, and begin with its number 0.")
        if whole == before.selection:
            return replace(before, given=selection)
        return _Sent(selection, whole, before.moved | whole, placed_entries(whole, self._layout))

    def _digests(self, named: Mapping[str, Tensor], moved: Selection) -> dict[str, str]:
        """For a reader that begins with a model of the same names and dtypes, which it can recognise by them."""
        if self._number or self._layout is not None or self._dtype is not None:
            return {}
        return {name: digest_of_others(moved, name, named[name]) for name in moved.names}

    def _present(
        self, named: Mapping[str, Tensor], selection: Selection, places: Mapping[str, Placed]
    ) -> dict[str, Tensor]:
        values = selected_values(named, selection)
        if self._dtype is not None:
            values = {name: one.to(self._dtype) for name, one in values.items()}
        return {name: one.values(values) for name, one in places.items()}


def _changed(values: Tensor, sent: Tensor) -> Entries:
    """Choose which of the values ``[K]`` to send, by their place: those of other bits, or all where that is less."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    differing = (values.view(kind) != sent.view(kind)).nonzero().view(-1)
    places = Entries.of(values.shape, differing)
    _, tensor = form_of(places, code=True)
    nbytes = len(differing) * values.element_size() + (0 if tensor is None else tensor.nbytes)
    return places if nbytes < values.nbytes else Entries.all(values.shape)


@dataclass(frozen=True)
class _Sent:
    """What a stream has sent.

    Attributes:
        given: The selection as it came, to see at once that it is the same.
        selection: That of all ranks.
        moved: Whatever has been selected so far.
        placed: The entries of ``selection`` under the names that are sent.
    """

    given: Selection
    selection: Selection
    moved: Selection
    placed: dict[str, Placed]


class DeltaReader:
    """Reads the updates of a :class:`DeltaStream`, in order: :meth:`apply` or :meth:`patches`, once for each."""

    def __init__(self) -> None:
        self._entries: dict[str, Entries] = {}
        self._next = 0

    def patches(self, update: DeltaUpdate) -> list[WeightPatch]:
        """Say what an update changes, for an engine of inference.

        Args:
            update: The next one of the stream, or its number 0.

        Returns:
            One patch for each tensor, whole: with the indices that the update itself may leave out.

        Raises:
            TypeError: It is no update.
            ValueError: An update is missing in between, or it has other values than its entries.
        """
        made = self._patches(update)
        self._read(update)
        return made

    @torch.no_grad()
    def apply(self, update: DeltaUpdate, model: nn.Module, *, check: bool = True) -> None:
        """Write an update into a model. Everything is checked before anything is written.

        Args:
            update: The next one of the stream, or its number 0.
            model: With the names, shapes and dtypes of the update; on number 0 the one that training began with. Where
                FSDP2 shards it, all ranks call this.
            check: On number 0, compare the digest of what has never been selected.

        Raises:
            TypeError: It is no update.
            ValueError: An update is missing in between, or the model is another one.
        """
        patches, named = self._patches(update), hosts.named_parameters(model, remove_duplicate=False)
        hosts.reshard(model)
        for one in patches:
            if one.name not in named:
                raise ValueError(
                    f"the model has no {one.name}: an update of a layout has the checkpoint's names. Make the stream "
                    "without layout=, or give an engine the patches."
                )
            parameter = named[one.name]
            if (tuple(parameter.shape), parameter.dtype) != (one.shape, one.dtype):
                raise ValueError(
                    f"{one.name} is {one.shape} of {one.dtype} in the update and {tuple(parameter.shape)} of "
                    f"{parameter.dtype} in the model: make the stream with dtype={parameter.dtype}."
                )
        moving = {one.name: Entries.of(torch.Size(one.shape), one.indices, one.name) for one in patches}
        if check and update.digests:
            shapes = {name: named[name].shape for name in update.digests if name in named}
            check_base(named, _selection(shapes, moving), update.digests)
        for one in patches:
            selection, parameter = _selection({one.name: torch.Size(one.shape)}, moving), named[one.name]
            own, share = own_entries(selection, one.name, parameter)
            values = one.values if share is None else own_values(one.values, moving[one.name], share)
            local = hosts.local_part(parameter)
            own.scatter_(local, values.to(local.device))
        self._read(update)

    def _patches(self, update: DeltaUpdate) -> list[WeightPatch]:
        if not isinstance(update, DeltaUpdate):
            raise TypeError(
                f"expected a fishkern.DeltaUpdate, got {type(update).__name__}: a stream's update() makes one, and "
                "fishkern.DeltaUpdate.load reads its file."
            )
        if update.number not in (0, self._next):
            raise ValueError(
                f"update {self._next} is next, and this is number {update.number}: read them in order, or call "
                "restart() on the stream and read its number 0 into the model that training began with."
            )
        if update.entries is None:
            return [self._of_changed(name, places, update.values[name]) for name, places in update.changed.items()]
        made = {name: patch(name, one, update.values[name]) for name, one in update.entries.items()}
        for name, one in update.ended.items():
            other = patch(name, one, update.last[name])
            made[name] = _joined(made[name], other) if name in made else other
        return list(made.values())

    def _of_changed(self, name: str, places: Entries, values: Tensor) -> WeightPatch:
        entries = self._entries.get(name)
        if entries is None or (entries.count,) != tuple(places.shape):
            raise ValueError(f"the update has {name} with other entries than the ones before: it is of another stream.")
        made = patch(name, entries, values)
        return made if places.is_all else made._replace(indices=made.indices[places.indices().long()])

    def _read(self, update: DeltaUpdate) -> None:
        self._entries = self._entries if update.entries is None else dict(update.entries)
        self._next = update.number + 1


def _joined(one: WeightPatch, other: WeightPatch) -> WeightPatch:
    indices, values = torch.cat([one.indices, other.indices]), torch.cat([one.values, other.values])
    order = indices.argsort()
    return one._replace(indices=indices[order], values=values[order])


def _selection(shapes: Mapping[str, torch.Size], entries: Mapping[str, Entries]) -> Selection:
    return Selection.from_entries({name: entries.get(name, Entries.none(shape)) for name, shape in shapes.items()})

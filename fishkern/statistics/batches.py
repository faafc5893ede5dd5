"""Batches of a ``DataLoader``: count their examples, and assign their entries to examples.

A mapping or a tuple is structure: it is entered, never cut. Tensors and arrays whose first axis is ``N`` are cut by
rows, and so are lists of ``N`` entries and a Qwen-VL's ``position_ids [kinds, N, T]``. An entry without one part for
each example is passed whole if that cannot matter (``N = 1``, a leading size of 1, a single value) or if the user says
that all examples share it. Otherwise it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fishkern.layers import ONE_EACH, Documents, RowOrder
from fishkern.statistics.contents import (
    Batch,
    Place,
    all_places,
    copied,
    holds_kinds,
    holds_mappings,
    is_array,
    is_single,
    is_structure,
    items_of,
    leading_sizes,
    leaves_of,
    name_of,
    rebuilt,
    with_tensors,
)

Shared = str | int | Sequence[str | int] | None

_ONE_ALONE = "(One batch alone is passed as [batch].)"
_WAYS_OUT = (
    "Put the example axis first, make it a list with one thing for each example, or, if all examples share it, name it "
    "in shared=."
)


@dataclass(frozen=True, eq=False)
class Examples:
    """A batch whose entries have been assigned to examples.

    Args:
        content: The input of the model or the loss function.
        num_examples: ``N``.
        places: Indices of its examples in the whole data.
        by_rows: Places in the batch of the entries that are cut by rows.
        entered: Places of the lists that are structure.
        cut_from: The batch that this one is a part of.
        documents: For packed rows, the documents that are its examples; ``None`` for others.
        dropped: For packed rows, how many documents in them have no label, padding included.
        order: Which rows an example has, where it has several.
    """

    content: Batch
    num_examples: int
    places: range
    by_rows: frozenset[Place] = frozenset()
    entered: frozenset[Place] = frozenset()
    cut_from: Examples | None = None
    documents: Documents | None = None
    dropped: int = 0
    order: RowOrder = ONE_EACH

    def take(self, start: int, stop: int) -> Examples:
        """Take some examples of the batch, with their padding.

        Args:
            start: Index of the first one in the batch.
            stop: Index after the last one.

        Returns:
            These examples; the batch itself if they are all.
        """
        if (start, stop) == (0, self.num_examples):
            return self
        rows = slice(start, stop)
        content = self._each((), self.content, lambda place, leaf: self._cut(place, leaf, rows))
        return replace(
            self, content=content, num_examples=stop - start, places=self.places[rows], cut_from=self.cut_from or self
        )

    def singly(self) -> Iterator[Examples]:
        """Iterate over the examples.

        Yields:
            Batches of one.
        """
        for n in range(self.num_examples):
            yield self.take(n, n + 1)

    @property
    def kind(self) -> Hashable:
        """For packed rows what decides whether a model keeps documents apart; ``None`` for others.

        It may keep them apart by one set of entries and not by another, and in one row but not in several.
        """
        return None

    @property
    def num_rows(self) -> int:
        """How many rows the model runs on."""
        return self.order.count(self.num_examples)

    @property
    def few(self) -> Examples:
        """The first two examples, or the only one."""
        return self.take(0, min(2, self.num_examples))

    @property
    def has_neighbours(self) -> bool:
        """Whether an example runs together with others, on which its loss could depend."""
        return self.num_examples > 1

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Names of the entries that are cut by rows, and of those that stay whole."""
        cut: list[str] = []
        whole: list[str] = []
        for place in self._entry_places((), self.content):
            (cut if place in self.by_rows else whole).append(name_of(place, self.content))
        return cut, whole

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Its named entries: those of a mapping, or of a pair's inputs if these are one; else none."""
        content = self.content
        first = content if isinstance(content, Mapping) else next(iter(content), None)
        return first if isinstance(first, Mapping) else {}

    def copied(self) -> Batch:
        """Copy the content for one run.

        Code that removes an entry (``batch.pop("labels")``, as the Trainer does) or writes into one gets its own batch.

        Returns:
            The copy.
        """
        return copied(self.content)

    def to(self, device: torch.device) -> Examples:
        """Move every tensor to a device, and detach it.

        Args:
            device: The device.

        Returns:
            The moved batch.
        """
        return self.with_tensors(lambda tensor: tensor.detach().to(device, non_blocking=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """Replace every tensor.

        Args:
            change: Called with each.

        Returns:
            The batch of the results.
        """
        return replace(self, content=with_tensors(self.content, change))

    def _cut(self, place: Place, leaf: Any, rows: slice) -> Any:
        if place not in self.by_rows:
            return leaf
        try:
            if _is_by_kind(place, leaf, self.content):
                return leaf[:, rows]
            if isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
                return leaf.index_select(0, torch.arange(rows.start, rows.stop, device=leaf.device))
            return leaf[rows]
        except (RuntimeError, TypeError) as error:  # a layout that torch does not slice
            kind = type(leaf).__name__ + (f" of layout {leaf.layout}" if isinstance(leaf, Tensor) else "")
            raise ValueError(
                f"{name_of(place, self.content)} of a batch cannot be cut by rows: it is a {kind}. Bring it as a dense "
                "tensor, or give batches of one."
            ) from error

    def _is_leaf(self, place: Place, value: Any) -> bool:
        return place in self.by_rows or not (is_structure(value) or place in self.entered)

    def _entry_places(self, place: Place, value: Any) -> Iterator[Place]:
        """Walk through the entries that are cut or passed whole."""
        if self._is_leaf(place, value):
            yield place
            return
        for key, item in items_of(value):
            yield from self._entry_places((*place, key), item)

    def _each(self, place: Place, value: Any, change: Callable[[Place, Any], Any]) -> Any:
        """Rebuild the structure with changed leaves."""
        if self._is_leaf(place, value):
            return change(place, value)
        return rebuilt(value, {key: self._each((*place, key), item, change) for key, item in items_of(value)})


class Reader:
    """Read batches: count their examples, and decide which entries are cut.

    A list of tensors whose sizes allow two readings is read as in earlier batches, so a reader belongs to one pass over
    data.

    Args:
        shared: Entries that all examples share: patterns of names, or positions in a tuple.
        only_pairs: Refuse tuples other than ``(inputs, labels)``: nothing would use the other entries.
        dropped: Keys of a mapping to withhold from the model.
        packed: Reads a batch, its number and what is shared as packed rows, or as examples of several rows, or gives
            ``None`` where each row is one example; ``None`` if rows are examples in any case.

    Attributes:
        withheld: Those of ``dropped`` that a batch contained.

    Raises:
        TypeError: ``shared`` contains something else.
    """

    def __init__(
        self,
        shared: Shared = None,
        *,
        only_pairs: bool = False,
        dropped: Sequence[str] = (),
        packed: Callable[[Batch, int, Callable[[Place], bool]], Examples | None] | None = None,
    ) -> None:
        patterns = tuple(shared) if isinstance(shared, list | tuple | set | frozenset) else (shared,)
        patterns = () if shared is None else patterns
        if not all(isinstance(pattern, str | int) and not isinstance(pattern, bool) for pattern in patterns):
            raise TypeError(f"shared takes patterns of entry names, or places in a tuple; got {shared!r}.")
        self._shared = patterns
        self._only_pairs = only_pairs
        self._dropped = tuple(dropped)
        self._packed = packed
        self._settled: dict[Place, bool] = {}
        self._unused = list(patterns)
        self.withheld: set[str] = set()

    @property
    def learned(self) -> Hashable:
        """What changes when a batch settles how later ones are read."""
        return len(self._settled)

    def __call__(self, raw: Any, number: int) -> Examples:
        """Read a batch.

        Args:
            raw: A batch as the iterable yields it.
            number: Its index in the iterable, for the message.

        Returns:
            The batch; a list becomes a tuple.

        Raises:
            TypeError: It is neither a mapping nor a tuple.
            ValueError: It has no examples, or an entry that cannot be assigned to examples.
        """
        content = self._checked_kind(raw, number)
        for place, leaf in leaves_of((), content):
            if isinstance(leaf, Tensor) and leaf.is_nested and leaf.layout is torch.strided:
                raise ValueError(
                    f"{name_of(place, content)} of batch {number} is a nested tensor, whose rows have no common shape: "
                    "bring a padded tensor, torch.nested.to_padded_tensor(...), or a list of tensors, one for each."
                )
        tensors = [leaf for _, leaf in leaves_of((), content) if is_array(leaf) and len(leaf.shape)]
        if not tensors:
            raise ValueError(_no_tensor(content, number))
        self._check_shared(content, number)
        if self._packed is not None and (packed := self._packed(content, number, self._is_shared)) is not None:
            return packed
        source, N = self._count(content, number)
        if N == 0:
            raise ValueError(f"batch {number} holds no example (size 0). Drop empty batches before estimating.")
        counted = f"batch {number} holds {N} examples by {source}"
        decision = _Decision(N, content, self._is_shared, self._settled, counted)
        if N > 1:
            decision.decide((), content)
        return Examples(content, N, range(N), frozenset(decision.by_rows), frozenset(decision.entered))

    def _checked_kind(self, raw: Any, number: int) -> Batch:
        content = tuple(raw) if isinstance(raw, list) else raw
        if not isinstance(content, Mapping | tuple) or isinstance(content, PackedSequence):
            raise TypeError(
                f"batch {number} is a {type(raw).__name__}: expected a mapping of keyword arguments for the model, "
                "or a pair (inputs, labels), as a DataLoader yields them. "
                + ("(vars(batch) makes a mapping of a dataclass.)" if is_dataclass(raw) else _ONE_ALONE)
            )
        if self._only_pairs and (isinstance(content, Mapping) or len(content) == 2):
            labels = content.get("labels") if isinstance(content, Mapping) else content[1]
            if isinstance(labels, int | float) or (is_array(labels) and not len(labels.shape)):
                raise ValueError(
                    f"batch {number} has a single number as its labels, as an example has that is in no batch: let a "
                    "DataLoader make batches, or give each tensor an example axis, x[None]."
                )
        if isinstance(content, tuple) and self._only_pairs and len(content) != 2:
            raise TypeError(
                f"batch {number} is a {type(raw).__name__} of {len(content)}: expected a mapping of keyword arguments "
                "for the model, or a pair (inputs, labels); more entries need likelihood= as a function (model, batch) "
                "-> losses [N] that takes them."
            )
        if isinstance(content, Mapping) and (dropped := [key for key in self._dropped if key in content]):
            self.withheld.update(dropped)
            content = rebuilt(content, {key: value for key, value in content.items() if key not in dropped})
        return content

    def _count(self, content: Batch, number: int) -> tuple[str, int]:
        """Find ``N`` in the entry that is most certain to have it, and name the entry."""
        for certain in (True, False):
            if (counted := self._counted((), content, certain=certain)) is not None:
                place, N = counted
                return name_of(place, content), N
        raise ValueError(
            f"batch {number} does not say how many examples it holds: expected 'input_ids', 'labels' or a first entry "
            "that is a tensor with the example axis first, or a list with one thing for each example."
        )

    def _counted(self, place: Place, value: Any, *, certain: bool) -> tuple[Place, int] | None:
        if self._is_shared(place):
            return None
        if is_structure(value):
            items = list(items_of(value))
            if isinstance(value, Mapping):  # entries whose names imply one row for each example come first
                first = {"input_ids": 0, "labels": 1}
                items.sort(key=lambda item: first.get(item[0], 2))
            each = (self._counted((*place, key), item, certain=certain) for key, item in items)
            return next((counted for counted in each if counted is not None), None)
        if is_array(value):
            return (place, value.shape[0]) if len(value.shape) else None
        if not isinstance(value, list):
            return None
        sizes = leading_sizes(value)
        if not sizes or holds_mappings(value):
            return place, len(value)
        if certain or (len(set(sizes)) == 1 and sizes[0] != len(value)):
            return None  # either one tensor for each example, or several with all examples in each: not certain
        return place, len(value)

    def _is_shared(self, place: Place) -> bool:
        if not place:
            return False
        names = {".".join(map(str, place)), str(place[-1])}
        for pattern in self._shared:
            by_place = isinstance(pattern, int) and place == (pattern,)
            if by_place or (isinstance(pattern, str) and any(fnmatchcase(name, pattern) for name in names)):
                if pattern in self._unused:
                    self._unused.remove(pattern)
                return True
        return False

    def _check_shared(self, content: Batch, number: int) -> None:
        """Refuse a pattern that matches nothing in the first batch: a typing error would go unnoticed."""
        places = [place for place, _ in all_places((), content)]
        for place in places:
            self._is_shared(place)
        if number == 0 and self._unused:
            names = [".".join(map(str, place)) for place in places]
            near = get_close_matches(str(self._unused[0]), names) or names[:8]
            raise ValueError(f"shared={self._unused[0]!r} names no entry of the first batch; it holds {near}.")


class _Decision:
    """Decide for each entry of a batch of several examples whether it is cut, entered or passed whole."""

    def __init__(
        self, N: int, content: Batch, shared: Callable[[Place], bool], settled: dict[Place, bool], batch: str
    ) -> None:
        self._N = N
        self._content = content
        self._shared = shared
        self._settled = settled
        self._batch = batch
        self.by_rows: set[Place] = set()
        self.entered: set[Place] = set()

    def decide(self, place: Place, value: Any) -> None:
        if self._shared(place) or is_single(value):
            return
        if is_structure(value):
            self._enter(place, value)
        elif isinstance(value, list):
            self._decide_list(place, value)
        elif not is_array(value):
            self._refuse(place, f"a {type(value).__name__}, whose parts cannot be assigned to examples")
        elif _is_by_kind(place, value, self._content):
            if value.shape[1] != 1:
                self.by_rows.add(place)
        elif len(value.shape) and value.shape[0] == self._N:
            self.by_rows.add(place)
        elif len(value.shape) and value.shape[0] != 1:
            self._refuse(place, f"of leading size {value.shape[0]}, so the leading sizes differ")

    def _enter(self, place: Place, value: Any) -> None:
        items = list(items_of(value))
        if isinstance(value, tuple) and len(items) == self._N and all(is_single(item) for _, item in items) and place:
            self._refuse(place, f"a tuple of {self._N} single values: one for each example, or a setting")
        for key, item in items:
            self.decide((*place, key), item)

    def _decide_list(self, place: Place, value: list[Any]) -> None:
        sizes = leading_sizes(value)
        one_each = len(value) == self._N
        all_in_each = bool(sizes) and all(size == self._N for size in sizes) and not holds_mappings(value)
        if one_each and all_in_each:  # N tensors of N rows each: only an earlier batch of another size can tell
            if place not in self._settled:
                self._refuse(
                    place,
                    f"a list of {self._N} with {self._N} rows each: one thing for each example, or all examples in "
                    "each; an earlier batch of another size would settle it",
                )
            one_each = self._settled[place]
        elif sizes and (one_each or all_in_each) and self._settled.setdefault(place, one_each) != one_each:
            self._refuse(place, "a list that was cut in another way in earlier batches")
        if one_each:
            self.by_rows.add(place)
        elif sizes and set(sizes) <= {self._N, 1, None} and self._N in sizes:
            self.entered.add(place)
            self._enter(place, value)
        else:
            self._refuse(place, f"a list of {len(value)}")

    def _refuse(self, place: Place, what: str) -> None:
        other = another_reading(self._content)
        raise ValueError(f"{self._batch}, and {name_of(place, self._content)} is {what}. {_WAYS_OUT}{other}")


def another_reading(content: Batch) -> str:
    """Suggest another reading of a batch that does not work as it was read.

    Args:
        content: The batch.

    Returns:
        A sentence that begins with a space; empty if there is no other reading.
    """
    entries = list(content) if isinstance(content, tuple) else list(content.values())
    if isinstance(content, tuple) and all(isinstance(entry, Mapping | tuple | list) for entry in entries):
        parts = [frozenset(entry) if isinstance(entry, Mapping) else len(entry) for entry in entries]
        singles = [part for entry in entries for _, part in items_of(entry) if is_single(part) or _has_no_axis(part)]
        if len(set(parts)) == 1 and singles:
            return " If it is a list of examples, collate them first (torch.utils.data.default_collate)."
    tuples = [entry for entry in entries if isinstance(entry, tuple)]
    if any(is_structure(one) or is_array(one) for entry in tuples for one in entry):
        return " (A tuple is entered and never cut: one thing for each example makes a list.)"
    if any(_has_no_axis(leaf) for _, leaf in leaves_of((), content)):
        return " If it is one example in no batch, let a DataLoader make batches, or give each tensor an axis, x[None]."
    return ""


def _is_by_kind(place: Place, leaf: Any, content: Batch) -> bool:
    """Recognise an entry whose rows are its second axis, beside the tokens of a batch."""
    tokens = content.get("input_ids") if isinstance(content, Mapping) and len(place) == 1 else None
    return is_array(tokens) and holds_kinds(place[0], leaf, tuple(tokens.shape))


def _has_no_axis(value: Any) -> bool:
    return is_array(value) and not len(value.shape)


def _no_tensor(content: Batch, number: int) -> str:
    says = f"batch {number} holds no tensor with an example axis"
    for place, leaf in leaves_of((), content):
        if not (is_single(leaf) or is_array(leaf)):
            return (
                f"{says}, and {name_of(place, content)} is a {type(leaf).__name__}, which is not looked into: give "
                "what it holds as a mapping, vars(...), or as tensors."
            )
    return f"{says}: let the collator return tensors (return_tensors='pt')."

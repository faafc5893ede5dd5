"""Packed rows: recognise the documents in the rows of a batch, which are its examples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fishkern.layers import Documents, Span
from fishkern.statistics.batches import Examples
from fishkern.statistics.contents import Batch, is_array, is_single, rebuilt
from fishkern.statistics.labels import as_tensor

# Cumulated lengths of all documents of the flattened rows, and their largest length: what varlen kernels are given.
_BORDERS, _LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
_LABELS = ("labels", "shift_labels")


def document_numbers(content: Batch) -> Tensor | None:
    """Give each document of packed rows a number, by what transformers itself reads.

    The borders are those of ``cu_seq_lens_q`` or ``cu_seq_lens_k``; else a new document begins where ``seq_idx``
    changes; else where ``position_ids`` do not go on by one. Beside an ``attention_mask [R, T]`` transformers does not
    read them so, and padding has positions of its own: then a document begins where they fall, between two attended
    positions.

    Args:
        content: A batch.

    Returns:
        ``[R, T]``, int64, ascending from 0 in every row; ``None`` where each row is one document.

    Raises:
        ValueError: The borders do not fit the rows, or are given by an entry that is not read.
    """
    if not isinstance(content, Mapping):
        return None
    if unread := [key for key in content if str(key).startswith("cu_seqlens")]:
        raise ValueError(
            f"the rows are packed, as their {unread[0]!r} says, and where their documents end is read off "
            "'cu_seq_lens_q', 'seq_idx' or 'position_ids': give one of these."
        )
    if (shape := _shape(content)) is None:
        return None
    starts = _starts(content, shape)
    if starts is None or not bool(starts[:, 1:].any()):
        return None
    return starts.long().cumsum(1) - starts[:, :1].long()


def documents_of(content: Batch, labelled: Tensor) -> Documents | None:
    """Find the documents that count: those in which a position has a label.

    Args:
        content: A batch.
        labelled: At which positions the output has a label, ``[R, T]``, bool.

    Returns:
        The documents; ``None`` where each row is one.

    Raises:
        ValueError: The borders do not fit the rows.
    """
    numbers = document_numbers(content)
    if numbers is None:
        return None
    return Documents(tuple(numbers.shape), tuple(_spans(numbers, labelled.to(numbers.device))))


def inside_documents(labels: Tensor, content: Batch, ignore_index: int = -100) -> Tensor:
    """Take the label away from the last position of each document: there is no next token in the same document.

    Args:
        labels: Label of the token after each position, ``[R, T]``.
        content: The batch.
        ignore_index: Label of a position that does not count.

    Returns:
        The labels, where rows are packed a copy.
    """
    numbers = document_numbers(content)
    if numbers is None:
        return labels
    last = torch.ones_like(numbers, dtype=torch.bool)
    last[:, :-1] = numbers.diff(dim=1) != 0
    return labels.masked_fill(last.to(labels.device), ignore_index)


@dataclass(frozen=True, eq=False)
class PackedExamples(Examples):
    """A batch of packed rows: its examples are the documents that have labels, and ``documents`` says where."""

    @cached_property
    def kind(self) -> Hashable:
        entries = frozenset(key for key, value in self.content.items() if value is not None)
        return entries, self.documents.shape[0] > 1, self._telling[0]

    @property
    def few(self) -> Examples:
        """Two documents, by which a leak shows: those of :attr:`_telling`.

        The only row is cut. Of several, two at least stay whole, since flash attention of transformers reads the
        position_ids of a single row alone.
        """
        start = min(self._telling[1], max(self.num_examples - 2, 0))
        stop = min(start + 2, self.num_examples)
        if self.documents.shape[0] == 1 or stop - start == self.num_examples:
            return self.take(start, stop)
        return self._part(start, stop, whole_rows=True)

    @property
    def has_neighbours(self) -> bool:
        return True  # a lone document has dropped ones beside it

    @property
    def num_rows(self) -> int:
        return self.documents.shape[0]

    @property
    def _telling(self) -> tuple[str, int]:
        """What shows a leak best, and the number of the document: followed by another one, or behind what is none."""
        spans = self.documents.spans
        pairs = (n for n, (one, other) in enumerate(pairwise(spans)) if one.row == other.row)
        behind = (n for n, span in enumerate(spans) if span.start > 0)
        if (number := next(pairs, None)) is not None:
            return "followed", number
        if (number := next(behind, None)) is not None:
            return "behind", number
        return "first", 0

    def take(self, start: int, stop: int) -> Examples:
        """Take some documents.

        Args:
            start: Number of the first one.
            stop: Number after the last one.

        Returns:
            Documents of one row are cut out of it, and one alone is unpacked; of several rows, the rows are taken
            whole, and the labels of all other documents away. The batch itself if they are all.
        """
        return self if (start, stop) == (0, self.num_examples) else self._part(start, stop)

    def singly(self) -> Iterator[Examples]:
        for n in range(self.num_examples):
            yield self._part(n, n + 1)

    def _part(self, start: int, stop: int, *, whole_rows: bool = False) -> Examples:
        spans = self.documents.spans[start:stop]
        first, last = spans[0], spans[-1]
        one_row = first.row == last.row and not whole_rows
        rows = slice(first.row, last.row + 1)
        if whole_rows and first.row == last.row:  # and another one, the next or the last but one
            upper = min(last.row + 2, self.documents.shape[0])
            rows = slice(upper - 2, upper)
        columns = slice(first.start, last.stop) if one_row else slice(0, self.documents.shape[1])
        cut = _Cut(self.documents.shape, rows, columns)
        moved = tuple(Span(row - rows.start, a - columns.start, b - columns.start) for row, a, b in spans)
        documents = Documents((rows.stop - rows.start, columns.stop - columns.start), moved)
        taken = {place[0] for place in self.by_rows}
        content = {
            key: cut.entry(key, value, self.content) if key in taken else value for key, value in self.content.items()
        }
        if not one_row:
            others = documents.numbers < 0
            for key in _LABELS:
                if content.get(key) is not None:
                    labels = as_tensor(content[key])
                    content[key] = labels.masked_fill(others.to(labels.device), -100)
        common = {
            "content": rebuilt(self.content, content),
            "num_examples": len(spans),
            "places": self.places[start:stop],
            "cut_from": self.cut_from or self,
        }
        if len(spans) == 1:
            return Examples(by_rows=self.by_rows, **common)
        whole = slice(first.row * self.documents.shape[1] + first.start, last.row * self.documents.shape[1] + last.stop)
        dropped = len(self._borders_of_dropped(whole))
        return replace(self, documents=documents, dropped=dropped, **common)

    def _borders_of_dropped(self, part: slice) -> list[int]:
        """List where documents without labels begin, in a part of the flattened rows."""
        numbers = document_numbers(self.content)
        if numbers is None:
            return []
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers.diff(dim=1) != 0
        kept = self.documents.numbers.to(numbers.device) >= 0
        found = (begins & ~kept).flatten().nonzero().flatten().tolist()
        return [place for place in found if part.start <= place < part.stop]


@dataclass(frozen=True)
class _Cut:
    """Rows and columns of a batch ``[R, T]`` that are taken."""

    shape: tuple[int, int]
    rows: slice
    columns: slice

    def entry(self, key: str, value: Any, content: Mapping[str, Any]) -> Any:
        """Cut one entry of a batch."""
        if key in _BORDERS:
            return self._borders(value)
        if key in _LENGTHS:
            named = [content.get(name) for name in (f"cu_seq_lens_{key[-1]}", *_BORDERS)]
            borders = next((one for one in named if one is not None), None)
            if borders is None:
                return value
            longest = int(as_tensor(self._borders(borders)).diff().max())
            return longest if isinstance(value, int) else as_tensor(value).new_tensor(longest)
        return cut_axes(value, self.shape, self.rows, self.columns)

    def _borders(self, value: Any) -> Any:
        T = self.shape[1]
        first = self.rows.start * T + self.columns.start
        end = (self.rows.stop - 1) * T + self.columns.stop
        return value[(value >= first) & (value <= end)] - first


def cut_axes(value: Any, shape: tuple[int, int], rows: slice, columns: slice) -> Any:
    """Cut a tensor of packed rows.

    Args:
        value: ``[R, T, ...]``, ``[1, T]``, or a mask ``[R, H, T, T]``.
        shape: ``(R, T)``.
        rows: The rows that are taken.
        columns: The positions that are taken, of every row.

    Returns:
        The part.

    Raises:
        ValueError: The sizes are others.
    """
    R, T = shape
    sizes = tuple(value.shape)
    rows = rows if sizes and sizes[0] == R else slice(None)
    if len(sizes) == 4 and sizes[0] in (R, 1) and sizes[2:] == (T, T):
        return value[rows, :, columns, columns]
    if len(sizes) > 1 and sizes[0] in (R, 1) and sizes[1] == T:
        return value[rows, columns]
    raise ValueError(f"of shape {sizes}")


def packed_examples(
    content: Mapping[str, Any], labelled: Tensor, number: int, is_shared: Callable[[tuple[Any, ...]], bool]
) -> PackedExamples | None:
    """Read a batch whose rows are packed.

    Args:
        content: The batch.
        labelled: At which positions the output has a label, ``[R, T]``, bool.
        number: Its index in the iterable, for the message.
        is_shared: Tells of an entry, by its place, whether all examples share it.

    Returns:
        Its documents as examples; ``None`` where each row is one.

    Raises:
        ValueError: No document has a label, the borders do not fit the rows, an entry has other axes, or there is an
            ``attention_mask [R, T]`` with padding.
    """
    documents = documents_of(content, labelled)
    if documents is None:
        return None
    R, T = documents.shape
    mask = content.get("attention_mask")
    if is_array(mask) and len(mask.shape) == 2 and bool((as_tensor(mask) == 0).any()):
        # flash attention may separate documents beside a mask of ones, which the proof shows, and not beside this one
        raise ValueError(
            f"batch {number} has packed rows, and padding in its attention_mask, beside which transformers does not "
            "look where documents end: leave it out of packed batches (padding has the label -100), or give one of "
            "shape [R, 1, T, T] that separates the documents."
        )
    taken = set()
    for key, value in content.items():
        if key in (*_BORDERS, *_LENGTHS) and value is not None:
            taken.add((key,))
            continue
        if is_single(value) or is_shared((key,)) or (is_array(value) and not len(value.shape)):
            continue
        try:
            if not is_array(value):
                raise ValueError(f"a {type(value).__name__}")
            cut_axes(value, documents.shape, slice(0, 1), slice(0, 1))
        except ValueError as error:
            raise ValueError(
                f"batch {number} has packed rows [{R}, {T}] of {documents.count} documents with labels, and {key!r} is "
                f"{error}, which cannot be cut into documents: give it as [{R}, {T}, ...], name it in shared= if all "
                "documents share it, or leave it out."
            ) from None
        taken.add((key,))
    if not documents.count:
        raise ValueError(
            f"batch {number} has packed rows, and none of their documents has a label: the first token of a document "
            "is predicted by nothing. Drop such batches before estimating."
        )
    N = documents.count
    batch = PackedExamples(content, N, range(N), frozenset(taken), documents=documents)
    return replace(batch, dropped=len(batch._borders_of_dropped(slice(0, R * T))))


def _shape(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Read ``(R, T)`` off the entry that says what the rows are."""
    for key in ("input_ids", "inputs_embeds", "labels"):
        value = content.get(key)
        if is_array(value) and len(value.shape) > 1:
            return value.shape[0], value.shape[1]
    return None


def _starts(content: Mapping[str, Any], shape: tuple[int, int]) -> Tensor | None:
    """Say at which positions a document begins, ``[R, T]``, bool."""
    R, T = shape
    borders = next((content[key] for key in _BORDERS if content.get(key) is not None), None)
    if borders is not None:
        return _starts_of_borders(as_tensor(borders), R, T)
    for key, begins in (("seq_idx", _changes), ("position_ids", _restarts)):
        value = content.get(key)
        if is_array(value) and tuple(value.shape) in {(R, T), (1, T)}:
            return begins(as_tensor(value).expand(R, T), content.get("attention_mask"))
    return None


def _starts_of_borders(borders: Tensor, R: int, T: int) -> Tensor:
    ends = borders.flatten().tolist()
    firsts = set(range(0, R * T, T))
    if ends != sorted(ends) or not ends or (ends[0], ends[-1]) != (0, R * T) or not firsts <= set(ends):
        raise ValueError(
            f"cu_seq_lens_q must ascend from 0 to the number of positions, {R * T}, with a border at each of {R} rows; "
            f"got {len(ends)} numbers{f' from {ends[0]} to {ends[-1]}' if ends else ''}. Make them with the collator "
            "that packs the rows."
        )
    starts = torch.zeros(R * T, dtype=torch.bool)
    starts[ends[:-1]] = True
    return starts.view(R, T)


def _changes(numbers: Tensor, mask: Any) -> Tensor:
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers.diff(dim=1) != 0
    return starts


def _restarts(positions: Tensor, mask: Any) -> Tensor:
    steps = positions.diff(dim=1)
    starts = torch.ones_like(positions, dtype=torch.bool)
    if is_array(mask) and tuple(mask.shape) in {tuple(positions.shape), (1, positions.shape[1])}:
        attended = (as_tensor(mask).to(positions.device) != 0).expand_as(positions)
        starts[:, 1:] = (steps < 0) & attended[:, 1:] & attended[:, :-1]
    else:
        starts[:, 1:] = steps != 1
    return starts


def _spans(numbers: Tensor, labelled: Tensor) -> Iterator[Span]:
    """List where the documents with a label are, row after row."""
    for row, (own, marks) in enumerate(zip(numbers.cpu(), labelled.cpu(), strict=True)):
        _, lengths = own.unique_consecutive(return_counts=True)
        stop = 0
        for length in lengths.tolist():
            start, stop = stop, stop + length
            if bool(marks[start:stop].any()):
                yield Span(row, start, stop)

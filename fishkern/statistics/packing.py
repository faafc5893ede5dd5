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
from fishkern.statistics.borders import BORDERS, check_mask, document_numbers, is_pairs, text_positions
from fishkern.statistics.contents import Batch, holds_kinds, is_array, is_single, rebuilt
from fishkern.statistics.labels import as_tensor

_LENGTHS = ("max_length_q", "max_length_k")  # of the longest document, which varlen kernels are given as well
_LABELS = ("labels", "shift_labels")


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
        entries = frozenset((key, _form(value)) for key, value in self.content.items() if value is not None)
        return entries, self.documents.shape[0] > 1, self._telling[0]

    @property
    def few(self) -> Examples:
        """Two documents, by which a leak shows: those of :attr:`_telling`.

        The only row is cut, unless what is around the two decides which positions are the lowest. Of several, two at
        least stay whole, since flash attention of transformers reads the position_ids of a single row alone.
        """
        what, number = self._telling
        start = min(number, max(self.num_examples - 2, 0))
        stop = min(start + 2, self.num_examples)
        one_row = self.documents.shape[0] == 1 and what != "above the lowest"
        if one_row or stop - start == self.num_examples:
            return self.take(start, stop)
        return self._part(start, stop, whole_rows=True)

    @property
    def has_neighbours(self) -> bool:
        return True  # a lone document has dropped ones beside it

    @property
    def num_rows(self) -> int:
        return self.documents.shape[0]

    @cached_property
    def _telling(self) -> tuple[str, int]:
        """What shows a leak best, and the number of the document: followed by another one, or behind what is none.

        Flash attention of transformers begins a document at the lowest position alone, so one that begins above it,
        where others do not, is looked at first.
        """
        spans = self.documents.spans
        pairs = (n for n, (one, other) in enumerate(pairwise(spans)) if one.row == other.row)
        behind = (n for n, span in enumerate(spans) if span.start > 0)
        if (number := self._first_above_the_lowest()) is not None:
            return "above the lowest", max(number - 1, 0)
        if (number := next(pairs, None)) is not None:
            return "followed", number
        if (number := next(behind, None)) is not None:
            return "behind", number
        return "first", 0

    def _first_above_the_lowest(self) -> int | None:
        """Find the first document behind another one that begins above the lowest position of the batch."""
        positions = text_positions(self.content, self.documents.shape)
        inner = [n for n, span in enumerate(self.documents.spans) if span.start > 0]
        if positions is None or not inner:
            return None
        rows, starts, _ = zip(*(self.documents.spans[n] for n in inner), strict=True)
        above = (positions[list(rows), list(starts)] > positions.min()).tolist()
        return next((n for n, one in zip(inner, above, strict=True) if one), None)

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
            rows = slice(max(upper - 2, 0), upper)
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
        if key in BORDERS:
            return self._borders(value)
        if key in _LENGTHS:
            named = [content.get(name) for name in (f"cu_seq_lens_{key[-1]}", *BORDERS)]
            borders = next((one for one in named if one is not None), None)
            if borders is None:
                return value
            longest = int(as_tensor(self._borders(borders)).diff().max())
            return longest if isinstance(value, int) else as_tensor(value).new_tensor(longest)
        return cut_axes(key, value, self.shape, self.rows, self.columns)

    def _borders(self, value: Any) -> Any:
        T = self.shape[1]
        first = self.rows.start * T + self.columns.start
        end = (self.rows.stop - 1) * T + self.columns.stop
        return value[(value >= first) & (value <= end)] - first


def cut_axes(key: str, value: Any, shape: tuple[int, int], rows: slice, columns: slice) -> Any:
    """Cut a tensor of packed rows.

    Args:
        key: Its key in the batch.
        value: ``[R, T, ...]``, ``[1, T]``, positions of several kinds ``[kinds, R, T]``, or a mask ``[R, H, T, T]`` or
            ``[R, T, T]``.
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
    kinds = holds_kinds(key, value, shape)
    axis = 1 if kinds else 0
    if len(sizes) <= axis or sizes[axis] not in (R, 1):
        raise ValueError(f"of shape {sizes}")
    rows = rows if sizes[axis] == R else slice(None)
    if kinds:
        return value[:, rows, columns]
    if is_pairs(value, T) and (len(sizes) == 4 or key == "attention_mask"):
        return value[rows, ..., columns, columns]
    if len(sizes) > 1 and sizes[1] == T:
        return value[rows, columns]
    raise ValueError(f"of shape {sizes}")


def _form(value: Any) -> Hashable:
    """Say what an entry is, without its values: a model may read a mask of other axes or numbers in another way."""
    return (len(value.shape), str(value.dtype)) if is_array(value) else type(value).__name__


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
            ``attention_mask [R, T]`` with padding, or one of pairs of positions that does not separate all documents.
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
        if key in (*BORDERS, *_LENGTHS) and value is not None:
            taken.add((key,))
            continue
        if is_single(value) or is_shared((key,)) or (is_array(value) and not len(value.shape)):
            continue
        try:
            if not is_array(value):
                raise ValueError(f"a {type(value).__name__}")
            cut_axes(key, value, documents.shape, slice(0, 1), slice(0, 1))
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
    check_mask(content, documents, number)
    N = documents.count
    batch = PackedExamples(content, N, range(N), frozenset(taken), documents=documents)
    return replace(batch, dropped=len(batch._borders_of_dropped(slice(0, R * T))))


def _spans(numbers: Tensor, labelled: Tensor) -> Iterator[Span]:
    """List where the documents with a label are, row after row."""
    for row, (own, marks) in enumerate(zip(numbers.cpu(), labelled.cpu(), strict=True)):
        _, lengths = own.unique_consecutive(return_counts=True)
        stop = 0
        for length in lengths.tolist():
            start, stop = stop, stop + length
            if bool(marks[start:stop].any()):
                yield Span(row, start, stop)

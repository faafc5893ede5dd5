"""Batches of preference pairs: each example has two rows, a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fishkern.layers import RowOrder
from fishkern.statistics.batches import Examples
from fishkern.statistics.borders import document_numbers
from fishkern.statistics.contents import Batch, Place, is_array, is_single

ORDERS = {"halves": RowOrder(2, adjacent=False), "interleaved": RowOrder(2, adjacent=True)}
"""Which rows are those of a pair: all chosen answers before all rejected ones, or each pair after the other."""

_ROWS = ("input_ids", "inputs_embeds")
_EXPECTED = (
    "expected a mapping with 'input_ids' [2 N, T], both answers of each of N pairs, and a 'completion_mask' or "
    "'labels' of the same shape, as TRL's DataCollatorForPreference makes them"
)


@dataclass(frozen=True, eq=False)
class PairedExamples(Examples):
    """A batch whose examples have two rows each.

    Args:
        of_rows: Places of the entries with two rows for each example; ``by_rows`` has these, and those with one.
    """

    of_rows: frozenset[Place] = field(kw_only=True)

    def _cut(self, place: Place, leaf: Any, rows: slice) -> Any:
        if place not in self.of_rows:
            return super()._cut(place, leaf, rows)
        return leaf[self.order.indices(rows.start, rows.stop, self.num_examples)]


def pair_reader(rows: str) -> Callable[[Batch, int, Callable[[Place], bool]], PairedExamples]:
    """Make a function that reads batches of pairs, for a :class:`fishkern.statistics.batches.Reader`.

    Args:
        rows: ``"halves"`` or ``"interleaved"``.

    Returns:
        :func:`paired_examples` with this order.

    Raises:
        ValueError: ``rows`` is something else.
    """
    if rows not in ORDERS:
        raise ValueError(f"the rows of pairs are {' or '.join(map(repr, ORDERS))}, got {rows!r}.")
    return partial(paired_examples, order=ORDERS[rows])


def paired_examples(content: Batch, number: int, is_shared: Callable[[Place], bool], order: RowOrder) -> PairedExamples:
    """Read a batch of preference pairs.

    Args:
        content: A mapping of entries with a row for each answer, and of entries with one thing for each pair.
        number: Its index in the iterable, for the message.
        is_shared: Tells of an entry, by its place, whether all examples share it.
        order: Which rows are those of a pair.

    Returns:
        The pairs as examples.

    Raises:
        ValueError: It is no such mapping, its rows are no pairs or are packed, or an entry fits neither rows nor pairs.
    """
    entries = content if isinstance(content, Mapping) else {}
    rows = next((entries[key] for key in _ROWS if is_array(entries.get(key))), None)
    if rows is None:
        raise ValueError(f"batch {number} holds no preference pairs: {_EXPECTED}.")
    R = rows.shape[0]
    if R % order.per_example:
        raise ValueError(f"batch {number} holds {R} rows, which are no pairs: {_EXPECTED}.")
    if document_numbers(content) is not None:
        raise ValueError(
            f"batch {number} is packed, and preference pairs are read of rows that hold one answer each: which "
            "documents of a packed row belong together is not known. Use a collator that pads, as TRL's "
            "DataCollatorForPreference does."
        )
    N = R // order.per_example
    of_rows, of_pairs = set(), set()
    for key, value in content.items():
        if is_single(value) or is_shared((key,)) or (is_array(value) and not len(value.shape)):
            continue
        size = value.shape[0] if is_array(value) else None
        if size == R:
            of_rows.add((key,))
        elif size == N:
            of_pairs.add((key,))
        elif size != 1:
            what = f"of leading size {size}" if is_array(value) else f"a {type(value).__name__}"
            raise ValueError(
                f"batch {number} holds {N} pairs in {R} rows, and {key!r} is {what}: give a tensor with {R} rows, or "
                f"with {N}, one for each pair, or name it in shared= if all pairs share it."
            )
    if not N:
        raise ValueError(f"batch {number} holds no pair (size 0). Drop empty batches before estimating.")
    places = {"order": order, "of_rows": frozenset(of_rows), "by_rows": frozenset(of_rows | of_pairs)}
    return PairedExamples(content, N, range(N), **places)


def refuse_unnamed_pairs(content: Batch, number: int) -> None:
    """Refuse what can only be preference pairs, where no likelihood is named: nothing says by which loss.

    Args:
        content: A batch.
        number: Its index in the iterable, for the message.

    Raises:
        ValueError: It has log-probabilities of a reference model, or marks completions and has no labels.
    """
    if not isinstance(content, Mapping):
        return
    marked = "completion_mask" in content and content.get("labels") is None
    if marked or "ref_chosen_logps" in content:
        key = "ref_chosen_logps" if "ref_chosen_logps" in content else "completion_mask"
        raise ValueError(
            f"batch {number} has {key!r}, as batches of preference pairs do, and their loss is not the model's own: "
            "pass likelihood=fishkern.Preference(beta=...). For the tokens of single answers give 'labels', -100 where "
            "a token does not count."
        )

"""Parts of a batch: the head of a language model runs on some of the examples at a time, in backward.

The logits of all examples ``[N, T, V]`` may be larger than everything else of a pass. So the head's own gradients are
captured part by part: the calls in a part are those of its examples, whole, since the sum over positions comes before
the square.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fishkern.layers.documents import Documents, Span
from fishkern.layers.embedding import Embedding
from fishkern.layers.linear import Linear
from fishkern.layers.site import Layout, Site


@dataclass(frozen=True)
class Part:
    """Some examples of a batch, one after the other.

    Args:
        examples: Their numbers.
        rows: The rows that they are in.
        columns: The positions that they are in, of every one of these rows.
        documents: For packed rows, where the examples are in these rows and columns; ``None`` for others.
    """

    examples: slice
    rows: slice
    columns: slice
    documents: Documents | None = None

    @property
    def num_examples(self) -> int:
        """How many they are."""
        return self.examples.stop - self.examples.start


def parts_of(num_rows: int, num_positions: int, documents: Documents | None, most: int) -> Iterator[Part]:
    """Divide a batch into parts of whole examples.

    Args:
        num_rows: Rows of the batch.
        num_positions: Positions of each row, ``T``.
        documents: The examples of packed rows; ``None`` where each row is one.
        most: The most positions of a part. A longer example is a part by itself.

    Yields:
        The parts, in order. Positions that belong to no example are in none of them, or add nothing.
    """
    if documents is None:
        step = max(1, most // max(1, num_positions))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield Part(rows, rows, slice(0, num_positions))
        return
    first = 0
    spans = documents.spans
    for n, span in enumerate(spans):
        after = spans[n + 1] if n + 1 < len(spans) else None
        if after is None or after.row != span.row or after.stop - spans[first].start > most:
            yield _of_documents(spans, first, n + 1)
            first = n + 1


def _of_documents(spans: Sequence[Span], first: int, end: int) -> Part:
    row, start, stop = spans[first].row, spans[first].start, spans[end - 1].stop
    moved = tuple(Span(0, a - start, b - start) for _, a, b in spans[first:end])
    documents = Documents((1, stop - start), moved)
    return Part(slice(first, end), slice(row, row + 1), slice(start, stop), documents)


def sites_inside(head: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """List the sites in a head.

    Args:
        head: The module.
        sites: All sites.

    Returns:
        Those whose module is the head or inside it.
    """
    inside = set(head.modules())
    return [site for site in sites if site.module in inside]


def why_whole(head: nn.Module, sites: Sequence[Site], *, squares: bool) -> str | None:
    """Say why a head must run on all examples at once.

    Args:
        head: The module that gives the logits.
        sites: The sites of a pass.
        squares: Whether only squares are added, which may be delivered in parts.

    Returns:
        The reason; ``None`` if it may run part by part.
    """
    own = sites_inside(head, sites)
    for site in sites:
        if site not in own and site.layer is None and head in set(site.module.modules()):
            return f"{site.path} runs once more for each example, with the head in it"
    for site in own:
        if not site.settled or site.picked or site.layout is not Layout.BATCHED or site.axis != 1:
            return f"whose rows {site.path} gets is not certain before its gradient arrives"
        for key in site.keys.values():
            others = [one for one in sites if one is not site and key in one.keys.values()]
            if others and not (squares and _is_tied(site, others)):
                return f"{key} is used elsewhere, and its gradients are read as one"
    return None


def _is_tied(head: Site, others: Collection[Site]) -> bool:
    """Tell whether a linear head shares its weight with embeddings alone, so that squares are added in two steps."""
    embeddings = all(isinstance(one.layer, Embedding) and one.layout is Layout.BATCHED for one in others)
    return isinstance(head.layer, Linear) and embeddings and all(one.settled and not one.picked for one in others)


def of_part(tensor: Tensor, part: Part) -> Tensor:
    """Take a part of what has one entry for each position.

    Args:
        tensor: ``[R, T, ...]``.
        part: The part.

    Returns:
        A view.
    """
    return tensor[part.rows, part.columns]

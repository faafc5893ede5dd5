"""The first scores of every row, or of every few neighbours in a row, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fishkern.files import PIECE, AnyTensor, pieces
from fishkern.ops.streaming_topk import Order
from fishkern.selection.ranking import check_ordered, no_rank, refuse_nan
from fishkern.selection.shards import Shards


def widths_of(scores: Mapping[str, AnyTensor]) -> dict[str, int]:
    """Measure the rows of parameters: a row is everything at one index of the first axis.

    Args:
        scores: By name.

    Returns:
        How many entries a row has, by name.

    Raises:
        ValueError: A parameter has no rows.
    """
    if flat := [name for name, score in scores.items() if len(score.shape) < 2]:
        raise ValueError(
            f"{len(flat)} of {len(scores)} parameters have no rows, such as {flat[0]} of shape "
            f"{tuple(scores[flat[0]].shape)}: name them in always= or never=."
        )
    return {name: score.shape[1:].numel() for name, score in scores.items()}


def topk_of_rows(
    scores: Mapping[str, AnyTensor], counts: Mapping[str, int], widths: Mapping[str, int], order: Order
) -> tuple[dict[str, Tensor], list[str]]:
    """Select the first scores of each row; of equal ones, those of smaller index.

    Args:
        scores: By name, in memory or on disk; read once. Of :class:`~fishkern.selection.shards.Shards` the indices are
            those of this rank's entries.
        counts: How many of each row, by name; at most its width.
        widths: How many neighbours are a row, by name; a divisor of the parameter's size.
        order: Which scores come first.

    Returns:
        Flat indices by name, ascending, int64; and the parameters in which, of equal zeros, some were selected by their
        position alone.

    Raises:
        ValueError: A score is NaN, or what is a row here is split over ranks; its parameter is named.
        TypeError: Scores are of a dtype that torch does not sort, such as float8.
    """
    check_ordered(scores)
    if isinstance(scores, Shards):
        return _on_ranks(scores, counts, widths, order)
    selected, zeros = {}, []
    for name, score in scores.items():
        parts = list(_parts(name, score, counts[name], widths[name], order))
        selected[name] = torch.cat([torch.empty(0, dtype=torch.int64), *(indices.cpu() for indices, _ in parts)])
        if any(by_position for _, by_position in parts):
            zeros.append(name)
    return selected, zeros


def _on_ranks(
    shards: Shards, counts: Mapping[str, int], widths: Mapping[str, int], order: Order
) -> tuple[dict[str, Tensor], list[str]]:
    """Select as :func:`topk_of_rows`, each rank from its own rows. A collective operation."""
    refuse_nan(shards)
    with shards.together():
        for name, region in shards.regions.items():
            if region.splits(widths[name]):
                raise ValueError(
                    f"each rank holds a part of every row of {name}, from which {widths[name]} entries are ranked "
                    "together: shard along the first axis (Shard(0)), or save the statistics, and select from the "
                    "file on every rank."
                )
        parts = {name: shards.part(name) for name in shards}
        selected, zeros = topk_of_rows(parts, counts, widths, order)
        selected = {name: shards.regions[name].in_whole(indices) for name, indices in selected.items()}
    zeros_of_any = {name for names in shards.gathered(zeros) for name in names}
    return selected, [name for name in shards if name in zeros_of_any]


def some_rows(zeros: list[str], scores: Iterable[str]) -> str:
    """Say where position alone has decided, for :func:`~fishkern.selection.ranking.warn_of_zeros`.

    Args:
        zeros: Names of these parameters.
        scores: All names.

    Returns:
        The words.
    """
    return f"some rows of {len(zeros)} of {len(list(scores))} parameters (such as {zeros[0]})"


def _parts(name: str, score: AnyTensor, k: int, width: int, order: Order) -> Iterator[tuple[Tensor, bool]]:
    """Yield, for some rows after others, the flat indices selected, and whether position chose a zero."""
    if k == 0 or score.numel() == 0:
        return
    first = 0
    for piece in pieces(score, max(1, PIECE // width) * width):
        rows = piece.view(-1, width)
        if rows.isnan().any():
            raise ValueError(no_rank(name, first + int(piece.isnan().nonzero()[0])))
        largest = order == "largest"
        threshold = rows.topk(k, dim=1, largest=largest).values[:, -1:]
        better = rows > threshold if largest else rows < threshold
        equal = rows == threshold
        room = k - better.sum(1, keepdim=True)
        better |= equal & (equal.cumsum(1) <= room)
        non_zero = rows.count_nonzero(1)
        among_largest = (non_zero < k) & (k < width)
        tied = among_largest if largest else (threshold[:, 0] == 0) & (width - non_zero > k)
        yield better.view(-1).nonzero().view(-1) + first, bool(tied.any())
        first += len(piece)

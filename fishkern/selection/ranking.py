"""Ranking scores: the exact top-k by name, what has no rank, and the ranks that only positions decide."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern.arguments import one_of
from fishkern.backend import Backend, BackendUnavailableError, choose
from fishkern.files import AnyTensor, pieces
from fishkern.ops.streaming_topk import ORDERS, NaNScoreError, Order, streaming_topk_torch, topk_with_threshold
from fishkern.selection._topk_on_ranks import topk_on_ranks
from fishkern.selection.budgeted import Budgeted
from fishkern.selection.shards import Shards
from fishkern.warning import warn_caller


@dataclass(frozen=True)
class TopK(Budgeted, ABC):
    """A rule that spends its budget on the first scores of an order.

    Args:
        k: How many; or
        density: A fraction.
        order: ``"largest"`` scores first, or ``"smallest"``.
        always: As for every rule.
        never: As for every rule.

    Raises:
        ValueError: Not exactly one of ``k`` and ``density`` is given, or an argument is out of range.
        TypeError: ``k`` or ``density`` is not a number.
    """

    order: Order = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.order, ORDERS, "order")


def topk(
    scores: Mapping[str, AnyTensor], k: int, order: Order, backend: Backend | None
) -> tuple[dict[str, Tensor], float | None]:
    """Select the ``k`` first scores of several parameters together.

    Args:
        scores: By name. Of :class:`~fishkern.selection.shards.Shards` the indices are those of this rank's entries.
        k: How many.
        order: Which come first.
        backend: See :func:`fishkern.ops.streaming_topk`.

    Returns:
        Flat indices by name, and the last score selected (``None`` where it is not known).

    Raises:
        ValueError: A score is NaN; its parameter is named.
        TypeError: Scores are of a dtype that torch does not sort, such as float8.
        BackendUnavailableError: Triton was named, and cannot run.
    """
    check_ordered(scores)
    if isinstance(scores, Shards):
        if choose(streaming_topk_torch, backend) is not streaming_topk_torch:
            raise BackendUnavailableError(
                "the top-k of scores that are sharded over processes cannot run on Triton. Ask for 'auto' or 'torch'."
            )
        refuse_nan(scores)
        return topk_on_ranks(scores, k, order)
    names = list(scores)
    try:
        indices, threshold = topk_with_threshold(list(scores.values()), k, order=order, backend=backend)
    except NaNScoreError as error:
        raise ValueError(no_rank(names[error.block], error.index)) from None
    return dict(zip(names, indices, strict=True)), threshold


def check_ordered(scores: Mapping[str, AnyTensor]) -> None:
    """Check that torch can sort the scores.

    Args:
        scores: By name.

    Raises:
        TypeError: One is of another dtype, such as float8.
    """
    for name, score in scores.items():
        if score.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"scores must be float64, float32, bfloat16 or float16; {name} is {score.dtype}: cast it.")


def no_rank(name: str, index: int) -> str:
    """Say what is wrong with a score that is NaN.

    Args:
        name: Of its parameter.
        index: Its flat index there.

    Returns:
        The message.
    """
    return (
        f"{name} holds NaN at flat index {index}, which has no rank: look at the data and the loss that it comes from, "
        "or leave it out (never= of a rule)."
    )


def refuse_nan(shards: Shards) -> None:
    """Refuse scores that have no rank, on all ranks alike.

    Args:
        shards: The scores.

    Raises:
        ValueError: A score is NaN; its parameter is named.
    """
    if (first := shards.first_nan()) is not None:
        raise ValueError(no_rank(*first))


def of_one(scores: Mapping[str, AnyTensor], name: str) -> Mapping[str, AnyTensor]:
    """Give the scores of one parameter.

    Args:
        scores: By name.
        name: The parameter's.

    Returns:
        A mapping of the same kind with this name alone.
    """
    return scores.only([name]) if isinstance(scores, Shards) else {name: scores[name]}


def count_selected(scores: Mapping[str, AnyTensor], indices: Mapping[str, Tensor]) -> dict[str, int]:
    """Count what was selected of each parameter, on all ranks together.

    Args:
        scores: By name.
        indices: Flat indices by name; names may be missing.

    Returns:
        The counts of all names.
    """
    return scores.counts(indices) if isinstance(scores, Shards) else {n: len(indices.get(n, ())) for n in scores}


def num_non_zero(scores: Mapping[str, AnyTensor]) -> int:
    """Count the scores that are not zero.

    Args:
        scores: By name, in memory or on disk; read once.

    Returns:
        Their number.
    """
    if not isinstance(scores, Shards):
        return sum(int(piece.count_nonzero()) for score in scores.values() for piece in pieces(score))
    own = (int(piece.count_nonzero()) for name in scores.counted() for _, piece in scores.pieces(name))
    return int(scores.summed(lambda: torch.tensor(sum(own))))


def position_decides(order: Order, k: int, non_zero: int, total: int) -> bool:
    """Tell whether some zeros were selected and others not, where the last selected score is zero.

    Args:
        order: Which scores come first.
        k: How many were selected, of scores none of which is negative.
        non_zero: How many scores are not zero.
        total: How many scores there are.

    Returns:
        Whether only their position decided.
    """
    return non_zero < k < total if order == "largest" else k < total - non_zero


def warn_of_zeros(order: Order, budget: str, where: str, count: int | None = None) -> None:
    """Warn that zeros were selected by their position.

    Args:
        order: Which scores come first: among the largest the zeros are last, among the smallest first.
        budget: What was to be selected, such as ``"k=3"``.
        where: Among which scores, such as ``"the pool"``.
        count: How many scores there are not zero (``"largest"``) or zero (``"smallest"``), where it is one number.
    """
    number = "number of" if count is None else f"{count:,}"
    if order == "largest":
        text = (
            f"{budget} exceeds the {number} non-zero scores in {where}, so entries that score exactly zero are "
            "selected by their position alone. With LoRA's usual start B = 0, every entry of A scores zero: start from "
            "PiSSA or another non-zero B, or select fewer."
        )
    else:
        text = (
            f"{budget} is less than the {number} scores in {where} that are exactly zero, so some of these entries are "
            "selected by their position alone. More data tells them apart; entries that no data reaches can be left "
            "out (never=)."
        )
    warn_caller(text)

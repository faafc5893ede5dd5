"""What a rule is: a recipe that chooses coordinates by their scores."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from fishkern.backend import Backend
from fishkern.files import AnyTensor, pieces
from fishkern.ops.streaming_topk import ORDERS, NaNScoreError, Order, topk_with_threshold
from fishkern.statistics.base import integer

Patterns = str | Iterable[str]


@dataclass(frozen=True)
class Rule(ABC):
    """Recipe of a selection.

    Patterns are those of a shell (``fnmatch``), for the whole canonical name, case-sensitive: ``"*.bias"``,
    ``"classifier.*"``, ``"*.layers.[0-3].*"``. One that matches no name raises, and so does a name in both.

    Args:
        always: Patterns of parameters that are selected whole, beside what the rule chooses.
        never: Patterns of parameters that belong to the pool and are selected nowhere.

    Attributes:
        streams: Whether :meth:`choose` takes scores that lie on disk as :class:`~fishkern.files.StoredTensor`, to read
            them piece by piece. Where not, a score is read whole whenever it is looked up. False for a class that
            defines ``choose`` and does not say.

    Raises:
        ValueError: A pattern is not a string.
    """

    streams: ClassVar[bool] = False

    always: Patterns = field(default=(), kw_only=True)
    never: Patterns = field(default=(), kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "choose" in vars(cls) and "streams" not in vars(cls):  # what it inherits speaks of another choose
            cls.streams = False

    def __post_init__(self) -> None:
        for name in ("always", "never"):
            patterns = getattr(self, name)
            patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{name} takes patterns of names, strings such as '*.bias'; got {patterns!r}.")
            object.__setattr__(self, name, patterns)

    @property
    def settings(self) -> dict[str, Any]:
        """The rule in plain values, for the header of a file."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if "__dataclass_fields__" not in vars(type(self)):  # what an __init__ of its own has set
            values |= {name: value for name, value in vars(self).items() if not name.startswith("_")}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"name": type(self).__name__, **plain}

    @abstractmethod
    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        """Choose among the parameters that are neither selected always nor never.

        Args:
            scores: By name, floating tensors; where the rule :attr:`streams`, also what lies on disk.
            total: Coordinates of the whole pool, those selected always or never included.
            backend: Passed on to the operation behind it.

        Returns:
            Flat indices by name, each ascending; names may be missing.
        """


def matching(patterns: Iterable[str], names: Iterable[str], argument: str) -> list[str]:
    """Find the names that match any pattern.

    Args:
        patterns: Of ``fnmatch``.
        names: All names.
        argument: Where the patterns come from, for the message.

    Returns:
        The matching names, in their order.

    Raises:
        ValueError: A pattern matches none.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = f"{names[0]} to {names[-1]}" if names else "none"
            raise ValueError(f"{argument}={pattern!r} matches no name of the pool ({len(names)} names: {shown}).")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def count_of(k: Any, name: str = "k") -> int:
    """Take a count as a plain number.

    Args:
        k: An integer of any library.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        ValueError: It is negative.
        TypeError: It is no integer.
    """
    if (k := integer(k, name)) < 0:
        raise ValueError(f"{name} must be at least 0, got {k}.")
    return k


def fraction_of(density: Any) -> float:
    """Take a density as a plain number.

    Args:
        density: A number of any library.

    Returns:
        The same number.

    Raises:
        ValueError: It is outside (0, 1].
        TypeError: It is no number.
    """
    try:
        plain = float(density) if isinstance(density, Real | Tensor) else None
    except (RuntimeError, ValueError):  # of a tensor with several entries
        plain = None
    if plain is None:
        raise TypeError(f"density must be a number, got {density!r}.")
    if not 0 < plain <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {plain}.")
    return plain


def either(k: Any, density: Any) -> dict[str, int | float | None]:
    """Demand exactly one of the two, in its range.

    Args:
        k: A count.
        density: A fraction.

    Returns:
        Both by name as plain numbers, one of them ``None``.

    Raises:
        ValueError: Both or neither are given, ``k`` is negative, or ``density`` is outside (0, 1].
        TypeError: What is given is no number.
    """
    if (k is None) == (density is None):
        raise ValueError(f"give either k or density, got k={k} and density={density}.")
    if k is not None:
        return {"k": count_of(k), "density": None}
    return {"k": None, "density": fraction_of(density)}


def budget(k: int | None, density: float | None, total: int) -> int:
    """Count what a rule may spend.

    Args:
        k: A count, or ``None``.
        density: A fraction, taken as the decimal number it is written as: 0.005 of 1000 is 5.
        total: What ``density`` is a fraction of.

    Returns:
        ``k``, or floor(density * total), exactly.
    """
    return k if k is not None else int(Fraction(repr(float(density))) * total)


def check_order(order: str) -> None:
    """Demand one of the two orders.

    Args:
        order: Which scores come first.

    Raises:
        ValueError: It is neither.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")


def topk(
    scores: Mapping[str, AnyTensor], k: int, order: Order, backend: Backend | None
) -> tuple[dict[str, Tensor], float | None]:
    """Select the ``k`` first scores of several parameters together.

    Args:
        scores: By name.
        k: How many.
        order: Which come first.
        backend: See :func:`fishkern.ops.streaming_topk`.

    Returns:
        Flat indices by name, and the last score selected (``None`` where it is not known).

    Raises:
        ValueError: A score is NaN; its parameter is named.
        TypeError: Scores are of a dtype without an order of its own, such as float8.
    """
    check_ordered(scores)
    names = list(scores)
    try:
        indices, threshold = topk_with_threshold(list(scores.values()), k, order=order, backend=backend)
    except NaNScoreError as error:
        raise ValueError(no_rank(names[error.block], error.index)) from None
    return dict(zip(names, indices, strict=True)), threshold


def check_ordered(scores: Mapping[str, AnyTensor]) -> None:
    """Demand scores that torch can sort.

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


def num_non_zero(scores: Iterable[AnyTensor]) -> int:
    """Count the scores that are not zero.

    Args:
        scores: In memory or on disk; read once.

    Returns:
        Their number.
    """
    return sum(int(piece.count_nonzero()) for score in scores for piece in pieces(score))


def by_position(order: Order, k: int, non_zero: int, total: int) -> bool:
    """Tell whether some zeros were selected and others not, where the last selected score is zero.

    Args:
        order: Which scores come first.
        k: How many were selected, of scores none of which is negative.
        non_zero: How many scores are not zero.
        total: How many scores there are.

    Returns:
        Whether it was by their position alone.
    """
    return k > non_zero if order == "largest" else k < total - non_zero


def warn_of_zeros(order: Order, what: str, number: str) -> None:
    """Say that scores of zero were selected by their position: among the largest the last, among the smallest some.

    Args:
        order: Which scores come first.
        what: Which ``k``, and where.
        number: How many scores are not zero (``"largest"``) or are (``"smallest"``): a number, or ``"number of"``.
    """
    if order == "largest":
        text = (
            f"{what} exceeds the {number} non-zero scores, so that entries which score exactly zero are selected by "
            "their position alone. Where this is LoRA with its usual start B = 0, every entry of A scores zero: start "
            "from PiSSA or another non-zero B, or select fewer."
        )
    else:
        text = (
            f"{what} is less than the {number} scores that are exactly zero, so that some of these entries are "
            "selected by their position alone. More data tells them apart; what no data reaches can be left out "
            "(never=)."
        )
    warnings.warn(text, stacklevel=4)

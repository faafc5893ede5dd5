"""Checks of single arguments, whose messages name the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


def integer(value: Any, name: str) -> int:
    """Convert an integer of any library to a plain ``int``, which the header of a file can store.

    Args:
        value: Also of numpy, or a tensor.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        TypeError: It is not an integer.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None


def count_of(value: Any, name: str = "k") -> int:
    """Check a count and convert it to a plain ``int``.

    Args:
        value: An integer of any library.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        ValueError: It is negative.
        TypeError: It is not an integer.
    """
    return at_least(0, value, name)


def at_least(least: int, value: Any, name: str) -> int:
    """Check an integer that has a smallest value and convert it to a plain ``int``.

    Args:
        least: The smallest.
        value: An integer of any library.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        ValueError: It is smaller.
        TypeError: It is not an integer.
    """
    if (number := integer(value, name)) < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def fraction_of(value: Any, name: str = "density") -> float:
    """Check a fraction and convert it to a plain ``float``.

    Args:
        value: A number of any library.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        ValueError: It is outside (0, 1].
        TypeError: It is not a number.
    """
    fraction = number(value, name)
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {fraction}.")
    return fraction


def number(value: Any, name: str) -> float:
    """Convert a number of any library to a plain ``float``.

    Args:
        value: Also of numpy, or a tensor.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        TypeError: It is not a number.
    """
    try:
        plain = float(value) if isinstance(value, Real | Tensor) else None
    except (RuntimeError, ValueError):  # of a tensor with several entries
        plain = None
    if plain is None:
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return plain


def positive(value: Any, name: str) -> float:
    """Check a positive number and convert it to a plain ``float``.

    Args:
        value: A number of any library.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        ValueError: It is not finite, or not above 0.
        TypeError: It is not a number.
    """
    if not (math.isfinite(plain := number(value, name)) and plain > 0):
        raise ValueError(f"{name} must be a positive number, got {plain:g}.")
    return plain


def one_of(value: Value, allowed: Sequence[Value], name: str) -> Value:
    """Check that an argument is one of a few values.

    Args:
        value: The argument.
        allowed: The values that it may have.
        name: Of the argument, for the message.

    Returns:
        ``value``.

    Raises:
        ValueError: It is none of them.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}.")
    return value

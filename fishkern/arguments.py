"""Checks of single arguments, whose messages name the argument."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def from_file(value: Any) -> str:
    """Say how statistics are loaded, where their file is given in their place.

    Args:
        value: What was given in place of statistics.

    Returns:
        The end of a sentence, empty if it names no file.
    """
    if not isinstance(value, str | Path):
        return ""
    return f" (a file is loaded first: fishkern.Statistics.load({str(value)!r}))"


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


def byte_count(value: Any, name: str) -> int:
    """Read a size as huggingface_hub does: ``"5GB"`` is 5 * 1000**3 bytes, ``"5GiB"`` 5 * 1024**3.

    Args:
        value: A number of bytes, or such a text.
        name: Of the argument, for the message.

    Returns:
        The number of bytes.

    Raises:
        ValueError: It is neither, or not above zero.
    """
    if match := re.fullmatch(r"(\d+) *(?:([KMGT])(I?)B)?", str(value).strip().upper()):
        number, prefix, binary = match.groups()
        nbytes = int(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " ")
        if nbytes:
            return nbytes
    raise ValueError(f'{name} must be a positive number of bytes or like "5GB", "500MiB"; got {value!r}.')


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
        percent = f" ({fraction:g} percent is {fraction / 100:g})" if 1 < fraction <= 100 else ""
        raise ValueError(f"{name} must be above 0 and at most 1, got {fraction}{percent}.")
    return fraction


def share_of(value: Any, name: str) -> float:
    """Check a share, which may be none and all, and convert it to a plain ``float``.

    Args:
        value: A number of any library.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        ValueError: It is outside [0, 1].
        TypeError: It is not a number.
    """
    share = number(value, name)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {share:g}.")
    return share


def number(value: Any, name: str) -> float:
    """Convert a number of any library to a plain ``float``.

    Args:
        value: Also of numpy, or a tensor.
        name: Of the argument, for the message.

    Returns:
        The same number.

    Raises:
        TypeError: It is not a number; True and False are none.
    """
    try:
        truth = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
        plain = float(value) if isinstance(value, Real | Tensor) and not truth else None
    except (RuntimeError, ValueError):  # of a tensor with several entries
        plain = None
    if plain is None:
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return plain


def several(value: Iterable[Any], name: str) -> list[Any]:
    """Check that an argument holds several values, and list them.

    Args:
        value: Anything that can be gone through but a text.
        name: Of the argument, for the message.

    Returns:
        The values.

    Raises:
        TypeError: It is one value.
    """
    single = isinstance(value, str | bytes) or (isinstance(value, Tensor) and not value.ndim)
    if single or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be several, such as a list, got {value!r}.")
    return list(value)


def weights_of(value: Iterable[Any], count: int, things: str, name: str = "weights") -> list[float]:
    """Check the weights of a mean and convert them to plain ``float``.

    Args:
        value: One for each of what is averaged, at least 0 and not all of them 0.
        count: How many there must be.
        things: What they weigh, for the message, such as ``"models"``.
        name: Of the argument, for the message.

    Returns:
        The weights.

    Raises:
        TypeError: It is one number, or one of them is none.
        ValueError: There are more or fewer, or one is out of range.
    """
    weights = [number(weight, name) for weight in several(value, name)]
    if len(weights) != count or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(
            f"{name} must be one number of at least 0 for each of the {count} {things}, not all of them 0; got "
            f"{weights}."
        )
    return weights


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


def patterns_of(value: str | Iterable[str], name: str) -> tuple[str, ...]:
    """Check patterns of names and put them into a tuple.

    Args:
        value: One pattern or several.
        name: Of the argument, for the message.

    Returns:
        The patterns.

    Raises:
        ValueError: One of them is not a string.
    """
    patterns = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{name} takes patterns of names, strings such as '*.bias'; got {patterns!r}.")
    return patterns


def json_of(value: Mapping[str, Any], name: str) -> str:
    """Write an argument as JSON, which a file's header can store and nobody can change.

    Args:
        value: The argument.
        name: Of the argument, for the message.

    Returns:
        The text.

    Raises:
        TypeError: It is not JSON.
    """
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be JSON: {error}.") from None

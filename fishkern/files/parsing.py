"""Parsing headers of files that anybody may have written: JSON, counts, shapes.

A file may be truncated, damaged in transit, or made to do harm. So nothing here uses more memory or recursion than the
size of the file explains, and every fault is reported in one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

DEEPEST = 500  # levels of JSON: a union of selections nests the provenance of both, two levels deeper
MOST_AXES = 64  # torch has no tensor with more


def read_json(text: str | bytes) -> Any:
    """Parse JSON of unknown origin.

    Args:
        text: The text.

    Returns:
        Plain values, at most 500 levels deep, whose strings can be written as UTF-8.

    Raises:
        ValueError: It is not JSON, is nested deeper, or has a key twice.
    """
    text = text.decode() if isinstance(text, bytes) else text  # json.loads would let halves of surrogate pairs pass
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(f"JSON of more than {DEEPEST} levels") from None
    # The recursion limit of json depends on the stack of the caller. Counting levels does not, and leaves room for
    # writing and comparing the value, which are recursive as well.
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            break
    else:
        raise ValueError(f"JSON of more than {DEEPEST} levels")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # raises at half of a surrogate pair
    return value


def read_count(text: object) -> int:
    """Parse a count that a header gives as text.

    Args:
        text: Digits.

    Returns:
        The number, below 2^63.

    Raises:
        ValueError: It is not a count.
    """
    # isdecimal alone accepts digits of every script, and int() of thousands of digits takes quadratic time.
    if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63:
        return int(text)
    raise ValueError(f"{in_brief(repr(text), 40)} is not a count")


def checked_shape(shape: object) -> torch.Size:
    """Check that a tensor of torch can have this shape.

    Args:
        shape: A value from a header.

    Returns:
        The shape.

    Raises:
        ValueError: No tensor can have it.
    """
    sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else (None,)
    fits = len(sizes) <= MOST_AXES and all(type(size) is int and size >= 0 for size in sizes)
    if not fits or math.prod(size for size in sizes if size) >= 2**60:  # at 8 bytes each, an int64 overflows
        raise ValueError(f"{in_brief(repr(shape), 80)} is the shape of no tensor")
    return torch.Size(sizes)


def in_brief(words: object, most: int = 240) -> str:
    """Put a value that may come from a file into one short line of a message.

    Args:
        words: Converted by ``str``.
        most: Maximal number of characters.

    Returns:
        One line of printable characters; of a longer one the middle is left out.
    """
    text = str(words)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def parsing(fault: str) -> Iterator[None]:
    """Turn whatever Python raises over unexpected content of a file into one line.

    Args:
        fault: Beginning of the message: ``"fisher.safetensors holds no valid statistics"``.

    Yields:
        Nothing.

    Raises:
        ValueError: The content is not as expected.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{fault}: {in_brief(error)} is missing in it. Copy or save it again.") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{fault}: {in_brief(error).rstrip('.')}. Copy or save it again.") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of a JSON object; of two values for one key, two readers could take different ones."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))
        raise ValueError(f"it says {in_brief(twice, 80)!r} twice")
    return values


def _inside(value: Any) -> Sequence[Any] | Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

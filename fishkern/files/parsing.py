"""What is taken out of a file that anybody may have made: JSON, shapes, and one line where they are not what they say.

A file may be cut, damaged on its way, or made to do harm. So nothing here costs more memory or depth than the size of
the file explains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

DEEPEST = 500  # levels of JSON; each union of selections adds two
MOST_AXES = 64


def read_json(text: str | bytes) -> Any:
    """Parse JSON that somebody else may have written.

    Args:
        text: The text.

    Returns:
        Plain values, at most 500 levels deep, of texts that can be written as UTF-8.

    Raises:
        ValueError: It is no JSON, goes deeper, or says two things of one key.
    """
    text = text.decode() if isinstance(text, bytes) else text  # json's own way lets halves of surrogate pairs pass
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(f"JSON of more than {DEEPEST} levels") from None
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
    """Read a number of things out of a header.

    Args:
        text: Digits.

    Returns:
        The number, below 2^63.

    Raises:
        ValueError: It is none.
    """
    if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63:
        return int(text)
    raise ValueError(f"{in_brief(repr(text), 40)} is no number of things")


def checked_shape(shape: object) -> torch.Size:
    """Demand the shape of a tensor that torch can have.

    Args:
        shape: What a header says.

    Returns:
        The shape.

    Raises:
        ValueError: It is none.
    """
    sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else (None,)
    fits = len(sizes) <= MOST_AXES and all(type(size) is int and size >= 0 for size in sizes)
    if not fits or math.prod(size for size in sizes if size) >= 2**60:  # times 8 bytes is what an int64 holds
        raise ValueError(f"{in_brief(repr(shape), 80)} is the shape of no tensor")
    return torch.Size(sizes)


def in_brief(words: object, most: int = 240) -> str:
    """Say something that a file may have dictated in one short line.

    Args:
        words: Said by ``str``.
        most: How many characters.

    Returns:
        One line of printable characters, its middle left out where it is longer.
    """
    text = str(words)
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def parsing(fault: str) -> Iterator[None]:
    """Turn what Python raises where the content of a file is not as expected into one line.

    Args:
        fault: What is then said first: ``"fisher.safetensors holds no valid statistics"``.

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
    """Make an object of pairs; of two values for one key a reader could take either."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it says {in_brief(twice, 80)!r} twice")
    return made


def _inside(value: Any) -> Sequence[Any] | Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()

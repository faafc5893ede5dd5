"""Numbers of layers, as options name them."""

from __future__ import annotations


def numbers_in(text: str, option: str) -> list[int]:
    """Read numbers such as ``0-4`` or ``0,2,5``.

    Args:
        text: What the user wrote.
        option: The option that it belongs to, for the message.

    Returns:
        The numbers, in the order in which they are written.

    Raises:
        ValueError: It cannot be read.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{option} is like 0-4 or 0,2,5, got {text!r}.")
        if dash and int(last) < int(first):  # an empty list would mean all layers to PEFT
            raise ValueError(f"{option} {text} counts down: write {last}-{first}.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers

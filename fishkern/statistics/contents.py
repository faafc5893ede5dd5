"""What a batch contains: structure that is entered (mappings, tuples), arrays, single values, and their places."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fishkern.digests import exact_digest

Batch = Mapping[str, Any] | tuple[Any, ...]
Place = tuple[Any, ...]

KINDS = {"with text": 4, "without text": 3}
"""How many kinds of positions a Qwen-VL takes: time, height and width, and in front of them those of the text."""


def is_structure(value: Any) -> bool:
    """Recognise a container that is entered and never cut: a mapping or a tuple."""
    return isinstance(value, Mapping | tuple) and not isinstance(value, PackedSequence)


def is_array(value: Any) -> bool:
    """Recognise a tensor, or an array of numpy and similar libraries."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def is_single(value: Any) -> bool:
    """Recognise a single value, which is the same for every example."""
    return value is None or isinstance(value, str | bytes | bool | int | float | complex | torch.dtype | torch.device)


def holds_kinds(key: Any, value: Any, shape: tuple[int, ...]) -> bool:
    """Recognise positions of several kinds, as those of a Qwen-VL, whose rows are the second axis.

    Args:
        key: Key of the entry.
        value: The entry.
        shape: Of the tokens, ``(N, T)``.

    Returns:
        Whether it is ``position_ids [kinds, N or 1, T]``.
    """
    if key != "position_ids" or not is_array(value) or len(value.shape) != 3 or len(shape) != 2:
        return False
    kinds, rows, positions = value.shape
    return kinds in KINDS.values() and rows in (shape[0], 1) and positions == shape[1]


def items_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over the keys and items of a mapping, or the numbers and items of a list or tuple."""
    return iter(value.items()) if isinstance(value, Mapping) else enumerate(value)


def all_places(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    """Walk through everything inside a container, the containers in it included.

    Args:
        place: Of the container in the batch.
        value: The container.

    Yields:
        Place and value, a container before what is in it.
    """
    for key, item in items_of(value):
        yield (*place, key), item
        if is_structure(item) or isinstance(item, list):
            yield from all_places((*place, key), item)


def leaves_of(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    """Walk through everything inside a container that is no container itself."""
    return ((at, item) for at, item in all_places(place, value) if not (is_structure(item) or isinstance(item, list)))


def leading_sizes(value: list[Any]) -> list[int | None]:
    """List the leading sizes of all tensors in a list, at any depth; ``None`` for a tensor without an axis."""
    return [leaf.shape[0] if len(leaf.shape) else None for _, leaf in leaves_of((), value) if is_array(leaf)]


def holds_mappings(value: list[Any]) -> bool:
    """Recognise a list of mappings, one for each example, such as the targets of a detector."""
    return all(isinstance(item, Mapping) for item in value)


def name_of(place: Place, content: Batch) -> str:
    """Name an entry of a batch as the user knows it."""
    if isinstance(content, tuple) and len(content) == 2 and place:
        place = (("inputs", "labels")[place[0]], *place[1:])
    return repr(".".join(map(str, place)))


def rebuilt(value: Any, items: Mapping[Any, Any]) -> Any:
    """Make a container of the same kind with other items."""
    if isinstance(value, UserDict):
        new = copy.copy(value)
        new.data = dict(items)
        return new
    if isinstance(value, dict) and value.keys() == items.keys():
        new = copy.copy(value)  # of its class: a loss function may read entries as attributes, or rely on defaults
        for key, item in items.items():
            new[key] = item
        return new
    if isinstance(value, Mapping):
        return dict(items)
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*items.values())
    return list(items.values()) if isinstance(value, list) else tuple(items.values())


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Replace every tensor in a nest."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return type(value)(*(None if part is None else change(part) for part in value))
    if is_structure(value) or isinstance(value, list):
        return rebuilt(value, {key: with_tensors(item, change) for key, item in items_of(value)})
    return value


def copied(value: Any) -> Any:
    """Copy a nest with its tensors and arrays."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_structure(value) or isinstance(value, list):
        return rebuilt(value, {key: copied(item) for key, item in items_of(value)})
    return copy.copy(value) if is_array(value) else value


def bytes_of(value: Any) -> Iterator[bytes | None]:
    """Give bytes that say what a nest holds, piece by piece: equal nests give equal ones.

    Args:
        value: A nest.

    Yields:
        Bytes, ``None`` where a value has none that say what it is.
    """
    if isinstance(value, Tensor):
        yield exact_digest(value) if type(value) is Tensor and value.layout is torch.strided else None
    elif is_structure(value) or isinstance(value, list):
        items = list(items_of(value))
        yield repr((isinstance(value, Mapping), [key for key, _ in items])).encode()
        for _, item in items:
            yield from bytes_of(item)
    elif is_array(value):
        plain = hasattr(value, "tobytes") and getattr(value.dtype, "hasobject", True) is False
        yield repr((value.dtype, value.shape)).encode() + value.tobytes() if plain else None
    else:
        yield repr(value).encode() if is_single(value) else None

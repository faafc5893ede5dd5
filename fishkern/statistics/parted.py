"""The base of results that hold several tensors for each parameter, by the names of its parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fishkern.statistics.held import Held

Value = TypeVar("Value")


class Parted(Held[Value]):
    """A result whose entries are ``"<name>/<part>"``: tensors of any shape, several for each parameter.

    Args:
        tensors: The entries.
        **options: As for :class:`fishkern.Statistics`.

    Raises:
        TypeError: As for :class:`fishkern.Statistics`.
        ValueError: As for :class:`fishkern.Statistics`; or the parts of a parameter do not fit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__(tensors, **options)
        for name, entries in self._names.items():
            self._check_parts(name, {part_of(entry): self.shapes[entry] for entry in entries})

    @staticmethod
    @abstractmethod
    def _check_parts(name: str, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse parts of a parameter that are missing, unknown, or of shapes that do not fit."""

    @staticmethod
    def name_of(entry: str) -> str:
        return entry.rpartition("/")[0] or entry

    @classmethod
    def _renamed_entry(cls, entry: str, fn: Callable[[str], str]) -> str:
        return f"{fn(cls.name_of(entry))}/{part_of(entry)}"


def part_of(entry: str) -> str:
    """Read the part from the key of an entry.

    Args:
        entry: ``"<name>/<part>"``.

    Returns:
        The part.
    """
    return entry.rpartition("/")[2]


def entries_of(results: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Give the parts of all parameters as entries.

    Args:
        results: Parts by parameter name.

    Returns:
        Tensors by ``"<name>/<part>"``.
    """
    return {f"{name}/{part}": tensor for name, parts in results.items() for part, tensor in parts.items()}

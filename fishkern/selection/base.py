"""Rules: recipes that choose coordinates by their scores, and the patterns of names that they take."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from fishkern.arguments import patterns_of
from fishkern.backend import Backend
from fishkern.files import AnyTensor

Patterns = str | Iterable[str]


@dataclass(frozen=True)
class Rule(ABC):
    """Recipe of a selection.

    Patterns are those of a shell (``fnmatch``), for the whole canonical name, case-sensitive: ``"*.bias"``,
    ``"classifier.*"``, ``"*.layers.[0-3].*"``. One that matches no name raises, and so does a name in both.

    Args:
        always: Patterns of parameters that are selected whole, on top of what the rule chooses.
        never: Patterns of parameters that belong to the pool and are selected nowhere.

    Attributes:
        streams: Whether :meth:`choose` takes scores on disk as :class:`~fishkern.files.StoredTensor`, to read them
            piece by piece. If not, a score is read whole whenever it is looked up. False for a class that defines
            ``choose`` and does not set it.
        on_shards: Whether :meth:`choose` takes scores of which each rank holds a part,
            :class:`~fishkern.selection.shards.Shards`, and gives the indices of this rank's own entries. If not, such
            scores are refused. False for a class that defines ``choose`` and does not set it.

    Raises:
        ValueError: A pattern is not a string.
    """

    streams: ClassVar[bool] = False
    on_shards: ClassVar[bool] = False

    always: Patterns = field(default=(), kw_only=True)
    never: Patterns = field(default=(), kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("streams", "on_shards") if "choose" in vars(cls) else ():
            if name not in vars(cls):  # the inherited value is about another choose
                setattr(cls, name, False)

    def __post_init__(self) -> None:
        for name in ("always", "never"):
            vars(self)[name] = patterns_of(getattr(self, name), name)

    @property
    def settings(self) -> dict[str, Any]:
        """The rule in plain values, for the header of a file."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if "__dataclass_fields__" not in vars(type(self)):  # attributes set by an __init__ of its own
            values |= {name: value for name, value in vars(self).items() if not name.startswith("_")}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"name": type(self).__name__, **plain}

    @abstractmethod
    def choose(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> Mapping[str, Tensor]:
        """Choose among the parameters that are neither selected always nor never.

        Args:
            scores: By name, floating tensors; where the rule :attr:`streams`, also tensors on disk; where it says
                :attr:`on_shards`, also :class:`~fishkern.selection.shards.Shards`.
            total: Coordinates of the whole pool, those selected always or never included.
            backend: Passed on to the operation.

        Returns:
            Flat indices by name, each ascending; names may be missing.
        """

    def choose_and_report(
        self, scores: Mapping[str, AnyTensor], total: int, backend: Backend | None = None
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Choose, and say what the choice has shown; by default nothing.

        Args:
            scores: As for :meth:`choose`.
            total: As for :meth:`choose`.
            backend: As for :meth:`choose`.

        Returns:
            What :meth:`choose` gives, and entries for the selection's provenance, JSON.
        """
        return self.choose(scores, total, backend), {}


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Write patterns that match these names alone, for ``always`` and ``never``.

    Args:
        names: Names of parameters, which may contain characters that patterns use.

    Returns:
        A pattern for each.
    """
    return tuple(re.sub(r"([*?[])", r"[\1]", name) for name in names)


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

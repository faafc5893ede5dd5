"""The recipe of an adapter's start from directions: which ones, and how large."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fishkern.arguments import integer, one_of, positive, share_of
from fishkern.ops.streaming_topk import ORDERS, Order
from fishkern.selection.base import Patterns

SCORES = ("energy", "weighted")
FISHERS = ("kronecker", "joint")
MAGNITUDES = ("sigma", "energy", "uniform")
DEAD = ("keep", "skip")


@dataclass(frozen=True)
class DirectionInit:
    """Recipe of an adapter's start: which directions ``u_k v_k^T`` of each weight matrix, and how large.

    The directions are those of the energies' basis. The score of a direction is its energy, ``input * output`` of
    :class:`fishkern.Energies` or the exact ``joint``, or ``sigma_k^2`` times it, which is the Fisher information along
    the component itself. The start of a matrix is ``scaling * B A = sum_k m_k u_k v_k^T``, split evenly between ``A``
    and ``B``.

    Args:
        ranks: How many directions: one rank for all matrices, or one for each name or pattern. Patterns (``fnmatch``)
            are of weight names, ``"*.q_proj.weight"``, or of paths, ``"*.q_proj"`` and ``"q_proj"``. A weight's own
            name counts before a pattern, an earlier pattern before a later one, and each weight needs an entry.
        order: ``"largest"`` or ``"smallest"`` scores, for all matrices, or by name or pattern. Ties go to the smaller
            number.
        score: ``"energy"`` (FILet) or ``"weighted"`` by the squared singular value (FARSS).
        fisher: ``"kronecker"``, the product of both energies, or ``"joint"``, the mean of squares of the examples' own
            gradients along the direction.
        magnitude: The size ``m_k``: ``"sigma"``, the singular value, so that the start takes over that part of the
            weight (as in PiSSA); ``"energy"``, the score, at least ``floor``; or ``"uniform"``, one for all directions
            of a matrix.
        floor: Smallest ``m_k`` under ``"energy"``.
        size: Under ``"uniform"``, the norm of ``scaling * B A`` relative to that of the weight.
        scaling: Of every module. It is compensated for in ``A`` and ``B``, so it does not move the start.
        distinct: Leave out a direction whose ``|cos|`` with a chosen one exceeds this for both ``u`` and ``v``;
            ``None`` leaves none out. Singular vectors are orthogonal, so it matters to the power basis alone.
        dead: Whether directions that the data do not reach may be chosen: ``"keep"``, with a warning that counts them,
            or ``"skip"``.
        dead_below: A direction is dead where its energy is at most this part of the median of the matrix's energies
            that are not zero.
        targets: Patterns of the weights that get an adapter.

    Raises:
        TypeError: A rank is not an integer, or another argument is of another type than described.
        ValueError: A rank is below 1, or another argument is none of the above.
    """

    ranks: int | Mapping[str, int]
    order: Order | Mapping[str, Order] = "largest"
    score: Literal["energy", "weighted"] = "energy"
    fisher: Literal["kronecker", "joint"] = "kronecker"
    magnitude: Literal["sigma", "energy", "uniform"] = "sigma"
    floor: float = 1e-8
    size: float = 0.01
    scaling: float = 1.0
    distinct: float | None = None
    dead: Literal["keep", "skip"] = "keep"
    dead_below: float = 1e-6
    targets: Patterns = "*"

    def __post_init__(self) -> None:
        for name, rank in _by_name(self.ranks, "ranks"):
            if integer(rank, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {rank}; targets= leaves weights out.")
        for name, order in _by_name(self.order, "order"):
            one_of(order, ORDERS, name)
        one_of(self.score, SCORES, "score")
        one_of(self.fisher, FISHERS, "fisher")
        one_of(self.magnitude, MAGNITUDES, "magnitude")
        one_of(self.dead, DEAD, "dead")
        for name in ("floor", "size", "scaling"):
            vars(self)[name] = positive(getattr(self, name), name)
        for name in ("distinct", "dead_below"):
            if getattr(self, name) is not None or name != "distinct":
                vars(self)[name] = share_of(getattr(self, name), name)
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        targets = tuple(targets) if isinstance(targets, Iterable) else (targets,)
        if not all(isinstance(one, str) for one in targets):
            raise TypeError(f"targets must be patterns of names such as '*.q_proj', got {self.targets!r}.")
        if not targets:
            raise ValueError("targets= is empty: give a pattern of the weights that get an adapter, or '*' for all.")
        vars(self).update(ranks=_plain(self.ranks, int), order=_plain(self.order, str), targets=targets)

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe in plain values, for the header of a file."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"name": type(self).__name__, **plain}


def _by_name(value: Any, argument: str) -> list[tuple[str, Any]]:
    """List the values of an argument that is one value or one by name, each with what to call it in a message."""
    if not isinstance(value, Mapping):
        return [(argument, value)]
    if not value:
        raise ValueError(f"{argument}= is empty: give one value, or one for each name or pattern.")
    return [(f"{argument}[{key!r}]", one) for key, one in value.items()]


def _plain(value: Any, kind: type) -> Any:
    return {key: kind(one) for key, one in value.items()} if isinstance(value, Mapping) else kind(value)

"""Energies: what gradients and activations hold along each direction of each weight matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Self

import torch
from torch import Tensor

from fishkern.digests import agree
from fishkern.files import Format, StoredTensor, in_brief
from fishkern.statistics.parted import Parted, part_of

_PARTS = ("input", "output", "joint", "singular_values", "positions", "matrix", "importance", "grams")


class MatrixEnergies:
    """The energies of one weight matrix ``M [O, I]`` along ``K`` directions ``u_k v_k^T``; read-only.

    Tensors are float32 (float64 for a float64 model), ``[K]``. If the file was loaded lazily, each is read on access.

    Args:
        read: Reads a part by its name.
        parts: The parts that there are.
    """

    __slots__ = ("_parts", "_read")

    def __init__(self, read: Callable[[str], Tensor], parts: Sequence[str]) -> None:
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "_parts", frozenset(parts))

    @property
    def input(self) -> Tensor:
        """``[K]``: mean over positions of ``(v_k . h)^2``, where ``h`` is what enters the module."""
        return self._per_position("input")

    @property
    def output(self) -> Tensor:
        """``[K]``: mean over positions of ``(u_k . d)^2``, where ``d`` is the gradient of the loss at the output."""
        return self._per_position("output")

    @property
    def kronecker(self) -> Tensor:
        """``[K]``: ``input * output``, the energy if activations and output gradients were independent."""
        return self.input * self.output

    @property
    def joint(self) -> Tensor:
        """``[K]``: mean over examples of ``<grad_n, u_k v_k^T>^2``, exact."""
        return self._read("joint")

    @property
    def singular_values(self) -> Tensor | None:
        """``[K]``, descending; ``None`` for the power basis, whose directions are not singular vectors."""
        return self._read("singular_values") if "singular_values" in self._parts else None

    @property
    def importance(self) -> float | None:
        """Importance of the whole matrix, as :class:`DirectionEnergy` was asked for it; ``None`` if it was not."""
        O, I = self.shape
        if "importance" in self._parts:
            return self._read("importance").item() / (O * I)
        if "grams" not in self._parts:
            return None
        first, second = self._read("grams")
        positions = self._read("positions").double()
        product = sum(
            (a.double() * b.double()).sum() for a, b in zip(first.split(1024), second.split(1024), strict=True)
        )
        return (product / positions.square() / (O * I)).item() if positions else 0.0

    @property
    def positions(self) -> float:
        """Mean number of positions of an example that count in :attr:`input` and :attr:`output`."""
        return self._read("positions").item()

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``: number of features that leave and that enter the module, however the weight is stored."""
        O, I, _, _ = self._read("matrix").tolist()
        if not (O >= 1 and I >= 1 and O.is_integer() and I.is_integer()):
            raise ValueError(f"a matrix has at least one row and one column, and these energies say {O} and {I}.")
        return int(O), int(I)

    @property
    def digest(self) -> tuple[float, float]:
        """Digest of the matrix that the directions are of (:func:`fishkern.digests.digest`)."""
        _, _, norm, signed = self._read("matrix").tolist()
        return norm, signed

    def _per_position(self, part: str) -> Tensor:
        sums, positions = self._read(part), self._read("positions")
        return sums / positions if positions else sums

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"MatrixEnergies are frozen: {name} cannot be set.")

    def __repr__(self) -> str:
        O, I = self.shape
        return f"MatrixEnergies(matrix {O} x {I}, {len(self.joint)} directions)"


class Energies(Parted[MatrixEnergies]):
    """What :class:`DirectionEnergy` estimates: the energies of each weight matrix along its directions, by name.

    A read-only mapping from the canonical name of a weight to :class:`MatrixEnergies`, in the model's order. All parts
    are means over ``count`` examples, so results of different data merge exactly.

    Args:
        tensors: Entries ``"<name>/<part>"``: ``input`` and ``output``, ``[K]``, sums over the counted positions of an
            example, mean over examples; ``joint [K]``; ``positions``, their mean number; ``matrix [4]``, which are
            ``O``, ``I`` and the two numbers of its digest; for singular vectors ``singular_values [K]``; with
            importance ``importance``, or the two matrices of the smaller side whose product it is, ``grams [2, S, S]``.
        count: Number of examples.
        provenance: As for :class:`fishkern.Statistics`.
        coverage: As for :class:`fishkern.Statistics`.

    Raises:
        TypeError: As for :class:`fishkern.Statistics`.
        ValueError: As for :class:`fishkern.Statistics`; or a part is missing or unknown, or has another shape.
    """

    FORMAT: ClassVar[Format] = Format("fishkern.energies", version=1, saved_by="Energies.save")
    KEEPS: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)

    @staticmethod
    def _check_parts(name: str, shapes: Mapping[str, torch.Size]) -> None:
        _check_parts(name, shapes)

    @property
    def basis(self) -> Literal["svd", "power"]:
        """The directions: ``"svd"`` for singular vectors, ``"power"`` for FILet's."""
        return self.provenance["definition"].get("basis", "svd")

    def __getitem__(self, name: str) -> MatrixEnergies:
        parts = [part_of(entry) for entry in self._entries_of(name)]
        return MatrixEnergies(lambda part: self._read(f"{name}/{part}"), parts)

    @classmethod
    def mean(cls, parts: Sequence[Self], shares: Sequence[float], definition: Mapping[str, Any]) -> Self:
        for other in parts[1:]:
            for name in parts[0]:
                if not agree(other[name].digest, parts[0][name].digest):
                    raise ValueError(
                        f"the energies are along directions of different weights: {name} had norm "
                        f"{parts[0][name].digest[0]:.6g} in one and {other[name].digest[0]:.6g} in another. Estimate "
                        "both on the same model."
                    )
        return super().mean(parts, shares, definition)

    def __repr__(self) -> str:
        definition = self.provenance["definition"]
        parts = [
            f"{len(self):,} {'matrix' if len(self) == 1 else 'matrices'}",
            "power basis" if self.basis == "power" else "singular vectors",
            f"mean over {self.count:,} example{'s' * (self.count != 1)}",
        ]
        if definition.get("importance"):
            parts.append(f"{definition['importance']} importance")
        if any(isinstance(entry, StoredTensor) for entry in self._entries.values()):
            parts.append("on disk")
        return f"Energies({', '.join(parts)})"


def _check_parts(name: str, shapes: Mapping[str, torch.Size]) -> None:
    """Check that the energies of a matrix have their parts, and that these fit together."""
    name = in_brief(name, 80)
    if unknown := [part for part in shapes if part not in _PARTS]:
        shown = in_brief(unknown[0], 40)
        raise ValueError(f"energies have the parts {', '.join(_PARTS)}; those of {name} have {shown}.")
    if missing := [part for part in ("input", "output", "joint", "positions", "matrix") if part not in shapes]:
        raise ValueError(f"the energies of {name} lack {', '.join(missing)}.")
    K = shapes["input"][0] if len(shapes["input"]) == 1 else None
    expected = {"input": (K,), "output": (K,), "joint": (K,), "singular_values": (K,), "positions": (), "matrix": (4,),
                "importance": ()}  # fmt: skip
    for part, shape in shapes.items():
        fits = len(shape) == 3 and shape[0] == 2 and shape[1] == shape[2] if part == "grams" else None
        if fits is None:
            fits = K is not None and tuple(shape) == expected[part]
        if not fits:
            raise ValueError(f"the energies of {name} have {part} of shape {tuple(shape)}, which does not fit.")

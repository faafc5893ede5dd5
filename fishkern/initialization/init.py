"""The start of a low-rank adapter: two small matrices for each adapted module, as plain data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import hosts
from fishkern.arguments import json_of
from fishkern.digests import agree, difference, digest
from fishkern.files import (
    AnyTensor,
    Format,
    StoredTensor,
    check_cast,
    in_brief,
    open_tensors,
    parsing,
    read_json,
    save_tensors,
)
from fishkern.layers import linear_maps
from fishkern.names import listed, renamed, without_wrappers
from fishkern.selection.frozen import Frozen

FORMAT = Format("fishkern.adapter-init", version=1, saved_by="AdapterInit.save")

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PARTS = ("A", "B", "chosen")  # the tensors of one module in a file


@dataclass(frozen=True, eq=False)
class ModuleInit:
    """The start of the adapter of one module, whose output is ``x W^T + scaling * x A^T B^T``.

    ``==`` compares the contents. Frozen; float32 tensors on the CPU are not copied.

    Attributes:
        A: ``[R, I]`` float32 on the CPU, ``I`` the size of what enters the module, however its weight is stored.
        B: ``[O, R]`` float32 on the CPU, ``O`` the size of what leaves it.
        scaling: What the runtime multiplies the product by: alpha / rank.
        chosen: ``[R]`` int64: which directions of the matrix these are, by their numbers in its basis.

    Raises:
        TypeError: ``A`` or ``B`` is not a floating tensor, or ``chosen`` holds no integers.
        ValueError: The shapes do not fit together, the rank is 0, an entry is not finite, ``scaling`` is not a positive
            number, or ``chosen`` repeats a number or has a negative one.
    """

    A: Tensor
    B: Tensor
    scaling: float
    chosen: Tensor

    def __post_init__(self) -> None:
        A, B = (_factor(getattr(self, name), name) for name in ("A", "B"))
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or not A.numel() or not B.numel():
            raise ValueError(f"A is [R, I] and B [O, R] of one rank R >= 1, got {tuple(A.shape)} and {tuple(B.shape)}.")
        scaling = float(self.scaling)
        if not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"scaling must be a positive number, got {self.scaling!r}.")
        vars(self).update(A=A, B=B, scaling=scaling, chosen=_numbers(self.chosen, len(A)))

    @property
    def rank(self) -> int:
        """Number of directions, ``R``."""
        return len(self.A)

    @property
    def alpha(self) -> float:
        """PEFT's ``lora_alpha`` of this module: scaling * rank."""
        return self.scaling * self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the module's map."""
        return len(self.B), self.A.shape[1]

    def delta(self) -> Tensor:
        """Multiply out what the start adds to the module's map.

        Returns:
            scaling * B A, ``[O, I]`` float32.
        """
        return self.scaling * (self.B @ self.A)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleInit):
            return NotImplemented
        return self.scaling == other.scaling and all(
            torch.equal(getattr(self, part), getattr(other, part)) for part in _PARTS
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ModuleInit(rank {self.rank} of {self.shape[0]} x {self.shape[1]}, scaling {self.scaling:g})"


class AdapterInit(Frozen, Mapping[str, ModuleInit]):
    """The start of a low-rank adapter: a read-only mapping from paths of modules to their :class:`ModuleInit`.

    Whoever attaches it subtracts the same product from the frozen weight, or runs it beside it with a negative sign, so
    that the model's output is what it was. ``==`` compares the modules and the digests, not the provenance. Frozen.

    Args:
        modules: The start of each module by its path, in the model's order. Wrappers are taken out of paths.
        digests: For each path the digest of the matrix that the start was made for, see :mod:`fishkern.digests`.
        provenance: Where it comes from, JSON.

    Raises:
        TypeError: An entry is not a :class:`ModuleInit`, or ``provenance`` is not JSON.
        ValueError: There is no module, two paths become one, or the digests are not one pair for each path.
    """

    _modules: dict[str, ModuleInit]
    _digests: dict[str, tuple[float, float]]
    _provenance: str  # JSON, so that nobody changes it

    def __init__(
        self,
        modules: Mapping[str, ModuleInit],
        *,
        digests: Mapping[str, Sequence[float]],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        modules, digests = renamed(modules, _canonical), renamed(digests, _canonical)
        if not modules:
            raise ValueError("the start of an adapter needs at least one module, got none.")
        for path, module in modules.items():
            if not isinstance(module, ModuleInit):
                raise TypeError(f"the start of each module is a ModuleInit, that of {path} is {type(module).__name__}.")
        if differing := modules.keys() ^ digests.keys():
            raise ValueError(f"give one digest for each module: modules and digests differ in {listed(differing)}.")
        vars(self).update(
            _modules=modules,
            _digests={path: _checked_digest(path, digests[path]) for path in modules},
            _provenance=json_of(provenance or {}, "provenance"),
        )

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module by its path."""
        return {path: module.rank for path, module in self._modules.items()}

    @property
    def alphas(self) -> dict[str, float]:
        """PEFT's ``lora_alpha`` of each module by its path."""
        return {path: module.alpha for path, module in self._modules.items()}

    @property
    def digests(self) -> dict[str, tuple[float, float]]:
        """For each path the digest of the matrix that the start was made for."""
        return dict(self._digests)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the start comes from, as a fresh copy."""
        return json.loads(self._provenance)

    def __getitem__(self, path: str) -> ModuleInit:
        try:
            return self._modules[path]
        except KeyError:
            raise KeyError(f"{path} is none of the {len(self)} modules ({listed(self)})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, path: object) -> bool:
        return path in self._modules

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterInit):
            return NotImplemented
        return self._modules == other._modules and self._digests == other._digests

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        ranks = sorted(self.ranks.values())
        span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
        entries = sum(module.A.numel() + module.B.numel() for module in self._modules.values())
        return f"AdapterInit({len(self)} modules, {span}, {entries:,} entries)"

    def check(self, model: nn.Module) -> None:
        """Check that a model has the weights that the start was made for.

        Args:
            model: The model before an adapter is attached.

        Raises:
            ValueError: A module is missing, computes no linear map, or has another shape or other weights.
        """
        maps = {one.path: one for one in linear_maps(hosts.unwrap(model)).values()}
        if missing := [path for path in self if path not in maps]:
            raise ValueError(
                f"the start of the adapter does not fit the model: {len(missing)} of its {len(self)} modules are no "
                f"linear maps of it ({listed(missing)}). Take the model that it was made for, without an adapter."
            )
        for path, module in self._modules.items():
            if maps[path].shape != module.shape:
                raise ValueError(
                    f"the start of the adapter does not fit the model: {path} maps {module.shape[1]} to "
                    f"{module.shape[0]} features in it, and {maps[path].shape[1]} to {maps[path].shape[0]} in the "
                    "model. Take the model that it was made for."
                )
            recorded, actual = self._digests[path], digest(maps[path].matrix())
            if not agree(actual, recorded):
                raise ValueError(
                    f"the start of the adapter was made for other weights: {path} {difference(actual, recorded)}. Load "
                    "the model that it was made for, or make the start anew."
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as one ``.safetensors`` file, which appears whole or not at all.

        Args:
            path: ``adapter_init.safetensors``, or another name; the suffix is added. Its folder must exist.

        Returns:
            The file to give to :meth:`load`.

        Raises:
            FileExistsError: A file of that name holds something else, such as a model.
            OSError: The folder is missing or read-only, or the disk is full.
        """
        tensors: dict[str, AnyTensor] = {
            f"{part}:{name}": getattr(module, part) for name, module in self._modules.items() for part in _PARTS
        }
        modules = {name: [module.scaling, *self._digests[name]] for name, module in self._modules.items()}
        metadata = {"modules": json.dumps(modules), "provenance": self._provenance}
        return save_tensors(path, tensors, format=FORMAT, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterInit:
        """Load what :meth:`save` wrote.

        Args:
            path: The file, or its name without suffix.

        Returns:
            The start of the adapter, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated or damaged, holds no start of an adapter, or is of a newer format.
        """
        metadata, stored = open_tensors(path, format=FORMAT)
        with parsing(f"{path} holds no valid start of an adapter"):
            said = {name: _checked_entry(name, *entry) for name, entry in read_json(metadata["modules"]).items()}
            provenance = read_json(metadata["provenance"])
            if not isinstance(provenance, dict):
                raise ValueError("provenance is an object of JSON")
            if odd := stored.keys() ^ {f"{part}:{name}" for name in said for part in _PARTS}:
                raise ValueError(f"its header and its tensors disagree on {in_brief(min(odd), 80)}")
            modules = {name: _read_module(name, scaling, stored) for name, (scaling, _) in said.items()}
            return cls(modules, digests={name: pair for name, (_, pair) in said.items()}, provenance=provenance)


def _factor(factor: Tensor, name: str) -> Tensor:
    if not isinstance(factor, Tensor) or not factor.is_floating_point():
        what = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
        raise TypeError(f"{name} must be a floating tensor, got {what}.")
    single = factor.detach().to("cpu", torch.float32).contiguous()
    if factor.dtype == torch.float64:
        check_cast(name, factor.detach().cpu(), single)
    if not single.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite.")
    return single


def _numbers(chosen: Tensor, rank: int) -> Tensor:
    if not isinstance(chosen, Tensor) or chosen.dtype not in _INTEGERS:
        what = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"chosen must be a tensor of integers, got {what}.")
    numbers = chosen.detach().to("cpu", torch.int64)
    if tuple(numbers.shape) != (rank,) or numbers.min() < 0 or len(numbers.unique()) < rank:
        raise ValueError(
            f"chosen must be {rank} different numbers of directions, one for each row of A, got "
            f"{in_brief(chosen.tolist(), 80)}."
        )
    return numbers


def _canonical(path: str) -> str:
    return without_wrappers(f"{path}.weight").removesuffix(".weight")


def _checked_digest(path: str, pair: Sequence[float]) -> tuple[float, float]:
    norm, signed = (float(number) for number in pair)
    if not (math.isfinite(norm) and math.isfinite(signed) and norm >= 0):
        raise ValueError(f"the digest of {path} is a norm and a sum, got {in_brief(list(pair), 80)}.")
    return norm, signed


def _checked_entry(name: str, *numbers: object) -> tuple[float, tuple[float, float]]:
    if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"{in_brief(name, 80)} has three numbers, a scaling and a digest")
    scaling, norm, signed = map(float, numbers)
    return scaling, (norm, signed)


def _read_module(name: str, scaling: float, stored: Mapping[str, StoredTensor]) -> ModuleInit:
    tensors = {part: stored[f"{part}:{name}"] for part in _PARTS}
    dtypes = {part: tensor.dtype for part, tensor in tensors.items()}
    if dtypes != {"A": torch.float32, "B": torch.float32, "chosen": torch.int64}:
        raise ValueError(f"A and B of {in_brief(name, 80)} are float32 and chosen int64, not {in_brief(dtypes, 120)}")
    return ModuleInit(scaling=scaling, **{part: tensor.read() for part, tensor in tensors.items()})

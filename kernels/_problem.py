"""A call of an operation on weight gradients without its tensors: everything that the choice of code depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

# Bytes of the widest load of a thread, and the alignment that it needs; TMA needs the same.
VECTOR = 16
# Limits of TMA descriptors: entries of an axis (those of packed examples have an axis of 2**30), bytes of a stride.
_LONGEST_AXIS, _LARGEST_STRIDE = 2**30, 2**40


class Layout(NamedTuple):
    """Addresses of the entries of a tensor, relative to the first one.

    Args:
        shape: Of the tensor.
        strides: In entries.
        itemsize: Bytes of an entry.
        aligned: Whether the address of the first entry is a multiple of 16 bytes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    aligned: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Read it off a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.element_size(), tensor.data_ptr() % VECTOR == 0)

    @property
    def fits_tma(self) -> bool:
        """Whether TMA can load blocks of it: rows without gaps, no stride of zero, nothing too large."""
        *outer, (columns, stride) = zip(self.shape, self.strides, strict=True)
        strides = [stride * self.itemsize for length, stride in outer if length > 1]
        return (
            (columns == 1 or stride == 1)
            and self.aligned
            and max(self.shape) <= _LONGEST_AXIS
            and all(0 < stride < _LARGEST_STRIDE and stride % VECTOR == 0 for stride in strides)
        )

    @property
    def has_vectors(self) -> bool:
        """Whether 16 bytes can be loaded at once: along one axis entries are neighbours, and all else is aligned."""
        strides = [stride for length, stride in zip(self.shape, self.strides, strict=True) if length > 1]
        odd = [stride for stride in strides if stride * self.itemsize % VECTOR]
        return self.aligned and odd in ([], [1])


class Block(NamedTuple):
    """A TMA block of a tensor ``[N, T, columns]``, or of examples of any length packed in ``[S, columns]``."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]

    @classmethod
    def of_layout(cls, layout: Layout, block_shape: list[int]) -> Block:
        """Describe it for all tensors of one layout."""
        # Along axes of one entry, where any stride would do, a descriptor accepts multiples of 16 bytes.
        unit = VECTOR // layout.itemsize
        outer = zip(layout.shape[:-1], layout.strides[:-1], strict=True)
        strides = [unit if length == 1 else stride for length, stride in outer]
        return cls(list(layout.shape), [*strides, 1], block_shape)

    def of(self, tensor: Tensor) -> TensorDescriptor:
        """Make the descriptor of one tensor."""
        if len(self.shape) == 3:
            return TensorDescriptor(tensor, *self)
        return create_ragged_descriptor(tensor.as_strided(self.shape, self.strides), self.block_shape)


class Problem(NamedTuple):
    """Everything about one call that the choice of code depends on: plans are cached by it.

    Args:
        x: Activations, ``[N, T, I]`` or packed ``[S, I]``.
        g: Output gradients, ``[N, T, O]`` or packed ``[S, O]``.
        dtype: Of both.
        N: Number of examples.
        results: Tensors ``[O, I]`` that a program writes its tiles to: the squares, and the sum of the gradients where
            it is requested; none where a program sums its tiles over rows or columns.
        add: Whether the squares are added to values that are there.
        allow_tf32: Whether float32 may be rounded to tf32.
    """

    x: Layout
    g: Layout
    dtype: torch.dtype
    N: int
    results: tuple[Layout, ...]
    add: bool
    allow_tf32: bool

    @property
    def packed(self) -> bool:
        """Whether the examples are of any length, one after the other."""
        return len(self.x.shape) == 2

    @property
    def O(self) -> int:  # noqa: E743
        """Rows of a gradient."""
        return self.g.shape[-1]

    @property
    def I(self) -> int:  # noqa: E743
        """Columns of a gradient."""
        return self.x.shape[-1]

    @property
    def T(self) -> int:
        """Positions of each example; 0 where they are packed."""
        return 0 if self.packed else self.x.shape[1]

    @property
    def positions(self) -> int:
        """Positions of all examples together."""
        return self.x.shape[0] if self.packed else self.N * self.T

    def is_single(self, BLOCK_T: int) -> bool:
        """Whether each example is one chunk of so many positions, and better multiplied on its own."""
        # Where float32 is multiplied without matrix units nothing is gained, and Triton 3.6 spills on sm_80.
        return not self.packed and self.T <= BLOCK_T and self.itemsize == 2

    @property
    def itemsize(self) -> int:
        """Bytes of an entry of the inputs."""
        return self.x.itemsize

    @property
    def mean(self) -> bool:
        """Whether the sum of the gradients is requested, which is the mean gradient times ``N``."""
        return len(self.results) == 2

    @property
    def precision(self) -> str:
        """How matrix products round their inputs, as Triton calls it."""
        return "tf32" if self.allow_tf32 and self.dtype is torch.float32 else "ieee"


def input_blocks(problem: Problem, BLOCK_O: int, BLOCK_I: int, BLOCK_T: int) -> dict[str, Block]:
    """Describe the TMA blocks of both inputs, by their names in the kernels."""
    positions = [BLOCK_T] if problem.packed else [1, BLOCK_T]
    return {
        "x": Block.of_layout(problem.x, [*positions, BLOCK_I]),
        "g": Block.of_layout(problem.g, [*positions, BLOCK_O]),
    }


def input_arguments(problem: Problem, parts: int, *, tma: bool) -> dict[str, int]:
    """List the sizes and strides of a problem by their names in the kernels."""
    return {
        "N": problem.N, "O": problem.O, "I": problem.I, "T": problem.T, "parts": parts,
        **stride_arguments("x", "nti", problem.x, tma=tma), **stride_arguments("g", "nto", problem.g, tma=tma),
    }  # fmt: skip


def stride_arguments(tensor: str, axes: str, layout: Layout, *, tma: bool) -> dict[str, int]:
    """List strides by their names in the kernels: zeros for missing axes, and where TMA reads none of them."""
    # Triton would compile again for other strides.
    strides = (0,) * (len(axes) - len(layout.strides)) + layout.strides
    return {f"stride_{tensor}{axis}": 0 if tma else stride for axis, stride in zip(axes, strides, strict=True)}

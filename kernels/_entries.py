"""The selected entries of many parameters in one launch: tables of addresses, and how a block reads and writes.

Row ``i`` of the table is parameter ``i``, int64 numbers in the columns named below. ``blocks [B]``, int32, is the
parameter of each block of ``BLOCK`` selected entries; a parameter without gradient has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._hardware import to_gpu

PARAM = tl.constexpr(0)  # address of the weights
GRAD = tl.constexpr(1)  # address of the gradient
INDICES = tl.constexpr(2)  # address of the indices; 0: all entries are selected
COUNT = tl.constexpr(3)  # number of selected entries
FIRST_ENTRY = tl.constexpr(4)  # the first of them in the compact state
FIRST_BLOCK = tl.constexpr(5)
IS_GATHERED = tl.constexpr(6)  # 1: the gradient is that of the selected entries alone
COLUMNS = tl.constexpr(7)

BLOCK = 1024
OPTIONS = {"enable_fp_fusion": True}  # of the compiler, whose default depends on the version of Triton


@triton.jit
def entries_of_block(
    table_ptr, blocks_ptr,  # see above
    param_like, grad_like, index_like,  # pointers whose dtypes those in the table have; never read
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the entries of this program: ``(mask, parameter, compact places, weight pointers, gradient pointers)``."""
    block = tl.program_id(0)
    parameter = tl.load(blocks_ptr + block)
    row = table_ptr + parameter * COLUMNS
    params = tl.load(row + PARAM).to(param_like.dtype)
    grads = tl.load(row + GRAD).to(grad_like.dtype)
    indices = tl.load(row + INDICES)
    count = tl.load(row + COUNT)
    offs = (block - tl.load(row + FIRST_BLOCK)) * BLOCK + tl.arange(0, BLOCK)  # int64, as the table is
    mask = offs < count
    places = offs
    if indices != 0:
        places = tl.load(indices.to(index_like.dtype) + offs, mask=mask, other=0).to(tl.int64)
    grad_places = places
    if tl.load(row + IS_GATHERED) != 0:
        grad_places = offs
    return mask, parameter, tl.load(row + FIRST_ENTRY) + offs, params + places, grads + grad_places


@triton.jit
def load_grad(grad_ptrs, mask, scale_ptr, MAXIMIZE: tl.constexpr):
    """Load the gradient of a block in float32, scaled, and with its sign changed to go up."""
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        grad = grad * tl.load(scale_ptr)
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def load_weight(param_ptrs, master_ptr, offs, mask):
    """Load the weights of a block in float32: the masters, where there are any."""
    stored = tl.load(param_ptrs, mask=mask, other=0.0)
    weight = stored.to(tl.float32)
    if master_ptr is not None:
        weight = master_or_stored(tl.load(master_ptr + offs, mask=mask, other=0.0), stored)
    return weight


@triton.jit
def store_weight(weight, param_ptrs, master_ptr, offs, mask):
    """Store the weights of a block, rounded to the parameter's dtype, and the masters as they are."""
    if master_ptr is not None:
        tl.store(master_ptr + offs, weight, mask=mask)
    tl.store(param_ptrs, weight.to(param_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def master_or_stored(master, stored):
    """Return the master, or the stored weight where it is not the master rounded: something else has changed it."""
    weight = stored.to(tl.float32)
    rounded = master.to(stored.dtype).to(tl.float32)
    own = rounded.to(tl.int32, bitcast=True) == weight.to(tl.int32, bitcast=True)  # as floats 0 would equal -0
    return tl.where(own, master, weight)


def tables(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], indices: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Make the table, the blocks, and one tensor of each kind, from which the kernel takes the dtypes.

    They are cached by value, so a step with the same addresses as one before copies nothing to the device. Call it with
    that device as the current one.

    Args:
        params: Flat, contiguous, on one device.
        grads: Flat, contiguous; of all entries or of the selected ones, or ``None``.
        indices: ``[K_i]`` of one dtype, or ``None``.

    Returns:
        ``table [P, COLUMNS]`` int64, ``blocks [B]`` int32, and ``[param, grad, index]``.

    Raises:
        RuntimeError: They are not in the cache, and a CUDA graph is being captured.
    """
    device = params[0].device
    rows, counts, first, block = [], [], 0, 0
    for param, grad, listed in zip(params, grads, indices, strict=True):
        count = param.numel() if listed is None else len(listed)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (param, grad, listed)]
        is_gathered = grad is not None and grad.numel() == count  # with all selected, both forms are the same
        rows.append((*addresses, count, first, block, int(is_gathered)))  # in the order of the columns
        counts.append(0 if grad is None else count)
        first += count
        block += triton.cdiv(counts[-1], BLOCK)
    one_grad = next((grad for grad in grads if grad is not None), params[0])
    one_index = next((listed for listed in indices if listed is not None), None)
    if one_index is None:
        one_index = torch.empty(0, dtype=torch.int32, device=device)
    table, blocks = _table(tuple(rows), device).here(), _blocks(tuple(counts), device).here()
    return table, blocks, [params[0], one_grad, one_index]


class _Copied:
    """A copy on a device that is made on one stream, and used on any.

    Args:
        tensor: On the CPU.
        device: Where to copy it, the current one.

    Raises:
        RuntimeError: A CUDA graph is being captured.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        instead = (
            "do the masked step once before, with gradients that stay where they are (zero_grad(set_to_none=False))."
        )
        self.tensor = to_gpu(tensor, device, instead)
        self.made = None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device)
            self.made = self.stream.record_event()

    def here(self) -> Tensor:
        """Return the copy, for the current stream."""
        if self.made is None:
            return self.tensor
        if torch.cuda.is_current_stream_capturing():
            # Finished, since torch.cuda.graph waits for the device; and replays read it, whatever the caches forget.
            return _kept(self).tensor
        stream = torch.cuda.current_stream(self.tensor.device)
        if stream != self.stream:
            stream.wait_event(self.made)
            self.tensor.record_stream(stream)
        return self.tensor


@cache
def _kept(copied: _Copied) -> _Copied:
    return copied


@lru_cache(maxsize=64)  # each backward pass may put gradients elsewhere, but the allocator reuses few addresses
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> _Copied:
    return _Copied(torch.tensor(rows, dtype=torch.int64), device)


@lru_cache(maxsize=64)
def _blocks(counts: tuple[int, ...], device: torch.device) -> _Copied:
    sizes = torch.tensor([triton.cdiv(count, BLOCK) for count in counts])
    return _Copied(torch.arange(len(counts), dtype=torch.int32).repeat_interleave(sizes), device)


def as_tensor(number: float | Tensor, device: torch.device) -> Tensor:
    """Return a zero-dimensional float32 tensor on the device, without waiting for the device."""
    if isinstance(number, Tensor):
        return number.to(device, torch.float32, non_blocking=True)
    return torch.full((), number, dtype=torch.float32, device=device)

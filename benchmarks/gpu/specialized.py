"""A warp-specialised form of the kernel of ``sum_grad_squared``, in Gluon; unused until a device shows that it pays.

A program for each multiprocessor goes from tile to tile. One warp loads the chunks by TMA, also those of the next tile
while this one is written; two groups of four warps each multiply the upper and the lower half of a tile, and one
squares its gradient while the matrix units work for the other. Dense bfloat16 examples whose length is a multiple of
``BLOCK_T``, rows of whole 16 bytes, the result added to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 renamed it.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _tile(number, O, I, BLOCK_O: gl.constexpr, BLOCK_I: gl.constexpr, GROUP_O: gl.constexpr):
    in_group = GROUP_O * gl.cdiv(I, BLOCK_I)
    first = number // in_group * GROUP_O
    rows = gl.minimum(gl.cdiv(O, BLOCK_O) - first, GROUP_O)
    within = number % in_group
    return (first + within % rows) * BLOCK_O, (within // rows) * BLOCK_I


@gluon.jit
def _bring(
    x, g, x_slots, g_slots, full, empty, N, T, O, I, tiles, programs,
    BLOCK_O: gl.constexpr, BLOCK_I: gl.constexpr, BLOCK_T: gl.constexpr, SLOTS: gl.constexpr, GROUP_O: gl.constexpr,
):  # fmt: skip
    """Fill the slots in turn; each is waited for until both groups have emptied it."""
    slot = 0
    phase = 1
    for number in range(gl.program_id(0), tiles, programs):
        row, column = _tile(number, O, I, BLOCK_O, BLOCK_I, GROUP_O)
        for position in range(0, N * T, BLOCK_T):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BLOCK_T * (BLOCK_I + BLOCK_O) * 2)
            _load(x, [position, column], full.index(slot), x_slots.index(slot))
            _load(g, [position, row], full.index(slot), g_slots.index(slot))
            _load(g, [position, row + BLOCK_O // 2], full.index(slot), g_slots.index(slot + SLOTS))
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1


@gluon.jit
def _multiply(
    x_slots, g_slots, full, empty, out, N, T, O, I, tiles, programs, HALF: gl.constexpr,
    BLOCK_O: gl.constexpr, BLOCK_I: gl.constexpr, BLOCK_T: gl.constexpr, SLOTS: gl.constexpr, GROUP_O: gl.constexpr,
):  # fmt: skip
    """One half of each tile: the products of an example, its square, and at the end the addition to the result."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_I, 16]
    )
    ROWS: gl.constexpr = BLOCK_O // 2
    slot = 0
    phase = 0
    for number in range(gl.program_id(0), tiles, programs):
        row, column = _tile(number, O, I, BLOCK_O, BLOCK_I, GROUP_O)
        total = gl.zeros([ROWS, BLOCK_I], gl.float32, layout)
        grad = warpgroup_mma_init(gl.zeros([ROWS, BLOCK_I], gl.float32, layout))
        for _ in range(N):
            mbarrier.wait(full.index(slot), phase)
            g_chunk = g_slots.index(slot + HALF * SLOTS).permute((1, 0))
            grad = warpgroup_mma(g_chunk, x_slots.index(slot), grad, use_acc=False, is_async=True)
            before = slot
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
            for _ in range(BLOCK_T, T, BLOCK_T):
                mbarrier.wait(full.index(slot), phase)
                g_chunk = g_slots.index(slot + HALF * SLOTS).permute((1, 0))
                grad = warpgroup_mma(g_chunk, x_slots.index(slot), grad, is_async=True)
                grad = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[grad]))
                mbarrier.arrive(empty.index(before), count=1)  # the product before this one has read its slot
                before = slot
                slot += 1
                if slot == SLOTS:
                    slot = 0
                    phase ^= 1
            done = warpgroup_mma_wait(0, deps=[grad])
            mbarrier.arrive(empty.index(before), count=1)
            total += done * done
        offs_o = row + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        offs_i = column + gl.arange(0, BLOCK_I, gl.SliceLayout(0, layout))
        mask = (offs_o[:, None] < O) & (offs_i[None, :] < I)
        ptrs = out + offs_o.to(gl.int64)[:, None] * I + offs_i[None, :]
        gl.store(ptrs, total + gl.load(ptrs, mask=mask, other=0.0), mask=mask)


@gluon.jit
def specialized_kernel(
    x, g, out, N, T, O, I, programs,  # descriptors of [N T, I] and [N T, O]; [O, I] contiguous
    BLOCK_O: gl.constexpr, BLOCK_I: gl.constexpr, BLOCK_T: gl.constexpr, SLOTS: gl.constexpr, GROUP_O: gl.constexpr,
):  # fmt: skip
    x_slots = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK_T, BLOCK_I], x.layout)
    g_slots = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, BLOCK_T, BLOCK_O // 2], g.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    tiles = gl.cdiv(O, BLOCK_O) * gl.cdiv(I, BLOCK_I)
    gl.warp_specialize(
        [
            (_multiply, (x_slots, g_slots, full, empty, out, N, T, O, I, tiles, programs, 0,
                         BLOCK_O, BLOCK_I, BLOCK_T, SLOTS, GROUP_O)),
            (_multiply, (x_slots, g_slots, full, empty, out, N, T, O, I, tiles, programs, 1,
                         BLOCK_O, BLOCK_I, BLOCK_T, SLOTS, GROUP_O)),
            (_bring, (x, g, x_slots, g_slots, full, empty, N, T, O, I, tiles, programs,
                      BLOCK_O, BLOCK_I, BLOCK_T, SLOTS, GROUP_O)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread: the multiplying groups share what the loading warp leaves
    )  # fmt: skip


def specialized(x: Tensor, g: Tensor, out: Tensor, processors: int) -> Callable[[], None]:
    """Prepare a launch.

    Args:
        x: Activations ``[N, T, I]``, contiguous bfloat16; ``T`` is 16, or a multiple of 64.
        g: Output gradients ``[N, T, O]``, likewise.
        out: ``[O, I]``, float32, added to.
        processors: Streaming multiprocessors.

    Returns:
        The launch.

    Raises:
        ValueError: The examples are of another length.
    """
    (N, T, I), O = x.shape, g.shape[-1]
    if T != 16 and T % 64:
        raise ValueError(f"examples must have 16 positions or a multiple of 64, got {T}.")
    BLOCK_O, BLOCK_I, (BLOCK_T, SLOTS) = 128, 256, (16, 8) if T == 16 else (64, 4)
    blocks = []
    for tensor, width in ((x, BLOCK_I), (g, BLOCK_O // 2)):
        layout = gl.NVMMASharedLayout.get_default_for([BLOCK_T, width], gl.bfloat16)
        blocks.append(TensorDescriptor.from_tensor(tensor.flatten(0, 1), [BLOCK_T, width], layout))

    def launch() -> None:
        specialized_kernel[(processors,)](
            *blocks, out, N, T, O, I, processors, BLOCK_O, BLOCK_I, BLOCK_T, SLOTS, 8, num_warps=4
        )

    return launch

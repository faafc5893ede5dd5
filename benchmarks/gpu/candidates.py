"""Two changes of the kernel of ``sum_grad_squared`` that wait for a device to show their effect.

``SINGLE``: where an example is one chunk, its gradient is a product of its own, instead of an accumulator that is
carried through the loop, tested, squared and zeroed. ``REDUCE``: TMA adds a tile to the result, instead of loading it,
waiting, and storing the sum. Still one addition to each entry in a launch: equal calls give equal bits. Dense
examples, rows of whole 16 bytes, no mean gradient, no parts.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from fishkern.kernels._sum_grad_squared_configs import Config
from fishkern.kernels._sum_grad_squared_device import _tile
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def candidate_kernel(
    x, g, out,  # descriptors of [N, T, I], [N, T, O] and [1, O, I], to which is added
    N, T, I, O,
    SINGLE: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP_O)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if SINGLE:
        for n in range(N):
            x_chunk = x.load([n, 0, column]).reshape(BLOCK_T, BLOCK_I)
            g_chunk = tl.trans(g.load([n, 0, row]).reshape(BLOCK_T, BLOCK_O))
            grad = tl.dot(g_chunk, x_chunk)
            total += grad * grad
    else:
        grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        n = N * 0
        t = N * 0
        remaining = t + T
        for _ in range(N * tl.cdiv(T, BLOCK_T)):
            x_chunk = x.load([n, t, column]).reshape(BLOCK_T, BLOCK_I)
            g_chunk = tl.trans(g.load([n, t, row]).reshape(BLOCK_T, BLOCK_O))
            grad = tl.dot(g_chunk, x_chunk, grad)
            last = remaining <= BLOCK_T
            if last:
                total += grad * grad
                grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
            n = tl.where(last, n + 1, n)
            t = tl.multiple_of(tl.where(last, 0, t + BLOCK_T), BLOCK_T)
            remaining = T - t
    tile = total.reshape(1, BLOCK_O, BLOCK_I)
    if REDUCE:
        out.atomic_add([0, row, column], tile)
    else:
        out.store([0, row, column], tile + out.load([0, row, column]))


def candidate(x: Tensor, g: Tensor, out: Tensor, config: Config, *, single: bool, reduce: bool) -> Callable[[], None]:
    """Prepare a launch.

    Args:
        x: Activations ``[N, T, I]``, contiguous, 16 bits.
        g: Output gradients ``[N, T, O]``, likewise.
        out: ``[O, I]``, float32, added to.
        config: Tiles; those of ``single`` hold an example, ``T <= BLOCK_T``.
        single: See above.
        reduce: See above.

    Returns:
        The launch.
    """
    (N, T, I), O = x.shape, g.shape[-1]
    blocks = [
        TensorDescriptor.from_tensor(x, [1, config.BLOCK_T, config.BLOCK_I]),
        TensorDescriptor.from_tensor(g, [1, config.BLOCK_T, config.BLOCK_O]),
        TensorDescriptor.from_tensor(out[None], [1, config.BLOCK_O, config.BLOCK_I]),
    ]
    grid = (triton.cdiv(O, config.BLOCK_O) * triton.cdiv(I, config.BLOCK_I),)

    def launch() -> None:
        candidate_kernel[grid](*blocks, N, T, I, O, single, reduce, **config.constants, **config.options)

    return launch

"""Device code of :mod:`fishkern.kernels.sum_grad_squared`.

One program owns one ``[BLOCK_O, BLOCK_I]`` tile of the result and visits its examples in order, so that no per-example
gradient leaves the registers, and the order of every sum is fixed: an entry of a result is added to once in a launch.
In all kernels::

    x, g                activations [N, T, I] and output gradients [N, T, O]; [S, I] and [S, O] when PACKED
    out, grad_out       [parts, O, I], float32: sum of the squares and sum of the gradients of each part of the examples
    ADD                 whether to add to the values in out (ADD_MEAN: in grad_out), or to overwrite them
    MEAN                whether grad_out is requested: the sum of the gradients, N times the mean gradient
    SINGLE              whether each example is one chunk: its gradient is a product of its own, instead of an
                        accumulator that is carried through the loop, tested, squared and zeroed
    REDUCE              whether TMA adds a tile in memory, instead of loading it, waiting, and storing the sum;
                        sums below 1e-38 may then become zero

N and parts change from call to call, so kernels are not specialised for them (``do_not_specialize``), which would
compile again. ``n * 0`` and the like are zeros of the type that a loop needs: a constant would change its type there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

# Rounds of a loop without matrix products whose loads are under way at once, not one after the other.
LOADS_AT_ONCE = tl.constexpr(4)


@triton.jit
def _tile(pid, O, I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP_O: tl.constexpr):
    """First row and column of a tile; neighbours take turns on GROUP_O rows of tiles, which the L2 cache then holds."""
    in_group = GROUP_O * tl.cdiv(I, BLOCK_I)
    first = pid // in_group * GROUP_O
    rows = min(tl.cdiv(O, BLOCK_O) - first, GROUP_O)
    within = pid % in_group
    return (first + within % rows) * BLOCK_O, (within // rows) * BLOCK_I


@triton.jit
def _first_example(part, parts, N):
    """First example of a part, so that parts differ by one example at most; for ``part = parts`` it is N."""
    return (part.to(tl.int64) * N // parts).to(tl.int32)


@triton.jit
def _load_chunk(
    source, example, position, remaining, column, columns, stride_n, stride_t, stride_c,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_T, BLOCK_C]`` of an input or its transpose, zero where the example or the columns end."""
    if TMA:
        if PACKED:
            block = load_ragged(source, position, remaining, [0, column])
        else:
            block = source.load([example, position, column]).reshape(BLOCK_T, BLOCK_C)
        if TRANSPOSED:
            block = tl.trans(block)
    else:
        # Loaded the way it is multiplied: what is transposed after the load is not copied asynchronously on sm_80.
        # Addresses are int64: N * T * I, O * I and every single stride may pass 2**31.
        axis: tl.constexpr = 0 if TRANSPOSED else 1
        offs_t = tl.expand_dims(tl.arange(0, BLOCK_T), axis)
        offs_c = tl.expand_dims(column + tl.arange(0, BLOCK_C), 1 - axis)
        first = source + example.to(tl.int64) * stride_n + position.to(tl.int64) * stride_t
        ptrs = first + (offs_t.to(tl.int64) * stride_t + offs_c.to(tl.int64) * stride_c)
        block = tl.load(ptrs, mask=(offs_t < remaining) & (offs_c < columns), other=0.0)
    return block


@triton.jit
def _store_tile(
    out, value, part, row, column, O, I, stride_p, stride_o, stride_i,
    ADD: tl.constexpr, TMA: tl.constexpr, REDUCE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Write one tile of one part, or add to the values there."""
    if TMA and ADD and REDUCE:
        out.atomic_add([part, row, column], value.reshape(1, BLOCK_O, BLOCK_I))
    elif TMA:
        if ADD:
            value += out.load([part, row, column]).reshape(BLOCK_O, BLOCK_I)
        out.store([part, row, column], value.reshape(1, BLOCK_O, BLOCK_I))
    else:
        offs_o = row + tl.arange(0, BLOCK_O)[:, None]
        offs_i = column + tl.arange(0, BLOCK_I)[None, :]
        mask = (offs_o < O) & (offs_i < I)
        first = out + part.to(tl.int64) * stride_p
        ptrs = first + (offs_o.to(tl.int64) * stride_o + offs_i.to(tl.int64) * stride_i)
        if ADD:
            value += tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, value, mask=mask)


@triton.jit
def _sum_squares(
    x, g, chunks, cuts, row, column, part,
    N, T, I, O, parts,
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    PACKED: tl.constexpr, SINGLE: tl.constexpr, MEAN: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum the squared gradients of a part's examples in one tile, and with MEAN the gradients.

    All chunks of all examples pass through one loop, so that the loads of the next are under way while one is squared.

    Returns:
        Both sums; the second is zero without MEAN, and takes no registers.
    """
    n = _first_example(part, parts, N)
    t = n * 0
    chunk = t
    remaining = t + T
    if PACKED:
        chunk = tl.load(cuts + part)
        steps = tl.load(cuts + part + 1) - chunk
        t = tl.load(chunks + 2 * chunk)
        remaining = tl.load(chunks + 2 * chunk + 1)
    else:
        steps = (_first_example(part + 1, parts, N) - n) * tl.cdiv(T, BLOCK_T)

    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    mean = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for _ in range(steps):
        x_chunk = _load_chunk(
            x, n, t, remaining, column, I, stride_xn, stride_xt, stride_xi, False, PACKED, TMA, BLOCK_T, BLOCK_I
        )
        g_chunk = _load_chunk(
            g, n, t, remaining, row, O, stride_gn, stride_gt, stride_go, True, PACKED, TMA, BLOCK_T, BLOCK_O
        )
        if UPCAST:
            x_chunk = x_chunk.to(tl.float32)
            g_chunk = g_chunk.to(tl.float32)
        if SINGLE:
            product = tl.dot(g_chunk, x_chunk, input_precision=PRECISION)
            total += product * product
            if MEAN:
                mean += product
            n += 1
        else:
            grad = tl.dot(g_chunk, x_chunk, grad, input_precision=PRECISION)  # [BLOCK_O, BLOCK_T] @ [BLOCK_T, BLOCK_I]
            last = remaining <= BLOCK_T
            if last:
                total += grad * grad  # after the sum over positions: per example, not per position
                if MEAN:
                    mean += grad
                grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
            # Known one chunk ahead and selected, not branched on: the next loads wait for neither table nor squares.
            if PACKED:
                chunk += 1
                t = tl.load(chunks + 2 * chunk)
                remaining = tl.load(chunks + 2 * chunk + 1)
            else:
                n = tl.where(last, n + 1, n)
                t = tl.multiple_of(tl.where(last, 0, t + BLOCK_T), BLOCK_T)
                remaining = T - t
    return total, mean


@triton.jit(do_not_specialize=["N", "parts"])
def sum_grad_squared_kernel(
    x, g, out, grad_out,  # pointers, or descriptors of blocks where TMA and TMA_OUT say so
    chunks, cuts,  # when PACKED: [C, 2] position and remaining positions of each; [parts + 1] first chunk of each part
    N, T, I, O, parts,  # N and T are not read when PACKED
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    stride_op, stride_oo, stride_oi,
    stride_mp, stride_mo, stride_mi,
    PACKED: tl.constexpr, SINGLE: tl.constexpr, ADD: tl.constexpr, MEAN: tl.constexpr, ADD_MEAN: tl.constexpr,
    TMA: tl.constexpr, TMA_OUT: tl.constexpr, REDUCE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    """Write the sums of the squares, and of the gradients where MEAN is set."""
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP_O)
    part = tl.program_id(1)
    total, mean = _sum_squares(
        x, g, chunks, cuts, row, column, part, N, T, I, O, parts,
        stride_xn, stride_xt, stride_xi, stride_gn, stride_gt, stride_go,
        PACKED, SINGLE, MEAN, TMA, PRECISION, UPCAST, BLOCK_O, BLOCK_I, BLOCK_T,
    )  # fmt: skip
    _store_tile(
        out, total, part, row, column, O, I, stride_op, stride_oo, stride_oi,
        ADD, TMA_OUT, REDUCE, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    if MEAN:
        _store_tile(
            grad_out, mean, part, row, column, O, I, stride_mp, stride_mo, stride_mi,
            ADD_MEAN, TMA_OUT, REDUCE, BLOCK_O, BLOCK_I,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "parts"])
def few_positions_kernel(
    x, g, out, grad_out,
    N, I, O, parts,
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    stride_op, stride_oo, stride_oi,
    stride_mp, stride_mo, stride_mi,
    T: tl.constexpr, ADD: tl.constexpr, MEAN: tl.constexpr, ADD_MEAN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    """Add up outer products of T positions in float32: matrix units would multiply mostly zeros."""
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP_O)
    part = tl.program_id(1)
    n = _first_example(part, parts, N)
    end = _first_example(part + 1, parts, N)
    offs_o = row + tl.arange(0, BLOCK_O)
    offs_i = column + tl.arange(0, BLOCK_I)
    x_ptrs = x + n.to(tl.int64) * stride_xn + offs_i.to(tl.int64) * stride_xi  # [BLOCK_I]
    g_ptrs = g + n.to(tl.int64) * stride_gn + offs_o.to(tl.int64) * stride_go  # [BLOCK_O]

    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    if MEAN:
        mean = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for _ in tl.range(end - n, loop_unroll_factor=LOADS_AT_ONCE // T):
        grad = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for t in tl.static_range(T):
            step = tl.full((), t, tl.int64)
            x_row = tl.load(x_ptrs + step * stride_xt, mask=offs_i < I, other=0.0).to(tl.float32)
            g_row = tl.load(g_ptrs + step * stride_gt, mask=offs_o < O, other=0.0).to(tl.float32)
            grad += g_row[:, None] * x_row[None, :]
        total += grad * grad
        if MEAN:
            mean += grad
        x_ptrs += stride_xn
        g_ptrs += stride_gn

    _store_tile(
        out, total, part, row, column, O, I, stride_op, stride_oo, stride_oi, ADD, False, False, BLOCK_O, BLOCK_I
    )
    if MEAN:
        _store_tile(
            grad_out, mean, part, row, column, O, I, stride_mp, stride_mo, stride_mi,
            ADD_MEAN, False, False, BLOCK_O, BLOCK_I,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    values, out,  # [parts, O, I] contiguous, [O, I]
    parts, O, I,
    stride_oo, stride_oi,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Add up the parts in their order."""
    row, column = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, 1)
    offs_o = row + tl.arange(0, BLOCK_O)[:, None]
    offs_i = column + tl.arange(0, BLOCK_I)[None, :]
    mask = (offs_o < O) & (offs_i < I)
    ptrs = values + (offs_o.to(tl.int64) * I + offs_i)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for _ in tl.range(parts, loop_unroll_factor=LOADS_AT_ONCE):
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += tl.full((), 1, tl.int64) * O * I  # in int64: O * I may pass 2**31
    _store_tile(out, total, row * 0, row, column, O, I, 0, stride_oo, stride_oi, ADD, False, False, BLOCK_O, BLOCK_I)

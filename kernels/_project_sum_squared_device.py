"""Device code of :mod:`fishkern.kernels.project_sum_squared`.

The positions of an example are cut into chunks of BLOCK_T, the last of which may be shorter, and the chunks of all
examples are numbered one after the other. One program projects CHUNKS of them, side by side, on BLOCK_K directions: two
``[CHUNKS * BLOCK_T, BLOCK_K]`` tiles in registers, of which only sums are written, each to a place of its own, which a
second kernel adds up in their order. In both kernels::

    x, g            activations [N, T, I] and output gradients [N, T, O]; where TMA loads several chunks at once, which
                    then are neighbours, [1, N * T, I] and [1, N * T, O]
    v, u            directions [PIECES, I, K] and [PIECES, O, K], the sums of whose pieces are meant
    counted         [N, T], bool: the positions that count, where COUNTED is set
    chunks          chunks of each example
    squares         [tiles, 2, K], float32: sums of the squares of both projections
    joints          float32: sums of the products of both projections, [N * chunks, K]; where WHOLE, that is, where a
                    chunk is an example, squared and summed over the chunks of a tile, [tiles, K]

N, T and chunks change from call to call, so kernels are not specialised for them (``do_not_specialize``), which would
compile again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sum_grad_squared_device import _tile


@triton.jit
def _places(first, chunks, CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Find the example and the position of each row of a tile whose chunks begin with ``first``."""
    rows = tl.arange(0, CHUNKS * BLOCK_T)
    chunk = first + rows // BLOCK_T
    return chunk // chunks, chunk % chunks * BLOCK_T + rows % BLOCK_T


@triton.jit
def _load_rows(
    source, first, chunks, N, T, column, columns, stride_n, stride_t, stride_c,
    TMA: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``[CHUNKS * BLOCK_T, BLOCK_C]`` of activations or output gradients, zero where these end."""
    if TMA:
        if CHUNKS == 1:
            block = source.load([first // chunks, first % chunks * BLOCK_T, column])
        else:
            block = source.load([0, first * BLOCK_T, column])
        block = block.reshape(CHUNKS * BLOCK_T, BLOCK_C)
    else:
        # Addresses are int64: N * T * I and every single stride may pass 2**31.
        n, t = _places(first, chunks, CHUNKS, BLOCK_T)
        offs = column + tl.arange(0, BLOCK_C)
        rows = n.to(tl.int64) * stride_n + t.to(tl.int64) * stride_t
        ptrs = source + (rows[:, None] + offs.to(tl.int64)[None, :] * stride_c)
        block = tl.load(ptrs, mask=((n < N) & (t < T))[:, None] & (offs < columns)[None, :], other=0.0)
    return block


@triton.jit
def _load_directions(
    source, piece, row, rows, column, columns, stride_p, stride_r, stride_c,
    TMA: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_R, BLOCK_C]`` of a piece of the directions, which TMA loads TRANSPOSED where their rows have gaps."""
    if TMA:
        if TRANSPOSED:
            block = tl.trans(source.load([piece, column, row]).reshape(BLOCK_C, BLOCK_R))
        else:
            block = source.load([piece, row, column]).reshape(BLOCK_R, BLOCK_C)
    else:
        offs_r = (row + tl.arange(0, BLOCK_R))[:, None]
        offs_c = (column + tl.arange(0, BLOCK_C))[None, :]
        first = source + piece.to(tl.int64) * stride_p
        ptrs = first + (offs_r.to(tl.int64) * stride_r + offs_c.to(tl.int64) * stride_c)
        block = tl.load(ptrs, mask=(offs_r < rows) & (offs_c < columns), other=0.0)
    return block


@triton.jit
def _project(
    factors, directions, first, chunks, column, N, T, F, K,
    stride_n, stride_t, stride_f,
    stride_p, stride_r, stride_k,
    PIECES: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Project a tile of one factor: the products with all pieces, summed."""
    projections = tl.zeros((CHUNKS * BLOCK_T, BLOCK_K), dtype=tl.float32)
    feature = first * 0  # of the type that the loop needs: a constant would change its type there
    piece = feature
    for _ in range(PIECES * tl.cdiv(F, BLOCK_F)):
        rows = _load_rows(
            factors, first, chunks, N, T, feature, F, stride_n, stride_t, stride_f, TMA, CHUNKS, BLOCK_T, BLOCK_F
        )
        block = _load_directions(
            directions, piece, feature, F, column, K, stride_p, stride_r, stride_k, TMA, TRANSPOSED, BLOCK_F, BLOCK_K
        )
        if UPCAST:
            rows = rows.to(tl.float32)
            block = block.to(tl.float32)
        projections = tl.dot(rows, block, projections, input_precision=PRECISION)
        feature += BLOCK_F
        if PIECES > 1:  # selected, not branched on: the next loads must not wait
            piece = tl.where(feature < F, piece, piece + 1)
            feature = tl.where(feature < F, feature, 0)
        feature = tl.multiple_of(feature, BLOCK_F)
    return projections


@triton.jit(do_not_specialize=["N", "T", "chunks"])
def project_sum_squared_kernel(
    x, g, v, u, counted, squares, joints,  # of the first four pointers, or descriptors of blocks where TMA says so
    N, T, I, O, K, chunks,
    stride_xn, stride_xt, stride_xi,
    stride_gn, stride_gt, stride_go,
    stride_vp, stride_vi, stride_vk,
    stride_up, stride_uo, stride_uk,
    stride_cn, stride_ct,
    COUNTED: tl.constexpr, WHOLE: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    TRANSPOSED_V: tl.constexpr, TRANSPOSED_U: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the sums of one tile."""
    tile, column = _tile(tl.program_id(0), tl.cdiv(N * chunks, CHUNKS), K, 1, BLOCK_K, GROUP)
    first = tile * CHUNKS
    h = _project(
        x, v, first, chunks, column, N, T, I, K, stride_xn, stride_xt, stride_xi, stride_vp, stride_vi, stride_vk,
        PIECES, TMA, TRANSPOSED_V, PRECISION, UPCAST, CHUNKS, BLOCK_T, BLOCK_F, BLOCK_K,
    )  # fmt: skip
    d = _project(
        g, u, first, chunks, column, N, T, O, K, stride_gn, stride_gt, stride_go, stride_up, stride_uo, stride_uk,
        PIECES, TMA, TRANSPOSED_U, PRECISION, UPCAST, CHUNKS, BLOCK_T, BLOCK_F, BLOCK_K,
    )  # fmt: skip
    offs = column + tl.arange(0, BLOCK_K)
    mask = offs < K
    # Positions after the end of an example were loaded as zeros.
    joint = tl.sum(tl.reshape(h * d, (CHUNKS, BLOCK_T, BLOCK_K)), 1)  # over the positions of each chunk
    if WHOLE:
        tl.store(joints + tile.to(tl.int64) * K + offs, tl.sum(joint * joint, 0), mask=mask)
    else:
        lines = first + tl.arange(0, CHUNKS)[:, None]
        ptrs = joints + (lines.to(tl.int64) * K + offs[None, :])
        tl.store(ptrs, joint, mask=(lines < N * chunks) & mask[None, :])
    if COUNTED:
        n, t = _places(first, chunks, CHUNKS, BLOCK_T)
        ptrs = counted + (n.to(tl.int64) * stride_cn + t.to(tl.int64) * stride_ct)
        counts = tl.load(ptrs, mask=(n < N) & (t < T), other=0)[:, None] != 0
        # Before squaring: squares of what is in padded positions may be infinite.
        h = tl.where(counts, h, 0.0)
        d = tl.where(counts, d, 0.0)
    ptrs = squares + tile.to(tl.int64) * 2 * K + offs
    tl.store(ptrs, tl.sum(h * h, 0), mask=mask)
    tl.store(ptrs + K, tl.sum(d * d, 0), mask=mask)


@triton.jit(do_not_specialize=["N", "chunks", "tiles"])
def sum_tiles_kernel(
    squares, joints, out,  # out: [3, K], rows without gaps
    N, K, chunks, tiles, stride_row,
    WHOLE: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add up a row of the result, BLOCK_LINES at a time; of joint sums those of an example first, and their squares."""
    row = tl.program_id(1)
    offs_l = tl.arange(0, BLOCK_LINES)[:, None]
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_LINES, BLOCK_K), dtype=tl.float32)
    if row < 2:
        ptrs = squares + (offs_l.to(tl.int64) * 2 + row) * K + offs_k
        for first in range(0, tiles, BLOCK_LINES):
            total += tl.load(ptrs, mask=(offs_l < tiles - first) & (offs_k < K), other=0.0)
            ptrs += tl.full((), BLOCK_LINES * 2, tl.int64) * K
    elif WHOLE:
        ptrs = joints + offs_l.to(tl.int64) * K + offs_k
        for first in range(0, tiles, BLOCK_LINES):
            total += tl.load(ptrs, mask=(offs_l < tiles - first) & (offs_k < K), other=0.0)
            ptrs += tl.full((), BLOCK_LINES, tl.int64) * K
    else:
        ptrs = joints + offs_l.to(tl.int64) * chunks * K + offs_k
        for first in range(0, N, BLOCK_LINES):
            joint = tl.zeros((BLOCK_LINES, BLOCK_K), dtype=tl.float32)
            for _ in tl.range(0, chunks, loop_unroll_factor=4):
                joint += tl.load(ptrs, mask=(offs_l < N - first) & (offs_k < K), other=0.0)
                ptrs += tl.full((), 1, tl.int64) * K
            total += joint * joint
            ptrs += tl.full((), BLOCK_LINES - 1, tl.int64) * chunks * K
    sums = tl.sum(total, 0)[None, :]
    tl.store(out + row.to(tl.int64) * stride_row + offs_k, sums, mask=offs_k < K)

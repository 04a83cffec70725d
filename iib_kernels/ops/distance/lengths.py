"""Squared lengths of rows, and copies of them to multiply with.

They come before the products of many rows and classes, for several matrices in one launch.
"""

import triton
import triton.language as tl

from iib_kernels.ops.tiles import inverse_length, load_tile


@triton.jit
def row_squares(x, offs_x, mask_x, WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x|^2 [X] of rows of a matrix."""
    squares = tl.zeros((offs_x.shape[0],), ACC)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        values = load_tile(x, offs_x, mask_x, offs_d, offs_d < WIDTH).to(ACC)
        squares += tl.sum(values * values, 1)
    return squares


@triton.jit
def _measure(
    x,
    count,
    squares_ptr,
    copy,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_X rows of one matrix."""
    offs_x = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < count
    squares = row_squares(x, offs_x, mask_x, WIDTH, ACC, BLOCK_D)
    if copy is not None:
        scale = tl.full((BLOCK_X,), 1.0, ACC)
        if UNIT:
            scale = inverse_length(squares)
        for start in range(0, PADDED, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < PADDED
            values = load_tile(x, offs_x, mask_x, offs_d, offs_d < WIDTH).to(ACC)
            values = values * scale[:, None]
            ptrs = copy.ptr + offs_x[:, None] * copy.stride_row + offs_d[None, :]
            values = values.to(copy.ptr.dtype.element_ty)
            tl.store(ptrs, values, mask=mask_x[:, None] & mask_d[None, :])
    if squares_ptr is not None:
        tl.store(squares_ptr + offs_x, squares, mask=mask_x)


@triton.jit
def measure_rows(
    matrices,
    counts,
    squares_ptrs,
    copies,
    N: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """|x|^2 and a copy of BLOCK_X rows of one of N matrices, where there is a place for either.

    Copies may be of another type, and stand at unit length where UNITS says so. WIDTHS: D of each,
    and of its copy, whose further components are 0.
    """
    for i in tl.static_range(N):
        if tl.program_id(1) == i:
            _measure(
                matrices[i],
                counts[i],
                squares_ptrs[i],
                copies[i],
                UNITS[i],
                WIDTHS[i][0],
                WIDTHS[i][1],
                ACC,
                BLOCK_X,
                BLOCK_D,
            )

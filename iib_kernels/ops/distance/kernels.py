"""Distances to prototypes, and what their large forms share (method page, section 2).

Few rows and classes: one launch takes products and lengths in one pass. Many: lengths are taken
before (`lengths.py`), so that nothing but products stands in the loop over components.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.tiles import (
    Product,
    inner_products,
    load_tile,
    multiply,
    squared_distance,
    unit_squares,
)


class Squares(NamedTuple):
    """|x|^2 of features [B] and of prototypes [K]."""

    rows_ptr: tl.tensor
    prototypes_ptr: tl.tensor


@triton.jit
def output_ptrs(ptr, CLASSES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers of this program's tile of a matrix [B, CLASSES]."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK_B * CLASSES) + tl.program_id(1) * BLOCK_K
    offsets = tl.arange(0, BLOCK_B)[:, None] * CLASSES + tl.arange(0, BLOCK_K)[None, :]
    return ptr + first + offsets


@triton.jit
def dot_products(x, offs_x, mask_x, y, offs_y, mask_y, WIDTH: tl.constexpr, HOW: tl.constexpr):
    """x . y [X, Y] of rows of two matrices. HOW: a Product; y is multiplied in x's type."""
    dots = tl.zeros((offs_x.shape[0], offs_y.shape[0]), HOW.ACC)
    for start in range(0, WIDTH, HOW.BLOCK_D):
        offs_d = (start + tl.arange(0, HOW.BLOCK_D)).to(tl.int64)
        mask_d = offs_d < WIDTH
        a = load_tile(x, offs_x, mask_x, offs_d, mask_d)  # [X, D]
        b = load_tile(y, offs_y, mask_y, offs_d, mask_d)  # [Y, D]
        if HOW.UPCAST:
            a = a.to(HOW.ACC)
        dots = multiply(a, tl.trans(b.to(a.dtype)), dots, HOW.PRECISION, HOW.ACC)
    return dots


@triton.jit(do_not_specialize=["batch"])
def distance_forward(
    features,
    prototypes,
    distance_ptr,
    exact_ptr,
    squares,
    batch,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile [BLOCK_B, BLOCK_K] of squared distances, lengths taken on the way.

    For backward also, where asked for: the distances before rounding to half precision, and the
    squared length of each row and prototype.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_b = offs_b < batch
    mask_k = offs_k < CLASSES
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    dots, zz, pp = inner_products(
        features, offs_b, mask_b, prototypes, offs_k, mask_k, WIDTH, HOW
    )  # [B, K], [B], [K]
    distance = squared_distance(dots, zz, pp, COSINE)
    mask = mask_b[:, None] & mask_k[None, :]
    tl.store(output_ptrs(distance_ptr, CLASSES, BLOCK_B, BLOCK_K), distance, mask=mask)
    if exact_ptr is not None:
        tl.store(output_ptrs(exact_ptr, CLASSES, BLOCK_B, BLOCK_K), distance, mask=mask)

    # The lengths do not depend on the other axis of tiles: its first program writes them
    if squares is not None:
        if tl.program_id(1) == 0:
            tl.store(squares.rows_ptr + offs_b, zz, mask=mask_b)
        if tl.program_id(0) == 0:
            tl.store(squares.prototypes_ptr + offs_k, pp, mask=mask_k)


@triton.jit(do_not_specialize=["batch"])
def distance_forward_large(
    features,
    prototypes,
    distance_ptr,
    squares,
    batch,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    COSINE: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile [BLOCK_B, BLOCK_K] of squared distances, from lengths that are known.

    With UNIT the prototypes are a copy at unit length.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_b = offs_b < batch
    mask_k = offs_k < CLASSES
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    dots = dot_products(features, offs_b, mask_b, prototypes, offs_k, mask_k, WIDTH, HOW)
    zz = tl.load(squares.rows_ptr + offs_b, mask=mask_b, other=0.0)
    pp = tl.load(squares.prototypes_ptr + offs_k, mask=mask_k, other=0.0)
    if UNIT:
        pp = unit_squares(pp)
    distance = squared_distance(dots, zz, pp, COSINE)
    mask = mask_b[:, None] & mask_k[None, :]
    tl.store(output_ptrs(distance_ptr, CLASSES, BLOCK_B, BLOCK_K), distance, mask=mask)


@triton.jit(do_not_specialize=["batch"])
def distance_from_products(
    distance_ptr,
    squares,
    batch,
    CLASSES: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Put squared distances in the place of a library's products z . p, [B, K]."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_b = offs_b < batch
    mask_k = offs_k < CLASSES
    ptrs = output_ptrs(distance_ptr, CLASSES, BLOCK_B, BLOCK_K)
    mask = mask_b[:, None] & mask_k[None, :]
    dots = tl.load(ptrs, mask=mask, other=0.0)
    zz = tl.load(squares.rows_ptr + offs_b, mask=mask_b, other=0.0)
    pp = tl.load(squares.prototypes_ptr + offs_k, mask=mask_k, other=0.0)
    tl.store(ptrs, squared_distance(dots, zz, pp, COSINE), mask=mask)

"""Gradients of distances to prototypes (method page, section 2).

For rows z_i and p_k, d2(i, k) = |z_i|^2 + |p_k|^2 - 2 z_i . p_k; the cosine takes both at unit
length. Differentiated by z_i, with g the upstream gradient and cos = z . p / (|z| |p|):

    squared Euclidean   2 (z_i sum_k g_ik - sum_k g_ik p_k)
    cosine              2 / |z_i| (z_i / |z_i| sum_k g_ik cos_ik - sum_k g_ik p_k / |p_k|)

Both are `2 inverse (z_i inverse along - pulled)`: `inverse` is 1 / |z_i| (1 without the cosine),
`along` the first sum and `pulled` the second. The cosine's `along` is also the product of `pulled`
with z_i / |z_i|, which needs no distances: so where `pulled` is a library's product.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.tiles import (
    Matrix,
    inverse_length,
    load_tile,
    multiply,
    store_tile,
    unit_squares,
)


class Side(NamedTuple):
    """Features or prototypes in backward: a Matrix, and more of its rows."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_col: tl.tensor
    squares_ptr: tl.tensor  # |x|^2 of each row, or None without the cosine
    grad_ptr: tl.tensor  # contiguous, or None where no gradient is needed


class How(NamedTuple):
    """Constants of both sides."""

    WIDTH: tl.constexpr
    COSINE: tl.constexpr
    ACC: tl.constexpr
    PRECISION: tl.constexpr
    CHUNK: tl.constexpr  # components at a time


@triton.jit
def scaled_gradient(x_tile, inverse, along, pulled):
    """2 inverse (x inverse along - pulled), [X, D]."""
    return (2.0 * inverse)[:, None] * (x_tile * (along * inverse)[:, None] - pulled)


@triton.jit
def _distance_gradient(
    x,
    x_count,
    y,
    y_count,
    grad,
    distance,
    pid,
    first,
    last,
    HOW: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """Gradient of BLOCK_X rows of side x in components `first` to `last`.

    `grad` and `distance` are [X, Y]. With ONE_BLOCK all rows of y fit one block: `grad` is read
    once and stays in registers.
    """
    offs_x = pid.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < x_count
    inverse = tl.full((BLOCK_X,), 1.0, HOW.ACC)
    if HOW.COSINE:
        inverse = inverse_length(tl.load(x.squares_ptr + offs_x, mask=mask_x, other=0.0))

    # The part of the gradient along x, which the normalisation takes out
    g = tl.zeros((BLOCK_X, BLOCK_Y), HOW.ACC)
    along = tl.zeros((BLOCK_X,), HOW.ACC)
    for start in range(0, y_count, BLOCK_Y):
        offs_y = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
        mask_y = offs_y < y_count
        g = load_tile(grad, offs_x, mask_x, offs_y, mask_y).to(HOW.ACC)  # [X, Y]
        if HOW.COSINE:
            d2 = load_tile(distance, offs_x, mask_x, offs_y, mask_y).to(HOW.ACC)
            yy = tl.load(y.squares_ptr + offs_y, mask=mask_y, other=0.0)
            xx = tl.load(x.squares_ptr + offs_x, mask=mask_x, other=0.0)
            cosine = 0.5 * (unit_squares(xx)[:, None] + unit_squares(yy)[None, :] - d2)
            along += tl.sum(g * cosine, 1)
            g = g * inverse_length(yy)[None, :]
        else:
            along += tl.sum(g, 1)

    # The pull towards the rows of y, CHUNK components at a time
    CHUNK: tl.constexpr = HOW.CHUNK
    for chunk in range(first, last, CHUNK):
        offs_d = (chunk + tl.arange(0, CHUNK)).to(tl.int64)
        mask_d = offs_d < HOW.WIDTH
        pulled = tl.zeros((BLOCK_X, CHUNK), HOW.ACC)
        for start in range(0, y_count, BLOCK_Y):
            offs_y = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
            mask_y = offs_y < y_count
            if not ONE_BLOCK:
                g = load_tile(grad, offs_x, mask_x, offs_y, mask_y).to(HOW.ACC)
                if HOW.COSINE:
                    yy = tl.load(y.squares_ptr + offs_y, mask=mask_y, other=0.0)
                    g = g * inverse_length(yy)[None, :]
            y_tile = load_tile(y, offs_y, mask_y, offs_d, mask_d).to(HOW.ACC)  # [Y, D]
            pulled = multiply(g, y_tile, pulled, HOW.PRECISION, HOW.ACC)
        x_tile = load_tile(x, offs_x, mask_x, offs_d, mask_d).to(HOW.ACC)  # [X, D]
        grad_x = scaled_gradient(x_tile, inverse, along, pulled)
        store_tile(x.grad_ptr, HOW.WIDTH, offs_x, mask_x, offs_d, mask_d, grad_x)


@triton.jit(do_not_specialize=["batch"])
def distance_backward(
    features,
    prototypes,
    grad,
    distance_ptr,
    batch,
    classes,
    row_programs,
    span,
    WIDTH: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_ROW_BLOCK: tl.constexpr,
    ONE_CLASS_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of the features and of the prototypes, `span` components a program.

    Programs 0 to row_programs - 1 of the first axis compute the features', the others the
    prototypes', which is the same with rows and columns exchanged.
    """
    HOW: tl.constexpr = How(WIDTH, COSINE, ACC, PRECISION, CHUNK)
    pid = tl.program_id(0)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, WIDTH)
    if pid < row_programs:
        if features.grad_ptr is not None:
            _distance_gradient(
                features,
                batch,
                prototypes,
                classes,
                grad,
                Matrix(distance_ptr, classes, 1),
                pid,
                first,
                last,
                HOW,
                ONE_CLASS_BLOCK,
                BLOCK_B,
                BLOCK_K,
            )
    else:
        if prototypes.grad_ptr is not None:
            _distance_gradient(
                prototypes,
                classes,
                features,
                batch,
                Matrix(grad.ptr, grad.stride_col, grad.stride_row),
                Matrix(distance_ptr, 1, classes),
                pid - row_programs,
                first,
                last,
                HOW,
                ONE_ROW_BLOCK,
                BLOCK_K,
                BLOCK_B,
            )


@triton.jit(do_not_specialize=["count"])
def gradient_from_pull(
    x,
    squares_ptr,
    pulled_ptr,
    along_ptr,
    grad_ptr,
    count,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of BLOCK_X rows from `pulled` [X, D], a library's product.

    `along_ptr` holds the sums of the upstream gradient, or is None for the cosine, which takes
    `along` from the rows themselves.
    """
    offs_x = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < count
    pull = Matrix(pulled_ptr, WIDTH, 1)
    inverse = tl.full((BLOCK_X,), 1.0, ACC)
    if along_ptr is None:
        inverse = inverse_length(tl.load(squares_ptr + offs_x, mask=mask_x, other=0.0))
        along = tl.zeros((BLOCK_X,), ACC)
        for start in range(0, WIDTH, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < WIDTH
            x_tile = load_tile(x, offs_x, mask_x, offs_d, mask_d).to(ACC)
            pulled = load_tile(pull, offs_x, mask_x, offs_d, mask_d)
            along += tl.sum(x_tile * inverse[:, None] * pulled, 1)
    else:
        along = tl.load(along_ptr + offs_x, mask=mask_x, other=0.0)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < WIDTH
        x_tile = load_tile(x, offs_x, mask_x, offs_d, mask_d).to(ACC)  # [X, D]
        pulled = load_tile(pull, offs_x, mask_x, offs_d, mask_d)
        grad_x = scaled_gradient(x_tile, inverse, along, pulled)
        store_tile(grad_ptr, WIDTH, offs_x, mask_x, offs_d, mask_d, grad_x)

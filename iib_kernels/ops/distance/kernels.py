"""Distances to prototypes and their gradients (method page, section 2).

For rows z_i and p_k, d2(i, k) = |z_i|^2 + |p_k|^2 - 2 z_i . p_k; the cosine takes both at unit
length. Differentiated by z_i, with g the upstream gradient and cos = z . p / (|z| |p|):

    squared Euclidean   2 (z_i sum_k g_ik - sum_k g_ik p_k)
    cosine              2 / |z_i| (z_i / |z_i| sum_k g_ik cos_ik - sum_k g_ik p_k / |p_k|)

Both are `2 inverse (z_i inverse along - pulled)`: `inverse` is 1 / |z_i| (1 without the cosine),
`along` the first sum and `pulled` the second.
"""

import triton
import triton.language as tl

from iib_kernels.ops.tiles import (
    Matrix,
    Product,
    inner_products,
    inverse_length,
    load_tile,
    multiply,
    squared_distance,
    store_tile,
    unit_squares,
)


@triton.jit
def distance_forward(
    features_ptr,
    features_stride_b,
    features_stride_d,
    prototypes_ptr,
    prototypes_stride_k,
    prototypes_stride_d,
    distance_out_ptr,
    exact_out_ptr,
    squares_out_ptr,
    prototype_squares_out_ptr,
    batch,
    classes,
    width,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile [BLOCK_B, BLOCK_K] of squared distances.

    For backward also, where asked for: the distances before rounding to half precision, and the
    squared length of each row and prototype.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_b = offs_b < batch
    mask_k = offs_k < classes
    features = Matrix(features_ptr, features_stride_b, features_stride_d)
    prototypes = Matrix(prototypes_ptr, prototypes_stride_k, prototypes_stride_d)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)

    dots, zz, pp = inner_products(
        features, offs_b, mask_b, prototypes, offs_k, mask_k, width, HOW
    )  # [B, K], [B], [K]
    distance = squared_distance(dots, zz, pp, COSINE)
    offsets = offs_b[:, None] * classes + offs_k[None, :]
    mask = mask_b[:, None] & mask_k[None, :]
    tl.store(distance_out_ptr + offsets, distance, mask=mask)
    if exact_out_ptr is not None:
        tl.store(exact_out_ptr + offsets, distance, mask=mask)

    # The lengths do not depend on the other axis of tiles: its first program writes them
    if squares_out_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(squares_out_ptr + offs_b, zz, mask=mask_b)
        if tl.program_id(0) == 0:
            tl.store(prototype_squares_out_ptr + offs_k, pp, mask=mask_k)


@triton.jit
def _distance_gradient(
    x,
    x_squares_ptr,
    x_count,
    y,
    y_squares_ptr,
    y_count,
    width,
    grad,
    distance,
    grad_x_ptr,
    pid,
    first,
    last,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of BLOCK_X rows of x in components `first` to `last`.

    `grad` and `distance` are [X, Y]. With ONE_BLOCK all rows of y fit one block: `grad` is read
    once and stays in registers.
    """
    offs_x = pid.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < x_count
    inverse = tl.full((BLOCK_X,), 1.0, ACC)
    if COSINE:
        inverse = inverse_length(tl.load(x_squares_ptr + offs_x, mask=mask_x, other=0.0))

    # The part of the gradient along x, which the normalisation takes out
    g = tl.zeros((BLOCK_X, BLOCK_Y), ACC)
    along = tl.zeros((BLOCK_X,), ACC)
    for start in range(0, y_count, BLOCK_Y):
        offs_y = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
        mask_y = offs_y < y_count
        g = load_tile(grad, offs_x, mask_x, offs_y, mask_y).to(ACC)  # [X, Y]
        if COSINE:
            d2 = load_tile(distance, offs_x, mask_x, offs_y, mask_y).to(ACC)
            yy = tl.load(y_squares_ptr + offs_y, mask=mask_y, other=0.0)
            xx = tl.load(x_squares_ptr + offs_x, mask=mask_x, other=0.0)
            cosine = 0.5 * (unit_squares(xx)[:, None] + unit_squares(yy)[None, :] - d2)
            along += tl.sum(g * cosine, 1)
            g = g * inverse_length(yy)[None, :]
        else:
            along += tl.sum(g, 1)

    # The pull towards the rows of y, CHUNK components at a time
    for chunk in range(first, last, CHUNK):
        offs_d = (chunk + tl.arange(0, CHUNK)).to(tl.int64)
        mask_d = offs_d < width
        pulled = tl.zeros((BLOCK_X, CHUNK), ACC)
        for start in range(0, y_count, BLOCK_Y):
            offs_y = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
            mask_y = offs_y < y_count
            if not ONE_BLOCK:
                g = load_tile(grad, offs_x, mask_x, offs_y, mask_y).to(ACC)
                if COSINE:
                    yy = tl.load(y_squares_ptr + offs_y, mask=mask_y, other=0.0)
                    g = g * inverse_length(yy)[None, :]
            y_tile = load_tile(y, offs_y, mask_y, offs_d, mask_d).to(ACC)  # [Y, D]
            pulled = multiply(g, y_tile, pulled, PRECISION, ACC)
        x_tile = load_tile(x, offs_x, mask_x, offs_d, mask_d).to(ACC)  # [X, D]
        grad_x = (2.0 * inverse)[:, None] * (x_tile * (along * inverse)[:, None] - pulled)
        store_tile(grad_x_ptr, width, offs_x, mask_x, offs_d, mask_d, grad_x)


@triton.jit
def distance_backward(
    features_ptr,
    features_stride_b,
    features_stride_d,
    squares_ptr,
    prototypes_ptr,
    prototypes_stride_k,
    prototypes_stride_d,
    prototype_squares_ptr,
    grad_ptr,
    grad_stride_b,
    grad_stride_k,
    distance_ptr,
    grad_features_ptr,
    grad_prototypes_ptr,
    batch,
    classes,
    width,
    row_programs,
    span,
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
    pid = tl.program_id(0)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, width)
    features = Matrix(features_ptr, features_stride_b, features_stride_d)
    prototypes = Matrix(prototypes_ptr, prototypes_stride_k, prototypes_stride_d)
    if pid < row_programs:
        if grad_features_ptr is not None:
            _distance_gradient(
                features,
                squares_ptr,
                batch,
                prototypes,
                prototype_squares_ptr,
                classes,
                width,
                Matrix(grad_ptr, grad_stride_b, grad_stride_k),
                Matrix(distance_ptr, classes, 1),
                grad_features_ptr,
                pid,
                first,
                last,
                COSINE,
                ACC,
                PRECISION,
                ONE_CLASS_BLOCK,
                BLOCK_B,
                BLOCK_K,
                CHUNK,
            )
    else:
        if grad_prototypes_ptr is not None:
            _distance_gradient(
                prototypes,
                prototype_squares_ptr,
                classes,
                features,
                squares_ptr,
                batch,
                width,
                Matrix(grad_ptr, grad_stride_k, grad_stride_b),
                Matrix(distance_ptr, 1, classes),
                grad_prototypes_ptr,
                pid - row_programs,
                first,
                last,
                COSINE,
                ACC,
                PRECISION,
                ONE_ROW_BLOCK,
                BLOCK_K,
                BLOCK_B,
                CHUNK,
            )

"""The nearest prototype of a seen class, and the gradient through it (method page, section 2)."""

import triton
import triton.language as tl

from iib_kernels.ops.tiles import (
    Matrix,
    Product,
    inner_products,
    inverse_length,
    load_tile,
    seen_classes,
    select,
    squared_distance,
    store_tile,
)


@triton.jit
def nearest_forward(
    features_ptrs,
    features_strides_b,
    features_strides_d,
    prototypes_ptrs,
    prototypes_strides_k,
    prototypes_strides_d,
    widths,
    seen_ptrs,
    distance_out_ptr,
    index_out_ptr,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared distance to the nearest prototype of a seen class, and that class (-1: none seen).

    BLOCK_B rows of one modality a program, with a running minimum over blocks of classes.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    m = tl.program_id(1)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    seen_ptr = None
    if SEEN:
        seen_ptr = select(seen_ptrs, m, M)

    best = tl.full((BLOCK_B,), float("inf"), ACC)
    winner = tl.full((BLOCK_B,), -1, tl.int64)
    for start in range(0, classes, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = seen_classes(seen_ptr, offs_k, offs_k < classes)
        features = Matrix(
            select(features_ptrs, m, M),
            select(features_strides_b, m, M),
            select(features_strides_d, m, M),
        )
        prototypes = Matrix(
            select(prototypes_ptrs, m, M),
            select(prototypes_strides_k, m, M),
            select(prototypes_strides_d, m, M),
        )
        width = select(widths, m, M)
        dots, zz, pp = inner_products(
            features, offs_b, mask_b, prototypes, offs_k, mask_k, width, HOW
        )  # [B, K], [B], [K]
        distance = squared_distance(dots, zz, pp, COSINE)

        # NaN comes first, as in torch.min: it stands as -1 until the end
        distance = tl.where(distance == distance, distance, -1.0)
        distance = tl.where(mask_k[None, :], distance, float("inf"))
        nearest = tl.min(distance, 1)  # [B]
        is_nearest = mask_k[None, :] & (distance == nearest[:, None])
        index = tl.min(tl.where(is_nearest, offs_k[None, :], 9223372036854775807), 1)  # the first

        # An infinite distance of a seen class still beats no class at all
        closer = (nearest < best) | ((winner < 0) & (index < classes))
        winner = tl.where(closer, index, winner)
        best = tl.where(closer, nearest, best)
    best = tl.where(best < 0.0, float("nan"), best)
    tl.store(distance_out_ptr + offs_b * M + m, tl.where(winner < 0, 0.0, best), mask=mask_b)
    tl.store(index_out_ptr + offs_b * M + m, winner, mask=mask_b)


@triton.jit
def _nearest_gradient(z_tile, p_tile, upstream, z_inverse, p_inverse, along):
    """Gradient [B, D] of z, with one prototype p a row and `along` its cosine (1 without it).

    It is the formula at the head of distance/kernels.py, where the sums have one term.
    """
    return (2.0 * upstream * z_inverse)[:, None] * (
        z_tile * (along * z_inverse)[:, None] - p_tile * p_inverse[:, None]
    )


@triton.jit
def nearest_backward(
    features_ptrs,
    features_strides_b,
    features_strides_d,
    prototypes_ptrs,
    prototypes_strides_k,
    prototypes_strides_d,
    widths,
    index_ptr,
    grad_distance_ptr,
    grad_stride_b,
    grad_stride_m,
    grad_features_ptrs,
    batch,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the features through the winning prototypes, BLOCK_B rows of one modality.

    With ONE_BLOCK a row's components fit one block and are read once; else the cosine reads them
    twice, for the lengths and for the gradient.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    m = tl.program_id(1)
    width = select(widths, m, M)
    features = Matrix(
        select(features_ptrs, m, M),
        select(features_strides_b, m, M),
        select(features_strides_d, m, M),
    )
    prototypes = Matrix(
        select(prototypes_ptrs, m, M),
        select(prototypes_strides_k, m, M),
        select(prototypes_strides_d, m, M),
    )
    grad_features_ptr = select(grad_features_ptrs, m, M)

    winner = tl.load(index_ptr + offs_b * M + m, mask=mask_b, other=-1)
    found = winner >= 0
    upstream_ptrs = grad_distance_ptr + offs_b * grad_stride_b + m * grad_stride_m
    upstream = tl.load(upstream_ptrs, mask=found, other=0.0).to(ACC)

    z_inverse = tl.full((BLOCK_B,), 1.0, ACC)
    p_inverse = tl.full((BLOCK_B,), 1.0, ACC)
    along = tl.full((BLOCK_B,), 1.0, ACC)
    if ONE_BLOCK:
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = offs_d < width
        z_tile = load_tile(features, offs_b, found, offs_d, mask_d).to(ACC)  # [B, D]
        p_tile = load_tile(prototypes, winner, found, offs_d, mask_d).to(ACC)  # [B, D]
        if COSINE:
            z_inverse = inverse_length(tl.sum(z_tile * z_tile, 1))
            p_inverse = inverse_length(tl.sum(p_tile * p_tile, 1))
            along = tl.sum(z_tile * p_tile, 1) * z_inverse * p_inverse
        grad = _nearest_gradient(z_tile, p_tile, upstream, z_inverse, p_inverse, along)
        store_tile(grad_features_ptr, width, offs_b, mask_b, offs_d, mask_d, grad)
    else:
        if COSINE:
            zz = tl.zeros((BLOCK_B,), ACC)
            pp = tl.zeros((BLOCK_B,), ACC)
            dots = tl.zeros((BLOCK_B,), ACC)
            for start in range(0, width, BLOCK_D):
                offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
                mask_d = offs_d < width
                z_tile = load_tile(features, offs_b, found, offs_d, mask_d).to(ACC)
                p_tile = load_tile(prototypes, winner, found, offs_d, mask_d).to(ACC)
                zz += tl.sum(z_tile * z_tile, 1)
                pp += tl.sum(p_tile * p_tile, 1)
                dots += tl.sum(z_tile * p_tile, 1)
            z_inverse = inverse_length(zz)
            p_inverse = inverse_length(pp)
            along = dots * z_inverse * p_inverse
        for start in range(0, width, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < width
            z_tile = load_tile(features, offs_b, found, offs_d, mask_d).to(ACC)
            p_tile = load_tile(prototypes, winner, found, offs_d, mask_d).to(ACC)
            grad = _nearest_gradient(z_tile, p_tile, upstream, z_inverse, p_inverse, along)
            store_tile(grad_features_ptr, width, offs_b, mask_b, offs_d, mask_d, grad)

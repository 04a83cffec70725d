"""The nearest prototype of a seen class, and the gradient through it (method page, section 2).

The modality is chosen by `if pid_m == m` over constants: each keeps its own types, strides and
width, and one whose rows are not aligned makes no other's loads narrow.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.distance.kernels import dot_products
from iib_kernels.ops.distance.lengths import row_squares
from iib_kernels.ops.tiles import (
    Matrix,
    Product,
    inner_products,
    inverse_length,
    load_tile,
    seen_classes,
    squared_distance,
    store_tile,
    unit_squares,
)


@triton.jit
def closest(distance, offs_k, mask_k, best, winner, CLASSES: tl.constexpr):
    """The running minimum [B] and its class with one more block of distances [B, K].

    Of equal ones the first. NaN comes before all, as in torch.min: it stands as -1 until the end.
    """
    distance = tl.where(distance == distance, distance, -1.0)
    distance = tl.where(mask_k[None, :], distance, float("inf"))
    nearest = tl.min(distance, 1)  # [B]
    is_nearest = mask_k[None, :] & (distance == nearest[:, None])
    index = tl.min(tl.where(is_nearest, offs_k[None, :], CLASSES), 1)
    # An infinite distance of a seen class still beats no class at all
    closer = (nearest < best) | ((winner < 0) & (index < CLASSES))
    return tl.where(closer, nearest, best), tl.where(closer, index, winner)


@triton.jit
def _search(
    x,
    table,
    seen_ptr,
    squares_ptr,
    offs_b,
    mask_b,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    COSINE: tl.constexpr,
    UNIT: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Least squared distance [B] of rows of one modality, and its class.

    Where the prototypes' lengths are given, nothing but products stands in the inner loop.
    """
    best = tl.full((BLOCK_B,), float("inf"), HOW.ACC)
    winner = tl.full((BLOCK_B,), -1, tl.int32)
    zz = tl.zeros((BLOCK_B,), HOW.ACC)
    if squares_ptr is not None:
        zz = row_squares(x, offs_b, mask_b, WIDTH, HOW.ACC, HOW.BLOCK_D)
    for start in range(0, CLASSES, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        rows_k = offs_k.to(tl.int64)
        mask_k = seen_classes(seen_ptr, rows_k, offs_k < CLASSES)
        if squares_ptr is None:
            dots, zz, pp = inner_products(
                x, offs_b, mask_b, table, rows_k, mask_k, WIDTH, HOW
            )  # [B, K], [B], [K]
        else:
            dots = dot_products(x, offs_b, mask_b, table, rows_k, mask_k, WIDTH, HOW)
            pp = tl.load(squares_ptr + offs_k, mask=mask_k, other=0.0)
            if UNIT:
                pp = unit_squares(pp)
        distance = squared_distance(dots, zz, pp, COSINE)
        best, winner = closest(distance, offs_k, mask_k, best, winner, CLASSES)
    return best, winner


@triton.jit(do_not_specialize=["batch"])
def nearest_forward(
    features,
    prototypes,
    seen_ptrs,
    squares_ptrs,
    distance_ptr,
    index_ptr,
    batch,
    M: tl.constexpr,
    WIDTHS: tl.constexpr,
    CLASSES: tl.constexpr,
    COSINE: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared distance to the nearest prototype of a seen class, and that class (-1: none seen).

    BLOCK_B rows of one modality a program, with a running minimum over blocks of classes. UNITS:
    which modalities' prototypes are copies at unit length.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    pid_m = tl.program_id(1)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    for m in tl.static_range(M):
        if pid_m == m:
            best, winner = _search(
                features[m],
                prototypes[m],
                None if seen_ptrs is None else seen_ptrs[m],
                None if squares_ptrs is None else squares_ptrs[m],
                offs_b,
                mask_b,
                WIDTHS[m],
                CLASSES,
                COSINE,
                UNITS[m],
                HOW,
                BLOCK_B,
                BLOCK_K,
            )
            best = tl.where(best < 0.0, float("nan"), best)
            best = tl.where(winner < 0, 0.0, best)
            tl.store(distance_ptr + offs_b * M + m, best, mask=mask_b)
            tl.store(index_ptr + offs_b * M + m, winner.to(tl.int64), mask=mask_b)


@triton.jit
def nearest_gradient(z_tile, p_tile, upstream, z_inverse, p_inverse, along):
    """Gradient [B, D] of z, with one prototype p a row and `along` its cosine (1 without it).

    It is the formula at the head of distance/kernels_backward.py, where the sums have one term.
    """
    return (2.0 * upstream * z_inverse)[:, None] * (
        z_tile * (along * z_inverse)[:, None] - p_tile * p_inverse[:, None]
    )


class Backward(NamedTuple):
    """What the gradient is made of, and where it goes."""

    features: tl.tuple  # M Matrix [B, D_m]
    prototypes: tl.tuple  # M Matrix [K, D_m]
    index_ptr: tl.tensor  # [B, M] class of the nearest prototype, or -1
    upstream: Matrix  # [B, M] gradient of the distance to it
    grad_ptrs: tl.tuple  # M of [B, D_m]


class Winners(NamedTuple):
    """Rows of one modality and the prototypes nearest to them, [B] each."""

    offs_b: tl.tensor
    mask_b: tl.tensor
    index: tl.tensor  # class of the nearest prototype
    found: tl.tensor  # whether there is one
    upstream: tl.tensor  # gradient of the distance to it


@triton.jit
def load_winners(flow, batch, ACC: tl.constexpr, BLOCK_B: tl.constexpr):
    """The winners of BLOCK_B rows of this program's modality. `flow`: a Backward."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    m = tl.program_id(1)
    index = tl.load(flow.index_ptr + offs_b * len(flow.grad_ptrs) + m, mask=mask_b, other=-1)
    found = index >= 0
    ptrs = flow.upstream.ptr + offs_b * flow.upstream.stride_row + m * flow.upstream.stride_col
    upstream = tl.load(ptrs, mask=found, other=0.0).to(ACC)
    return Winners(offs_b, mask_b, index, found, upstream)


@triton.jit
def _pull_back(
    x, table, at, grad_ptr, WIDTH: tl.constexpr, COSINE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Gradient of rows of one modality, each read once."""
    ACC: tl.constexpr = at.upstream.dtype
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < WIDTH
    z_tile = load_tile(x, at.offs_b, at.found, offs_d, mask_d).to(ACC)  # [B, D]
    p_tile = load_tile(table, at.index, at.found, offs_d, mask_d).to(ACC)  # [B, D]
    z_inverse = tl.full(at.upstream.shape, 1.0, ACC)
    p_inverse = z_inverse
    along = z_inverse
    if COSINE:
        z_inverse = inverse_length(tl.sum(z_tile * z_tile, 1))
        p_inverse = inverse_length(tl.sum(p_tile * p_tile, 1))
        along = tl.sum(z_tile * p_tile, 1) * z_inverse * p_inverse
    gradient = nearest_gradient(z_tile, p_tile, at.upstream, z_inverse, p_inverse, along)
    store_tile(grad_ptr, WIDTH, at.offs_b, at.mask_b, offs_d, mask_d, gradient)


@triton.jit(do_not_specialize=["batch"])
def nearest_backward(
    flow, batch, SIZES: tl.constexpr, COSINE: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Gradient of the features through the winning prototypes, BLOCK_B rows of one modality.

    SIZES: D and BLOCK_D of each modality.
    """
    at = load_winners(flow, batch, ACC, BLOCK_B)
    for m in tl.static_range(len(flow.features)):
        if tl.program_id(1) == m:
            _pull_back(
                flow.features[m],
                flow.prototypes[m],
                at,
                flow.grad_ptrs[m],
                SIZES[m][0],
                COSINE,
                SIZES[m][1],
            )

"""The prototype losses of a block of rows, and their gradient by the features, in one pass
(method page, section 3), where one block holds all classes.

The terms are those at the head of ops/alignment/kernels.py. With c the factor of C_m in the
objective and g that of A_m times its deviation, both 0 where a row does not count, the gradient by
the score of class k is

    q_m(k) (c + g share) - g q_a(k) - c [k = y],    share = sum_k q_a(k)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.alignment.kernels import is_aligned, read_budgets, shortfall
from iib_kernels.ops.tiles import (
    FLOOR,
    Matrix,
    Product,
    inner_products,
    inverse_length,
    load_scalar,
    load_tile,
    multiply,
    seen_classes,
    select,
    squared_distance,
    store_tile,
    unit_squares,
)


class Tables(NamedTuple):
    """What the prototype losses are taken of: M pointers each, and the budgets [M]."""

    features: tl.tuple  # [B, D_m]
    prototypes: tl.tuple  # [K, D_m]
    seen: tl.tuple  # [K], or None
    budgets: tl.tensor
    temperature: tl.tensor


class How(NamedTuple):
    """How they are computed; constants of the kernel, as they change with the model alone."""

    widths: tuple  # M of D_m
    strides_b: tuple  # M row strides of the features
    strides_k: tuple  # M row strides of the prototypes
    cosine: bool
    unit: bool  # prototypes have unit length
    upcast: bool  # whether factors are raised before they are multiplied
    precision: str  # of float32 products
    block_d: int
    number_pointer: bool


@triton.jit
def _sizes(index, M: tl.constexpr, HOW: tl.constexpr):
    """Row strides of features and prototypes, and width, of modality `index`, known on the device.

    One constant after the other: Triton 3.6 takes no tuples of them.
    """
    stride_b = tl.full((), HOW.strides_b[0], tl.int32)
    stride_k = tl.full((), HOW.strides_k[0], tl.int32)
    width = tl.full((), HOW.widths[0], tl.int32)
    for m in tl.static_range(1, M):
        stride_b = tl.where(index == m, tl.full((), HOW.strides_b[m], tl.int32), stride_b)
        stride_k = tl.where(index == m, tl.full((), HOW.strides_k[m], tl.int32), stride_k)
        width = tl.where(index == m, tl.full((), HOW.widths[m], tl.int32), width)
    return stride_b, stride_k, width


class Posterior(NamedTuple):
    """One modality's posterior over the classes, in the rows of a block."""

    log_q: tl.tensor  # [B, K], -inf for a class not seen
    true_log_q: tl.tensor  # [B] of the target
    confidence: tl.tensor  # [B] q(y), 0 where the row does not count
    counted: tl.tensor  # [B]
    zz: tl.tensor  # [B] |z|^2
    pp: tl.tensor  # [K] |p|^2


@triton.jit
def _posterior(
    z,
    p,
    seen_ptr,
    width,
    offs_b,
    present,
    targets,
    offs_k,
    is_target,
    tau,
    K: tl.constexpr,
    ACC: tl.constexpr,
    HOW: tl.constexpr,
):
    """The Posterior of the modality with features `z` and prototypes `p`."""
    mask_k = seen_classes(seen_ptr, offs_k, offs_k < K)
    counted = present
    if seen_ptr is not None:
        counted = present & (tl.load(seen_ptr + targets, mask=present, other=0) != 0)
    PRODUCT: tl.constexpr = Product(ACC, HOW.upcast, HOW.precision, HOW.block_d)
    dots, zz, pp = inner_products(z, offs_b, present, p, offs_k, mask_k, width, PRODUCT)
    if HOW.unit:
        pp = tl.where(mask_k, 1.0, 0.0).to(ACC)
    scores = -squared_distance(dots, zz, pp, HOW.cosine) / tau
    scores = tl.where(mask_k[None, :], scores, float("-inf"))
    maximum = tl.max(scores, 1)
    maximum = tl.where(maximum < FLOOR, FLOOR, maximum)
    lse = tl.log(tl.sum(tl.exp(scores - maximum[:, None]), 1)) + maximum
    log_q = scores - lse[:, None]
    true_log_q = tl.sum(tl.where(is_target, log_q, 0.0), 1)
    confidence = tl.where(counted, tl.exp(true_log_q), 0.0)
    return Posterior(log_q, true_log_q, confidence, counted, zz, pp)


@triton.jit
def prototype_losses(
    tables,
    block,
    labels,
    by_contrast,
    by_alignment,
    divisors,
    grad_ptrs,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HOW: tl.constexpr,
):
    """C_m and A_m of these rows, M of [B] each, 0 where they do not count.

    Where `grad_ptrs` is not None, the gradient by each modality's features is stored. `by_contrast`
    and `by_alignment` say what the means of C_m and A_m weigh in the objective, and `divisors`, M
    of [], over how many rows they are taken.

    The anchor comes first, and once more in its turn: so only two posteriors are held at once.
    """
    offs_b = block.offs
    available = block.available
    offs_k = tl.arange(0, BLOCK_K)
    is_target = offs_k[None, :] == labels.targets[:, None]
    budgets = read_budgets(tables.budgets, 1, M, ACC)
    tau = load_scalar(tables.temperature, HOW.number_pointer, ACC)

    i = budgets.anchor
    stride_b, stride_k, width = _sizes(i, M, HOW)
    a = _posterior(
        Matrix(select(tables.features, i, M), stride_b, 1),
        Matrix(select(tables.prototypes, i, M), stride_k, 1),
        None if tables.seen is None else select(tables.seen, i, M),
        width,
        offs_b,
        labels.counted & select(available, i, M),
        labels.targets,
        offs_k,
        is_target,
        tau,
        K,
        ACC,
        HOW,
    )
    contrastive = ()
    alignment = ()
    for m in tl.static_range(M):
        own = _posterior(
            Matrix(tables.features[m], HOW.strides_b[m], 1),
            Matrix(tables.prototypes[m], HOW.strides_k[m], 1),
            None if tables.seen is None else tables.seen[m],
            HOW.widths[m],
            offs_b,
            labels.counted & available[m],
            labels.targets,
            offs_k,
            is_target,
            tau,
            K,
            ACC,
            HOW,
        )
        both = (own.log_q > float("-inf")) & (a.log_q > float("-inf"))
        anchor_q = tl.where(both, tl.exp(a.log_q), 0.0)
        divergence = tl.sum(anchor_q * tl.where(both, a.log_q - own.log_q, 0.0), 1)
        deviation = shortfall(own.confidence, a.confidence, budgets, m, ACC)
        aligned = is_aligned(own.counted, a.counted, budgets.anchor, m, offs_b)
        contrastive = contrastive + (tl.where(own.counted, -own.true_log_q, 0.0),)
        alignment = alignment + (tl.where(aligned, deviation * divergence, 0.0),)
        if grad_ptrs is not None:
            c = tl.where(own.counted, by_contrast, 0.0)
            g = tl.where(aligned, by_alignment * deviation, 0.0)
            pull = c + g * tl.sum(anchor_q, 1)
            slope = tl.exp(own.log_q) * pull[:, None] - g[:, None] * anchor_q
            slope -= tl.where(is_target, c[:, None], 0.0)
            # What stands in a row that does not count must not become NaN
            slope = tl.where(((c == 0.0) & (g == 0.0))[:, None], 0.0, slope)
            _store_gradient(
                slope, own, tables, m, grad_ptrs[m], offs_b, block.mask, offs_k, tau, divisors[m],
                K, HOW, ACC,
            )  # fmt: skip
    return contrastive, alignment


@triton.jit
def _store_gradient(
    slope,
    own,
    tables,
    m: tl.constexpr,
    grad_ptr,
    offs_b,
    mask_b,
    offs_k,
    tau,
    divisor,
    K: tl.constexpr,
    HOW: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient [B, D_m] by the features, from `slope` [B, K], `divisor` times that by the scores.

    The scores hold -d2 / tau and d2 holds -2 z . p, hence 2 / tau. The squared Euclidean needs no
    more, because a row of the slope sums to 0. The cosine (p_k at unit length) loses the part along
    z and is scaled by 1 / |z|.

    The slope is multiplied in the features' type. Times the divisor, which comes last, it is of a
    size for which float16 has room.
    """
    BLOCK_D: tl.constexpr = HOW.block_d
    WIDTH: tl.constexpr = HOW.widths[m]
    PRECISION: tl.constexpr = HOW.precision
    mask_k = seen_classes(None if tables.seen is None else tables.seen[m], offs_k, offs_k < K)
    along = tl.zeros_like(own.zz)
    inverse = tl.zeros_like(own.zz)
    if HOW.cosine:
        # The cosine is (|z|^2 + |p|^2 + tau score) / 2 at unit length. What all classes have in
        # common, as |z|^2 and the posterior's normalisation, has no part in the sum
        twice = tl.where(mask_k[None, :], own.log_q, 0.0) * tau + unit_squares(own.pp)[None, :]
        inverse = inverse_length(own.zz)
        along = 0.5 * tl.sum(slope * twice, 1) * inverse
        slope = slope * inverse_length(own.pp)[None, :]
    factor = 2.0 / (tau * divisor)
    z = Matrix(tables.features[m], HOW.strides_b[m], 1)
    p = Matrix(tables.prototypes[m], HOW.strides_k[m], 1)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < WIDTH
        p_tile = load_tile(p, offs_k, mask_k, offs_d, mask_d)  # [K, D]
        pulled = tl.zeros((offs_b.shape[0], BLOCK_D), ACC)
        if HOW.upcast:
            pulled = multiply(slope, p_tile.to(ACC), pulled, PRECISION, ACC)
        else:
            kind = z.ptr.dtype.element_ty
            pulled = multiply(slope.to(kind), p_tile.to(kind), pulled, PRECISION, ACC)
        if HOW.cosine:
            z_tile = load_tile(z, offs_b, own.counted, offs_d, mask_d).to(ACC)  # [B, D]
            pulled = (pulled - z_tile * along[:, None]) * inverse[:, None]
        store_tile(grad_ptr, WIDTH, offs_b, mask_b, offs_d, mask_d, factor * pulled)

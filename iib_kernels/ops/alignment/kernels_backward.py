"""Gradients of the alignment loss by the features (method page, section 3).

The terms are those at the head of kernels.py.

With c the upstream gradient of C_m, and g that of A_m times its deviation (0 where a row does not
count), the gradient by the score of class k is

    q_m(k) (c + g share) - g q_a(k) - c [k = y],    share = sum_k q_a(k)

where q_a stands for the classes that modality m has seen. From there it goes through the scores to
the features: one more product with the prototypes.

For as many classes as one tile holds, whose scores are computed once.
"""

import triton
import triton.language as tl

from iib_kernels.ops.alignment.kernels import (
    all_evidence,
    is_aligned,
    load_upstream,
    read_budgets,
    shortfall,
)
from iib_kernels.ops.tiles import (
    Product,
    inverse_length,
    load_scalar,
    load_tile,
    multiply,
    seen_classes,
    select,
    store_tile,
    unit_squares,
    valid_targets,
)


@triton.jit
def _score_gradient(scores, lse, anchor_scores, anchor_lse, share, c, g, is_target):
    """Gradient [B, K] by one modality's scores: the formula at the head of this file."""
    q = tl.exp(scores - lse[:, None])
    both = (scores > float("-inf")) & (g != 0.0)[:, None]
    anchor_q = tl.where(both, tl.exp(anchor_scores - anchor_lse[:, None]), 0.0)
    share = tl.where(g == 0.0, 0.0, share)
    grad = q * (c + g * share)[:, None] - g[:, None] * anchor_q
    grad -= tl.where(is_target, c[:, None], 0.0)
    # What stands in a row that does not count must not become NaN
    idle = (c == 0.0) & (g == 0.0)
    return tl.where(idle[:, None], 0.0, grad)


@triton.jit
def _twice_cosine(scores, mask_k, zz, pp, inverse_temperature):
    """2 cos [B, K], back from the scores: d2 = |z|^2 + |p|^2 - 2 cos at unit length."""
    lengths = unit_squares(pp)[None, :] + unit_squares(zz)[:, None]
    return lengths + tl.where(mask_k[None, :], scores, 0.0) / inverse_temperature


@triton.jit
def _feature_gradient(pulled, z_tile, along, zz, inverse_temperature, COSINE: tl.constexpr):
    """Gradient [B, D] by the features, from `pulled` = sum_k grad_k p_k.

    The scores hold -d2 / tau and d2 holds -2 z . p, hence 2 / tau. The squared Euclidean needs no
    more: its sum_k grad_k, by |z|^2, is 0. The cosine (p_k at unit length) loses the part along z,
    with `along` = sum_k grad_k cos_k, and is scaled by 1 / |z|.
    """
    if COSINE:
        inverse = inverse_length(zz)
        across = pulled - z_tile * (inverse * along)[:, None]
        return 2.0 * inverse_temperature * inverse[:, None] * across
    else:
        return 2.0 * inverse_temperature * pulled


@triton.jit(do_not_specialize=["batch"])
def alignment_backward(
    features,
    prototypes,
    widths,
    rows,
    upstream,
    gradient_ptrs,
    batch,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOPE_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of BLOCK_B rows of all modalities, where one tile holds all classes.

    The scores of all modalities are computed once; then each gradient follows, BLOCK_D components
    at a time.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    inverse_temperature = 1.0 / load_scalar(rows.temperature, ACC == tl.float64, ACC)
    budgets = read_budgets(rows.budgets, 1, M, ACC)
    found = all_evidence(features, prototypes, widths, rows, offs_b, mask_b, offs_k, M, COSINE, HOW)
    targets, valid = valid_targets(rows.targets, 1, rows.ignore_index, offs_b, mask_b, rows.classes)
    is_target = offs_k[None, :] == targets[:, None]  # [B, K]
    anchor_scores = select(found.scores, budgets.anchor, M)
    anchor_lse = select(found.lse, budgets.anchor, M)
    anchor_q = select(found.confidences, budgets.anchor, M)
    anchor_counted = select(found.counted, budgets.anchor, M)

    for m in tl.static_range(M):
        counted = found.counted[m]
        scores = found.scores[m]
        zz = found.zz[m]
        aligned = is_aligned(counted, anchor_counted, budgets.anchor, m, offs_b)
        c, g = load_upstream(upstream, counted, aligned, offs_b, m, ACC)
        deviation = shortfall(found.confidences[m], anchor_q, budgets, m, ACC)
        g = tl.where(aligned, g * deviation, 0.0)
        seen_anchor_q = tl.where(
            scores > float("-inf"), tl.exp(anchor_scores - anchor_lse[:, None]), 0.0
        )
        share = tl.sum(seen_anchor_q, 1)
        grad = _score_gradient(
            scores, found.lse[m], anchor_scores, anchor_lse, share, c, g, is_target
        )  # [B, K]
        mask_k = seen_classes(
            None if rows.seen is None else rows.seen[m], offs_k, offs_k < rows.classes
        )
        along = tl.zeros((BLOCK_B,), ACC)
        if COSINE:
            pp = found.pp[m]
            cosine = 0.5 * _twice_cosine(scores, mask_k, zz, pp, inverse_temperature)
            along = tl.sum(grad * cosine, 1)
            grad = grad * inverse_length(pp)[None, :]

        for start in range(0, widths[m], BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < widths[m]
            p = load_tile(prototypes[m], offs_k, mask_k, offs_d, mask_d).to(ACC)  # [K, D]
            pulled = multiply(grad, p, tl.zeros((BLOCK_B, BLOCK_D), ACC), SLOPE_PRECISION, ACC)
            z = pulled
            if COSINE:
                z = load_tile(features[m], offs_b, counted, offs_d, mask_d).to(ACC)  # [B, D]
            grad_z = _feature_gradient(pulled, z, along, zz, inverse_temperature, COSINE)
            store_tile(gradient_ptrs[m], widths[m], offs_b, mask_b, offs_d, mask_d, grad_z)

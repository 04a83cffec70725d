"""Gradients of the alignment loss by the features (method page, section 3).

The terms are those at the head of kernels.py.

With c the upstream gradient of C_m, and g that of A_m times its deviation (0 where a row does not
count), the gradient by the score of class k is

    q_m(k) (c + g share) - g q_a(k) - c [k = y],    share = sum_k q_a(k)

where q_a stands for the classes that modality m has seen. From there it goes through the scores to
the features: one more product with the prototypes.

Two kernels: `alignment_backward_block` where one block holds all classes, so that the scores are
computed once; `alignment_backward_tiled` where they need several, from the sums that forward kept.
"""

import triton
import triton.language as tl

from iib_kernels.ops.alignment.kernels import (
    count_rows,
    is_aligned,
    read_budgets,
    score_tile,
    shortfall,
)
from iib_kernels.ops.tiles import (
    FLOOR,
    Matrix,
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
def _upstream(
    grad_contrastive,
    grad_alignment,
    counted,
    anchor_counted,
    q,
    anchor_q,
    budgets,
    offs_b,
    m,
    ACC: tl.constexpr,
):
    """c [B] and g [B] of one modality. Either upstream gradient may be missing (pointer None)."""
    c = tl.zeros((offs_b.shape[0],), ACC)
    g = tl.zeros((offs_b.shape[0],), ACC)
    if grad_contrastive.ptr is not None:
        row_ptrs = grad_contrastive.ptr + offs_b * grad_contrastive.stride_row
        c = tl.load(row_ptrs + m * grad_contrastive.stride_col, mask=counted, other=0.0).to(ACC)
    if grad_alignment.ptr is not None:
        aligned = is_aligned(counted, anchor_counted, budgets.anchor, m, offs_b)
        row_ptrs = grad_alignment.ptr + offs_b * grad_alignment.stride_row
        g = tl.load(row_ptrs + m * grad_alignment.stride_col, mask=aligned, other=0.0).to(ACC)
        g = tl.where(aligned, g * shortfall(q, anchor_q, budgets, m, ACC), 0.0)
    return c, g


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


@triton.jit
def alignment_backward_block(
    features_ptrs,
    features_strides_b,
    features_strides_d,
    prototypes_ptrs,
    prototypes_strides_k,
    prototypes_strides_d,
    widths,
    targets_ptr,
    targets_stride,
    ignore_index,
    budgets_ptr,
    budgets_stride,
    temperature,
    seen_ptrs,
    mask_ptr,
    mask_stride_b,
    mask_stride_m,
    grad_contrastive_ptr,
    grad_contrastive_stride_b,
    grad_contrastive_stride_m,
    grad_alignment_ptr,
    grad_alignment_stride_b,
    grad_alignment_stride_m,
    grad_features_ptrs,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOPE_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of BLOCK_B rows of all modalities, where one block holds all classes.

    The scores of all modalities are computed once; then each gradient follows, BLOCK_D components
    at a time.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    inverse_temperature = 1.0 / load_scalar(temperature, NUMBER_POINTER, ACC)
    modality_mask = Matrix(mask_ptr, mask_stride_b, mask_stride_m)
    grad_contrastive = Matrix(
        grad_contrastive_ptr, grad_contrastive_stride_b, grad_contrastive_stride_m
    )
    grad_alignment = Matrix(grad_alignment_ptr, grad_alignment_stride_b, grad_alignment_stride_m)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    budgets = read_budgets(budgets_ptr, budgets_stride, M, ACC)
    anchor = budgets.anchor
    targets, valid = valid_targets(
        targets_ptr, targets_stride, ignore_index, offs_b, mask_b, classes
    )
    is_target = offs_k[None, :] == targets[:, None]  # [B, K]

    # Forward once more: scores, their lse, and q(y)
    scores = ()
    zz = ()
    pp = ()
    counted = ()
    lse = ()
    confidences = ()
    for m in tl.static_range(M):
        seen_ptr = seen_ptrs[m] if SEEN else None
        present_m, counted_m = count_rows(
            targets, valid, modality_mask, seen_ptr, offs_b, mask_b, m
        )
        mask_k = seen_classes(seen_ptr, offs_k, offs_k < classes)
        z = Matrix(features_ptrs[m], features_strides_b[m], features_strides_d[m])
        p = Matrix(prototypes_ptrs[m], prototypes_strides_k[m], prototypes_strides_d[m])
        scores_m, zz_m, pp_m = score_tile(
            z, offs_b, present_m, p, offs_k, mask_k, widths[m], inverse_temperature, COSINE, HOW
        )
        maximum = tl.max(scores_m, 1)
        maximum = tl.where(maximum < FLOOR, FLOOR, maximum)
        lse_m = tl.log(tl.sum(tl.exp(scores_m - maximum[:, None]), 1)) + maximum
        target_score = tl.sum(tl.where(is_target, scores_m, 0.0), 1)
        scores = scores + (scores_m,)
        zz = zz + (zz_m,)
        pp = pp + (pp_m,)
        counted = counted + (counted_m,)
        lse = lse + (lse_m,)
        confidences = confidences + (tl.where(counted_m, tl.exp(target_score - lse_m), 0.0),)
    anchor_scores = select(scores, anchor, M)
    anchor_lse = select(lse, anchor, M)
    anchor_q = select(confidences, anchor, M)
    anchor_counted = select(counted, anchor, M)

    for m in tl.static_range(M):
        c, g = _upstream(
            grad_contrastive,
            grad_alignment,
            counted[m],
            anchor_counted,
            confidences[m],
            anchor_q,
            budgets,
            offs_b,
            m,
            ACC,
        )
        seen_anchor_q = tl.where(
            scores[m] > float("-inf"), tl.exp(anchor_scores - anchor_lse[:, None]), 0.0
        )
        share = tl.sum(seen_anchor_q, 1)
        grad = _score_gradient(
            scores[m], lse[m], anchor_scores, anchor_lse, share, c, g, is_target
        )  # [B, K]
        mask_k = seen_classes(seen_ptrs[m] if SEEN else None, offs_k, offs_k < classes)
        along = tl.zeros((BLOCK_B,), ACC)
        if COSINE:
            cosine = 0.5 * _twice_cosine(scores[m], mask_k, zz[m], pp[m], inverse_temperature)
            along = tl.sum(grad * cosine, 1)
            grad = grad * inverse_length(pp[m])[None, :]

        z = Matrix(features_ptrs[m], features_strides_b[m], features_strides_d[m])
        p = Matrix(prototypes_ptrs[m], prototypes_strides_k[m], prototypes_strides_d[m])
        for start in range(0, widths[m], BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < widths[m]
            p_tile = load_tile(p, offs_k, mask_k, offs_d, mask_d).to(ACC)  # [K, D]
            pulled = multiply(grad, p_tile, tl.zeros((BLOCK_B, BLOCK_D), ACC), SLOPE_PRECISION, ACC)
            z_tile = pulled
            if COSINE:
                z_tile = load_tile(z, offs_b, counted[m], offs_d, mask_d).to(ACC)  # [B, D]
            grad_z = _feature_gradient(pulled, z_tile, along, zz[m], inverse_temperature, COSINE)
            store_tile(grad_features_ptrs[m], widths[m], offs_b, mask_b, offs_d, mask_d, grad_z)


@triton.jit
def alignment_backward_tiled(
    features_ptrs,
    features_strides_b,
    features_strides_d,
    prototypes_ptrs,
    prototypes_strides_k,
    prototypes_strides_d,
    widths,
    targets_ptr,
    targets_stride,
    ignore_index,
    budgets_ptr,
    budgets_stride,
    temperature,
    seen_ptrs,
    mask_ptr,
    mask_stride_b,
    mask_stride_m,
    confidence_ptr,
    statistics_ptr,
    grad_contrastive_ptr,
    grad_contrastive_stride_b,
    grad_contrastive_stride_m,
    grad_alignment_ptr,
    grad_alignment_stride_b,
    grad_alignment_stride_m,
    grad_features_ptrs,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOPE_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of BLOCK_B rows of one modality in CHUNK components, over blocks of classes.

    The scores of the modality and of the anchor are computed again, block by block; their lse and
    the share come from the statistics that forward kept.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    m = tl.program_id(1)
    offs_d = (tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    inverse_temperature = 1.0 / load_scalar(temperature, NUMBER_POINTER, ACC)
    modality_mask = Matrix(mask_ptr, mask_stride_b, mask_stride_m)
    grad_contrastive = Matrix(
        grad_contrastive_ptr, grad_contrastive_stride_b, grad_contrastive_stride_m
    )
    grad_alignment = Matrix(grad_alignment_ptr, grad_alignment_stride_b, grad_alignment_stride_m)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    budgets = read_budgets(budgets_ptr, budgets_stride, M, ACC)
    anchor = budgets.anchor
    targets, valid = valid_targets(
        targets_ptr, targets_stride, ignore_index, offs_b, mask_b, classes
    )

    width = select(widths, m, M)
    mask_d = offs_d < width
    z = Matrix(
        select(features_ptrs, m, M),
        select(features_strides_b, m, M),
        select(features_strides_d, m, M),
    )
    p = Matrix(
        select(prototypes_ptrs, m, M),
        select(prototypes_strides_k, m, M),
        select(prototypes_strides_d, m, M),
    )
    anchor_width = select(widths, anchor, M)
    anchor_z = Matrix(
        select(features_ptrs, anchor, M),
        select(features_strides_b, anchor, M),
        select(features_strides_d, anchor, M),
    )
    anchor_p = Matrix(
        select(prototypes_ptrs, anchor, M),
        select(prototypes_strides_k, anchor, M),
        select(prototypes_strides_d, anchor, M),
    )
    seen_ptr = None
    anchor_seen_ptr = None
    if SEEN:
        seen_ptr = select(seen_ptrs, m, M)
        anchor_seen_ptr = select(seen_ptrs, anchor, M)

    present, counted = count_rows(targets, valid, modality_mask, seen_ptr, offs_b, mask_b, m)
    anchor_present, anchor_counted = count_rows(
        targets, valid, modality_mask, anchor_seen_ptr, offs_b, mask_b, anchor
    )
    q = tl.load(confidence_ptr + offs_b * M + m, mask=mask_b, other=0.0)
    anchor_q = tl.load(confidence_ptr + offs_b * M + anchor, mask=mask_b, other=0.0)
    c, g = _upstream(
        grad_contrastive,
        grad_alignment,
        counted,
        anchor_counted,
        q,
        anchor_q,
        budgets,
        offs_b,
        m,
        ACC,
    )
    row_ptrs = statistics_ptr + offs_b * (2 * M)
    lse = tl.load(row_ptrs + m, mask=mask_b, other=0.0)
    anchor_lse = tl.load(row_ptrs + anchor, mask=mask_b, other=0.0)
    share = tl.load(row_ptrs + M + m, mask=mask_b, other=0.0)

    pulled = tl.zeros((BLOCK_B, CHUNK), ACC)
    along = tl.zeros((BLOCK_B,), ACC)
    zz = tl.zeros((BLOCK_B,), ACC)
    for start in range(0, classes, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        is_target = offs_k[None, :] == targets[:, None]  # [B, K]
        mask_k = seen_classes(seen_ptr, offs_k, offs_k < classes)
        scores, zz, pp = score_tile(
            z, offs_b, present, p, offs_k, mask_k, width, inverse_temperature, COSINE, HOW
        )
        anchor_scores = scores
        if m != anchor:
            anchor_scores, anchor_zz, anchor_pp = score_tile(
                anchor_z,
                offs_b,
                anchor_present,
                anchor_p,
                offs_k,
                seen_classes(anchor_seen_ptr, offs_k, offs_k < classes),
                anchor_width,
                inverse_temperature,
                COSINE,
                HOW,
            )
        grad = _score_gradient(scores, lse, anchor_scores, anchor_lse, share, c, g, is_target)
        if COSINE:
            twice_cosine = _twice_cosine(scores, mask_k, zz, pp, inverse_temperature)
            along += tl.sum(grad * 0.5 * twice_cosine, 1)
            grad = grad * inverse_length(pp)[None, :]
        p_tile = load_tile(p, offs_k, mask_k, offs_d, mask_d).to(ACC)  # [K, CHUNK]
        pulled = multiply(grad, p_tile, pulled, SLOPE_PRECISION, ACC)

    z_tile = pulled
    if COSINE:
        z_tile = load_tile(z, offs_b, counted, offs_d, mask_d).to(ACC)  # [B, CHUNK]
    grad_z = _feature_gradient(pulled, z_tile, along, zz, inverse_temperature, COSINE)
    grad_features_ptr = select(grad_features_ptrs, m, M)
    store_tile(grad_features_ptr, width, offs_b, mask_b, offs_d, mask_d, grad_z)

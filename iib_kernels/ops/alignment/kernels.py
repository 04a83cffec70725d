"""Prototype contrast and relative alignment of all modalities (method page, section 3).

The score of class k for row i in modality m is s_m(i, k) = -d2_m(i, k) / tau, and q_m is its
softmax over the classes that the modality has seen. With the anchor a, the modality of the largest
budget, and the relative budgets rho_m = b_m / b_a:

    contrast     C_m = -log q_m(y)
    alignment    A_m = max(0, rho_m q_a(y) - q_m(y)) sum_k q_a(k) (log q_a(k) - log q_m(k))

The sum in A_m, the divergence, runs over the classes that both have seen; A_a is 0. The first
factor of A_m, the deviation, is a constant for the gradient.

Tiles [BLOCK_B, BLOCK_K] of the scores of all modalities live in registers: nothing of size [B, K]
is stored.

This file holds the forward kernel and what backward shares with it; kernels_backward.py holds
backward.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.tiles import (
    FLOOR,
    Matrix,
    Product,
    inner_products,
    load_scalar,
    seen_classes,
    select,
    squared_distance,
    valid_targets,
)


class Budgets(NamedTuple):
    """The modalities' budgets, and which modality leads."""

    ptr: tl.tensor
    stride: tl.tensor
    anchor: tl.tensor  # the modality of the largest budget, the first of equals
    largest: tl.tensor  # its budget


@triton.jit
def read_budgets(ptr, stride, M: tl.constexpr, ACC: tl.constexpr):
    """Find the anchor."""
    anchor = tl.full((), 0, tl.int32)
    largest = tl.load(ptr).to(ACC)
    for m in tl.static_range(1, M):
        budget = tl.load(ptr + m * stride).to(ACC)
        anchor = tl.where(budget > largest, m, anchor)
        largest = tl.where(budget > largest, budget, largest)
    return Budgets(ptr, stride, anchor, largest)


@triton.jit
def shortfall(q, anchor_q, budgets, m, ACC: tl.constexpr):
    """The deviation max(0, rho_m q_a(y) - q_m(y)), [B]. Where no budget is above 0, rho_m is 1."""
    positive = budgets.largest > 0
    budget = tl.load(budgets.ptr + m * budgets.stride).to(ACC)
    rho = tl.where(positive, budget / tl.where(positive, budgets.largest, 1.0), 1.0)
    deviation = rho * anchor_q - q
    # Not tl.maximum, which on a GPU drops NaN
    return tl.where(deviation < 0.0, 0.0, deviation)


@triton.jit
def is_aligned(counted, anchor_counted, anchor, m, offs_b):
    """The rows [B] in which modality m is compared with the anchor."""
    # As a block: some interpreters lose the type of a block of bools combined with a single one
    return counted & anchor_counted & (offs_b * 0 + anchor != m)


@triton.jit
def count_rows(targets, valid, modality_mask, seen_ptr, offs_b, mask_b, m):
    """The rows [B] with a valid target in which modality m is present, and which of them count.

    Those count whose class the modality has seen.
    """
    present = valid
    if modality_mask.ptr is not None:
        ptrs = modality_mask.ptr + offs_b * modality_mask.stride_row + m * modality_mask.stride_col
        present = valid & (tl.load(ptrs, mask=mask_b, other=0) != 0)
    counted = present
    if seen_ptr is not None:
        counted = present & (tl.load(seen_ptr + targets, mask=present, other=0) != 0)
    return present, counted


@triton.jit
def score_tile(
    z,
    offs_b,
    mask_b,
    p,
    offs_k,
    mask_k,
    width,
    inverse_temperature,
    COSINE: tl.constexpr,
    HOW: tl.constexpr,
):
    """-d2 / tau [B, K], -inf where `mask_k` is False; |z|^2 [B] and |p|^2 [K]. HOW: a Product."""
    dots, zz, pp = inner_products(z, offs_b, mask_b, p, offs_k, mask_k, width, HOW)
    scores = -squared_distance(dots, zz, pp, COSINE) * inverse_temperature
    return tl.where(mask_k[None, :], scores, float("-inf")), zz, pp


@triton.jit
def alignment_forward(
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
    contrastive_out_ptr,
    alignment_out_ptr,
    confidence_out_ptr,
    counts_out_ptr,
    statistics_out_ptr,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """C, A, q(y) and which rows count, each [B, M]: BLOCK_B rows a program.

    One sweep over the classes keeps running maxima and sums, from which all four follow.

    `statistics_out_ptr` [B, 2 M], if given, keeps for backward each modality's lse (the log of the
    sum of the exp of its scores) and the share of q_a on classes that the modality has seen.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    inverse_temperature = 1.0 / load_scalar(temperature, NUMBER_POINTER, ACC)
    modality_mask = Matrix(mask_ptr, mask_stride_b, mask_stride_m)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    budgets = read_budgets(budgets_ptr, budgets_stride, M, ACC)
    anchor = budgets.anchor
    targets, valid = valid_targets(
        targets_ptr, targets_stride, ignore_index, offs_b, mask_b, classes
    )

    present = ()
    counted = ()
    maxima = ()  # of the scores so far
    sums = ()  # of exp(score - maximum)
    target_scores = ()
    shares = ()  # sum of exp(s_a - max_a) over the classes that both m and the anchor have seen
    moments = ()  # the same, times s_a - s_m
    for m in tl.static_range(M):
        seen_ptr = seen_ptrs[m] if SEEN else None
        present_m, counted_m = count_rows(
            targets, valid, modality_mask, seen_ptr, offs_b, mask_b, m
        )
        present = present + (present_m,)
        counted = counted + (counted_m,)
        maxima = maxima + (tl.full((BLOCK_B,), FLOOR, ACC),)
        sums = sums + (tl.zeros((BLOCK_B,), ACC),)
        target_scores = target_scores + (tl.zeros((BLOCK_B,), ACC),)
        shares = shares + (tl.zeros((BLOCK_B,), ACC),)
        moments = moments + (tl.zeros((BLOCK_B,), ACC),)

    for start in range(0, classes, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        is_target = offs_k[None, :] == targets[:, None]  # [B, K]
        scores = ()
        for m in tl.static_range(M):
            mask_k = seen_classes(seen_ptrs[m] if SEEN else None, offs_k, offs_k < classes)
            z = Matrix(features_ptrs[m], features_strides_b[m], features_strides_d[m])
            p = Matrix(prototypes_ptrs[m], prototypes_strides_k[m], prototypes_strides_d[m])
            scores_m, zz, pp = score_tile(
                z,
                offs_b,
                present[m],
                p,
                offs_k,
                mask_k,
                widths[m],
                inverse_temperature,
                COSINE,
                HOW,
            )
            scores = scores + (scores_m,)

        anchor_scores = select(scores, anchor, M)
        old_maximum = select(maxima, anchor, M)
        new_maximum = tl.maximum(old_maximum, tl.max(anchor_scores, 1))
        anchor_exp = tl.exp(anchor_scores - new_maximum[:, None])
        rescale = tl.exp(old_maximum - new_maximum)

        # A tuple has no item assignment: each running value is gathered anew
        new_maxima = ()
        new_sums = ()
        new_target_scores = ()
        new_shares = ()
        new_moments = ()
        for m in tl.static_range(M):
            maximum = tl.maximum(maxima[m], tl.max(scores[m], 1))
            block_sum = tl.sum(tl.exp(scores[m] - maximum[:, None]), 1)
            target_score = tl.sum(tl.where(is_target, scores[m], 0.0), 1)
            both = (scores[m] > float("-inf")) & (anchor_scores > float("-inf"))
            difference = tl.where(both, anchor_scores - scores[m], 0.0)
            mass = tl.where(both, anchor_exp, 0.0)
            new_maxima = new_maxima + (maximum,)
            new_sums = new_sums + (sums[m] * tl.exp(maxima[m] - maximum) + block_sum,)
            new_target_scores = new_target_scores + (target_scores[m] + target_score,)
            new_shares = new_shares + (shares[m] * rescale + tl.sum(mass, 1),)
            new_moments = new_moments + (moments[m] * rescale + tl.sum(mass * difference, 1),)
        maxima = new_maxima
        sums = new_sums
        target_scores = new_target_scores
        shares = new_shares
        moments = new_moments

    lse = ()
    confidences = ()  # q_m(y)
    for m in tl.static_range(M):
        lse = lse + (tl.log(sums[m]) + maxima[m],)
        q = tl.where(counted[m], tl.exp(target_scores[m] - lse[m]), 0.0)
        confidences = confidences + (q,)
    anchor_sum = select(sums, anchor, M)
    anchor_lse = select(lse, anchor, M)
    anchor_q = select(confidences, anchor, M)
    anchor_counted = select(counted, anchor, M)

    for m in tl.static_range(M):
        share = shares[m] / anchor_sum
        divergence = moments[m] / anchor_sum + share * (lse[m] - anchor_lse)
        deviation = shortfall(confidences[m], anchor_q, budgets, m, ACC)
        aligned = is_aligned(counted[m], anchor_counted, anchor, m, offs_b)
        contrastive = tl.where(counted[m], lse[m] - target_scores[m], 0.0)
        alignment = tl.where(aligned, deviation * divergence, 0.0)
        offsets = offs_b * M + m
        tl.store(contrastive_out_ptr + offsets, contrastive, mask=mask_b)
        tl.store(alignment_out_ptr + offsets, alignment, mask=mask_b)
        tl.store(confidence_out_ptr + offsets, confidences[m], mask=mask_b)
        tl.store(counts_out_ptr + offsets, counted[m], mask=mask_b)
        if statistics_out_ptr is not None:
            tl.store(statistics_out_ptr + offs_b * (2 * M) + m, lse[m], mask=mask_b)
            tl.store(statistics_out_ptr + offs_b * (2 * M) + M + m, share, mask=mask_b)

"""Losses and gradients of many classes, from what attention or evidence stored.

The terms are those at the head of attention.py. With c the upstream gradient of C_m, and g that of
A_m times its deviation, the gradient by z at unit length is

    (2 / tau) (c D_m + g share (D_m - R_m))
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.alignment.kernels import (
    count_rows,
    is_aligned,
    load_upstream,
    read_budgets,
    shortfall,
    store_losses,
)
from iib_kernels.ops.tiles import (
    Matrix,
    inverse_length,
    load_scalar,
    load_tile,
    select,
    store_tile,
    valid_targets,
)


class Outcome(NamedTuple):
    """What forward keeps for gradients; contiguous."""

    confidence: tl.tensor  # q_m(y) [B, M]
    counts: tl.tensor  # [B, M]
    share: tl.tensor  # [B, M]
    pulls: tl.tensor  # D_m and R_m, [2, M, B, width]
    width: tl.tensor


@triton.jit
def _combined(own_ptr, m, offs_b, mask_b, batch, M: tl.constexpr, splits):
    """lse [B] of modality m, and the target's score [B], from all parts."""
    apart = M * batch.to(tl.int64)
    ptrs = own_ptr + m * batch.to(tl.int64) + offs_b
    maximum = tl.load(ptrs, mask=mask_b, other=0.0)
    for split in range(1, splits):
        other = tl.load(ptrs + split * 3 * apart, mask=mask_b, other=0.0)
        maximum = tl.where(other > maximum, other, maximum)
    total = maximum * 0.0
    target_score = maximum * 0.0
    for split in range(splits):
        part = ptrs + split * 3 * apart
        rescale = tl.exp(tl.load(part, mask=mask_b, other=0.0) - maximum)
        total += rescale * tl.load(part + apart, mask=mask_b, other=0.0)
        target_score += tl.load(part + 2 * apart, mask=mask_b, other=0.0)
    return tl.log(total) + maximum, target_score


@triton.jit(do_not_specialize=["batch", "splits"])
def losses(
    rows,
    own_ptr,
    across_ptr,
    outputs,
    means,
    share_ptr,
    batch,
    splits,
    M: tl.constexpr,
    ACC: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """C, A, q(y), which rows count, and the share, each [B, M]; the means of the first three [M].

    The share is that of q_a on classes that m has seen; 0 in rows that are not aligned.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    budgets = read_budgets(rows.budgets, 1, M, ACC)
    targets, valid = valid_targets(rows.targets, 1, rows.ignore_index, offs_b, mask_b, rows.classes)
    mask = Matrix(rows.mask, M, 1)
    counted = ()
    lse = ()
    target_scores = ()
    confidences = ()  # q_m(y)
    for m in tl.static_range(M):
        seen_ptr = None if rows.seen is None else rows.seen[m]
        _, counted_m = count_rows(targets, valid, mask, seen_ptr, offs_b, mask_b, m)
        lse_m, target_score = _combined(own_ptr, m, offs_b, mask_b, batch, M, splits)
        counted = counted + (counted_m,)
        lse = lse + (lse_m,)
        target_scores = target_scores + (target_score,)
        confidences = confidences + (tl.where(counted_m, tl.exp(target_score - lse_m), 0.0),)
    anchor_lse = select(lse, budgets.anchor, M)
    anchor_q = select(confidences, budgets.anchor, M)
    anchor_counted = select(counted, budgets.anchor, M)

    apart = M * batch.to(tl.int64)
    contrastive = ()
    alignment = ()
    for m in tl.static_range(M):
        aligned = is_aligned(counted[m], anchor_counted, budgets.anchor, m, offs_b)
        share = tl.zeros((BLOCK_B,), ACC)
        moment = tl.zeros((BLOCK_B,), ACC)
        for split in range(splits):
            ptrs = across_ptr + (split * (2 + CHUNKS) * M + m) * batch.to(tl.int64) + offs_b
            maximum = tl.load(ptrs, mask=aligned, other=0.0)
            weight = tl.exp(maximum - anchor_lse) * tl.load(ptrs + apart, mask=aligned, other=0.0)
            share += weight
            for chunk in tl.static_range(CHUNKS):
                mean = tl.load(ptrs + (2 + chunk) * apart, mask=aligned, other=0.0)
                moment += weight * mean
        divergence = moment + share * (lse[m] - anchor_lse)
        deviation = shortfall(confidences[m], anchor_q, budgets, m, ACC)
        contrastive = contrastive + (tl.where(counted[m], lse[m] - target_scores[m], 0.0),)
        alignment = alignment + (tl.where(aligned, deviation * divergence, 0.0),)
        share = tl.where(aligned, share, 0.0)
        tl.store(share_ptr + offs_b * M + m, share, mask=mask_b)
    store_losses(outputs, means, contrastive, alignment, confidences, counted, offs_b, mask_b)


@triton.jit(do_not_specialize=["batch", "splits"])
def merge(
    parts_ptr,
    sums_ptr,
    pulls_ptr,
    batch,
    splits,
    width,
    M: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's means over all classes [M, B, width], from those over splits parts of them.

    In the order of the parts, by their sums of weights in `sums_ptr` [splits, ROW, M, B].
    """
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    offs_d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    rows = M * batch.to(tl.int64)
    place = m * batch.to(tl.int64) + b
    maximum = tl.load(sums_ptr + place)
    for split in range(1, splits):
        other = tl.load(sums_ptr + split * ROW * rows + place)
        maximum = tl.where(other > maximum, other, maximum)
    total = maximum * 0.0
    pulled = tl.zeros((BLOCK_D,), sums_ptr.dtype.element_ty)
    for split in range(splits):
        ptr = sums_ptr + split * ROW * rows + place
        weight = tl.exp(tl.load(ptr) - maximum) * tl.load(ptr + rows)
        total += weight
        mean = tl.load(
            parts_ptr + (split * rows + place) * width + offs_d, mask=mask_d, other=0.0
        ).to(pulled.dtype)
        pulled += tl.where(weight == 0.0, 0.0, weight * mean)
    pulled = pulled / tl.where(total == 0.0, 1.0, total)
    pulled = pulled.to(pulls_ptr.dtype.element_ty)
    tl.store(pulls_ptr + place * width + offs_d, pulled, mask=mask_d)


@triton.jit(do_not_specialize=["batch"])
def gradients(
    features,
    widths,
    rows,
    outcome,
    upstream,
    gradient_ptrs,
    batch,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of BLOCK_B rows of all modalities, by the formula at the head of this file.

    The cosine loses the part along z, and is scaled by 1 / |z|.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    budgets = read_budgets(rows.budgets, 1, M, ACC)
    inverse_temperature = 1.0 / load_scalar(rows.temperature, ACC == tl.float64, ACC)
    anchor_place = offs_b * M + budgets.anchor
    anchor_counted = tl.load(outcome.counts + anchor_place, mask=mask_b, other=0) != 0
    anchor_q = tl.load(outcome.confidence + anchor_place, mask=mask_b, other=0.0)
    for m in tl.static_range(M):
        place = offs_b * M + m
        counted = tl.load(outcome.counts + place, mask=mask_b, other=0) != 0
        aligned = is_aligned(counted, anchor_counted, budgets.anchor, m, offs_b)
        q = tl.load(outcome.confidence + place, mask=mask_b, other=0.0)
        share = tl.load(outcome.share + place, mask=mask_b, other=0.0)
        c, g = load_upstream(upstream, counted, aligned, offs_b, m, ACC)
        g = g * tl.where(aligned, shortfall(q, anchor_q, budgets, m, ACC), 0.0)

        mask_d = offs_d < widths[m]
        idle = (c == 0.0) & (g == 0.0)  # whose gradient is 0, whatever stands there
        own_ptr = outcome.pulls + (m * batch.to(tl.int64)) * outcome.width
        own = Matrix(own_ptr, outcome.width, 1)
        across = Matrix(own_ptr + M * batch.to(tl.int64) * outcome.width, outcome.width, 1)
        d = load_tile(own, offs_b, counted & (idle == 0), offs_d, mask_d).to(ACC)
        r = load_tile(across, offs_b, aligned & (g != 0.0), offs_d, mask_d).to(ACC)
        grad = c[:, None] * d + (g * share)[:, None] * tl.where((g != 0.0)[:, None], d - r, 0.0)
        grad = 2.0 * inverse_temperature * tl.where(idle[:, None], 0.0, grad)
        if COSINE:
            z = load_tile(features[m], offs_b, counted, offs_d, mask_d).to(ACC)
            inverse = inverse_length(tl.sum(z * z, 1))[:, None]
            z = z * inverse
            grad = inverse * (grad - z * tl.sum(grad * z, 1)[:, None])
        store_tile(gradient_ptrs[m], widths[m], offs_b, mask_b, offs_d, mask_d, grad)

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

This file holds the steps, and the forward kernel for as many classes as one tile holds;
kernels_backward.py holds its backward, and attention.py, streamed.py and outcome.py what more
classes take.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.means import store_means
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


class Rows(NamedTuple):
    """What says which rows count, and by how much; contiguous."""

    targets: tl.tensor  # [B]
    ignore_index: tl.tensor
    mask: tl.tensor  # [B, M], or None
    seen: tl.tensor  # M of [K], or None
    budgets: tl.tensor  # [M]
    temperature: tl.tensor  # a number, or a pointer to a float64
    classes: tl.tensor  # K


class Upstream(NamedTuple):
    """Upstream gradients [B, M], each a Matrix; a pointer is None where there is none.

    Those of means have a row's stride of 0, and come before their division.
    """

    contrastive: tl.tensor
    alignment: tl.tensor
    divisors: Matrix  # [M]


class Losses(NamedTuple):
    """What forward stores, [B, M] each and contiguous; None where it is not asked for."""

    contrastive: tl.tensor
    alignment: tl.tensor
    confidence: tl.tensor  # q_m(y)
    counts: tl.tensor  # which rows count


class Evidence(NamedTuple):
    """Of all modalities, where one tile holds all classes: tuples of M."""

    scores: tl.tensor  # [B, K]
    zz: tl.tensor  # |z|^2 [B]
    pp: tl.tensor  # |p|^2 [K]
    counted: tl.tensor  # [B]
    lse: tl.tensor  # [B]
    target_scores: tl.tensor  # [B]
    confidences: tl.tensor  # q_m(y) [B]


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
def load_upstream(upstream, counted, aligned, offs_b, m, ACC: tl.constexpr):
    """Upstream gradients [B] of C_m and A_m; 0 where not given, or the row does not count."""
    c = tl.zeros((offs_b.shape[0],), ACC)
    g = tl.zeros((offs_b.shape[0],), ACC)
    if upstream.contrastive.ptr is not None:
        values = upstream.contrastive
        ptrs = values.ptr + offs_b * values.stride_row + m * values.stride_col
        c = tl.load(ptrs, mask=counted, other=0.0).to(ACC)
    if upstream.alignment.ptr is not None:
        values = upstream.alignment
        ptrs = values.ptr + offs_b * values.stride_row + m * values.stride_col
        g = tl.load(ptrs, mask=aligned, other=0.0).to(ACC)
    if upstream.divisors.ptr is not None:
        divisor = tl.load(upstream.divisors.ptr + m)
        c = c / divisor
        g = g / divisor
    return c, g


@triton.jit
def _store_column(ptr, column, offs_b, mask_b, m, M):
    if ptr is not None:
        tl.store(ptr + offs_b * M + m, column, mask=mask_b)


@triton.jit
def store_losses(outputs, means, contrastive, alignment, confidence, counted, offs_b, mask_b):
    """Each of M of [B], as columns; and with `means`, a Reduction, the means of the first three."""
    M: tl.constexpr = len(contrastive)
    rows = ()
    for m in tl.static_range(M):
        _store_column(outputs.contrastive, contrastive[m], offs_b, mask_b, m, M)
        _store_column(outputs.alignment, alignment[m], offs_b, mask_b, m, M)
        _store_column(outputs.confidence, confidence[m], offs_b, mask_b, m, M)
        _store_column(outputs.counts, counted[m], offs_b, mask_b, m, M)
        rows = rows + (tl.where(counted[m], 1.0, 0.0).to(contrastive[m].dtype),)
    if outputs.contrastive is None:
        store_means(means, contrastive + alignment + confidence, rows, M, 4096)


@triton.jit
def all_evidence(
    features,
    prototypes,
    widths,
    rows,
    offs_b,
    mask_b,
    offs_k,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    HOW: tl.constexpr,
):
    """The Evidence of a block of rows, where `offs_k` are all classes. HOW: a Product."""
    ACC: tl.constexpr = HOW.ACC
    inverse_temperature = 1.0 / load_scalar(rows.temperature, ACC == tl.float64, ACC)
    targets, valid = valid_targets(rows.targets, 1, rows.ignore_index, offs_b, mask_b, rows.classes)
    is_target = offs_k[None, :] == targets[:, None]  # [B, K]
    modality_mask = Matrix(rows.mask, M, 1)
    scores = ()
    zz = ()
    pp = ()
    counted = ()
    lse = ()
    target_scores = ()
    confidences = ()
    for m in tl.static_range(M):
        seen_ptr = None if rows.seen is None else rows.seen[m]
        present, counted_m = count_rows(targets, valid, modality_mask, seen_ptr, offs_b, mask_b, m)
        mask_k = seen_classes(seen_ptr, offs_k, offs_k < rows.classes)
        scores_m, zz_m, pp_m = score_tile(
            features[m],
            offs_b,
            present,
            prototypes[m],
            offs_k,
            mask_k,
            widths[m],
            inverse_temperature,
            COSINE,
            HOW,
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
        target_scores = target_scores + (target_score,)
        confidences = confidences + (tl.where(counted_m, tl.exp(target_score - lse_m), 0.0),)
    return Evidence(scores, zz, pp, counted, lse, target_scores, confidences)


@triton.jit(do_not_specialize=["batch"])
def alignment_forward(
    features,
    prototypes,
    widths,
    rows,
    outputs,
    means,
    batch,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The losses of BLOCK_B rows of all modalities, where one tile holds all classes."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    budgets = read_budgets(rows.budgets, 1, M, ACC)
    found = all_evidence(features, prototypes, widths, rows, offs_b, mask_b, offs_k, M, COSINE, HOW)
    anchor_log_q = select(found.scores, budgets.anchor, M)
    anchor_log_q -= select(found.lse, budgets.anchor, M)[:, None]
    anchor_q = select(found.confidences, budgets.anchor, M)
    anchor_counted = select(found.counted, budgets.anchor, M)
    contrastive = ()
    alignment = ()
    for m in tl.static_range(M):
        counted = found.counted[m]
        log_q = found.scores[m] - found.lse[m][:, None]
        neither = (log_q == float("-inf")) | (anchor_log_q == float("-inf"))
        difference = tl.where(neither, 0.0, anchor_log_q - log_q)
        divergence = tl.sum(tl.where(neither, 0.0, tl.exp(anchor_log_q)) * difference, 1)
        deviation = shortfall(found.confidences[m], anchor_q, budgets, m, ACC)
        aligned = is_aligned(counted, anchor_counted, budgets.anchor, m, offs_b)
        contrast = tl.where(counted, found.lse[m] - found.target_scores[m], 0.0)
        contrastive = contrastive + (contrast,)
        alignment = alignment + (tl.where(aligned, deviation * divergence, 0.0),)
    store_losses(
        outputs, means, contrastive, alignment, found.confidences, found.counted, offs_b, mask_b
    )

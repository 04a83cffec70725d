"""Attention and evidence over many classes, reading rows and prototypes piece by piece.

For widths, types and devices whose rows do not fit shared memory beside a block of prototypes, and
for the losses alone. The terms are those at the head of attention.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.alignment.attention import (
    along,
    finish,
    part,
    read_labels,
    row_scale,
    row_squares,
    rows_of,
    select_matrix,
    start_running,
    store_sums,
    store_zeros,
    weigh,
    weighted_score,
)
from iib_kernels.ops.alignment.kernels import read_budgets
from iib_kernels.ops.alignment.tables import load_block, load_scales
from iib_kernels.ops.tiles import FLOOR, Product, load_scalar, load_tile, multiply, select


@triton.jit
def dots_with(
    z, offs_b, present, width, tables, m, start_k, BLOCK_K: tl.constexpr, HOW: tl.constexpr
):
    """Inner products [B, K] of rows and modality m's classes from `start_k`. HOW: a Product."""
    OPERAND: tl.constexpr = HOW.ACC if HOW.UPCAST else tables.ptr.dtype.element_ty
    dots = tl.zeros((offs_b.shape[0], BLOCK_K), HOW.ACC)
    for start in range(0, width, HOW.BLOCK_D):
        offs_d = (start + tl.arange(0, HOW.BLOCK_D)).to(tl.int64)
        tile = load_tile(z, offs_b, present, offs_d, offs_d < width).to(OPERAND)  # [B, D]
        key = load_block(tables, m, start_k, start, BLOCK_K, HOW.BLOCK_D).to(OPERAND)  # [K, D]
        dots = multiply(tile, tl.trans(key), dots, HOW.PRECISION, HOW.ACC)
    return dots


@triton.jit
def store_idle(sum_ptrs, chunk_ptrs, mask_b, batch, first_part, M: tl.constexpr, ACC: tl.constexpr):
    """Zeros where nothing is found across; the row's sums too in the first of its parts."""
    zero = start_running(sum_ptrs.shape[0], ACC).extra
    tl.store(chunk_ptrs, zero, mask=mask_b)
    if first_part:
        tl.store(sum_ptrs, zero, mask=mask_b)
        tl.store(sum_ptrs + M * batch.to(tl.int64), zero, mask=mask_b)


@triton.jit(do_not_specialize=["batch", "splits"])
def attend_streamed(
    given,
    pulls_ptr,
    sums_ptr,
    batch,
    splits,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACROSS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
):
    """D_m, or with ACROSS R_m, as `attend_resident` gives it, in HELD times CHUNK components.

    Each of the CHUNKS programs of a row computes all its scores. With ACROSS each stores its part
    of the weighted mean of s_a - s_m: `sums_ptr` is [splits, 2 + CHUNKS, M, B].
    """
    rows = given.rows
    tables = given.tables
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    value = tl.program_id(1)
    split = tl.program_id(2) // CHUNKS
    chunk = tl.program_id(2) % CHUNKS
    query = value
    if ACROSS:
        query = read_budgets(rows.budgets, 1, M, ACC).anchor
    ROW: tl.constexpr = 2 + CHUNKS if ACROSS else 3
    sum_ptrs = sums_ptr + (split * ROW * M + value).to(tl.int64) * batch + offs_b
    chunk_ptrs = sum_ptrs + (2 + chunk) * M * batch.to(tl.int64)
    value_width = select(given.widths, value, M)
    # Nothing is found across for the anchor, nor where a narrower modality has no components
    first_d = chunk * CHUNK * HELD
    idle = (chunk > 0) & (first_d >= value_width)
    if ACROSS:
        idle = idle | (query == value)
    if idle:
        pull_ptrs = rows_of(pulls_ptr, split * M + value, offs_b, batch, tables.width)
        for held in tl.static_range(HELD):
            store_zeros(pull_ptrs, mask_b, first_d + held * CHUNK, CHUNK)
        if ACROSS:
            first_part = (chunk == 0) & (query == value)
            store_idle(sum_ptrs, chunk_ptrs, mask_b, batch, first_part, M, ACC)
        return
    inverse_temperature = 1.0 / load_scalar(rows.temperature, ACC == tl.float64, ACC)
    labels = read_labels(rows, offs_b, mask_b, query, value, M)

    OPERAND: tl.constexpr = ACC if UPCAST else tables.ptr.dtype.element_ty
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    z = select_matrix(given.features, query, M)
    width = select(given.widths, query, M)
    squares = row_squares(z, offs_b, labels.query, width, BLOCK_D, ACC)
    scale = row_scale(squares, inverse_temperature, COSINE)

    running = start_running(BLOCK_B, ACC)
    pulled = (tl.zeros((BLOCK_B, CHUNK), ACC),) * HELD
    first, last = part(tables.classes, split, splits, BLOCK_K)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        dots = dots_with(z, offs_b, labels.query, width, tables, query, start, BLOCK_K, HOW)
        weights, rescale, running = weigh(
            dots, scale, tables, query, value, offs_k, labels.classes, running, ACROSS, UPCAST
        )
        weights = weights.to(OPERAND)
        more = ()
        for held in tl.static_range(HELD):
            values = load_block(tables, value, start, first_d + held * CHUNK, BLOCK_K, CHUNK)
            rescaled = pulled[held] * rescale[:, None]
            more = more + (multiply(weights, values.to(OPERAND), rescaled, PRECISION, ACC),)
        pulled = more

    place = split * M + value + tl.minimum(batch - 1, 0)  # found anew, as in `attend_resident`
    pull_ptrs = rows_of(pulls_ptr, place, offs_b, batch, tables.width)
    other = select_matrix(given.features, value, M)
    if ACROSS:
        squares = row_squares(other, offs_b, labels.value, value_width, BLOCK_D, ACC)
        scale = row_scale(squares, inverse_temperature, COSINE)
    moment = tl.zeros((BLOCK_B,), ACC)
    for held in tl.static_range(HELD):
        offs_d = (first_d + held * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
        mean = finish(pulled[held], running, labels, tables, value, pull_ptrs, mask_b, offs_d)
        if ACROSS:
            moment -= along(mean, other, offs_b, labels.value, offs_d, value_width, scale)
    if ACROSS:
        if chunk == 0:
            store_sums(sum_ptrs, running, moment + weighted_score(running), mask_b, batch, M)
        else:
            tl.store(chunk_ptrs, moment, mask=mask_b)
    elif chunk == 0:
        store_sums(sum_ptrs, running, running.extra, mask_b, batch, M)


class EvidenceSums(NamedTuple):
    """Running sums over the classes, without means: M of [B] each."""

    maxima: tl.tuple  # of the scores so far
    totals: tl.tuple  # of exp(score - maximum)
    target_scores: tl.tuple
    shares: tl.tuple  # exp(s_a - max_a), over the classes that both m and the anchor have seen
    moments: tl.tuple  # the same, times s_a - s_m


@triton.jit
def add_scores(running, scores, anchor, is_target, M: tl.constexpr):
    """The EvidenceSums with one more block of all modalities' scores, M of [B, K]."""
    anchor_scores = select(scores, anchor, M)
    old_maximum = select(running.maxima, anchor, M)
    anchor_maximum = tl.maximum(old_maximum, tl.max(anchor_scores, 1))
    anchor_weights = tl.exp(anchor_scores - anchor_maximum[:, None])
    rescale = tl.exp(old_maximum - anchor_maximum)
    # A tuple has no item assignment: each running value is gathered anew
    maxima = ()
    totals = ()
    target_scores = ()
    shares = ()
    moments = ()
    for m in tl.static_range(M):
        maximum = tl.maximum(running.maxima[m], tl.max(scores[m], 1))
        total = tl.sum(tl.exp(scores[m] - maximum[:, None]), 1)
        target_score = tl.sum(tl.where(is_target, scores[m], 0.0), 1)
        unseen = scores[m] == float("-inf")
        weights = tl.where(unseen, 0.0, anchor_weights)
        difference = tl.where(
            unseen | (anchor_scores == float("-inf")), 0.0, anchor_scores - scores[m]
        )
        rescaled = running.totals[m] * tl.exp(running.maxima[m] - maximum)
        moment = running.moments[m] * rescale + tl.sum(weights * difference, 1)
        maxima = maxima + (maximum,)
        totals = totals + (rescaled + total,)
        target_scores = target_scores + (running.target_scores[m] + target_score,)
        shares = shares + (running.shares[m] * rescale + tl.sum(weights, 1),)
        moments = moments + (moment,)
    return EvidenceSums(maxima, totals, target_scores, shares, moments)


@triton.jit(do_not_specialize=["batch", "splits"])
def evidence(
    given,
    own_ptr,
    across_ptr,
    batch,
    splits,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums of BLOCK_B rows over one part of the classes, for the losses alone.

    What attention stores, without its means: `own_ptr` and `across_ptr`, both [splits, 3, M, B].
    """
    rows = given.rows
    tables = given.tables
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    split = tl.program_id(1)
    inverse_temperature = 1.0 / load_scalar(rows.temperature, ACC == tl.float64, ACC)
    HOW: tl.constexpr = Product(ACC, UPCAST, PRECISION, BLOCK_D)
    anchor = read_budgets(rows.budgets, 1, M, ACC).anchor
    labels = read_labels(rows, offs_b, mask_b, anchor, anchor, M)
    present = ()
    scales = ()
    for m in tl.static_range(M):
        index = tl.full((), m, tl.int32)
        present_m = read_labels(rows, offs_b, mask_b, index, index, M).query
        squares = row_squares(given.features[m], offs_b, present_m, given.widths[m], BLOCK_D, ACC)
        present = present + (present_m,)
        scales = scales + (row_scale(squares, inverse_temperature, COSINE),)

    zeros = (tl.zeros((BLOCK_B,), ACC),) * M
    running = EvidenceSums((tl.full((BLOCK_B,), FLOOR, ACC),) * M, zeros, zeros, zeros, zeros)
    first, last = part(tables.classes, split, splits, BLOCK_K)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        is_target = offs_k[None, :] == labels.classes[:, None]  # [B, K]
        scores = ()
        for m in tl.static_range(M):
            index = tl.full((), m, tl.int32)
            z, width = given.features[m], given.widths[m]
            dots = dots_with(z, offs_b, present[m], width, tables, index, start, BLOCK_K, HOW)
            keys = load_scales(tables, index, offs_k)
            scores = scores + (dots * scales[m][:, None] * keys.unit[None, :] - keys.bias[None, :],)
        running = add_scores(running, scores, anchor, is_target, M)

    apart = M * batch.to(tl.int64)
    anchor_maximum = select(running.maxima, anchor, M)
    for m in tl.static_range(M):
        place = (split * 3 * M + m).to(tl.int64) * batch + offs_b
        tl.store(own_ptr + place, running.maxima[m], mask=mask_b)
        tl.store(own_ptr + place + apart, running.totals[m], mask=mask_b)
        tl.store(own_ptr + place + 2 * apart, running.target_scores[m], mask=mask_b)
        share = running.shares[m]
        mean = running.moments[m] / tl.where(share == 0.0, 1.0, share)
        tl.store(across_ptr + place, anchor_maximum, mask=mask_b)
        tl.store(across_ptr + place + apart, share, mask=mask_b)
        tl.store(across_ptr + place + 2 * apart, mean, mask=mask_b)

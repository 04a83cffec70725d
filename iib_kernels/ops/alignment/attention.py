"""The losses and their gradients over many classes, as attention (method page, section 3).

Softmax does not see what all scores of a row have in common, so the score of class k is taken as

    s_m(k) = (2 z . p_k - |p_k|^2) / tau

with z and p_k at unit length for the cosine. By z, C_m has the gradient (2 / tau) D_m, and the
divergence in A_m (2 / tau) (share D_m - share R_m), with

    D_m = sum_k q_m(k) (p_k - p_y)             over the prototypes of m, weighed by its posterior
    R_m = sum_k q_a(k) (p_k - p_y) / share     over the same, weighed by the anchor's
    share = sum_k q_a(k)                       over the classes k that m has seen

Each is attention: keys and values are prototypes, queries are features of m or of the anchor. The
divergence itself follows from R_m, because scores are linear in p. So no two modalities' scores
stand side by side, and nothing of size [B, K] is stored.

Products are of weights in the features' type, whose rounding error is relative to each p_k - p_y:
sums of p_k alone would lose it where a row's posterior is nearly 1 on one class.

This file holds the steps, and the kernels of rows that stay in shared memory; streamed.py those
that read rows piece by piece; outcome.py makes losses and gradients of what they store.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.alignment.kernels import count_rows, read_budgets
from iib_kernels.ops.alignment.tables import Tables, load_block, load_scales, table_ptrs
from iib_kernels.ops.tiles import (
    FLOOR,
    Matrix,
    inverse_length,
    load_scalar,
    load_tile,
    multiply,
    select,
    valid_targets,
)


class Given(NamedTuple):
    """What a call is about."""

    features: tl.tensor  # M Matrices [B, D_m]
    widths: tl.tensor  # M of D_m
    rows: tl.tensor  # Rows
    tables: tl.tensor  # Tables


class Running(NamedTuple):
    """Sums over the classes so far, [B] each."""

    maximum: tl.tensor  # of the scores
    total: tl.tensor  # of the weights exp(score - maximum)
    rounded: tl.tensor  # of the weights as they are multiplied
    extra: (
        tl.tensor
    )  # the target's score; with ACROSS the rounded weights' sum of s_a + |p|^2 / tau


class Labels(NamedTuple):
    """Targets of a block of rows, [B] each."""

    classes: tl.tensor  # 0 where not valid
    query: tl.tensor  # rows in which the modality that weighs is present
    value: tl.tensor  # rows in which the one whose prototypes are weighed is present
    counted: tl.tensor  # and its class seen


@triton.jit
def select_matrix(matrices, m, M: tl.constexpr):
    """Matrix m, known only on the device, of a tuple."""
    ptr = matrices[0].ptr
    stride_row = matrices[0].stride_row
    stride_col = matrices[0].stride_col
    for i in tl.static_range(1, M):
        ptr = tl.where(m == i, matrices[i].ptr, ptr)
        stride_row = tl.where(m == i, matrices[i].stride_row, stride_row)
        stride_col = tl.where(m == i, matrices[i].stride_col, stride_col)
    return Matrix(ptr, stride_row, stride_col)


@triton.jit
def read_labels(rows, offs_b, mask_b, query, value, M: tl.constexpr):
    """Targets, and where they count for the two modalities."""
    targets, valid = valid_targets(rows.targets, 1, rows.ignore_index, offs_b, mask_b, rows.classes)
    seen_ptr = None
    if rows.seen is not None:
        seen_ptr = select(rows.seen, value, M)
    mask = Matrix(rows.mask, M, 1)
    present, counted = count_rows(targets, valid, mask, seen_ptr, offs_b, mask_b, value)
    weighing, _ = count_rows(targets, valid, mask, None, offs_b, mask_b, query)
    return Labels(targets.to(tl.int32), weighing, present, counted)


@triton.jit
def row_squares(z, offs_b, mask_b, width, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """|z|^2 of rows, [B]."""
    squares = tl.zeros((offs_b.shape[0],), ACC)
    for start in range(0, width, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        tile = load_tile(z, offs_b, mask_b, offs_d, offs_d < width).to(ACC)
        squares += tl.sum(tile * tile, 1)
    return squares


@triton.jit
def row_scale(squares, inverse_temperature, COSINE: tl.constexpr):
    """What an inner product with a row as it is becomes part of the score by: 2 / (tau |z|)."""
    if COSINE:
        return 2.0 * inverse_temperature * inverse_length(squares)
    else:
        return squares * 0.0 + 2.0 * inverse_temperature


@triton.jit
def start_running(BLOCK_B: tl.constexpr, ACC: tl.constexpr):
    """Sums over no classes."""
    zeros = tl.zeros((BLOCK_B,), ACC)
    return Running(tl.full((BLOCK_B,), FLOOR, ACC), zeros, zeros, zeros)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def three_sums(a, b, c, APART: tl.constexpr):
    """Sums [B] over classes, crossing warps once for all; APART: one by one, for the interpreter,
    which adds up several at once very slowly.
    """
    if APART:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    else:
        return tl.reduce((a, b, c), 1, _add_three)


@triton.jit
def weigh(
    dots,
    scale,
    tables,
    query,
    value,
    offs_k,
    targets,
    running,
    ACROSS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weights [B, K] of a block of classes, from their inner products with the rows.

    Also what sums so far are to be multiplied by, [B], and the new running sums.
    """
    ACC: tl.constexpr = dots.dtype
    keys = load_scales(tables, query, offs_k)
    scores = dots * scale[:, None] * keys.unit[None, :] - keys.bias[None, :]
    maximum = tl.maximum(running.maximum, tl.max(scores, 1))
    rescale = tl.exp(running.maximum - maximum)
    weights = tl.exp(scores - maximum[:, None])
    values = keys
    if ACROSS:
        values = load_scales(tables, value, offs_k)
        weights = tl.where((values.bias == float("inf"))[None, :], 0.0, weights)
    rounded = (weights * values.unit[None, :]).to(tables.ptr.dtype.element_ty)
    back = rounded.to(ACC) * values.length[None, :]
    if ACROSS:
        third = tl.where(back > 0.0, back * (scores + values.bias[None, :]), 0.0)
    else:
        third = tl.where(offs_k[None, :] == targets[:, None], scores, 0.0)
    total, sums, extra = three_sums(weights, back, third, UPCAST)
    total += running.total * rescale
    sums += running.rounded * rescale
    extra += running.extra * (rescale if ACROSS else 1.0)
    return rounded, rescale, Running(maximum, total, sums, extra)


@triton.jit
def finish(pulled, running, labels, tables, value, pull_ptrs, mask_b, offs_d):
    """Store the weighted mean of p_k - p_y [B, D], from sums of p_k; the mean of p_k.

    Rows without any weight store finite numbers, which nothing will weigh.
    """
    ACC: tl.constexpr = pulled.dtype
    empty = running.rounded == 0.0  # false for NaN, which stays NaN
    norm = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, running.rounded))
    mean = pulled * norm[:, None]
    ptrs = table_ptrs(tables, value, labels.classes, offs_d)
    label = tl.load(ptrs, mask=labels.counted[:, None], other=0.0).to(ACC)
    unit = load_scales(tables, value, labels.classes).unit
    label = label * tl.where(labels.counted, unit, 0.0)[:, None]
    tl.store(
        pull_ptrs[:, None] + offs_d[None, :],
        (mean - label).to(pull_ptrs.dtype.element_ty),
        mask=mask_b[:, None],
    )
    return mean


@triton.jit
def along(mean, z, offs_b, present, offs_d, width, scale):
    """The rows' share [B] of the mean score in these components: scale z . mean."""
    tile = load_tile(z, offs_b, present, offs_d, offs_d < width).to(mean.dtype)
    return scale * tl.sum(tile * mean, 1)


@triton.jit
def weighted_score(running):
    """The weighted mean [B] of s_a + |p|^2 / tau, of ACROSS."""
    empty = running.rounded == 0.0
    return tl.where(empty, 0.0, running.extra / tl.where(empty, 1.0, running.rounded))


@triton.jit
def store_sums(ptrs, running, extra, mask_b, batch, M: tl.constexpr):
    """Maximum, sum of the weights and one more, M * batch elements apart."""
    apart = M * batch.to(tl.int64)
    tl.store(ptrs, running.maximum, mask=mask_b)
    tl.store(ptrs + apart, running.total, mask=mask_b)
    tl.store(ptrs + 2 * apart, extra, mask=mask_b)


@triton.jit
def rows_of(ptr, place, offs_b, batch, width):
    """Pointers to rows [B] of one of several matrices [batch, width] that follow one another."""
    return ptr + (place.to(tl.int64) * batch + offs_b) * width


@triton.jit
def store_zeros(row_ptrs, mask_b, first, BLOCK_D: tl.constexpr):
    """BLOCK_D components of rows, from `first`."""
    ptrs = row_ptrs[:, None] + (first + tl.arange(0, BLOCK_D))[None, :]
    zeros = tl.zeros(ptrs.shape, ptrs.dtype.element_ty)
    tl.store(ptrs, zeros, mask=mask_b[:, None])


@triton.jit
def part(classes, split, splits, BLOCK_K: tl.constexpr):
    """First and last (excluded) class of one of splits parts, in whole blocks."""
    size = tl.cdiv(classes, splits * BLOCK_K) * BLOCK_K
    first = split * size
    return first, tl.minimum(first + size, classes)


@triton.jit
def store_anchor(
    pull_ptrs, sum_ptrs, mask_b, batch, M: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Zeros across for the anchor, which is not drawn to itself."""
    for step in tl.static_range(STEPS):
        store_zeros(pull_ptrs, mask_b, step * BLOCK_D, BLOCK_D)
    zero = start_running(mask_b.shape[0], sum_ptrs.dtype.element_ty)
    store_sums(sum_ptrs, zero, zero.extra, mask_b, batch, M)


@triton.jit
def load_rows(
    z, offs_b, mask_b, width, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND, ACC: tl.constexpr
):
    """Rows in STEPS pieces [B, BLOCK_D], and |z|^2 [B]."""
    tiles = ()
    squares = tl.zeros((offs_b.shape[0],), ACC)
    for step in tl.static_range(STEPS):
        offs_d = (step * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        tile = load_tile(z, offs_b, mask_b, offs_d, offs_d < width)
        squares += tl.sum(tile.to(ACC) * tile.to(ACC), 1)
        tiles = tiles + (tile.to(OPERAND),)
    return tiles, squares


class Place(NamedTuple):
    """What a program of attention works on."""

    query: tl.tensor  # the modality that weighs
    value: tl.tensor  # the one whose prototypes are weighed
    split: tl.tensor  # part of the classes
    index_b: tl.tensor  # [B] rows


class Found(NamedTuple):
    """Where attention puts what it finds."""

    pulls_ptr: tl.tensor
    sums_ptr: tl.tensor


@triton.jit
def store_found(
    given,
    tables,
    accumulators,
    running,
    place,
    batch,
    inverse_temperature,
    outputs,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Means and sums of the rows of `attend_resident`, from all that it has added up."""
    ACC: tl.constexpr = accumulators[0].dtype
    # Found and read anew behind a barrier, so as to take no registers meanwhile: the compiler does
    # not know that what is added is 0
    tl.debug_barrier()
    value = place.value + tl.minimum(batch - 1, 0)
    index_b = place.index_b + tl.minimum(batch - 1, 0)
    mask_b = index_b < batch
    labels = read_labels(given.rows, index_b, mask_b, place.query, value, M)
    offs_b = index_b.to(tl.int64)
    pull_ptrs = rows_of(outputs.pulls_ptr, place.split * M + value, index_b, batch, tables.width)
    other = select_matrix(given.features, value, M)
    width = select(given.widths, value, M)
    moment = weighted_score(running)
    scale = moment
    if ACROSS:
        squares = row_squares(other, offs_b, labels.value, width, BLOCK_D, ACC)
        scale = row_scale(squares, inverse_temperature, COSINE)
    for step in tl.static_range(len(accumulators)):
        offs_d = (step * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mean = finish(accumulators[step], running, labels, tables, value, pull_ptrs, mask_b, offs_d)
        if ACROSS:
            moment -= along(mean, other, offs_b, labels.value, offs_d, width, scale)
    ptrs = rows_of(outputs.sums_ptr, place.split * 3 * M + value, index_b, batch, 1)
    store_sums(ptrs, running, moment if ACROSS else running.extra, mask_b, batch, M)


@triton.jit(do_not_specialize=["batch", "splits"])
def attend_resident(
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
    STEPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """D_m, or with ACROSS R_m, of BLOCK_B rows of one modality and one part of the classes.

    The rows stay in shared memory, a block of prototypes is read once for scores and sums, and the
    sums over all components are in registers. STEPS tiles of BLOCK_D hold the widest modality.

    Stores `pulls_ptr` [splits, M, B, width] and `sums_ptr` [splits, 3, M, B]: maximum and sum of
    the weights; the target's score, or with ACROSS the weighted mean of s_a - s_m. With ACROSS
    zeros are stored for the anchor.
    """
    rows = given.rows
    # In 32 bits, where registers are scarce
    index_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = index_b < batch
    value = tl.program_id(1)
    split = tl.program_id(2)
    query = value
    if ACROSS:
        query = read_budgets(rows.budgets, 1, M, ACC).anchor
        if query == value:
            pull_ptrs = rows_of(pulls_ptr, split * M + value, index_b, batch, given.tables.width)
            sum_ptrs = rows_of(sums_ptr, split * 3 * M + value, index_b, batch, 1)
            store_anchor(pull_ptrs, sum_ptrs, mask_b, batch, M, STEPS, BLOCK_D)
            return
    inverse_temperature = 1.0 / load_scalar(rows.temperature, ACC == tl.float64, ACC)
    labels = read_labels(rows, index_b, mask_b, query, value, M)

    OPERAND: tl.constexpr = ACC if UPCAST else given.tables.ptr.dtype.element_ty
    # The width as a constant, so that addresses within a block are
    tables = Tables(given.tables.ptr, given.tables.scales, given.tables.classes, STEPS * BLOCK_D)
    z = select_matrix(given.features, query, M)
    width = select(given.widths, query, M)
    tiles, squares = load_rows(
        z, index_b.to(tl.int64), labels.query, width, STEPS, BLOCK_D, OPERAND, ACC
    )
    accumulators = (tl.zeros((BLOCK_B, BLOCK_D), ACC),) * STEPS
    scale = row_scale(squares, inverse_temperature, COSINE)

    running = start_running(BLOCK_B, ACC)
    first, last = part(tables.classes, split, splits, BLOCK_K)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        keys = ()
        dots = tl.zeros((BLOCK_B, BLOCK_K), ACC)
        for step in tl.static_range(STEPS):
            key = load_block(tables, query, start, step * BLOCK_D, BLOCK_K, BLOCK_D)
            keys = keys + (key.to(OPERAND),)  # [K, D]
        for step in tl.static_range(STEPS):
            key = tl.trans(keys[step])
            # See `launch.py`; the batch is never empty
            if batch > -step:
                dots = multiply(tiles[step], key, dots, PRECISION, ACC)
            elif step == STEPS - 1:
                dots = multiply(tiles[step], key, dots, PRECISION, ACC)
        weights, rescale, running = weigh(
            dots, scale, tables, query, value, offs_k, labels.classes, running, ACROSS, UPCAST
        )
        weights = weights.to(OPERAND)
        # All are rescaled before the first product, which then need not wait for one another
        rescaled = ()
        for step in tl.static_range(STEPS):
            rescaled = rescaled + (accumulators[step] * rescale[:, None],)
        accumulators = ()
        for step in tl.static_range(STEPS):
            values = keys[step]
            if ACROSS:
                values = load_block(tables, value, start, step * BLOCK_D, BLOCK_K, BLOCK_D)
                values = values.to(OPERAND)
            accumulators = accumulators + (
                multiply(weights, values, rescaled[step], PRECISION, ACC),
            )

    place = Place(query, value, split, index_b)
    outputs = Found(pulls_ptr, sums_ptr)
    store_found(
        given,
        tables,
        accumulators,
        running,
        place,
        batch,
        inverse_temperature,
        outputs,
        M,
        COSINE,
        ACROSS,
        BLOCK_D,
    )

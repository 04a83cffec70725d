"""The prototypes' moving average and class sums of rows too wide for registers.

The same as in `kernels.py`, BLOCK_D components at a time. A row's length is taken first, and kept
in memory beside the list of rows.
"""

import triton
import triton.language as tl

from iib_kernels.ops.tiles import inverse_length, load_scalar, load_tile
from iib_kernels.ops.update.kernels import (
    Members,
    count_labels,
    group,
    list_rows,
    load_labels,
    load_rows,
    moved_prototype,
)


@triton.jit
def _invert_lengths(
    x, members, inverses_ptr, ACC: tl.constexpr, SIZES: tl.constexpr, m: tl.constexpr
):
    """Write 1 / |x| of one class's rows, in the order of the list."""
    BLOCK_R: tl.constexpr = SIZES[m][1]
    BLOCK_D: tl.constexpr = SIZES[m][2]
    for start in range(0, members.count, BLOCK_R):
        offs_r, mask_r = load_rows(members, start, BLOCK_R)
        squares = tl.zeros((BLOCK_R,), ACC)
        for begin in range(0, SIZES[m][0], BLOCK_D):
            offs_d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
            values = load_tile(x, offs_r, mask_r, offs_d, offs_d < SIZES[m][0]).to(ACC)
            squares += tl.sum(values * values, 1)
        ptrs = inverses_ptr + start + tl.arange(0, BLOCK_R)
        tl.store(ptrs, inverse_length(squares), mask=mask_r)
    tl.debug_barrier()  # other threads of the program read them


@triton.jit
def _sum_block(
    x,
    members,
    inverses_ptr,
    offs_d,
    mask_d,
    ACC: tl.constexpr,
    SIZES: tl.constexpr,
    m: tl.constexpr,
):
    """Sum [D] of one class's embeddings in one block of components.

    Each is scaled by its inverse length, where these are given.
    """
    BLOCK_R: tl.constexpr = SIZES[m][1]
    BLOCK_D: tl.constexpr = SIZES[m][2]
    total = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, members.count, BLOCK_R):
        offs_r, mask_r = load_rows(members, start, BLOCK_R)
        values = load_tile(x, offs_r, mask_r, offs_d, mask_d).to(ACC)  # [R, D]
        if inverses_ptr is not None:
            ptrs = inverses_ptr + start + tl.arange(0, BLOCK_R)
            values = values * tl.load(ptrs, mask=mask_r, other=0.0)[:, None]
        total += tl.sum(values, 0)
    return total


@triton.jit
def _move_class(
    x,
    table,
    counts,
    momentum,
    class_index,
    members,
    inverses_ptr,
    ACC: tl.constexpr,
    SIZES: tl.constexpr,
    m: tl.constexpr,
):
    """Move one prototype and its count, in place; with a place for inverse lengths, the cosine's.

    A first sweep over the components takes the moved prototype's length, a second one stores.
    """
    BLOCK_D: tl.constexpr = SIZES[m][2]
    SWEEPS: tl.constexpr = 1 if inverses_ptr is None else 2
    count_ptr = counts.ptr + class_index * counts.stride
    old_count = tl.load(count_ptr)
    if inverses_ptr is not None:
        _invert_lengths(x, members, inverses_ptr, ACC, SIZES, m)
    square = tl.full((), 0.0, ACC)
    for sweep in range(0, SWEEPS):
        for begin in range(0, SIZES[m][0], BLOCK_D):
            offs_d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < SIZES[m][0]
            total = _sum_block(x, members, inverses_ptr, offs_d, mask_d, ACC, SIZES, m)
            old_ptrs = table.ptr + class_index * table.stride_row + offs_d * table.stride_col
            old = tl.load(old_ptrs, mask=mask_d, other=0.0)
            moved = moved_prototype(old, old_count, total, members.count, momentum)
            if sweep == SWEEPS - 1:
                if SWEEPS == 2:
                    moved = moved * inverse_length(square)
                tl.store(old_ptrs, moved.to(old.dtype), mask=mask_d)
            else:
                square += tl.sum(moved * moved, 0)
    tl.store(count_ptr, old_count + members.count)


@triton.jit(do_not_specialize=["batch"])
def move_prototypes_streamed(
    features,
    prototypes,
    counts,
    rows,
    inverses_ptr,
    momentum,
    batch,
    classes,
    HOW: tl.constexpr,
    SIZES: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Move the prototypes and counts of GROUP classes of one modality, in place."""
    M: tl.constexpr = HOW.M
    pid_m = tl.program_id(1)
    first, last = group(classes, HOW)
    labels = load_labels(rows, 0, batch, classes, HOW)
    if count_labels(rows, labels, first, last, batch, classes, HOW) > 0:
        mu = load_scalar(momentum, NUMBER_POINTER, ACC)
        place = pid_m.to(tl.int64) * batch
        place += count_labels(rows, labels, 0, first, batch, classes, HOW)
        for step in range(0, last - first):
            found = list_rows(rows, labels, first + step, place, batch, classes, HOW)
            if found > 0:
                for m in tl.static_range(M):
                    if pid_m == m:
                        _move_class(
                            features[m],
                            prototypes[m],
                            counts[m],
                            mu,
                            (first + step).to(tl.int64),
                            Members(rows.lists_ptr + place, found),
                            None if inverses_ptr is None else inverses_ptr + place,
                            ACC,
                            SIZES,
                            m,
                        )
            place += found


@triton.jit(do_not_specialize=["batch"])
def class_sums_streamed(
    features,
    rows,
    inverses_ptr,
    sums_ptr,
    totals_ptr,
    batch,
    classes,
    HOW: tl.constexpr,
    SIZES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums [K, D] and numbers [K] of GROUP classes' embeddings; of one modality."""
    WIDTH: tl.constexpr = SIZES[0][0]
    BLOCK_D: tl.constexpr = SIZES[0][2]
    x = features[0]
    first, last = group(classes, HOW)
    labels = load_labels(rows, 0, batch, classes, HOW)
    place = count_labels(rows, labels, 0, first, batch, classes, HOW).to(tl.int64)
    for step in range(0, last - first):
        k = (first + step).to(tl.int64)
        found = list_rows(rows, labels, first + step, place, batch, classes, HOW)
        members = Members(rows.lists_ptr + place, found)
        if inverses_ptr is not None:
            _invert_lengths(x, members, inverses_ptr + place, ACC, SIZES, 0)
        for begin in range(0, WIDTH, BLOCK_D):
            offs_d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < WIDTH
            inverses = None if inverses_ptr is None else inverses_ptr + place
            total = _sum_block(x, members, inverses, offs_d, mask_d, ACC, SIZES, 0)
            tl.store(sums_ptr + k * WIDTH + offs_d, total, mask=mask_d)
        tl.store(totals_ptr + k, found.to(tl.int64))
        place += found

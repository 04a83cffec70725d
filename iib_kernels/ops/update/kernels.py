"""The prototypes' moving average and class sums, rows in registers (method page, section 2).

Every program takes a few classes of one modality. It finds their rows by a counting sort: the rows
of class k stand in `lists` behind those of all smaller classes, as many places as there are of
them, so each program knows its places without asking another, and a class's rows are added in their
order: the result is repeatable bit by bit.

The modality is chosen by `if pid_m == m` over constants, not by a selection on the device: each
modality keeps its own types, strides and sizes, and one that loads narrow slows no other.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.tiles import inverse_length, load_scalar, load_tile, valid_targets


class Counts(NamedTuple):
    """How many samples of each class have been seen, [K] int64."""

    ptr: tl.tensor
    stride: tl.tensor


class Rows(NamedTuple):
    """Which rows belong to which class."""

    targets_ptr: tl.tensor  # [B]
    mask_ptr: tl.tensor  # [B, M], or None
    lists_ptr: tl.tensor  # [M, B] int32, written here: row numbers, sorted by class
    ignore_index: tl.tensor


class Members(NamedTuple):
    """The rows of one class."""

    ptr: tl.tensor  # of their numbers, in their order
    count: tl.tensor


class Search(NamedTuple):
    """How rows are found; constants only."""

    M: tl.constexpr
    GROUP: tl.constexpr  # classes a program
    BLOCK: tl.constexpr  # targets looked at at once
    ONE_BLOCK: tl.constexpr  # whether these are all of them: they then stay in registers


@triton.jit
def group(classes, HOW: tl.constexpr):
    """The first class of this program, and the one after its last."""
    first = tl.program_id(0) * HOW.GROUP
    return first, tl.minimum(first + HOW.GROUP, classes)


@triton.jit
def load_labels(rows, start, batch, classes, HOW: tl.constexpr):
    """Classes [BLOCK] int32 of the rows from `start`; -1 where a row does not count."""
    offs_b = (start + tl.arange(0, HOW.BLOCK)).to(tl.int64)
    mask_b = offs_b < batch
    labels, valid = valid_targets(rows.targets_ptr, 1, rows.ignore_index, offs_b, mask_b, classes)
    if rows.mask_ptr is not None:
        present_ptrs = rows.mask_ptr + offs_b * HOW.M + tl.program_id(1)
        valid = valid & (tl.load(present_ptrs, mask=valid, other=0) != 0)
    return tl.where(valid, labels, -1).to(tl.int32)


@triton.jit
def count_labels(rows, labels, first, last, batch, classes, HOW: tl.constexpr):
    """How many rows belong to the classes from `first` to `last` - 1."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, batch, HOW.BLOCK):
        if not HOW.ONE_BLOCK:
            labels = load_labels(rows, start, batch, classes, HOW)
        count += tl.sum(((labels >= first) & (labels < last)).to(tl.int32), 0)
    return count


@triton.jit
def list_rows(rows, labels, class_index, place, batch, classes, HOW: tl.constexpr):
    """Write the numbers of a class's rows to the list from `place` on; how many there are."""
    found = tl.full((), 0, tl.int32)
    for start in range(0, batch, HOW.BLOCK):
        if not HOW.ONE_BLOCK:
            labels = load_labels(rows, start, batch, classes, HOW)
        member = labels == class_index
        here = tl.sum(member.to(tl.int32), 0)
        if here > 0:
            places = rows.lists_ptr + place + found + (tl.cumsum(member.to(tl.int32), 0) - 1)
            tl.store(places, start + tl.arange(0, HOW.BLOCK), mask=member)
            tl.debug_barrier()  # other threads of the program read the list
            found += here
    return found


@triton.jit
def load_rows(members, start, BLOCK_R: tl.constexpr):
    """Numbers [R] of a class's rows from `start`, and which exist."""
    slots = start + tl.arange(0, BLOCK_R)
    mask_r = slots < members.count
    return tl.load(members.ptr + slots, mask=mask_r, other=0).to(tl.int64), mask_r


@triton.jit
def moved_prototype(old, old_count, total, count, momentum):
    """The moving average before it is scaled: mu p + (1 - mu) mean, or the mean the first time."""
    mean = total / count.to(total.dtype)
    average = momentum * old.to(total.dtype) + (1.0 - momentum) * mean
    return tl.where(old_count > 0, average, mean)


@triton.jit
def _sum_rows(
    x,
    members,
    offs_d,
    mask_d,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum [D] of one class's embeddings, with COSINE each at unit length."""
    total = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, members.count, BLOCK_R):
        offs_r, mask_r = load_rows(members, start, BLOCK_R)
        values = load_tile(x, offs_r, mask_r, offs_d, mask_d).to(ACC)  # [R, D]
        if COSINE:
            values = values * inverse_length(tl.sum(values * values, 1))[:, None]
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
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    SIZES: tl.constexpr,
    m: tl.constexpr,
):
    """Move one prototype of modality m and its count, in place."""
    BLOCK_R: tl.constexpr = SIZES[m][1]
    BLOCK_D: tl.constexpr = SIZES[m][2]
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < SIZES[m][0]
    old_ptrs = table.ptr + class_index * table.stride_row + offs_d * table.stride_col
    count_ptr = counts.ptr + class_index * counts.stride
    old = tl.load(old_ptrs, mask=mask_d, other=0.0)
    old_count = tl.load(count_ptr)
    total = _sum_rows(x, members, offs_d, mask_d, COSINE, ACC, BLOCK_R, BLOCK_D)
    moved = moved_prototype(old, old_count, total, members.count, momentum)
    if COSINE:
        moved = moved * inverse_length(tl.sum(moved * moved, 0))
    tl.store(old_ptrs, moved.to(old.dtype), mask=mask_d)
    tl.store(count_ptr, old_count + members.count)


@triton.jit(do_not_specialize=["batch"])
def move_prototypes(
    features,
    prototypes,
    counts,
    rows,
    momentum,
    batch,
    classes,
    HOW: tl.constexpr,
    SIZES: tl.constexpr,
    COSINE: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
):
    """Move the prototypes and counts of GROUP classes of one modality, in place.

    A class without rows is neither read nor written. SIZES: D, BLOCK_R and BLOCK_D of each
    modality.
    """
    M: tl.constexpr = HOW.M
    pid_m = tl.program_id(1)
    first, last = group(classes, HOW)
    labels = load_labels(rows, 0, batch, classes, HOW)
    if count_labels(rows, labels, first, last, batch, classes, HOW) > 0:
        mu = load_scalar(momentum, NUMBER_POINTER, ACC)
        place = pid_m.to(tl.int64) * batch
        place += count_labels(rows, labels, 0, first, batch, classes, HOW)
        for step in range(0, last - first):
            k = (first + step).to(tl.int64)
            found = list_rows(rows, labels, first + step, place, batch, classes, HOW)
            members = Members(rows.lists_ptr + place, found)
            if found > 0:
                for m in tl.static_range(M):
                    if pid_m == m:
                        x = features[m]
                        y = prototypes[m]
                        _move_class(x, y, counts[m], mu, k, members, COSINE, ACC, SIZES, m)
            place += found


@triton.jit(do_not_specialize=["batch"])
def class_sums(
    features,
    rows,
    sums_ptr,
    totals_ptr,
    batch,
    classes,
    HOW: tl.constexpr,
    SIZES: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums [K, D] and numbers [K] of GROUP classes' embeddings; of one modality."""
    WIDTH: tl.constexpr = SIZES[0][0]
    BLOCK_R: tl.constexpr = SIZES[0][1]
    BLOCK_D: tl.constexpr = SIZES[0][2]
    x = features[0]
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < WIDTH
    first, last = group(classes, HOW)
    labels = load_labels(rows, 0, batch, classes, HOW)
    place = count_labels(rows, labels, 0, first, batch, classes, HOW).to(tl.int64)
    for step in range(0, last - first):
        k = (first + step).to(tl.int64)
        found = list_rows(rows, labels, first + step, place, batch, classes, HOW)
        members = Members(rows.lists_ptr + place, found)
        total = _sum_rows(x, members, offs_d, mask_d, COSINE, ACC, BLOCK_R, BLOCK_D)
        tl.store(sums_ptr + k * WIDTH + offs_d, total, mask=mask_d)
        tl.store(totals_ptr + k, found.to(tl.int64))
        place += found

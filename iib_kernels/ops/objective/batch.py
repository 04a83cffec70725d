"""What a mean over the whole batch takes from a program that sees a few rows: how many rows count
before it begins, and the sums of all programs when the last one is done.

A line [J] has an entry a part of the objective: 0 the fused cross-entropy, then M each of the
modalities' cross-entropies, contrasts and alignments; the rest is padding.
"""

import triton
import triton.language as tl

from iib_kernels.ops.means import column_totals, is_last
from iib_kernels.ops.tiles import load_scalar, valid_targets


@triton.jit
def entries(line, start, COUNT: tl.constexpr):
    """COUNT entries of a line, in a tuple."""
    places = tl.arange(0, line.shape[0])
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.sum(tl.where(places == start + i, line, 0.0), 0),)
    return found


@triton.jit
def add_entries(line, start, values, COUNT: tl.constexpr):
    """The line with the sums of COUNT blocks [B] added to its entries."""
    places = tl.arange(0, line.shape[0])
    for i in tl.static_range(COUNT):
        line += tl.where(places == start + i, tl.sum(values[i], 0), 0.0)
    return line


@triton.jit
def load_weights(weights, M: tl.constexpr, J: tl.constexpr, NUMBER_POINTER: tl.constexpr, ACC):
    """What each part weighs in the objective, [J]; 0 in the padding."""
    places = tl.arange(0, J)
    fused = load_scalar(weights.fused, NUMBER_POINTER, ACC)
    unimodal = load_scalar(weights.unimodal, NUMBER_POINTER, ACC)
    contrastive = load_scalar(weights.contrastive, NUMBER_POINTER, ACC)
    alignment = load_scalar(weights.alignment, NUMBER_POINTER, ACC)
    line = tl.where(places == 0, fused, tl.zeros((J,), ACC))
    line = tl.where((places > 0) & (places <= M), unimodal, line)
    line = tl.where((places > M) & (places <= 2 * M), contrastive, line)
    return tl.where((places > 2 * M) & (places <= 3 * M), alignment, line)


@triton.jit
def count_batch(
    targets,
    mask_ptr,
    seen_ptrs,
    batch,
    K: tl.constexpr,
    M: tl.constexpr,
    J: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr = 1024,
):
    """What each part's mean is divided by, [J]; 1 where that would be 0.

    Every program finds it by itself, from the targets of the whole batch. With class weights a
    cross-entropy is divided by the sum of the weights of its rows' targets.
    """
    places = tl.arange(0, J)
    totals = tl.zeros((J,), ACC)
    for start in range(0, batch, BLOCK):
        offs_b = (start + tl.arange(0, BLOCK)).to(tl.int64)
        indices, valid = valid_targets(
            targets.ptr, 1, targets.ignore_index, offs_b, offs_b < batch, K
        )
        weight = tl.where(valid, 1.0, 0.0).to(ACC)
        if targets.class_weight_ptr is not None:
            weight = tl.load(targets.class_weight_ptr + indices, mask=valid, other=0.0).to(ACC)
        count = tl.sum(valid.to(tl.int32), 0)
        total = tl.sum(weight, 0)
        if mask_ptr is None and seen_ptrs is None:
            # All modalities are alike
            totals += tl.where(places <= M, total, count.to(ACC))
        else:
            totals += tl.where(places == 0, total, 0.0)
            for m in tl.static_range(M):
                here = valid
                if mask_ptr is not None:
                    here = valid & (tl.load(mask_ptr + offs_b * M + m, mask=valid, other=0) != 0)
                known = here
                if seen_ptrs is not None:
                    known = here & (tl.load(seen_ptrs[m] + indices, mask=here, other=0) != 0)
                own = places == 1 + m
                prototypes = (places == 1 + M + m) | (places == 1 + 2 * M + m)
                known_m = tl.sum(known.to(tl.int32), 0)
                totals += tl.where(own, tl.sum(tl.where(here, weight, 0.0), 0), 0.0)
                totals += tl.where(prototypes, known_m.to(ACC), 0.0)
    return tl.where(totals == 0.0, 1.0, totals)


@triton.jit
def finish(
    sums,
    divisors,
    weights,
    outputs,
    PARTS: tl.constexpr,
    J: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store this program's sums [J]; the last program to do so turns all of them into means.

    The counter that tells who is last goes back to 0 for the next launch.
    """
    offs_j = tl.arange(0, J)
    mask_j = offs_j < PARTS
    tl.store(outputs.sums + tl.program_id(0) * PARTS + offs_j, sums, mask=mask_j)
    if is_last(outputs.tickets):
        programs = tl.num_programs(0)
        totals = column_totals(outputs.sums, programs, PARTS, offs_j, mask_j, ACC, BLOCK)
        means = totals / divisors
        tl.store(outputs.parts + offs_j, means, mask=mask_j)
        weighed = tl.where(weights == 0.0, 0.0, weights * means)
        tl.store(outputs.loss, tl.sum(weighed, 0))
        tl.store(outputs.tickets, 0)

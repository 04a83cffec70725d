"""Means over the whole batch, in the launch that computes what they are of.

Every program stores its sums. The last one to have done so, which a ticket tells, adds them up in
the programs' order: whichever is last, the result is the same bit for bit.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Reduction(NamedTuple):
    """Where the means go; None of it where losses are stored row by row."""

    sums_ptr: tl.tensor  # [programs, J + W], see store_means
    tickets_ptr: tl.tensor  # [1], 0 before and after
    means_ptrs: tl.tuple  # the J means, in several tensors
    divisors_ptr: tl.tensor  # [W]
    mean: tl.constexpr  # otherwise sums are asked for, and the divisors are 1


@triton.jit
def is_last(tickets_ptr):
    """Whether all programs of the launch have drawn a ticket: then what they stored is there."""
    # All threads have stored before one of them draws the ticket
    tl.debug_barrier()
    return tl.atomic_add(tickets_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def column_totals(
    table_ptr, programs, columns, places, mask, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums [J] of the columns `places` [J] over the programs' lines of [programs, columns]."""
    totals = tl.zeros((places.shape[0],), ACC)
    for start in range(0, programs, BLOCK):
        offs_p = (start + tl.arange(0, BLOCK)).to(tl.int64)
        ptrs = table_ptr + offs_p[:, None] * columns + places[None, :]
        inside = (offs_p < programs)[:, None] & mask[None, :]
        # Past the first-level cache, which does not see what other multiprocessors stored
        totals += tl.sum(tl.load(ptrs, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    return totals


@triton.jit
def store_means(into, sums, weights, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Store the means of J losses. `into`: a Reduction.

    `sums` are J blocks, each to be summed up, and `weights` W of what they are divided by: those of
    losses j, W + j, ... are at j. Where no row counts the divisor is 1. The first of the tensors
    has FIRST means, each other one an equal share of the rest. The last program reads SIZE numbers
    at once.
    """
    J: tl.constexpr = len(sums)
    W: tl.constexpr = len(weights)
    ACC: tl.constexpr = sums[0].dtype
    SHARE: tl.constexpr = (J - FIRST) // (len(into.means_ptrs) - 1)
    PLACES: tl.constexpr = triton.next_power_of_2(J)
    BLOCK: tl.constexpr = SIZE // PLACES
    line = into.sums_ptr + tl.program_id(0).to(tl.int64) * (J + W)
    for j in tl.static_range(J):
        tl.store(line + j, tl.sum(sums[j], 0))
    for w in tl.static_range(W):
        tl.store(line + J + w, tl.sum(weights[w], 0))
    if is_last(into.tickets_ptr):
        offs_j = tl.arange(0, PLACES)
        mask_j = offs_j < J
        programs = tl.num_programs(0)
        means = column_totals(into.sums_ptr, programs, J + W, offs_j, mask_j, ACC, BLOCK)
        divisors = tl.full((PLACES,), 1.0, ACC)
        if into.mean:
            places = J + offs_j % W
            divisors = column_totals(into.sums_ptr, programs, J + W, places, mask_j, ACC, BLOCK)
            divisors = tl.where(divisors == 0.0, 1.0, divisors)
            means = means / divisors
        tl.store(into.divisors_ptr + offs_j, divisors, mask=offs_j < W)
        tl.store(into.means_ptrs[0] + offs_j, means, mask=offs_j < FIRST)
        for i in tl.static_range(1, len(into.means_ptrs)):
            place = offs_j - FIRST - (i - 1) * SHARE
            mask = (place >= 0) & (place < SHARE)
            tl.store(into.means_ptrs[i] + place, means, mask=mask)
        tl.store(into.tickets_ptr, 0)

"""Trusted fusion of rows with more classes than registers hold, one row at a time.

Forward reads the logits twice: for the softmaxes, and for what they say. `statistics` [B, 2 M]
keeps M maxima and M log-sums for backward, which reads logits and upstream gradient twice as well:
for the sums over the classes, and for the gradient.

Sums run in every lane apart, each with the maximum it has seen itself, and come together at the end
of a pass: within it, no warp waits for another.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import store_sums
from iib_kernels.ops.fusion.tiles import add_each, row_maxima, row_sums
from iib_kernels.ops.tiles import FLOOR
from iib_kernels.ops.trust.kernels import (
    below_maximum,
    doubted,
    experts_of,
    listen,
    load_gradient,
    products,
    scaled,
    slope_of,
    trust_gradients,
    trusts,
    zero_sums,
)


@triton.jit
def stream_softmaxes(logits, numbers, gate, block, plan):
    """The Experts of a row, in one pass."""
    zero = tl.zeros((block.offs.shape[0], plan.BLOCK_K), plan.ACC)
    maximum = (zero + FLOOR,) * plan.M
    total = (zero,) * plan.M
    for start in range(0, plan.K, plan.BLOCK_K):
        offs_k = start + tl.arange(0, plan.BLOCK_K)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        new_maximum = ()
        new_total = ()
        for m in tl.static_range(plan.M):
            new = tl.maximum(maximum[m], t[m])
            new_maximum = new_maximum + (new,)
            mass = tl.exp(maximum[m] - new) * total[m] + tl.exp(t[m] - new)
            new_total = new_total + (mass,)
        maximum = new_maximum
        total = new_total
    whole = row_maxima(maximum, plan.JOINT)
    tiles = ()
    for m in tl.static_range(plan.M):
        tiles = tiles + (tl.exp(maximum[m] - whole[m][:, None]) * total[m],)
    return experts_of(whole, row_sums(tiles, plan.JOINT), gate, block, plan)


@triton.jit
def store_statistics(ptr, experts, block):
    """Write maxima and log-sums into this row of [B, 2 M]."""
    M: tl.constexpr = len(experts.maximum)
    ptrs = ptr + block.offs * (2 * M)
    for m in tl.static_range(M):
        tl.store(ptrs + m, experts.maximum[m], mask=block.mask)
        tl.store(ptrs + M + m, experts.log_sum[m], mask=block.mask)


@triton.jit
def load_experts(ptr, gate, block, plan):
    """The Experts by this row of [B, 2 M]."""
    ptrs = ptr + block.offs * (2 * plan.M)
    maximum = ()
    log_sum = ()
    for m in tl.static_range(plan.M):
        maximum = maximum + (tl.load(ptrs + m, mask=block.mask, other=0.0),)
        log_sum = log_sum + (tl.load(ptrs + plan.M + m, mask=block.mask, other=0.0),)
    return doubted(maximum, log_sum, gate, block, plan)


@triton.jit(do_not_specialize=["batch"])
def trusted_streamed(logits, gate, outputs, batch, plan: tl.constexpr):
    """`trusted_rows` (kernels.py) of one row at a time, and the statistics."""
    numbers = loading.load_numbers(gate, plan)
    zero = tl.zeros((1, plan.BLOCK_K), plan.ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        experts = stream_softmaxes(logits, numbers, gate, block, plan)
        store_statistics(outputs.statistics_ptr, experts, block)
        highest = zero + FLOOR
        sums = (zero,) * (1 + len(experts.sure))  # exp(f - highest), and that times the shares
        for start in range(0, plan.K, plan.BLOCK_K):
            offs_k = start + tl.arange(0, plan.BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, plan)
            total, shares = listen(t, experts, block.available)
            fused = scaled(total, numbers.gamma, offs_k < plan.K)
            loading.store_rows((outputs.fused_ptr,), 0, block, offs_k, fused, plan.K)
            new = tl.maximum(highest, fused)
            rescale = tl.exp(highest - new)
            mass = tl.exp(fused - new)
            highest = new
            moved = (rescale * sums[0] + mass,)
            for m in tl.static_range(len(shares)):
                moved = moved + (rescale * sums[m + 1] + mass * shares[m],)
            sums = moved
        rescale = tl.exp(highest - tl.max(highest, 1)[:, None])
        mass = tl.sum(rescale * sums[0], 1)
        tiles = ()
        for m in tl.static_range(len(experts.sure)):
            tiles = tiles + (rescale * sums[m + 1],)
        trust = trusts(mass, row_sums(tiles, plan.JOINT), block.available)
        loading.store_each(outputs.trust_ptr, block, trust)


@triton.jit(do_not_specialize=["batch"])
def trusted_streamed_backward(
    logits, gate, statistics_ptr, upstream, grads, batch, plan: tl.constexpr
):
    """`trusted_rows_backward` (kernels.py) of one row at a time."""
    numbers = loading.load_numbers(gate, plan)
    partial = zero_sums(grads.partial_ptr, plan)
    zero = tl.zeros((1, plan.BLOCK_K), plan.ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        experts = load_experts(statistics_ptr, gate, block, plan)
        parts = (zero,) * (2 + len(experts.sure))
        for start in range(0, plan.K, plan.BLOCK_K):
            offs_k = start + tl.arange(0, plan.BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, plan)
            total, shares = listen(t, experts, block.available)
            grad = load_gradient(upstream, total, block, offs_k, plan)
            parts = add_each(parts, products(grad, total, shares))
        sums = row_sums(parts, plan.JOINT)
        by_trust = trust_gradients(sums, experts, numbers.gamma, block.available)
        loading.store_each(grads.gate_ptr, block, by_trust)
        along = (zero,) * plan.M
        for start in range(0, plan.K, plan.BLOCK_K):
            offs_k = start + tl.arange(0, plan.BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, plan)
            total, shares = listen(t, experts, block.available)
            grad = load_gradient(upstream, total, block, offs_k, plan)
            tiles = ()
            for m in tl.static_range(plan.M):
                slope = slope_of(t[m], m, grad, shares, sums, experts, numbers, block.available)
                loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
                tiles = tiles + (-slope * below_maximum(t[m], experts, m),)
            along = add_each(along, tiles)
        by_temperature = row_sums(along, plan.JOINT)
        partial = add_each(partial, by_trust + by_temperature + (sums[0],))
    if grads.partial_ptr is not None:
        store_sums(grads.partial_ptr, partial)

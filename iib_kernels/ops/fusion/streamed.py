"""Gated fusion of rows with more classes than registers hold.

Forward reads the logits twice: for the softmaxes, which the weights need, and for the sum. Backward
reads them twice as well: for the products with the fused logits' gradient, which the weights'
gradients need, and for the gradient. `statistics` [B, 3 M] keeps the softmaxes for it: M log-sums,
M entropies, M maxima.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.streaming import stream_softmaxes
from iib_kernels.ops.fusion.tiles import (
    NEVER,
    Softmaxes,
    add_each,
    finite,
    fuse,
    gate_gradients,
    gate_weights,
    logit_slope,
    row_sums,
    uncertainties,
)


@triton.jit
def store_softmaxes(ptrs, mask_b, softmax):
    """Write Softmaxes into the first 3 M columns of the statistics."""
    M: tl.constexpr = len(softmax.maximum)
    for m in tl.static_range(M):
        tl.store(ptrs + m, softmax.log_sum[m], mask=mask_b)
        tl.store(ptrs + M + m, softmax.entropy[m], mask=mask_b)
        tl.store(ptrs + 2 * M + m, softmax.maximum[m], mask=mask_b)


@triton.jit
def load_softmaxes(ptrs, mask_b, plan):
    """Softmaxes from the first 3 M columns of the statistics."""
    maximum = ()
    log_sum = ()
    entropy = ()
    for m in tl.static_range(plan.M):
        log_sum = log_sum + (tl.load(ptrs + m, mask=mask_b, other=0.0),)
        entropy = entropy + (tl.load(ptrs + plan.M + m, mask=mask_b, other=0.0),)
        maximum = maximum + (tl.load(ptrs + 2 * plan.M + m, mask=mask_b, other=0.0),)
    return Softmaxes(maximum, log_sum, entropy)


@triton.jit(do_not_specialize=["batch"])
def fusion_streamed(logits, gate, outputs, batch, plan: tl.constexpr):
    """`fusion_rows` (rows.py) of one row at a time, and the statistics."""
    every = loading.load_numbers(gate, plan)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        scores = loading.load_scores(gate, block, plan)
        softmax = stream_softmaxes(logits, numbers, block, plan)
        uncertainty = uncertainties(softmax.entropy, plan.K)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        loading.store_each(outputs.weights_ptr, block, weights)
        loading.store_each(outputs.uncertainty_ptr, block, uncertainty)
        store_softmaxes(outputs.statistics_ptr + block.offs * (3 * plan.M), block.mask, softmax)
        for start in range(0, plan.K, plan.BLOCK_K):
            offs_k = start + tl.arange(0, plan.BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, plan)
            fused = fuse(t, weights, numbers.gamma)
            loading.store_rows((outputs.fused_ptr,), 0, block, offs_k, fused, plan.K)


@triton.jit
def load_fused_gradient(upstream, t, weights, block, offs_k, plan):
    """Upstream gradient [B, K] of the fused logits; 0 where they are ruled out or there is none."""
    if upstream.fused is None:
        return tl.zeros_like(t[0])
    else:
        grad = loading.load_matrix(
            upstream.fused, 0, block.offs, block.mask, offs_k, offs_k < plan.K, plan.ACC
        )
        return tl.where(fuse(t, weights, 1.0) == NEVER, 0.0, grad)


@triton.jit(do_not_specialize=["batch"])
def fusion_streamed_backward(logits, gate, kept, upstream, grads, batch, plan: tl.constexpr):
    """`fusion_rows_backward` (rows.py) of one row at a time."""
    every = loading.load_numbers(gate, plan)
    partial = zero_partial(grads.partial_ptr, plan)
    zero = tl.zeros((1, plan.BLOCK_K), plan.ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        softmax = load_softmaxes(kept.statistics_ptr + block.offs * (3 * plan.M), block.mask, plan)
        product = (zero,) * plan.M
        if upstream.fused is not None:
            for start in range(0, plan.K, plan.BLOCK_K):
                offs_k = start + tl.arange(0, plan.BLOCK_K)
                t = loading.load_scaled(logits, numbers, block, offs_k, plan)
                grad = load_fused_gradient(upstream, t, weights, block, offs_k, plan)
                tiles = ()
                for m in tl.static_range(plan.M):
                    tiles = tiles + (grad * finite(t[m]),)
                product = add_each(product, tiles)
        back = gate_gradients(
            row_sums(product, plan.JOINT),
            weights,
            loading.load_each(upstream.weights_ptr, block.offs, block.mask, plan),
            loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, plan),
            uncertainties(softmax.entropy, plan.K),
            numbers,
            block.mask,
            plan.K,
        )
        loading.store_each(grads.gate_ptr, block, back.score)
        along = (zero,) * plan.M
        for start in range(0, plan.K, plan.BLOCK_K):
            offs_k = start + tl.arange(0, plan.BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, plan)
            grad = load_fused_gradient(upstream, t, weights, block, offs_k, plan)
            tiles = ()
            for m in tl.static_range(plan.M):
                slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
                slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
                loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
                tiles = tiles + (-slope * finite(t[m]),)
            along = add_each(along, tiles)
        by_temperature = row_sums(along, plan.JOINT)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_partial(grads.partial_ptr, partial)

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
from iib_kernels.ops.fusion.streaming import add_each, stream_softmaxes
from iib_kernels.ops.fusion.tiles import (
    NEVER,
    Softmaxes,
    finite,
    fuse,
    gate_gradients,
    gate_weights,
    logit_slope,
    row_sums,
    uncertainties,
)


@triton.jit
def store_softmaxes(ptrs, mask_b, softmax, M: tl.constexpr):
    """Write Softmaxes into the first 3 M columns of the statistics."""
    for m in tl.static_range(M):
        tl.store(ptrs + m, softmax.log_sum[m], mask=mask_b)
        tl.store(ptrs + M + m, softmax.entropy[m], mask=mask_b)
        tl.store(ptrs + 2 * M + m, softmax.maximum[m], mask=mask_b)


@triton.jit
def load_softmaxes(ptrs, mask_b, M: tl.constexpr):
    """Softmaxes from the first 3 M columns of the statistics."""
    maximum = ()
    log_sum = ()
    entropy = ()
    for m in tl.static_range(M):
        log_sum = log_sum + (tl.load(ptrs + m, mask=mask_b, other=0.0),)
        entropy = entropy + (tl.load(ptrs + M + m, mask=mask_b, other=0.0),)
        maximum = maximum + (tl.load(ptrs + 2 * M + m, mask=mask_b, other=0.0),)
    return Softmaxes(maximum, log_sum, entropy)


@triton.jit(do_not_specialize=["batch"])
def fusion_streamed(
    logits,
    gate,
    fused_ptr,
    weights_ptr,
    uncertainty_ptr,
    statistics_ptr,
    batch,
    BLOCK_K: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
):
    """`fusion_rows` (rows.py) of one row at a time, and the statistics."""
    numbers = loading.load_numbers(gate, M, ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, 1, M)
        scores = loading.load_scores(gate, block, M, ACC)
        softmax = stream_softmaxes(logits, numbers, block, K, M, ACC, JOINT, BLOCK_K)
        uncertainty = uncertainties(softmax.entropy, K, M, ACC)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available, M)
        loading.store_each(weights_ptr, block, weights, M)
        loading.store_each(uncertainty_ptr, block, uncertainty, M)
        store_softmaxes(statistics_ptr + block.offs * (3 * M), block.mask, softmax, M)
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, K, M, ACC)
            fused = fuse(t, weights, numbers.gamma, M)
            loading.store_rows((fused_ptr,), 0, block, offs_k, fused, K)


@triton.jit
def load_fused_gradient(
    upstream, t, weights, block, offs_k, K: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr
):
    """Upstream gradient [B, K] of the fused logits; 0 where they are ruled out or there is none."""
    if upstream.fused is None:
        return tl.zeros_like(t[0])
    else:
        grad = loading.load_matrix(
            upstream.fused, 0, block.offs, block.mask, offs_k, offs_k < K, ACC
        )
        return tl.where(fuse(t, weights, 1.0, M) == NEVER, 0.0, grad)


@triton.jit(do_not_specialize=["batch"])
def fusion_streamed_backward(
    logits,
    gate,
    weights_ptr,
    statistics_ptr,
    upstream,
    grads,
    batch,
    BLOCK_K: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
):
    """`fusion_rows_backward` (rows.py) of one row at a time."""
    numbers = loading.load_numbers(gate, M, ACC)
    partial = zero_partial(grads.partial_ptr, 1, M, ACC)
    zero = tl.zeros((1, BLOCK_K), ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, 1, M)
        weights = loading.load_each(weights_ptr, block.offs, block.mask, M, ACC)
        softmax = load_softmaxes(statistics_ptr + block.offs * (3 * M), block.mask, M)
        product = (zero,) * M
        if upstream.fused is not None:
            for start in range(0, K, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                t = loading.load_scaled(logits, numbers, block, offs_k, K, M, ACC)
                grad = load_fused_gradient(upstream, t, weights, block, offs_k, K, M, ACC)
                tiles = ()
                for m in tl.static_range(M):
                    tiles = tiles + (grad * finite(t[m]),)
                product = add_each(product, tiles, M)
        back = gate_gradients(
            row_sums(product, M, JOINT),
            weights,
            loading.load_each(upstream.weights_ptr, block.offs, block.mask, M, ACC),
            loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, M, ACC),
            uncertainties(softmax.entropy, K, M, ACC),
            numbers,
            block.mask,
            K,
            M,
            ACC,
        )
        loading.store_each(grads.gate_ptr, block, back.score, M)
        along = (zero,) * M
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, K, M, ACC)
            grad = load_fused_gradient(upstream, t, weights, block, offs_k, K, M, ACC)
            tiles = ()
            for m in tl.static_range(M):
                slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
                slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
                loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, K)
                tiles = tiles + (-slope * finite(t[m]),)
            along = add_each(along, tiles, M)
        by_temperature = row_sums(along, M, JOINT)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature, M)
    store_partial(grads.partial_ptr, partial, M)

"""Gated fusion of rows that stay in registers: the logits of all modalities are read once.

A program takes BLOCK_B rows at a time and walks over the batch. One or two warps hold a row, so
that reductions cost no barrier, or few.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion.loading import (
    load_block,
    load_each,
    load_matrix,
    load_numbers,
    load_scaled,
    load_scores,
    store_each,
    store_rows,
)
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.tiles import (
    NEVER,
    finite,
    fuse,
    gate_gradients,
    gate_weights,
    logit_slope,
    products,
    softmaxes,
    uncertainties,
)


@triton.jit(do_not_specialize=["batch"])
def fusion_rows(
    logits,
    gate,
    fused_ptr,
    weights_ptr,
    uncertainty_ptr,
    batch,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Fused logits [B, K], weights and uncertainty [B, M]. `logits`: Rows, `gate`: a Gate."""
    numbers = load_numbers(gate, M, ACC)
    offs_k = tl.arange(0, BLOCK_K)
    for number in range(tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.num_programs(0)):
        block = load_block(gate, number, batch, BLOCK_B, M)
        scores = load_scores(gate, block, M, ACC)
        t = load_scaled(logits, numbers, block, offs_k, K, M, ACC)
        entropy = softmaxes(t, M, JOINT).entropy
        uncertainty = uncertainties(entropy, K, M, ACC)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available, M)
        fused = fuse(t, weights, numbers.gamma, M)
        store_rows((fused_ptr,), 0, block, offs_k, fused, K)
        store_each(weights_ptr, block, weights, M)
        store_each(uncertainty_ptr, block, uncertainty, M)


@triton.jit(do_not_specialize=["batch"])
def fusion_rows_backward(
    logits,
    gate,
    weights_ptr,
    upstream,
    grads,
    batch,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The Grads of these rows, from those of the fused logits, weights and uncertainties."""
    numbers = load_numbers(gate, M, ACC)
    offs_k = tl.arange(0, BLOCK_K)
    partial = zero_partial(grads.partial_ptr, BLOCK_B, M, ACC)
    for number in range(tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.num_programs(0)):
        block = load_block(gate, number, batch, BLOCK_B, M)
        weights = load_each(weights_ptr, block.offs, block.mask, M, ACC)
        t = load_scaled(logits, numbers, block, offs_k, K, M, ACC)
        softmax = softmaxes(t, M, JOINT)
        uncertainty = uncertainties(softmax.entropy, K, M, ACC)

        grad = tl.zeros_like(t[0])
        if upstream.fused is not None:
            grad = load_matrix(upstream.fused, 0, block.offs, block.mask, offs_k, offs_k < K, ACC)
            grad = tl.where(fuse(t, weights, 1.0, M) == NEVER, 0.0, grad)
        back = gate_gradients(
            products(grad, t, M, JOINT),
            weights,
            load_each(upstream.weights_ptr, block.offs, block.mask, M, ACC),
            load_each(upstream.uncertainty_ptr, block.offs, block.mask, M, ACC),
            uncertainty,
            numbers,
            block.mask,
            K,
            M,
            ACC,
        )
        store_each(grads.gate_ptr, block, back.score, M)
        by_temperature = ()
        for m in tl.static_range(M):
            slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
            slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
            store_rows(grads.logits_ptrs, m, block, offs_k, slope, K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                by_temperature = by_temperature + (-tl.sum(slope * finite(t[m]), 1),)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature, M)
    store_partial(grads.partial_ptr, partial, M)

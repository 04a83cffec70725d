"""Gated fusion of rows that stay in registers: the logits of all modalities are read once.

A program takes BLOCK_B rows at a time and walks over the batch. One or two warps hold a row, so
that reductions cost no barrier, or few.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
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
def fusion_rows(logits, gate, outputs, batch, plan: tl.constexpr):
    """Fused logits [B, K], weights and uncertainty [B, M]. `logits`: Rows, `gate`: a Gate."""
    every = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        scores = loading.load_scores(gate, block, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        entropy = softmaxes(t, plan.JOINT).entropy
        uncertainty = uncertainties(entropy, plan.K)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        fused = fuse(t, weights, numbers.gamma)
        loading.store_rows((outputs.fused_ptr,), 0, block, offs_k, fused, plan.K)
        loading.store_each(outputs.weights_ptr, block, weights)
        loading.store_each(outputs.uncertainty_ptr, block, uncertainty)


@triton.jit(do_not_specialize=["batch"])
def fusion_rows_backward(logits, gate, kept, upstream, grads, batch, plan: tl.constexpr):
    """The Grads of these rows, from those of the fused logits, weights and uncertainties."""
    every = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        softmax = softmaxes(t, plan.JOINT)
        uncertainty = uncertainties(softmax.entropy, plan.K)

        grad = tl.zeros_like(t[0])
        if upstream.fused is not None:
            grad = loading.load_matrix(
                upstream.fused, 0, block.offs, block.mask, offs_k, offs_k < plan.K, plan.ACC
            )
            grad = tl.where(fuse(t, weights, 1.0) == NEVER, 0.0, grad)
        back = gate_gradients(
            products(grad, t, plan.JOINT),
            weights,
            loading.load_each(upstream.weights_ptr, block.offs, block.mask, plan),
            loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, plan),
            uncertainty,
            numbers,
            block.mask,
            plan.K,
        )
        loading.store_each(grads.gate_ptr, block, back.score)
        by_temperature = ()
        for m in tl.static_range(plan.M):
            slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
            slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                by_temperature = by_temperature + (-tl.sum(slope * finite(t[m]), 1),)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_partial(grads.partial_ptr, partial)

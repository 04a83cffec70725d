"""Other rows than the logits under the fusion's weights: features, say, M of [B, D].

The weights come from the logits as in rows.py and streamed.py. Values pass in blocks of BLOCK_D
components, once forward and once backward.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.streamed import load_softmaxes, store_softmaxes
from iib_kernels.ops.fusion.streaming import stream_softmaxes
from iib_kernels.ops.fusion.tiles import (
    add_each,
    finite,
    gate_gradients,
    gate_weights,
    logit_slope,
    row_sums,
    softmaxes,
    uncertainties,
)


@triton.jit
def store_sum(values, ptr, weights, gamma, block, plan):
    """Write gamma sum_m w_m v_m [B, D]; gamma may be one a row."""
    rows = tl.zeros_like(weights[0]) + gamma
    for start in range(0, plan.D, plan.BLOCK_D):
        offs_d = start + tl.arange(0, plan.BLOCK_D)
        total = tl.zeros((block.offs.shape[0], plan.BLOCK_D), plan.ACC)
        for m in tl.static_range(plan.M):
            v = loading.load_matrix(
                values, m, block.offs, block.available[m], offs_d, offs_d < plan.D, plan.ACC
            )
            total += weights[m][:, None] * v
        loading.store_rows((ptr,), 0, block, offs_d, rows[:, None] * total, plan.D)


@triton.jit
def value_gradients(values, upstream, grads, weights, gamma, block, plan):
    """Write the values' gradients, and give sum_d grad_d v_m(d) [B] of every modality."""
    product = (tl.zeros((block.offs.shape[0], plan.BLOCK_D), plan.ACC),) * plan.M
    if upstream.fused is not None:
        for start in range(0, plan.D, plan.BLOCK_D):
            offs_d = start + tl.arange(0, plan.BLOCK_D)
            grad = loading.load_matrix(
                upstream.fused, 0, block.offs, block.mask, offs_d, offs_d < plan.D, plan.ACC
            )
            tiles = ()
            for m in tl.static_range(plan.M):
                v = loading.load_matrix(
                    values, m, block.offs, block.available[m], offs_d, offs_d < plan.D, plan.ACC
                )
                tiles = tiles + (grad * v,)
                slope = (gamma * weights[m])[:, None] * grad
                slope = tl.where(block.available[m][:, None], slope, 0.0)
                loading.store_rows(grads.values_ptrs, m, block, offs_d, slope, plan.D)
            product = add_each(product, tiles)
    elif grads.values_ptrs is not None:
        for start in range(0, plan.D, plan.BLOCK_D):
            offs_d = start + tl.arange(0, plan.BLOCK_D)
            zero = tl.zeros((block.offs.shape[0], plan.BLOCK_D), plan.ACC)
            for m in tl.static_range(plan.M):
                loading.store_rows(grads.values_ptrs, m, block, offs_d, zero, plan.D)
    return row_sums(product, plan.JOINT)


@triton.jit(do_not_specialize=["batch"])
def values_rows(logits, gate, values, outputs, batch, plan: tl.constexpr):
    """The values' sum [B, D], weights and uncertainty [B, M]; all classes in registers."""
    every = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        uncertainty = uncertainties(softmaxes(t, plan.JOINT).entropy, plan.K)
        scores = loading.load_scores(gate, block, plan)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        gamma = numbers.gamma
        store_sum(values, outputs.fused_ptr, weights, gamma, block, plan)
        loading.store_each(outputs.weights_ptr, block, weights)
        loading.store_each(outputs.uncertainty_ptr, block, uncertainty)


@triton.jit(do_not_specialize=["batch"])
def values_streamed(logits, gate, values, outputs, batch, plan: tl.constexpr):
    """`values_rows` of one row at a time, and the statistics (streamed.py)."""
    every = loading.load_numbers(gate, plan)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        softmax = stream_softmaxes(logits, numbers, block, plan)
        store_softmaxes(outputs.statistics_ptr + block.offs * (3 * plan.M), block.mask, softmax)
        uncertainty = uncertainties(softmax.entropy, plan.K)
        scores = loading.load_scores(gate, block, plan)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        gamma = numbers.gamma
        store_sum(values, outputs.fused_ptr, weights, gamma, block, plan)
        loading.store_each(outputs.weights_ptr, block, weights)
        loading.store_each(outputs.uncertainty_ptr, block, uncertainty)


@triton.jit(do_not_specialize=["batch"])
def values_rows_backward(logits, gate, values, kept, upstream, grads, batch, plan: tl.constexpr):
    """The Grads of these rows, as `fusion_rows_backward` gives them and by the values."""
    every = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        gamma = numbers.gamma
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        by_weights = loading.load_each(upstream.weights_ptr, block.offs, block.mask, plan)
        by_uncertainty = loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, plan)
        product = value_gradients(values, upstream, grads, weights, gamma, block, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        softmax = softmaxes(t, plan.JOINT)
        u = uncertainties(softmax.entropy, plan.K)
        back = gate_gradients(
            product, weights, by_weights, by_uncertainty, u, numbers, block.mask, plan.K
        )
        loading.store_each(grads.gate_ptr, block, back.score)
        by_temperature = ()
        for m in tl.static_range(plan.M):
            slope = logit_slope(t, m, softmax, back, weights, gamma, None)
            slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                by_temperature = by_temperature + (-tl.sum(slope * finite(t[m]), 1),)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_partial(grads.partial_ptr, partial)


@triton.jit(do_not_specialize=["batch"])
def values_streamed_backward(
    logits, gate, values, kept, upstream, grads, batch, plan: tl.constexpr
):
    """`values_rows_backward` of one row at a time."""
    every = loading.load_numbers(gate, plan)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        gamma = numbers.gamma
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        by_weights = loading.load_each(upstream.weights_ptr, block.offs, block.mask, plan)
        by_uncertainty = loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, plan)
        softmax = load_softmaxes(kept.statistics_ptr + block.offs * (3 * plan.M), block.mask, plan)
        product = value_gradients(values, upstream, grads, weights, gamma, block, plan)
        u = uncertainties(softmax.entropy, plan.K)
        back = gate_gradients(
            product, weights, by_weights, by_uncertainty, u, numbers, block.mask, plan.K
        )
        loading.store_each(grads.gate_ptr, block, back.score)
        along = (tl.zeros((1, plan.BLOCK_K), plan.ACC),) * plan.M
        for start in range(0, plan.K, plan.BLOCK_K):
            offs_k = start + tl.arange(0, plan.BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, plan)
            tiles = ()
            for m in tl.static_range(plan.M):
                slope = logit_slope(t, m, softmax, back, weights, gamma, None)
                slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
                loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
                tiles = tiles + (-slope * finite(t[m]),)
            along = add_each(along, tiles)
        by_temperature = row_sums(along, plan.JOINT)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_partial(grads.partial_ptr, partial)

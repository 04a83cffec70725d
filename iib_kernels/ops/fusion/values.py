"""Other rows than the logits under the fusion's weights: features, say, M of [B, D].

The weights come from the logits as in rows.py and streamed.py. Values pass in blocks of BLOCK_D
components, once forward and once backward.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.streamed import load_softmaxes, store_softmaxes
from iib_kernels.ops.fusion.streaming import add_each, stream_softmaxes
from iib_kernels.ops.fusion.tiles import (
    finite,
    gate_gradients,
    gate_weights,
    logit_slope,
    row_sums,
    softmaxes,
    uncertainties,
)


@triton.jit
def store_sum(values, ptr, weights, gamma, block, D: tl.constexpr, M: tl.constexpr, ACC, BLOCK_D):
    """Write gamma sum_m w_m v_m [B, D]."""
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        total = tl.zeros((block.offs.shape[0], BLOCK_D), ACC)
        for m in tl.static_range(M):
            v = loading.load_matrix(
                values, m, block.offs, block.available[m], offs_d, offs_d < D, ACC
            )
            total += weights[m][:, None] * v
        loading.store_rows((ptr,), 0, block, offs_d, gamma * total, D)


@triton.jit
def value_gradients(
    values,
    upstream,
    grads,
    weights,
    gamma,
    block,
    D: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the values' gradients, and give sum_d grad_d v_m(d) [B] of every modality."""
    product = (tl.zeros((block.offs.shape[0], BLOCK_D), ACC),) * M
    if upstream.fused is not None:
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            grad = loading.load_matrix(
                upstream.fused, 0, block.offs, block.mask, offs_d, offs_d < D, ACC
            )
            tiles = ()
            for m in tl.static_range(M):
                v = loading.load_matrix(
                    values, m, block.offs, block.available[m], offs_d, offs_d < D, ACC
                )
                tiles = tiles + (grad * v,)
                slope = (gamma * weights[m])[:, None] * grad
                slope = tl.where(block.available[m][:, None], slope, 0.0)
                loading.store_rows(grads.values_ptrs, m, block, offs_d, slope, D)
            product = add_each(product, tiles, M)
    elif grads.values_ptrs is not None:
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            zero = tl.zeros((block.offs.shape[0], BLOCK_D), ACC)
            for m in tl.static_range(M):
                loading.store_rows(grads.values_ptrs, m, block, offs_d, zero, D)
    return row_sums(product, M, JOINT)


@triton.jit(do_not_specialize=["batch"])
def values_rows(
    logits,
    gate,
    values,
    fused_ptr,
    weights_ptr,
    uncertainty_ptr,
    batch,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The values' sum [B, D], weights and uncertainty [B, M]; all classes in registers."""
    numbers = loading.load_numbers(gate, M, ACC)
    offs_k = tl.arange(0, BLOCK_K)
    for number in range(tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, BLOCK_B, M)
        t = loading.load_scaled(logits, numbers, block, offs_k, K, M, ACC)
        uncertainty = uncertainties(softmaxes(t, M, JOINT).entropy, K, M, ACC)
        scores = loading.load_scores(gate, block, M, ACC)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available, M)
        gamma = numbers.gamma
        store_sum(values, fused_ptr, weights, gamma, block, D, M, ACC, BLOCK_D)
        loading.store_each(weights_ptr, block, weights, M)
        loading.store_each(uncertainty_ptr, block, uncertainty, M)


@triton.jit(do_not_specialize=["batch"])
def values_streamed(
    logits,
    gate,
    values,
    fused_ptr,
    weights_ptr,
    uncertainty_ptr,
    statistics_ptr,
    batch,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`values_rows` of one row at a time, and the statistics (streamed.py)."""
    numbers = loading.load_numbers(gate, M, ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, 1, M)
        softmax = stream_softmaxes(logits, numbers, block, K, M, ACC, JOINT, BLOCK_K)
        store_softmaxes(statistics_ptr + block.offs * (3 * M), block.mask, softmax, M)
        uncertainty = uncertainties(softmax.entropy, K, M, ACC)
        scores = loading.load_scores(gate, block, M, ACC)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available, M)
        gamma = numbers.gamma
        store_sum(values, fused_ptr, weights, gamma, block, D, M, ACC, BLOCK_D)
        loading.store_each(weights_ptr, block, weights, M)
        loading.store_each(uncertainty_ptr, block, uncertainty, M)


@triton.jit(do_not_specialize=["batch"])
def values_rows_backward(
    logits,
    gate,
    values,
    weights_ptr,
    upstream,
    grads,
    batch,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The Grads of these rows, as `fusion_rows_backward` gives them and by the values."""
    numbers = loading.load_numbers(gate, M, ACC)
    gamma = numbers.gamma
    offs_k = tl.arange(0, BLOCK_K)
    partial = zero_partial(grads.partial_ptr, BLOCK_B, M, ACC)
    for number in range(tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, BLOCK_B, M)
        weights = loading.load_each(weights_ptr, block.offs, block.mask, M, ACC)
        by_weights = loading.load_each(upstream.weights_ptr, block.offs, block.mask, M, ACC)
        by_uncertainty = loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, M, ACC)
        product = value_gradients(
            values, upstream, grads, weights, gamma, block, D, M, ACC, JOINT, BLOCK_D
        )
        t = loading.load_scaled(logits, numbers, block, offs_k, K, M, ACC)
        softmax = softmaxes(t, M, JOINT)
        u = uncertainties(softmax.entropy, K, M, ACC)
        back = gate_gradients(
            product, weights, by_weights, by_uncertainty, u, numbers, block.mask, K, M, ACC
        )
        loading.store_each(grads.gate_ptr, block, back.score, M)
        by_temperature = ()
        for m in tl.static_range(M):
            slope = logit_slope(t, m, softmax, back, weights, gamma, None)
            slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                by_temperature = by_temperature + (-tl.sum(slope * finite(t[m]), 1),)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature, M)
    store_partial(grads.partial_ptr, partial, M)


@triton.jit(do_not_specialize=["batch"])
def values_streamed_backward(
    logits,
    gate,
    values,
    weights_ptr,
    statistics_ptr,
    upstream,
    grads,
    batch,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`values_rows_backward` of one row at a time."""
    numbers = loading.load_numbers(gate, M, ACC)
    gamma = numbers.gamma
    partial = zero_partial(grads.partial_ptr, 1, M, ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, 1, M)
        weights = loading.load_each(weights_ptr, block.offs, block.mask, M, ACC)
        by_weights = loading.load_each(upstream.weights_ptr, block.offs, block.mask, M, ACC)
        by_uncertainty = loading.load_each(upstream.uncertainty_ptr, block.offs, block.mask, M, ACC)
        softmax = load_softmaxes(statistics_ptr + block.offs * (3 * M), block.mask, M)
        product = value_gradients(
            values, upstream, grads, weights, gamma, block, D, M, ACC, JOINT, BLOCK_D
        )
        u = uncertainties(softmax.entropy, K, M, ACC)
        back = gate_gradients(
            product, weights, by_weights, by_uncertainty, u, numbers, block.mask, K, M, ACC
        )
        loading.store_each(grads.gate_ptr, block, back.score, M)
        along = (tl.zeros((1, BLOCK_K), ACC),) * M
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            t = loading.load_scaled(logits, numbers, block, offs_k, K, M, ACC)
            tiles = ()
            for m in tl.static_range(M):
                slope = logit_slope(t, m, softmax, back, weights, gamma, None)
                slope = tl.where(block.available[m][:, None], slope, 0.0) * numbers.inverse[m]
                loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, K)
                tiles = tiles + (-slope * finite(t[m]),)
            along = add_each(along, tiles, M)
        by_temperature = row_sums(along, M, JOINT)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature, M)
    store_partial(grads.partial_ptr, partial, M)

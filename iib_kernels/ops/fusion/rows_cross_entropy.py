"""The fusion's cross-entropies of rows that stay in registers.

As in rows.py the logits of all modalities are read once, forward and backward. objective.py does
both in one pass.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion.loading import (
    load_block,
    load_class_weight,
    load_each,
    load_labels,
    load_numbers,
    load_scaled,
    load_scores,
    load_target_logits,
    store_counts,
    store_each,
    store_rows,
)
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.tiles import (
    finite,
    fused_cross_entropy,
    gate_gradients,
    gate_weights,
    logit_slope,
    own_cross_entropies,
    own_slope,
    products,
    smooth_parts,
    softmaxes,
    target_logits,
    uncertainties,
)


@triton.jit
def find_target_logits(t, logits, numbers, block, labels, is_target, K, M, ACC, JOINT):
    """Each modality's scaled logit [B] of the target: of many classes it is loaded once more.

    The line has just been read, and picking it from the tile takes two operations an element.
    """
    if K > 64:
        return load_target_logits(logits, numbers, block, labels, M, ACC)
    else:
        return target_logits(t, is_target, M, JOINT)


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_rows(
    logits,
    gate,
    targets,
    nll_ptr,
    unimodal_ptr,
    weights_ptr,
    counts_ptr,
    batch,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Cross-entropies of the fused logits [B] and of each modality's [B, M], the weights [B, M],
    and which rows count [B, M + 1]. `targets`: Targets.
    """
    numbers = load_numbers(gate, M, ACC)
    offs_k = tl.arange(0, BLOCK_K)
    class_weight = load_class_weight(targets, offs_k, K, ACC)
    for number in range(tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.num_programs(0)):
        block = load_block(gate, number, batch, BLOCK_B, M)
        labels = load_labels(targets, class_weight, block, K, ACC)
        is_target = offs_k[None, :] == labels.targets[:, None]
        scores = load_scores(gate, block, M, ACC)
        t = load_scaled(logits, numbers, block, offs_k, K, M, ACC)
        true_logits = find_target_logits(
            t, logits, numbers, block, labels, is_target, K, M, ACC, JOINT
        )
        softmax = softmaxes(t, M, JOINT)
        smooths = smooth_parts(t, true_logits, labels, M)
        unimodal = own_cross_entropies(softmax, true_logits, smooths, labels, block.available, M)
        uncertainty = uncertainties(softmax.entropy, K, M, ACC)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available, M)
        nll, _ = fused_cross_entropy(t, weights, numbers.gamma, true_logits, labels, is_target, M)
        tl.store(nll_ptr + block.offs, nll, mask=block.mask)
        store_each(unimodal_ptr, block, unimodal, M)
        store_each(weights_ptr, block, weights, M)
        store_counts(counts_ptr, block, labels.counted, M)


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_rows_backward(
    logits,
    gate,
    targets,
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
    """The Grads of these rows, from those of the cross-entropies and of the weights."""
    numbers = load_numbers(gate, M, ACC)
    offs_k = tl.arange(0, BLOCK_K)
    class_weight = load_class_weight(targets, offs_k, K, ACC)
    partial = zero_partial(grads.partial_ptr, BLOCK_B, M, ACC)
    for number in range(tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.num_programs(0)):
        block = load_block(gate, number, batch, BLOCK_B, M)
        labels = load_labels(targets, class_weight, block, K, ACC)
        is_target = offs_k[None, :] == labels.targets[:, None]
        active = labels.counted if upstream.weights_ptr is None else block.mask
        weights = load_each(weights_ptr, block.offs, block.mask, M, ACC)
        t = load_scaled(logits, numbers, block, offs_k, K, M, ACC)
        true_logits = find_target_logits(
            t, logits, numbers, block, labels, is_target, K, M, ACC, JOINT
        )
        softmax = softmaxes(t, M, JOINT)

        grad = tl.zeros_like(t[0])
        if upstream.nll_ptr is not None:
            by_nll = tl.load(upstream.nll_ptr + block.offs, mask=labels.counted, other=0.0).to(ACC)
            _, slope = fused_cross_entropy(
                t, weights, numbers.gamma, true_logits, labels, is_target, M
            )
            grad = by_nll[:, None] * slope
        back = gate_gradients(
            products(grad, t, M, JOINT),
            weights,
            load_each(upstream.weights_ptr, block.offs, block.mask, M, ACC),
            (),
            uncertainties(softmax.entropy, K, M, ACC),
            numbers,
            active,
            K,
            M,
            ACC,
        )
        store_each(grads.gate_ptr, block, back.score, M)
        by_unimodal = load_each(upstream.unimodal_ptr, block.offs, labels.counted, M, ACC)
        smooths = smooth_parts(t, true_logits, labels, M)
        by_temperature = ()
        for m in tl.static_range(M):
            slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
            if len(by_unimodal) > 0:
                slope += by_unimodal[m][:, None] * own_slope(
                    t, m, softmax, smooths, labels, is_target
                )
            slope = (
                tl.where((block.available[m] & active)[:, None], slope, 0.0) * numbers.inverse[m]
            )
            store_rows(grads.logits_ptrs, m, block, offs_k, slope, K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                along = tl.sum(slope * finite(t[m]), 1)
                by_temperature = by_temperature + (tl.where(active, -along, 0.0),)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature, M)
    store_partial(grads.partial_ptr, partial, M)

"""The fusion's cross-entropies of rows that stay in registers.

As in rows.py the logits of all modalities are read once, forward and backward. objective.py does
both in one pass.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
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
def find_target_logits(t, logits, numbers, block, labels, is_target, plan):
    """Each modality's scaled logit [B] of the target: of many classes it is loaded once more.

    The line has just been read, and picking it from the tile takes two operations an element.
    """
    if plan.K > 64:
        return loading.load_target_logits(logits, numbers, block, labels, plan)
    else:
        return target_logits(t, is_target, plan.JOINT)


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_rows(logits, gate, targets, outputs, batch, plan: tl.constexpr):
    """Cross-entropies of the fused logits [B] and of each modality's [B, M], the weights [B, M],
    and which rows count [B, M + 1]. `targets`: Targets.
    """
    numbers = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    class_weight = loading.load_class_weight(targets, offs_k, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        labels = loading.load_labels(targets, class_weight, block, plan)
        is_target = offs_k[None, :] == labels.targets[:, None]
        scores = loading.load_scores(gate, block, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        true_logits = find_target_logits(t, logits, numbers, block, labels, is_target, plan)
        softmax = softmaxes(t, plan.JOINT)
        smooths = smooth_parts(t, true_logits, labels)
        unimodal = own_cross_entropies(softmax, true_logits, smooths, labels, block.available)
        uncertainty = uncertainties(softmax.entropy, plan.K)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        nll, _ = fused_cross_entropy(t, weights, numbers.gamma, true_logits, labels, is_target)
        tl.store(outputs.nll_ptr + block.offs, nll, mask=block.mask)
        loading.store_each(outputs.unimodal_ptr, block, unimodal)
        loading.store_each(outputs.weights_ptr, block, weights)
        loading.store_counts(outputs.counts_ptr, block, labels.counted)


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_rows_backward(
    logits, gate, targets, kept, upstream, grads, batch, plan: tl.constexpr
):
    """The Grads of these rows, from those of the cross-entropies and of the weights."""
    numbers = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    class_weight = loading.load_class_weight(targets, offs_k, plan)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        labels = loading.load_labels(targets, class_weight, block, plan)
        is_target = offs_k[None, :] == labels.targets[:, None]
        active = labels.counted if upstream.weights_ptr is None else block.mask
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        true_logits = find_target_logits(t, logits, numbers, block, labels, is_target, plan)
        softmax = softmaxes(t, plan.JOINT)

        grad = tl.zeros_like(t[0])
        if upstream.nll_ptr is not None:
            given = tl.load(upstream.nll_ptr + block.offs, mask=labels.counted, other=0.0)
            by_nll = given.to(plan.ACC)
            _, slope = fused_cross_entropy(
                t, weights, numbers.gamma, true_logits, labels, is_target
            )
            grad = by_nll[:, None] * slope
        back = gate_gradients(
            products(grad, t, plan.JOINT),
            weights,
            loading.load_each(upstream.weights_ptr, block.offs, block.mask, plan),
            (),
            uncertainties(softmax.entropy, plan.K),
            numbers,
            active,
            plan.K,
        )
        loading.store_each(grads.gate_ptr, block, back.score)
        by_unimodal = loading.load_each(upstream.unimodal_ptr, block.offs, labels.counted, plan)
        smooths = smooth_parts(t, true_logits, labels)
        by_temperature = ()
        for m in tl.static_range(plan.M):
            slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
            if len(by_unimodal) > 0:
                slope += by_unimodal[m][:, None] * own_slope(
                    t, m, softmax, smooths, labels, is_target
                )
            slope = (
                tl.where((block.available[m] & active)[:, None], slope, 0.0) * numbers.inverse[m]
            )
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                along = tl.sum(slope * finite(t[m]), 1)
                by_temperature = by_temperature + (tl.where(active, -along, 0.0),)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_partial(grads.partial_ptr, partial)

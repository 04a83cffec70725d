"""The fusion's cross-entropies of rows that stay in registers.

As in rows.py the logits of all modalities are read once, forward and backward. objective.py does
both in one pass.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.tiles import (
    add_each,
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
from iib_kernels.ops.means import store_means


@triton.jit
def find_target_logits(t, logits, numbers, block, labels, is_target, plan):
    """Each modality's scaled logit [B] of the target: of many classes it is loaded once more.

    The line has just been read, and picking it from the tile takes two operations an element.
    """
    if plan.K > 64:
        return loading.load_target_logits(logits, numbers, block, labels, plan)
    else:
        return target_logits(t, is_target, plan.JOINT)


@triton.jit
def zero_losses(plan):
    """Sums to begin with: of the 1 + M cross-entropies, and of what their rows count for."""
    return (tl.zeros((plan.BLOCK_B,), plan.ACC),) * (2 * plan.M + 2)


@triton.jit
def store_losses(outputs, sums, losses, targets, labels, block, plan):
    """Write the 1 + M cross-entropies of a block, or add them to the sums."""
    if outputs.nll_ptr is None:
        return add_each(sums, losses + loading.counted_weights(targets, labels, block, plan))
    else:
        tl.store(outputs.nll_ptr + block.offs, losses[0], mask=block.mask)
        loading.store_each(outputs.unimodal_ptr, block, losses[1:])
        return sums


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_rows(logits, gate, targets, outputs, means, batch, plan: tl.constexpr):
    """Cross-entropies of the fused logits [B] and of each modality's [B, M], or their means [] and
    [M]; and the weights [B, M]. `targets`: Targets, `means`: a Reduction.
    """
    every = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    class_weight = loading.load_class_weight(targets, offs_k, plan)
    sums = zero_losses(plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
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
        loading.store_each(outputs.weights_ptr, block, weights)
        sums = store_losses(outputs, sums, (nll,) + unimodal, targets, labels, block, plan)
    if outputs.nll_ptr is None:
        store_means(means, sums[: plan.M + 1], sums[plan.M + 1 :], 1, 1024)


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_rows_backward(
    logits, gate, targets, kept, upstream, grads, batch, plan: tl.constexpr
):
    """The Grads of these rows, from those of the cross-entropies and of the weights."""
    every = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    class_weight = loading.load_class_weight(targets, offs_k, plan)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        labels = loading.load_labels(targets, class_weight, block, plan)
        is_target = offs_k[None, :] == labels.targets[:, None]
        active = labels.counted if upstream.weights_ptr is None else block.mask
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        true_logits = find_target_logits(t, logits, numbers, block, labels, is_target, plan)
        softmax = softmaxes(t, plan.JOINT)

        grad = tl.zeros_like(t[0])
        by_nll = loading.load_loss_gradients(
            upstream.nll_ptr, 0, upstream, block, labels.counted, 1, plan
        )
        if len(by_nll) > 0:
            _, slope = fused_cross_entropy(
                t, weights, numbers.gamma, true_logits, labels, is_target
            )
            grad = by_nll[0][:, None] * slope
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
        by_unimodal = loading.load_loss_gradients(
            upstream.unimodal_ptr, 1, upstream, block, labels.counted, plan.M, plan
        )
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

"""The fusion's part of the training objective: cross-entropies and their gradients in one pass.

What each cross-entropy weighs in the objective is known before it is computed, so nothing needs to
be read again for backward.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, store_sums, zero_partial
from iib_kernels.ops.fusion.rows_cross_entropy import find_target_logits
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
    uncertainties,
)


@triton.jit
def objective_of_tiles(
    t, true_logits, scores, available, labels, is_target, factors, numbers, plan
):
    """Losses, weights and gradients of BLOCK_B rows whose logits are in registers.

    Args, by tiles.py: `t` M tiles [B, K]; `true_logits` their targets' logits, M of [B]; `scores`
    log-prior plus gate, M of [B]; `available` M of [B]; `labels` Labels; `is_target` [B, K];
    `factors` 1 + M of [], what a counted row's cross-entropies weigh; `numbers` Numbers.

    Gives a tuple of 1 + M losses [B], a tuple of M weights [B], GateGradients and a tuple of M
    gradients [B, K] by the logits before their temperature.
    """
    softmax = softmaxes(t, plan.JOINT)
    smooths = smooth_parts(t, true_logits, labels)
    own = own_cross_entropies(softmax, true_logits, smooths, labels, available)
    uncertainty = uncertainties(softmax.entropy, plan.K)
    weights = gate_weights(scores, numbers.kappa, uncertainty, available)
    fused, slope = fused_cross_entropy(t, weights, numbers.gamma, true_logits, labels, is_target)
    grad = factors[0] * slope
    back = gate_gradients(
        products(grad, t, plan.JOINT), weights, (), (), uncertainty, numbers, labels.counted, plan.K
    )
    grads = ()
    for m in tl.static_range(plan.M):
        slope = logit_slope(t, m, softmax, back, weights, numbers.gamma, grad)
        slope += factors[m + 1] * own_slope(t, m, softmax, smooths, labels, is_target)
        rows = (labels.counted & available[m])[:, None]
        grads = grads + (tl.where(rows, slope, 0.0) * numbers.inverse[m],)
    return (fused,) + own, weights, back, grads


@triton.jit(do_not_specialize=["batch"])
def objective_rows(
    logits, gate, targets, factors_ptr, weights_ptr, losses_ptr, grads, batch, plan: tl.constexpr
):
    """`objective_of_tiles` over the batch: the gradients by the logits, the weights [B, M], each
    program's sums of the losses [programs, 1 + M] and, if asked for, gradients by the gate's logits
    [B, M] and by the parameters (partial.py).
    """
    numbers = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    class_weight = loading.load_class_weight(targets, offs_k, plan)
    factors = ()
    sums = ()
    for i in tl.static_range(plan.M + 1):
        factors = factors + (tl.load(factors_ptr + i).to(plan.ACC),)
        sums = sums + (tl.zeros((plan.BLOCK_B,), plan.ACC),)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        labels = loading.load_labels(targets, class_weight, block, plan)
        is_target = offs_k[None, :] == labels.targets[:, None]
        scores = loading.load_scores(gate, block, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        true_logits = find_target_logits(t, logits, numbers, block, labels, is_target, plan)
        losses, weights, back, slopes = objective_of_tiles(
            t,
            true_logits,
            scores,
            block.available,
            labels,
            is_target,
            factors,
            loading.row_numbers(numbers, gate, block),
            plan,
        )
        sums = add_each(sums, losses)
        by_temperature = ()
        for m in tl.static_range(plan.M):
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slopes[m], plan.K)
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                along = tl.sum(slopes[m] * finite(t[m]), 1)
                by_temperature = by_temperature + (tl.where(labels.counted, -along, 0.0),)
        loading.store_each(weights_ptr, block, weights)
        loading.store_each(grads.gate_ptr, block, back.score)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_sums(losses_ptr, sums)
    store_partial(grads.partial_ptr, partial)

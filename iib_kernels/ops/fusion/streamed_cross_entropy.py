"""The fusion's cross-entropies of rows with more classes than registers hold.

Forward reads the logits twice: for the softmaxes, which the weights need, and for the fused
cross-entropy. Its second pass also finds the products of that cross-entropy's gradient with each
modality's logits, so that backward reads the logits once.

`statistics` [B, 4 M + 2], with smoothing [B, 6 M + 4], keeps for backward: M log-sums, M entropies
and M maxima, then the fused logits' log-sum and maximum, M products, and with smoothing share and
mass (tiles.py, Smooths) of each modality and of the fused logits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, zero_partial
from iib_kernels.ops.fusion.rows_cross_entropy import store_losses, zero_losses
from iib_kernels.ops.fusion.streamed import load_softmaxes, store_softmaxes
from iib_kernels.ops.fusion.streaming import Fused, stream_fused, stream_softmaxes
from iib_kernels.ops.fusion.tiles import (
    Smooths,
    add_each,
    cross_entropy,
    cross_entropy_slope,
    finite,
    fuse,
    fuse_rows,
    gate_gradients,
    gate_weights,
    logit_slope,
    own_cross_entropies,
    own_slope,
    row_sums,
    uncertainties,
    with_class_weight,
)
from iib_kernels.ops.means import store_means


@triton.jit
def columns(labels, plan):
    """How many columns the statistics have."""
    if len(labels.smoothing) == 0:
        return 4 * plan.M + 2
    else:
        return 6 * plan.M + 4


@triton.jit
def streamed_cross_entropies(softmax, fused, true_logits, fused_true_logit, labels, available):
    """The cross-entropies [B], of the fused logits and of each modality's own: a tuple of 1 + M."""
    smooths = fused.smooths
    LAST: tl.constexpr = len(true_logits)
    first = cross_entropy(fused.maximum, fused.log_sum, fused_true_logit, smooths, LAST, labels)
    return (first,) + own_cross_entropies(softmax, true_logits, smooths, labels, available)


@triton.jit
def store_fused(ptrs, mask_b, fused):
    """Write a Fused into the statistics, behind the softmaxes."""
    M: tl.constexpr = len(fused.product)
    tl.store(ptrs + 3 * M, fused.log_sum, mask=mask_b)
    tl.store(ptrs + 3 * M + 1, fused.maximum, mask=mask_b)
    for m in tl.static_range(M):
        tl.store(ptrs + 3 * M + 2 + m, fused.product[m], mask=mask_b)
    if len(fused.smooths.share) > 0:
        ptrs += 4 * M + 2
        for i in tl.static_range(M + 1):
            tl.store(ptrs + 2 * i, fused.smooths.share[i], mask=mask_b)
            tl.store(ptrs + 2 * i + 1, fused.smooths.mass[i], mask=mask_b)


@triton.jit
def load_fused(ptrs, mask_b, labels, plan):
    """A Fused from the statistics; of the Smooths, what gradients need."""
    log_sum = tl.load(ptrs + 3 * plan.M, mask=mask_b, other=0.0)
    maximum = tl.load(ptrs + 3 * plan.M + 1, mask=mask_b, other=0.0)
    product = ()
    for m in tl.static_range(plan.M):
        product = product + (tl.load(ptrs + 3 * plan.M + 2 + m, mask=mask_b, other=0.0),)
    share = ()
    mass = ()
    if len(labels.smoothing) > 0:
        ptrs += 4 * plan.M + 2
        for i in tl.static_range(plan.M + 1):
            share = share + (tl.load(ptrs + 2 * i, mask=mask_b, other=0.0),)
            mass = mass + (tl.load(ptrs + 2 * i + 1, mask=mask_b, other=0.0),)
    return Fused(maximum, log_sum, product, Smooths(share, mass, (), ()))


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_streamed(logits, gate, targets, outputs, means, batch, plan: tl.constexpr):
    """`cross_entropy_rows` (rows_cross_entropy.py) of one row at a time, and the statistics."""
    every = loading.load_numbers(gate, plan)
    sums = zero_losses(plan)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        labels = loading.load_labels(targets, (), block, plan)
        scores = loading.load_scores(gate, block, plan)
        true_logits = loading.load_target_logits(logits, numbers, block, labels, plan)
        softmax = stream_softmaxes(logits, numbers, block, plan)
        uncertainty = uncertainties(softmax.entropy, plan.K)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        loading.store_each(outputs.weights_ptr, block, weights)
        fused_true_logit = fuse_rows(true_logits, weights, numbers.gamma)
        fused = stream_fused(
            logits, targets, numbers, weights, true_logits, fused_true_logit, labels, block, plan
        )
        losses = streamed_cross_entropies(
            softmax, fused, true_logits, fused_true_logit, labels, block.available
        )
        sums = store_losses(outputs, sums, losses, targets, labels, block, plan)
        statistics_ptrs = outputs.statistics_ptr + block.offs * columns(labels, plan)
        store_softmaxes(statistics_ptrs, block.mask, softmax)
        store_fused(statistics_ptrs, block.mask, fused)
    if outputs.nll_ptr is None:
        store_means(means, sums[: plan.M + 1], sums[plan.M + 1 :], 1, 1024)


class Flow(NamedTuple):
    """What flows back to the logits of a row, besides what they are themselves."""

    weights: tl.tuple  # M of [B]
    softmax: tl.tuple  # Softmaxes
    fused: tl.tuple  # Fused
    labels: tl.tuple  # Labels
    back: tl.tuple  # GateGradients
    by_nll: tl.tensor  # [B] by the fused cross-entropy
    by_unimodal: tl.tuple  # M of [B] by each modality's own, or none
    rows: tl.tuple  # M of [B]: where a modality's logits get a gradient


@triton.jit
def stream_gradients(logits, targets, numbers, flow, block, grads, plan):
    """Write the gradients by the logits in one pass, and give those by the temperature, M of [B].

    `flow`: a Flow.
    """
    along = (tl.zeros((block.offs.shape[0], plan.BLOCK_K), plan.ACC),) * plan.M
    softmax = flow.softmax
    fused = flow.fused
    for start in range(0, plan.K, plan.BLOCK_K):
        offs_k = start + tl.arange(0, plan.BLOCK_K)
        is_target = offs_k[None, :] == flow.labels.targets[:, None]
        class_weight = loading.load_class_weight(targets, offs_k, plan)
        labels = with_class_weight(flow.labels, class_weight)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        f = fuse(t, flow.weights, numbers.gamma)
        grad = flow.by_nll[:, None] * cross_entropy_slope(
            f, fused.maximum, fused.log_sum, fused.smooths, plan.M, labels, is_target
        )
        tiles = ()
        for m in tl.static_range(plan.M):
            rows = flow.rows[m][:, None]
            slope = logit_slope(t, m, softmax, flow.back, flow.weights, numbers.gamma, grad)
            if len(flow.by_unimodal) > 0:
                own = own_slope(t, m, softmax, fused.smooths, labels, is_target)
                slope += flow.by_unimodal[m][:, None] * own
            slope = tl.where(rows, slope, 0.0) * numbers.inverse[m]
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
            tiles = tiles + (tl.where(rows, -slope * finite(t[m]), 0.0),)
        along = add_each(along, tiles)
    return row_sums(along, plan.JOINT)


@triton.jit(do_not_specialize=["batch"])
def cross_entropy_streamed_backward(
    logits, gate, targets, kept, upstream, grads, batch, plan: tl.constexpr
):
    """`cross_entropy_rows_backward` (rows_cross_entropy.py) of one row at a time."""
    every = loading.load_numbers(gate, plan)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        labels = loading.load_labels(targets, (), block, plan)
        active = labels.counted if upstream.weights_ptr is None else block.mask
        weights = loading.load_each(kept.weights_ptr, block.offs, block.mask, plan)
        statistics_ptrs = kept.statistics_ptr + block.offs * columns(labels, plan)
        softmax = load_softmaxes(statistics_ptrs, block.mask, plan)
        fused = load_fused(statistics_ptrs, block.mask, labels, plan)
        by_nll = tl.zeros((1,), plan.ACC)
        given = loading.load_loss_gradients(
            upstream.nll_ptr, 0, upstream, block, labels.counted, 1, plan
        )
        if len(given) > 0:
            by_nll = given[0]
        product = ()
        rows = ()
        for m in tl.static_range(plan.M):
            product = product + (tl.where(by_nll == 0.0, 0.0, by_nll * fused.product[m]),)
            rows = rows + (active & block.available[m],)
        back = gate_gradients(
            product,
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
        flow = Flow(weights, softmax, fused, labels, back, by_nll, by_unimodal, rows)
        by_temperature = stream_gradients(logits, targets, numbers, flow, block, grads, plan)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_partial(grads.partial_ptr, partial)

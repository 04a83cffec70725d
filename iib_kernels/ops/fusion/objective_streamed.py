"""The fusion's part of the objective for rows with more classes than registers hold.

Three passes over a row, as its cross-entropies take two (streamed_cross_entropy.py) and their
gradients one.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import add_partial, store_partial, store_sums, zero_partial
from iib_kernels.ops.fusion.streamed_cross_entropy import (
    Flow,
    stream_gradients,
    streamed_cross_entropies,
)
from iib_kernels.ops.fusion.streaming import stream_fused, stream_softmaxes
from iib_kernels.ops.fusion.tiles import (
    add_each,
    fuse_rows,
    gate_gradients,
    gate_weights,
    uncertainties,
)


@triton.jit(do_not_specialize=["batch"])
def objective_streamed(
    logits, gate, targets, factors_ptr, weights_ptr, losses_ptr, grads, batch, plan: tl.constexpr
):
    """`objective_rows` (objective.py) of one row at a time."""
    every = loading.load_numbers(gate, plan)
    sums = (tl.zeros((1,), plan.ACC),) * (plan.M + 1)
    partial = zero_partial(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        numbers = loading.row_numbers(every, gate, block)
        labels = loading.load_labels(targets, (), block, plan)
        counted = labels.counted
        scores = loading.load_scores(gate, block, plan)
        true_logits = loading.load_target_logits(logits, numbers, block, labels, plan)
        softmax = stream_softmaxes(logits, numbers, block, plan)
        uncertainty = uncertainties(softmax.entropy, plan.K)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available)
        loading.store_each(weights_ptr, block, weights)
        true_logit = fuse_rows(true_logits, weights, numbers.gamma)
        fused = stream_fused(
            logits, targets, numbers, weights, true_logits, true_logit, labels, block, plan
        )
        losses = streamed_cross_entropies(
            softmax, fused, true_logits, true_logit, labels, block.available
        )
        sums = add_each(sums, losses)
        by_nll = tl.where(counted, tl.load(factors_ptr).to(plan.ACC), 0.0)
        by_unimodal = ()
        product = ()
        rows = ()
        for m in tl.static_range(plan.M):
            factor = tl.load(factors_ptr + m + 1).to(plan.ACC)
            by_unimodal = by_unimodal + (tl.zeros((1,), plan.ACC) + factor,)
            product = product + (by_nll * fused.product[m],)
            rows = rows + (counted & block.available[m],)
        back = gate_gradients(product, weights, (), (), uncertainty, numbers, counted, plan.K)
        loading.store_each(grads.gate_ptr, block, back.score)
        flow = Flow(weights, softmax, fused, labels, back, by_nll, by_unimodal, rows)
        by_temperature = stream_gradients(logits, targets, numbers, flow, block, grads, plan)
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature)
    store_sums(losses_ptr, sums)
    store_partial(grads.partial_ptr, partial)

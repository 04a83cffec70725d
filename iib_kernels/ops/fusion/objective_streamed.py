"""The fusion's part of the objective for rows with more classes than registers hold.

Three passes over a row, as its cross-entropies take two (streamed_cross_entropy.py) and their
gradients one.
"""

import triton
import triton.language as tl

from iib_kernels.ops.fusion.loading import (
    load_block,
    load_labels,
    load_numbers,
    load_scores,
    load_target_logits,
    row_numbers,
    store_each,
)
from iib_kernels.ops.fusion.partial import add_partial, store_partial, store_sums, zero_partial
from iib_kernels.ops.fusion.streamed_cross_entropy import (
    Flow,
    stream_gradients,
    streamed_cross_entropies,
)
from iib_kernels.ops.fusion.streaming import add_each, stream_fused, stream_softmaxes
from iib_kernels.ops.fusion.tiles import fuse_rows, gate_gradients, gate_weights, uncertainties


@triton.jit(do_not_specialize=["batch"])
def objective_streamed(
    logits,
    gate,
    targets,
    factors_ptr,
    weights_ptr,
    losses_ptr,
    grads,
    batch,
    BLOCK_K: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    JOINT: tl.constexpr,
):
    """`objective_rows` (objective.py) of one row at a time."""
    every = load_numbers(gate, M, ACC)
    sums = (tl.zeros((1,), ACC),) * (M + 1)
    partial = zero_partial(grads.partial_ptr, 1, M, ACC)
    for number in range(tl.program_id(0), batch, tl.num_programs(0)):
        block = load_block(gate, number, batch, 1, M)
        numbers = row_numbers(every, gate, block, M, ACC)
        labels = load_labels(targets, (), block, K, ACC)
        counted = labels.counted
        scores = load_scores(gate, block, M, ACC)
        true_logits = load_target_logits(logits, numbers, block, labels, M, ACC)
        softmax = stream_softmaxes(logits, numbers, block, K, M, ACC, JOINT, BLOCK_K)
        uncertainty = uncertainties(softmax.entropy, K, M, ACC)
        weights = gate_weights(scores, numbers.kappa, uncertainty, block.available, M)
        store_each(weights_ptr, block, weights, M)
        true_logit = fuse_rows(true_logits, weights, numbers.gamma, M)
        fused = stream_fused(
            logits,
            targets,
            numbers,
            weights,
            true_logits,
            true_logit,
            labels,
            block,
            K,
            M,
            ACC,
            JOINT,
            BLOCK_K,
        )
        losses = streamed_cross_entropies(
            softmax, fused, true_logits, true_logit, labels, block.available, M
        )
        sums = add_each(sums, losses, M + 1)
        by_nll = tl.where(counted, tl.load(factors_ptr).to(ACC), 0.0)
        by_unimodal = ()
        product = ()
        rows = ()
        for m in tl.static_range(M):
            factor = tl.load(factors_ptr + m + 1).to(ACC)
            by_unimodal = by_unimodal + (tl.zeros((1,), ACC) + factor,)
            product = product + (by_nll * fused.product[m],)
            rows = rows + (counted & block.available[m],)
        back = gate_gradients(product, weights, (), (), uncertainty, numbers, counted, K, M, ACC)
        store_each(grads.gate_ptr, block, back.score, M)
        flow = Flow(weights, softmax, fused, labels, back, by_nll, by_unimodal, rows)
        by_temperature = stream_gradients(
            logits, targets, numbers, flow, block, grads, BLOCK_K, K, M, ACC, JOINT
        )
        partial = add_partial(grads.partial_ptr, partial, back, by_temperature, M)
    store_sums(losses_ptr, sums, M + 1)
    store_partial(grads.partial_ptr, partial, M)

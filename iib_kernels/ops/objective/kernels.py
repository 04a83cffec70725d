"""The objective of a few classes, losses and gradients, in one launch (method page, section 5).

A program holds BLOCK_B rows of all modalities, with all classes in one block: the cross-entropies
from the logits, the prototype losses from the features, and the gradients by both, which need
nothing that is not at hand. Programs walk over the rows with a stride, so that their number, and
with it the number of partial sums, stays small.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.objective import objective_of_tiles
from iib_kernels.ops.fusion.tiles import target_logits
from iib_kernels.ops.objective.batch import (
    add_entries,
    count_batch,
    entries,
    finish,
    load_weights,
)
from iib_kernels.ops.objective.prototypes import prototype_losses
from iib_kernels.ops.tiles import load_scalar


class Weights(NamedTuple):
    """What each kind of loss weighs: numbers, or pointers where float32 would lose digits."""

    fused: tl.tensor
    unimodal: tl.tensor
    contrastive: tl.tensor
    alignment: tl.tensor


class Outputs(NamedTuple):
    """Where everything goes; the gradients are None where nothing asks for them."""

    loss: tl.tensor  # []
    parts: tl.tensor  # [3 M + 1]
    weights: tl.tensor  # [B, M]
    grad_logits: tl.tuple  # M of [B, K]
    grad_features: tl.tuple  # M of [B, D_m]
    sums: tl.tensor  # [programs, 3 M + 1]
    tickets: tl.tensor  # [1]


@triton.jit(do_not_specialize=["batch"])
def objective_small(
    logits,
    gate,
    targets,
    tables,
    weights,
    outputs,
    batch,
    plan: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Losses, their means over the batch, and gradients.

    `plan`: a Plan (fusion/loading.py). PROTOTYPES: how the prototype losses are computed
    (prototypes.How), or None to leave them out.
    """
    seen_ptrs = None if PROTOTYPES is None else tables.seen
    # What a part's mean is divided by, [J]
    divisors = count_batch(targets, gate.mask_ptr, seen_ptrs, batch, plan.K, plan.M, J, plan.ACC)
    factors = load_weights(weights, plan.M, J, NUMBER_POINTER, plan.ACC)
    shares = factors / divisors  # what a row's losses weigh
    numbers = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    class_weight = loading.load_class_weight(targets, offs_k, plan)
    sums = tl.zeros((J,), plan.ACC)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        labels = loading.load_labels(targets, class_weight, block, plan)
        is_target = offs_k[None, :] == labels.targets[:, None]
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        losses, fusion_weights, _, slopes = objective_of_tiles(
            t,
            target_logits(t, is_target, plan.JOINT),
            loading.load_scores(gate, block, plan),
            block.available,
            labels,
            is_target,
            entries(shares, 0, plan.M + 1),
            loading.row_numbers(numbers, gate, block),
            plan,
        )
        loading.store_each(outputs.weights, block, fusion_weights)
        if outputs.grad_logits is not None:
            for m in tl.static_range(plan.M):
                loading.store_rows(outputs.grad_logits, m, block, offs_k, slopes[m], plan.K)
        sums = add_entries(sums, 0, losses, plan.M + 1)
        if PROTOTYPES is not None:
            contrastive, alignment = prototype_losses(
                tables,
                block,
                labels,
                load_scalar(weights.contrastive, NUMBER_POINTER, plan.ACC),
                load_scalar(weights.alignment, NUMBER_POINTER, plan.ACC),
                entries(divisors, plan.M + 1, plan.M),
                outputs.grad_features,
                plan.K,
                plan.M,
                plan.ACC,
                plan.BLOCK_K,
                PROTOTYPES,
            )
            sums = add_entries(sums, plan.M + 1, contrastive, plan.M)
            sums = add_entries(sums, 2 * plan.M + 1, alignment, plan.M)
    finish(sums, divisors, factors, outputs, 3 * plan.M + 1, J, plan.ACC, BLOCK_P)

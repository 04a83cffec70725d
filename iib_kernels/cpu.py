"""A training step of :class:`~iibalance.nn.head.IIBalanceHead` for all modalities in one batched pass: the CPU's fast path.

On a CPU with small encoders most of a step is the cost of calling operations, not of computing them: heads, losses, gradients and the prototypes' update take a fraction
here of what they take one by one. Same equations, same results to rounding. The general path takes whatever this one does not: a GPU, embeddings of different sizes, missing
modalities, ignored rows, classes not seen yet, other dtypes, metrics and objectives, hooks, ``torch.compile``, ``torch.func``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_in_transform = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)  # torch.func.grad and the like
EPS = 1e-12  # a shorter embedding has no direction, as in iib_kernels
_ZERO = torch.tensor(0.0)


class Weights(NamedTuple):
    """Of the terms of the objective, as in :class:`~iibalance.nn.loss.IIBalanceLoss`; alpha and beta already times lambda(t)."""

    fused: float
    unimodal: float
    alpha: float
    beta: float


class StepOutput(NamedTuple):
    """What a step gives; gradients flow from all but the last."""

    total: Tensor  #: []
    fused: Tensor  #: []
    unimodal: Tensor  #: [M]
    contrastive: Tensor  #: [M]
    alignment: Tensor  #: [M]
    logits: Tensor  #: [M, B, K]
    summed: Tensor  #: [B, K] logits
    rows: Tensor  #: [M, B, D] embeddings at unit length


def takes(impl: str, targets: Tensor, classes: int, *groups: Sequence[Tensor]) -> bool:
    """Whether the fast path applies: ``impl="auto"``, every target one of the ``classes`` and, within each group, float32 CPU tensors of one shape."""
    if (
        torch.compiler.is_compiling()
        or impl != "auto"
        or not targets.is_cpu
        or targets.dtype is not torch.int64
        or not len(targets)
    ):
        return False
    if torch.is_autocast_enabled("cpu") or _in_transform():
        return False
    for group in groups:
        shape = group[0].shape
        for values in group:
            if values.dtype is not torch.float32 or not values.is_cpu or values.shape != shape:
                return False
    low, high = torch.aminmax(targets)
    return int(low) >= 0 and int(high) < classes


def step(
    embeddings: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Tensor,
    prototypes: Sequence[Tensor],
    budgets: Tensor,
    temperature: float,
    terms: Weights,
) -> StepOutput:
    """Heads and objective (method page, section 3; neutral gate, cosine metric): embeddings M of [B, D], weights M of [K, D], biases M of [K], targets [B] in
    [0, K), prototypes M of [K, D], budgets [M].

    Gradients to embeddings, weights and biases, once: asked for a graph of them (``create_graph=True``) it raises RuntimeError; give ``impl="reference"``.
    """
    fixed = targets, prototypes, 2 / temperature, terms, *_relative(tuple(budgets.tolist()))
    return StepOutput(*_Step.apply(fixed, *embeddings, *weights, *biases))


@lru_cache(64)
def _relative(budgets: tuple[float, ...]) -> tuple[int, Tensor]:
    anchor = max(range(len(budgets)), key=budgets.__getitem__)
    return anchor, torch.tensor(
        [[value / budgets[anchor] if budgets[anchor] > 0 else 1.0] for value in budgets]
    )


@lru_cache(64)
def _shares(terms: Weights, count: int) -> Tensor:
    return torch.tensor(
        [terms.unimodal] * count + [terms.alpha] * count + [terms.fused] + [terms.beta] * count
    )


@torch.no_grad()
def update(
    prototypes: Sequence[Tensor],
    counts: Sequence[Tensor],
    rows: Tensor,
    targets: Tensor,
    momentum: float,
    complete: bool,
) -> None:
    """Move the prototypes (M of [K, D]) and counts (M of [K]) in place towards the batch (section 2; cosine metric).

    ``rows`` [M, B, D] are the embeddings at unit length (:func:`unit`); ``complete``: all classes have been seen.
    """
    old = torch.stack(prototypes)  # [M, K, D]
    fresh = torch.bincount(targets, minlength=old.shape[1])
    # Momentum times what was and the rest times the batch's mean, both times the count: only the direction counts
    moved = old * (momentum * fresh).unsqueeze(1)
    if not complete:
        moved = moved.where((torch.stack(counts) > 0)[..., None], 0.0)
    moved = unit(moved.index_add_(1, targets, rows, alpha=1 - momentum))[0]
    if not int(fresh.min()):
        moved = moved.where((fresh > 0)[:, None], old)
    torch._foreach_copy_(prototypes, moved.unbind())
    torch._foreach_add_(counts, [fresh] * len(counts))


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at unit length and the inverses of their lengths; a zero row stays zero and has inverse 0."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse = torch.threshold_(length, EPS, math.inf).reciprocal_()
    return rows * inverse, inverse


class _Step(torch.autograd.Function):
    # Heads and prototypes are one table [M, 2K, D], so that one product gives both kinds of scores, and one softmax all distributions:
    # M heads, M prototype posteriors and the fused one. What counts here is the number of operations, not their size.
    @staticmethod
    def forward(ctx, fixed, *tensors):
        targets, prototypes, scale, terms, anchor, relative = fixed
        count = len(prototypes)
        inputs, weights, biases = (
            torch.stack(tensors[:count]),
            tensors[count : 2 * count],
            tensors[2 * count :],
        )
        classes, size = weights[0].shape
        table = torch.cat([part for pair in zip(weights, prototypes) for part in pair]).view(
            count, 2 * classes, size
        )
        # [M, 2K, B], as softmax is many times faster along a middle dimension than along a short last one
        logits, scores = torch.bmm(table, inputs.mT).chunk(2, 1)
        rows, inverse = unit(inputs)
        logits = logits + torch.stack(biases).unsqueeze(2)
        summed = logits.sum(0, keepdim=True)
        log_p = torch.cat(
            [logits, torch.addcmul(_ZERO, scores, inverse.mT, value=scale), summed]
        ).log_softmax(1)  # [2M + 1, K, B]
        error = log_p.exp()  # p, and in the end p less the target's one: the gradient of a cross-entropy by its scores
        index = targets.expand(2 * count + 1, 1, -1)
        log_true = log_p.gather(1, index).squeeze(1)  # [2M + 1, B]
        confidence = log_true[count : 2 * count].exp()
        deviation = (relative * confidence[anchor]).sub_(confidence).clamp_min_(0)  # [M, B]
        log_q = log_p[count : 2 * count]
        divergence = (log_q[anchor] - log_q).mul_(error[count + anchor]).sum(1)
        parts = torch.cat([log_true.neg_(), divergence.mul_(deviation)]).mean(1)
        share = _shares(terms, count)
        total = torch.dot(parts, share)
        error.scatter_(1, index, -1.0, reduce="add")
        ctx.anchor, ctx.scale, ctx.terms, ctx.count, ctx.share = anchor, scale, terms, count, share
        ctx.set_materialize_grads(False)
        summed = summed.squeeze(0).mT
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(table, inputs, rows, inverse, log_p, error, deviation)
        unimodal, contrastive, fused, alignment = parts.split_with_sizes([count, count, 1, count])
        return total, fused.squeeze(0), unimodal, contrastive, alignment, logits.mT, summed, rows

    @staticmethod
    def backward(ctx, total, fused, unimodal, contrastive, alignment, by_logits, by_summed, _):
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True: without this the second-order terms would be missing silently
            raise RuntimeError(
                'IIBalanceHead: its fast path on the CPU has first derivatives only; for second ones give impl="reference"'
            )
        table, inputs, rows, inverse, log_p, error, deviation = ctx.saved_tensors
        count, batch = ctx.count, error.shape[2]
        upstream = ctx.share * (
            0.0 if total is None else float(total) / batch
        )  # of the entropies, then of the alignment
        for gradient, start, stop in (
            (unimodal, 0, count),
            (contrastive, count, 2 * count),
            (fused, 2 * count, 2 * count + 1),
            (alignment, 2 * count + 1, None),
        ):
            if gradient is not None:
                upstream[start:stop].add_(gradient / batch)
        cross, pulled = upstream.split_with_sizes([2 * count + 1, count])
        by_heads, by_distances, by_fused = (error * cross.view(-1, 1, 1)).split_with_sizes(
            [count, count, 1]
        )
        by_heads.add_(by_fused)
        if ctx.terms.beta or alignment is not None:
            off = error[count : 2 * count]
            by_distances.addcmul_(
                off - off[ctx.anchor], (deviation * pulled.unsqueeze(1)).unsqueeze(1)
            )  # KL(q_a || q) by the scores: q - q_a
        if by_logits is not None:
            by_heads.add_(by_logits.mT)
        if by_summed is not None:
            by_heads.add_(by_summed.mT)
        # Through the unit length: less the part along the row. by_distances sums to 0 over the classes, so log_q serves for the scores
        along = (
            (by_distances * log_p[count : 2 * count]).sum(1).unsqueeze(2).mul_(inverse)
        )  # [M, B, 1]
        joined = torch.cat(
            [by_heads, torch.addcmul(_ZERO, by_distances, inverse.mT, value=ctx.scale)], 1
        )
        by_inputs = torch.bmm(joined.mT, table).addcmul_(rows, along, value=-1)
        by_weights, by_biases = torch.bmm(by_heads, inputs), by_heads.sum(2)
        return None, *by_inputs.unbind(), *by_weights.unbind(), *by_biases.unbind()

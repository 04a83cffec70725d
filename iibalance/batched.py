"""A training step of :class:`~iibalance.head.IIBalanceHead` for all modalities in one batched pass: the CPU's fast path.

On a CPU with small encoders most of a step is the cost of calling operations, not of computing them: heads, losses, gradients and the prototypes' update take a fraction
here of what they take one by one. Same equations, same results to rounding. The general path takes whatever this one does not: a GPU, embeddings of different sizes, missing
modalities, ignored rows, classes not seen yet, other dtypes, metrics and objectives, hooks, ``torch.compile``, ``torch.func``.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)  # torch.func.grad and the like
EPS = 1e-12  # a shorter embedding has no direction, as in iib_kernels


class Weights(NamedTuple):
    """Of the terms of the objective, as in :class:`~iibalance.objective.IIBalanceLoss`; alpha and beta already times lambda(t)."""

    fused: float
    unimodal: float
    alpha: float
    beta: float


class StepOutput(NamedTuple):
    """What a step gives; gradients flow from all but the last two."""

    total: Tensor  #: []
    fused: Tensor  #: []
    unimodal: Tensor  #: [M]
    contrastive: Tensor  #: [M]
    alignment: Tensor  #: [M]
    logits: Tensor  #: [M, B, K]
    summed: Tensor  #: [B, K]
    rows: Tensor  #: [M, B, D] embeddings at unit length


def takes(impl: str, targets: Tensor, classes: int, *groups: Sequence[Tensor]) -> bool:
    """Whether the fast path applies: ``impl="auto"``, every target one of the ``classes`` and, within each group, float32 CPU tensors of one shape."""
    if torch.compiler.is_compiling() or impl != "auto" or targets.device.type != "cpu" or targets.dtype != torch.int64 or not len(targets):
        return False
    if torch.is_autocast_enabled("cpu") or _in_transform():
        return False
    for group in groups:
        first = group[0]
        if any(values.dtype != torch.float32 or values.device.type != "cpu" or values.shape != first.shape for values in group):
            return False
    low, high = torch.aminmax(targets)
    return int(low) >= 0 and int(high) < classes


def step(
    embeddings: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], targets: Tensor, prototypes: Sequence[Tensor], budgets: Tensor,
    temperature: float, terms: Weights,
) -> StepOutput:
    """Heads and objective (method page, section 3; neutral gate, cosine metric): embeddings M of [B, D], weights M of [K, D], biases M of [K], targets [B] in
    [0, K), prototypes M of [K, D], budgets [M].

    Gradients to embeddings, weights and biases, once: asked for a graph of them (``create_graph=True``) it raises RuntimeError; give ``impl="reference"``.
    """
    values = budgets.tolist()
    anchor = max(range(len(values)), key=values.__getitem__)
    relative = torch.tensor([[value / values[anchor] if values[anchor] > 0 else 1.0] for value in values])
    constants = targets, torch.stack(list(prototypes)), relative, anchor, 2 / temperature, terms, len(embeddings)
    return StepOutput(*_Step.apply(*constants, *embeddings, *weights, *biases))


@torch.no_grad()
def update(prototypes: Sequence[Tensor], counts: Sequence[Tensor], rows: Tensor, targets: Tensor, momentum: float, complete: bool) -> None:
    """Move the prototypes (M of [K, D]) and counts (M of [K]) in place towards the batch (section 2; cosine metric).

    ``rows`` [M, B, D] are the embeddings at unit length (:func:`unit`); ``complete``: all classes have been seen.
    """
    old = torch.stack(list(prototypes))  # [M, K, D]
    fresh = torch.bincount(targets, minlength=old.shape[1])
    mean = torch.zeros_like(old).index_add_(1, targets, rows).div_(fresh.clamp_min(1)[:, None])
    moved = old.lerp(mean, 1 - momentum)
    if not complete:
        moved = torch.where((torch.stack(list(counts)) > 0)[..., None], moved, mean)
    moved = torch.where((fresh > 0)[:, None], unit(moved)[0], old)
    torch._foreach_copy_(list(prototypes), list(moved.unbind()))
    torch._foreach_add_(list(counts), [fresh] * len(counts))


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at unit length and the inverses of their lengths; a zero row stays zero and has inverse 0."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse = length.reciprocal().masked_fill_(length <= EPS, 0.0)
    return rows * inverse, inverse


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, prototypes, relative, anchor, scale, terms, count, *tensors):
        inputs, weights, biases = torch.stack(tensors[:count]), torch.stack(tensors[count:2 * count]), torch.stack(tensors[2 * count:])
        index = targets.expand(count + 1, -1)[..., None]  # [M + 1, B, 1]
        logits = torch.baddbmm(biases[:, None], inputs, weights.mT)
        summed = logits.sum(0)
        log_p = torch.cat([logits, summed[None]]).log_softmax(-1)
        entropies = log_p.gather(2, index).squeeze(2).mean(1).neg_()
        unimodal, fused = entropies.split([count, 1])
        rows, inverse = unit(inputs)
        log_q = torch.bmm(rows, prototypes.mT).mul_(scale).log_softmax(-1)
        log_true = log_q.gather(2, index[:count]).squeeze(2)  # [M, B]
        confidence = log_true.exp()
        deviation = (relative * confidence[anchor]).sub_(confidence).clamp_min_(0)
        log_anchor = log_q[anchor]
        divergence = (log_anchor - log_q).mul_(log_anchor.exp()).sum(-1)
        contrastive, alignment = log_true.mean(1).neg_(), (deviation * divergence).mean(1)
        total = terms.fused * fused.squeeze(0) + terms.unimodal * unimodal.sum() + (terms.alpha * contrastive + terms.beta * alignment).sum()
        ctx.anchor, ctx.scale, ctx.terms, ctx.count = anchor, scale, terms, count
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(summed, rows)
        ctx.save_for_backward(targets, prototypes, rows, inputs, weights, log_p, inverse, log_q, deviation)
        return total, fused.squeeze(0), unimodal, contrastive, alignment, logits, summed, rows

    @staticmethod
    def backward(ctx, total, fused, unimodal, contrastive, alignment, by_logits, *_):
        if torch.is_grad_enabled():  # create_graph=True: without this the second-order terms would be missing silently
            raise RuntimeError('IIBalanceHead: its fast path on the CPU has first derivatives only; for second ones give impl="reference"')
        targets, prototypes, rows, inputs, weights, log_p, inverse, log_q, deviation = ctx.saved_tensors
        count, batch, terms = ctx.count, len(targets), ctx.terms
        index = targets.expand(count + 1, -1)[..., None]
        total = 0.0 if total is None else total / batch
        plus = lambda weight, gradient: total * weight if gradient is None else total * weight + gradient / batch
        vector = inverse.new_empty(count + 1)
        vector[:count], vector[count] = plus(terms.unimodal, unimodal), plus(terms.fused, fused)
        upstream = vector[:, None, None]
        entropies = log_p.exp().mul_(upstream).scatter_add_(2, index, -upstream.expand(index.shape))
        by_heads = entropies[:count].add_(entropies[count])
        if by_logits is not None:
            by_heads = by_heads + by_logits
        pull, pulled = inverse.new_empty(2, count, 1).unbind()
        pull[:, 0], pulled[:, 0] = plus(terms.alpha, contrastive), plus(terms.beta, alignment)
        pulled = pulled * deviation  # [M, B]; KL(q_a || q) by the scores: q - q_a
        by_scores = log_q.exp()
        anchor = by_scores[ctx.anchor].clone()
        by_scores.mul_((pull + pulled)[..., None]).sub_(pulled[..., None] * anchor)
        by_scores.scatter_add_(2, index[:count], -pull[..., None].expand(count, batch, 1))
        by_rows = torch.bmm(by_scores.mul_(ctx.scale), prototypes)
        by_rows.sub_(rows * (rows * by_rows).sum(-1, keepdim=True)).mul_(inverse)
        by_inputs = by_rows.baddbmm_(by_heads, weights)
        return (None,) * 7 + (*by_inputs.unbind(), *torch.bmm(by_heads.mT, inputs).unbind(), *by_heads.sum(1).unbind())

"""A training step on a CPU: heads, objective and prototypes of all modalities in one batched pass.

With small encoders most of a step on a CPU is the cost of calling operations, not of computing
them. So everything is stacked over the modalities here, and heads, losses, gradients and the
prototypes' update take a fraction of what they take one by one.

It is one of three implementations of the same equations: ``reference`` states them, the Triton
kernels compute them on a GPU, this computes a whole step on a CPU. Results are the same to
rounding.

:func:`takes` says where it applies. It leaves to the others whatever is not plain training of
linear heads: a GPU, embeddings of different sizes, missing modalities, ignored rows, other dtypes,
other metrics than the cosine, classes not seen yet, ``torch.compile`` and ``torch.func``.

Shapes: B samples, K classes, M modalities, embeddings of D components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels.reference import EPS

# Whether torch.func.grad or the like is around a call
_in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
# Constants are made so whatever the default device and dtype are at the time
_CONSTANT = {"dtype": torch.float32, "device": "cpu"}
_ZERO = torch.tensor(0.0, **_CONSTANT)


class Weights(NamedTuple):
    """Weights of the objective's terms (method page, section 5), as they are in this step.

    Schedules are already in them.
    """

    fused: float  #: of the cross-entropy of the summed logits
    unimodal: float  #: of each modality's own cross-entropy
    alpha: float  #: of the prototype contrast
    beta: float  #: of the alignment


class StepOutput(NamedTuple):
    """What :func:`step` gives; gradients flow from the total and the logits, the parts are for
    reading.
    """

    total: Tensor  #: [] the objective
    fused: Tensor  #: [] cross-entropy of the summed logits
    unimodal: Tensor  #: [M] cross-entropies of the heads
    contrastive: Tensor  #: [M] prototype contrast
    alignment: Tensor  #: [M]
    logits: Tensor  #: [M, B, K] of the heads
    summed: Tensor  #: [B, K] their sum
    rows: Tensor  #: [M, B, D] embeddings at unit length


def takes(impl: str, targets: Tensor, classes: int, *groups: Sequence[Tensor]) -> bool:
    """Whether this implementation may take a call.

    It may where ``impl`` is ``"auto"``, every target is one of the ``classes`` and, within each
    group, tensors are float32, on the CPU and of one shape.
    """
    if torch.compiler.is_compiling() or impl != "auto":
        return False
    if not targets.is_cpu or targets.dtype is not torch.int64 or not len(targets):
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
    """Linear heads and the objective over them (method page, section 3 and section 5).

    The gate is neutral (the fused logits are the sum of the heads'), the metric is the cosine.

    Args:
        embeddings: M of [B, D].
        weights: M of [K, D], of the heads.
        biases: M of [K], of the heads.
        targets: [B] in [0, K).
        prototypes: M of [K, D], at unit length.
        budgets: [M].
        temperature: tau > 0.
        terms: weights of the objective's terms.

    Gradients reach embeddings, weights and biases, once. Asked for a graph of them
    (``create_graph=True``), backward raises RuntimeError.
    """
    anchor, relative = _anchor_and_relative(tuple(budgets.tolist()))
    fixed = _Fixed(targets, prototypes, 2 / temperature, terms, anchor, relative)
    return StepOutput(*_Step.apply(fixed, *embeddings, *weights, *biases))


@torch.no_grad()
def update(
    prototypes: Sequence[Tensor],
    counts: Sequence[Tensor],
    rows: Tensor,
    targets: Tensor,
    momentum: float,
    complete: bool,
) -> None:
    """Move prototypes and counts in place towards the batch (method page, section 2).

    The metric is the cosine.

    Args:
        prototypes: M of [K, D].
        counts: M of [K], how many samples of each class have been seen.
        rows: [M, B, D] embeddings at unit length (:func:`unit`).
        targets: [B] in [0, K).
        momentum: mu in [0, 1).
        complete: whether all classes have been seen before.
    """
    old = torch.stack(prototypes)  # [M, K, D]
    fresh = torch.bincount(targets, minlength=old.shape[1])  # [K]
    # mu times the old one and (1 - mu) times the batch's mean, both times the class's count: only
    # the direction matters, so the sum of the rows will do for their mean
    moved = old * (momentum * fresh).unsqueeze(1)
    if not complete:  # a class seen for the first time takes the mean itself
        moved = moved.where((torch.stack(counts) > 0)[..., None], 0.0)
    moved = unit(moved.index_add_(1, targets, rows, alpha=1 - momentum))[0]
    if not int(fresh.min()):  # a class absent from the batch keeps its prototype
        moved = moved.where((fresh > 0)[:, None], old)
    torch._foreach_copy_(prototypes, moved.unbind())
    torch._foreach_add_(counts, [fresh] * len(counts))


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., D] at unit length and the inverses of their lengths [..., 1].

    A zero row stays zero and has inverse 0.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse = torch.threshold_(length, EPS, math.inf).reciprocal_()
    return rows * inverse, inverse


class _Fixed(NamedTuple):
    """Arguments of a step that get no gradient."""

    targets: Tensor  # [B]
    prototypes: Sequence[Tensor]  # M of [K, D]
    scale: float  # 2 / tau: scores are 2 / tau times the cosine, up to a constant
    terms: Weights
    anchor: int  # the modality with the largest budget
    relative: Tensor  # [M, 1] rho, budgets by the anchor's


@lru_cache(64)
def _anchor_and_relative(budgets: tuple[float, ...]) -> tuple[int, Tensor]:
    """The anchor and rho [M, 1]; all 1 where no budget is above 0."""
    anchor = max(range(len(budgets)), key=budgets.__getitem__)
    top = budgets[anchor]
    relative = [[value / top if top > 0 else 1.0] for value in budgets]
    return anchor, torch.tensor(relative, **_CONSTANT)


@lru_cache(64)
def _shares(terms: Weights, count: int) -> Tensor:
    """The weight of each of the step's mean losses [3 M + 1], in the order of ``parts``."""
    shares = [terms.unimodal] * count + [terms.alpha] * count + [terms.fused] + [terms.beta] * count
    return torch.tensor(shares, **_CONSTANT)


class _Step(torch.autograd.Function):
    """:func:`step` for autograd: (fixed, M embeddings, M weights, M biases) -> StepOutput's fields.

    What counts here is the number of operations, not their size. Heads and prototypes are one table
    [M, 2K, D], so that one product gives both kinds of scores; one softmax then gives all 2 M + 1
    distributions: M heads, M prototype posteriors and the fused one, in this order.

    Classes stand in the middle dimension, as softmax is many times faster along it than along a
    short last one.
    """

    @staticmethod
    def forward(ctx, fixed: _Fixed, *tensors):
        targets, prototypes, scale, terms, anchor, relative = fixed
        count = len(prototypes)
        weights, biases = tensors[count : 2 * count], tensors[2 * count :]
        inputs = torch.stack(tensors[:count])  # [M, B, D]
        classes, size = weights[0].shape
        table = torch.cat([part for pair in zip(weights, prototypes) for part in pair])
        table = table.view(count, 2 * classes, size)

        # Scores and their 2 M + 1 distributions
        logits, scores = torch.bmm(table, inputs.mT).chunk(2, 1)  # [M, K, B] each
        rows, inverse = unit(inputs)
        logits = logits + torch.stack(biases).unsqueeze(2)
        scores = torch.addcmul(_ZERO, scores, inverse.mT, value=scale)
        summed = logits.sum(0, keepdim=True)  # [1, K, B]
        log_p = torch.cat([logits, scores, summed]).log_softmax(1)  # [2M + 1, K, B]
        p = log_p.exp()

        # Cross-entropies, and the alignment of the posteriors q with the anchor's
        index = targets.expand(2 * count + 1, 1, -1)
        log_true = log_p.gather(1, index).squeeze(1)  # [2M + 1, B]
        confidence = log_true[count : 2 * count].exp()  # [M, B] q_m(i, y_i)
        deviation = (relative * confidence[anchor]).sub_(confidence).clamp_min_(0)  # [M, B]
        log_q = log_p[count : 2 * count]
        divergence = (log_q[anchor] - log_q).mul_(p[count + anchor]).sum(1)  # [M, B]
        parts = torch.cat([log_true.neg_(), divergence.mul_(deviation)]).mean(1)  # [3M + 1]
        share = _shares(terms, count)
        total = torch.dot(parts, share)

        error = p.scatter_(1, index, -1.0, reduce="add")  # a cross-entropy's gradient by scores
        ctx.anchor, ctx.scale, ctx.terms, ctx.count, ctx.share = anchor, scale, terms, count, share
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(table, inputs, rows, inverse, log_p, error, deviation)
        unimodal, contrastive, fused, alignment = parts.split_with_sizes([count, count, 1, count])
        fused, summed = fused.squeeze(0), summed.squeeze(0).mT
        ctx.mark_non_differentiable(fused, unimodal, contrastive, alignment, rows)
        return total, fused, unimodal, contrastive, alignment, logits.mT, summed, rows

    @staticmethod
    def backward(ctx, total, *others):
        by_logits, by_summed = others[4:6]
        # With create_graph=True second-order terms would be missing silently
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the CPU's fast training step has first derivatives only; for second ones give "
                'impl="reference"'
            )
        table, inputs, rows, inverse, log_p, error, deviation = ctx.saved_tensors
        count, batch, anchor = ctx.count, error.shape[2], ctx.anchor

        # What each sample's losses weigh: 2 M + 1 cross-entropies, then M alignments
        upstream = ctx.share * (0.0 if total is None else float(total) / batch)
        cross, pulled = upstream.split_with_sizes([2 * count + 1, count])

        # By the scores of the heads and of the prototypes, [M, K, B] each
        weighted = error * cross.view(-1, 1, 1)
        by_heads, by_distances, by_fused = weighted.split_with_sizes([count, count, 1])
        by_heads.add_(by_fused)
        if ctx.terms.beta:
            # KL(q_a || q) by the scores is q - q_a; the targets' ones in error cancel
            off = error[count : 2 * count]
            strength = (deviation * pulled.unsqueeze(1)).unsqueeze(1)
            by_distances.addcmul_(off - off[anchor], strength)
        if by_logits is not None:
            by_heads.add_(by_logits.mT)
        if by_summed is not None:
            by_heads.add_(by_summed.mT)

        # By the embeddings. The prototypes' scores see them at unit length: less the part along the
        # row. by_distances sums to 0 over the classes, so log_q serves for the scores
        along = (by_distances * log_p[count : 2 * count]).sum(1).unsqueeze(2).mul_(inverse)
        by_cosines = torch.addcmul(_ZERO, by_distances, inverse.mT, value=ctx.scale)
        by_products = torch.cat([by_heads, by_cosines], 1)  # [M, 2K, B]
        by_inputs = torch.bmm(by_products.mT, table).addcmul_(rows, along, value=-1)  # [M, B, D]
        by_weights, by_biases = torch.bmm(by_heads, inputs), by_heads.sum(2)
        return None, *by_inputs.unbind(), *by_weights.unbind(), *by_biases.unbind()

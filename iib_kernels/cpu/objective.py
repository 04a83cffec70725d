"""The whole objective of a batch on a CPU, with its gradients in the same pass.

The loss is one scalar, so what it will ask of each row is known before the rows are read: each
chunk is evaluated and differentiated while it is in cache, and backward multiplies by what comes
in.

Arguments are those of ``reference``, of one dtype, float32 or float64, and not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels.cpu import alignment, alignment_rows, fusion_rows, shared
from iib_kernels.cpu.alignment_rows import Counts, Tables, counts_of, tables_of, usable
from iib_kernels.cpu.fusion_rows import Collected, Options
from iib_kernels.cpu.shared import Labels, joined, part


class Terms(NamedTuple):
    """What each kind of loss weighs in the objective."""

    fused: float = 1.0
    unimodal: float = 1.0
    contrastive: float = 1.0
    alignment: float = 1.0


class Plan(NamedTuple):
    """What of a call gets no gradient."""

    terms: Terms
    labels: Labels
    counts: Counts | None  # these two: None without prototype losses
    tables: Tables | None
    modalities: int
    asked: bool  # whether gradients are wanted


def multimodal_objective(
    logits: Sequence[Tensor],
    targets: Tensor,
    features: Sequence[Tensor] | None = None,
    prototypes: Sequence[Tensor] | None = None,
    budgets: Tensor | None = None,
    weights: Sequence[float] = Terms(),
    *,
    log_prior: Tensor | None = None,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    prototype_temperature: float = 0.2,
    metric: str = "cosine",
    unit_prototypes: bool = False,
    seen: Sequence[Tensor] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], and what it is made of: fused [], unimodal, contrastive and alignment [M], and the
    fusion weights [B, M].

    loss = fused CE(f) + sum_m (unimodal CE_m + contrastive C_m + alignment A_m), with four numbers
    for ``weights``; each part is a mean over the rows that count for it, 0 where there are none.

    Only the loss is differentiable: in logits [B, K], features [B, D_m], ``log_prior``,
    ``gate_logits``, ``temperature``, ``uncertainty_weight`` and ``scale``, once. ``scale`` is a
    number, a tensor [], or [B] for one a row. Prototypes are left out where there are no features
    or both their weights are 0.
    """
    options = Options(log_prior, gate_logits, temperature, uncertainty_weight, scale, mask)
    terms, count, dtype = Terms(*map(float, weights)), len(logits), logits[0].dtype
    labels = shared.labels_of(
        targets, mask, count, dtype, ignore_index, "mean", weight, label_smoothing
    )
    counts = tables = None
    if features is None or not (terms.contrastive or terms.alignment):
        features = ()
    else:
        counts = counts_of(targets, mask, seen, count, ignore_index)
        how = budgets, prototype_temperature, metric, seen, unit_prototypes, dtype
        tables = tables_of(prototypes, *how)
    plan = Plan(terms, labels, counts, tables, count, torch.is_grad_enabled())
    return _Objective.apply(plan, *options, *logits, *features)


class _Objective(torch.autograd.Function):
    """(Plan, Options' fields, M logits, M or no features) -> loss, its parts, fusion weights."""

    @staticmethod
    def forward(ctx, plan, *arguments):
        options, tensors = Options(*arguments[:6]), arguments[6:]
        logits, features = tensors[: plan.modalities], tensors[plan.modalities :]
        asked = plan.asked and any(ctx.needs_input_grad)
        entropies, weights, gradients = _fusion(plan, options, logits, asked)
        terms = plan.terms
        loss = terms.fused * entropies[0] + terms.unimodal * entropies[1:].sum()
        contrastive = alignment = torch.zeros_like(entropies[1:])
        if features:
            contrastive, alignment, by_features = _prototypes(plan, features, asked)
            loss += terms.contrastive * contrastive.sum() + terms.alignment * alignment.sum()
            gradients = (*gradients, *by_features)
        if asked:
            ctx.save_for_backward(*gradients)
        parts = entropies[0], entropies[1:].clone(), contrastive, alignment, weights
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    def backward(ctx, upstream, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "multimodal_objective: its gradients on the CPU come with the loss and cannot be "
                'differentiated again; for second derivatives give impl="reference"'
            )
        gradients = ctx.saved_tensors
        made = [value for value in gradients if value is not None]
        scaled = torch._foreach_mul(made, upstream)
        if not math.isfinite(upstream):
            # A gradient of 0 stays 0: its row has no part in the loss
            for product, value in zip(scaled, made):
                product.masked_fill_(value == 0, 0.0)
        found = iter(scaled)
        return None, *(None if value is None else next(found) for value in gradients)


def _fusion(
    plan: Plan, options: Options, logits: Sequence[Tensor], asked: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Mean cross-entropies [M + 1], fusion weights [B, M] and, where asked, the gradients by the
    options' fields and the logits.
    """
    weigh = logits[0].new_tensor([plan.terms.fused] + [plan.terms.unimodal] * len(logits))
    by_losses = weigh.unsqueeze(1) * plan.labels.share  # [M + 1, B]
    losses, weights, collected = [], [], Collected(options, logits)
    for start, stop in shared.chunks(len(logits), *logits[0].shape):
        true, chosen = plan.labels.rows(start, stop), options.rows(start, stop, len(logits[0]))
        rows = fusion_rows.evaluate_losses(
            [part(value, start, stop) for value in logits], chosen, true
        )
        losses.append(rows.joint(true))
        weights.append(rows.rows.weights)
        if asked:
            by_rows = part(by_losses, start, stop, 1)
            found = fusion_rows.differentiate_losses(rows, chosen, true, by_rows)
            collected.add(found, start, stop)
    means = (joined(losses) * plan.labels.share).sum(1)
    return means, joined(weights).mT.contiguous(), collected.total() if asked else ()


def _prototypes(
    plan: Plan, features: Sequence[Tensor], asked: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean contrast and alignment, [M] each, and, where asked, the features' gradients."""
    counts, tables = plan.counts, plan.tables
    share = _share(counts, features)
    gradients = [torch.empty_like(value) for value in features] if asked else []
    sums = features[0].new_zeros(2, len(features))
    classes = tables.offset.shape[2]
    for start, stop in alignment.chunks(len(features), len(share.mT), classes, share.dtype):
        true, each = counts.rows(start, stop), part(share, start, stop, 1)
        values = usable([part(value, start, stop) for value in features], true)
        rows = alignment_rows.evaluate(values, true, tables)
        contrastive, pulled, _, strength = alignment_rows.losses(
            rows.log_true, rows.divergence, true, tables
        )
        sums += torch.stack([contrastive * each, pulled * each]).sum(2)
        if asked:
            alignment_rows.differentiate(
                values,
                rows,
                true,
                tables,
                each * plan.terms.contrastive,
                strength * each * plan.terms.alignment,
                [part(value, start, stop) for value in gradients],
            )
    return *sums.unbind(), gradients


def _share(counts: Counts, features: Sequence[Tensor]) -> Tensor:
    """Each row's share in its modality's mean, [M, B]; 0 where it does not count."""
    size = len(features), len(features[0])
    if counts.counts is None:
        return features[0].new_full((), 1 / max(1, size[1])).expand(size)
    known = counts.counts.to(features[0].dtype)
    return known / known.sum(1, keepdim=True).clamp_min(1)

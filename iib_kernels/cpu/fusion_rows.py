"""A chunk of rows through the gated fusion and its cross-entropies, and back.

Equations: method page, sections 4 and 5. Shapes: R rows of a chunk of a batch of B, K classes,
M modalities, which stand first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels.cpu import shared
from iib_kernels.cpu.shared import Labels, part
from iib_kernels.reference import NEVER


class Options(NamedTuple):
    """Arguments of a fusion besides the logits; all but the mask may get a gradient."""

    log_prior: Tensor | None = None  # [M]
    gate_logits: Tensor | None = None  # [B, M]
    temperature: Tensor | float = 1.0  # [] or [M]
    uncertainty_weight: Tensor | float = 1.0  # [] or [M]
    scale: Tensor | float = 1.0  # [], or [B] one a row
    mask: Tensor | None = None  # [B, M] bool

    def rows(self, start: int, stop: int, batch: int) -> Options:
        """These of some rows of a batch."""
        if stop - start == batch:
            return self
        scale = self.scale
        if isinstance(scale, Tensor) and scale.dim():
            scale = part(scale, start, stop)
        return self._replace(
            gate_logits=part(self.gate_logits, start, stop),
            mask=part(self.mask, start, stop),
            scale=scale,
        )


class Rows(NamedTuple):
    """What a fusion makes of the rows of a chunk."""

    scores: Tensor  # [M, R, K] t_m = l_m / T_m; 0 where ruled out or missing
    p: Tensor  # [M, R, K] softmax(t)
    # [M, R, K]. Not log_p itself, which is as large as the logits, and so is the gradient that it
    # would meet: beyond 1e18 their product overflows
    p_log_p: Tensor
    negentropy: Tensor  # [M, R] sum_k p log p
    uncertainty: Tensor  # [M, R]
    weights: Tensor  # [M, R]
    fused: Tensor  # [R, K]; NEVER where ruled out
    ruled_out: Tensor | None  # [M, R, K] bool; None where every logit is finite


class Upstream(NamedTuple):
    """Gradients that come in from what was made of the rows."""

    fused: Tensor | None = None  # [R, K]
    weights: Tensor | None = None  # [M, R]
    uncertainty: Tensor | None = None  # [M, R]
    unimodal: Tensor | None = None  # [M, R] of the modalities' own cross-entropies
    terms: shared.CrossEntropy | None = None  # these, of labels
    labels: Labels | None = None


class Gradients(NamedTuple):
    """Gradients of a chunk's rows. The parameters' are the sums of theirs over the rows."""

    logits: Tensor  # [M, R, K]
    score: Tensor | None = None  # [M, R] of the gate, the prior's summands
    temperature: Tensor | None = None  # [M, R]
    uncertainty_weight: Tensor | None = None  # [M, R]
    scale: Tensor | None = None  # [M, R]


def evaluate(logits: Sequence[Tensor], options: Options) -> tuple[Rows, Tensor]:
    """The fusion of a chunk's rows, M of [R, K]; and log_softmax(t), 0 where ruled out."""
    prior, gate, temperature, kappa, scale, mask = options
    scores = torch.stack(list(logits))
    present = None if mask is None else mask.mT
    if present is not None:  # a missing modality's row may hold anything
        scores.masked_fill_(~present.unsqueeze(2), 0.0)
    if isinstance(temperature, Tensor):
        scores.div_(temperature.reshape(-1, 1, 1))
    elif temperature != 1:
        scores.div_(temperature)
    log_p, p = shared.log_softmax(scores)
    p_log_p = p * log_p
    negentropy = p_log_p.sum(-1)
    ruled_out = None
    # 0 * -inf is NaN: this tells for next to nothing that a class is ruled out, or worse
    if not math.isfinite(negentropy.sum().item()):
        ruled_out = scores == NEVER
        for values in (scores, log_p, p):
            values.masked_fill_(ruled_out, 0.0)
        # A row without a softmax has no uncertainty in the reference
        p_log_p = torch.where(p > 0, p * log_p, 0.0)
        negentropy = p_log_p.sum(-1)
    classes = scores.shape[-1]
    uncertainty = negentropy * (-1 / math.log(classes) if classes > 1 else 0.0)
    weights = _scores_of_weights(uncertainty, prior, gate, kappa)
    if present is not None:
        weights.masked_fill_(~present, NEVER)
    weights = weights.softmax(0)
    fused = (scores * _scaled(weights, scale).unsqueeze(2)).sum(0)
    if ruled_out is not None:  # by any modality that has a say
        fused.masked_fill_((ruled_out & (weights > 0).unsqueeze(2)).any(0), NEVER)
    rows = Rows(scores, p, p_log_p, negentropy, uncertainty, weights, fused, ruled_out)
    return rows, log_p


def _scores_of_weights(
    uncertainty: Tensor, prior: Tensor | None, gate: Tensor | None, kappa: Tensor | float
) -> Tensor:
    """What the weights are a softmax of, [M, R]."""
    if isinstance(kappa, Tensor):
        uncertainty, kappa = uncertainty * kappa.reshape(-1, 1), 1.0
    if prior is None and gate is None:
        return uncertainty * -kappa
    rest = prior.unsqueeze(1) if gate is None else gate.mT
    if prior is not None and gate is not None:
        rest = rest + prior.unsqueeze(1)
    return torch.add(rest, uncertainty, alpha=-kappa)


def _scaled(values: Tensor, factor: Tensor | float) -> Tensor:
    """values * factor, without a call where that changes nothing."""
    return values if isinstance(factor, float) and factor == 1 else values * factor


def differentiate(rows: Rows, options: Options, upstream: Upstream) -> Gradients:
    """Gradients of the rows' logits and parameters."""
    scores, p, p_log_p, negentropy, uncertainty, weights, fused, ruled_out = rows
    _, _, temperature, kappa, scale, _ = options
    by_fused = upstream.fused
    if by_fused is not None and ruled_out is not None:
        by_fused = by_fused.masked_fill(fused == NEVER, 0.0)
    # By the weights, and so by their scores and by the uncertainty
    by_weights, dots, by_score = upstream.weights, None, None
    if by_fused is not None:
        dots = (scores * by_fused).sum(-1)  # [M, R]
        by_weights = _plus(_scaled(dots, scale), by_weights)
    classes, slope = scores.shape[-1], None
    if by_weights is not None:
        by_score = by_weights * weights
        by_score.addcmul_(weights, by_score.sum(0), value=-1)
    if classes > 1:  # by the negative entropy, whose logits' gradient is p (log p - itself)
        steepness = 1 / math.log(classes)
        if by_score is not None and isinstance(kappa, Tensor):
            slope = by_score * (kappa * steepness).reshape(-1, 1)
        elif by_score is not None and kappa:
            slope = by_score * (kappa * steepness)
        if upstream.uncertainty is not None:
            slope = _plus(upstream.uncertainty * -steepness, slope)
    # By the logits: slope p log_p + level p + share by_fused, less what only targets get
    own = upstream.unimodal
    level = None if own is None else _scaled(own, upstream.terms.mass)
    share = None if by_fused is None else _scaled(weights, scale)
    if slope is not None:
        centre = slope * negentropy
        level = centre.neg_() if level is None else level - centre
    if isinstance(temperature, Tensor) or temperature != 1:
        column = _column(temperature)
        slope, level, share, own = (
            None if value is None else value / column for value in (slope, level, share, own)
        )
    if slope is not None:
        by_logits = (p_log_p * slope.unsqueeze(2)).addcmul_(p, level.unsqueeze(2))
    elif level is not None:
        by_logits = p * level.unsqueeze(2)
    else:
        by_logits = torch.zeros_like(scores)
    if own is not None:
        shared.add_target_gradient(by_logits, own, upstream.terms, upstream.labels)
    if share is not None:
        by_logits.addcmul_(by_fused, share.unsqueeze(2))
    if ruled_out is not None:
        by_logits.masked_fill_(ruled_out, 0.0)
    found = Gradients(
        by_logits,
        by_score,
        _by_temperature(scores, by_logits, by_fused, share) if _wanted(temperature) else None,
        by_score * -uncertainty if _wanted(kappa) and by_score is not None else None,
        dots * weights if _wanted(scale) and dots is not None else None,
    )
    return found if ruled_out is None else _without_idle(found, upstream)


def _by_temperature(
    scores: Tensor, by_logits: Tensor, by_fused: Tensor | None, share: Tensor | None
) -> Tensor:
    """-sum_k t_k by_logits_k, [M, R], with what all classes have in common taken out.

    All gradients but the fused logits' add up to 0 in each row, and their rounding, times logits of
    1e30, would overflow.
    """
    top = scores.amax(-1, keepdim=True)
    below = (scores - top).clamp_min_(torch.finfo(scores.dtype).min)
    found = below.mul_(by_logits).sum(-1).neg_()
    if share is not None:
        found -= top.squeeze(-1) * (share * by_fused.sum(-1))
    return found


def _plus(value: Tensor, other: Tensor | None) -> Tensor:
    return value if other is None else value + other


def _wanted(parameter: Tensor | float) -> bool:
    return isinstance(parameter, Tensor) and parameter.requires_grad


def _column(parameter: Tensor | float) -> Tensor | float:
    """A parameter to go with [M, R]."""
    return parameter.reshape(-1, 1) if isinstance(parameter, Tensor) else parameter


def _without_idle(found: Gradients, upstream: Upstream) -> Gradients:
    """No gradient where none comes in: such a row may hold NaN, which times 0 is NaN."""
    asked = torch.zeros_like(found.logits[0, :, 0], dtype=torch.bool)
    if upstream.fused is not None:
        asked |= (upstream.fused != 0).any(-1)
    for value in (upstream.weights, upstream.uncertainty, upstream.unimodal):
        if value is not None:
            asked |= (value != 0).any(0)
    found.logits.masked_fill_(~asked.unsqueeze(1), 0.0)
    rest = (None if value is None else value.masked_fill_(~asked, 0.0) for value in found[1:])
    return Gradients(found.logits, *rest)


def fused_gradient(
    rows: Rows, p: Tensor, upstream: Tensor, terms: shared.CrossEntropy, labels: Labels
) -> Tensor:
    """Gradient [R, K] of the fused logits' cross-entropies by the fused logits.

    Args:
        p: [R, K] softmax of the fused logits.
        upstream: [R].
    """
    gradient = p * _scaled(upstream, terms.mass).unsqueeze(1)
    shared.add_target_gradient(gradient, upstream, terms, labels)
    if rows.ruled_out is not None or labels.counts is not None:
        # A row that does not count may hold anything, and 3e38 times a scale is inf
        gradient.masked_fill_((upstream == 0).unsqueeze(1), 0.0)
    return gradient


class Losses(NamedTuple):
    """Cross-entropies of a chunk's rows."""

    rows: Rows
    p: Tensor  # [R, K] softmax of the fused logits
    fused: shared.CrossEntropy
    unimodal: shared.CrossEntropy

    def joint(self, labels: Labels) -> Tensor:
        """[M + 1, R] of the fused logits and of each modality's, 0 where they do not count."""
        loss = torch.cat([self.fused.loss.unsqueeze(0), self.unimodal.loss])
        return loss if labels.counts is None else loss.masked_fill_(~labels.counts, 0.0)


def evaluate_losses(logits: Sequence[Tensor], options: Options, labels: Labels) -> Losses:
    """The fusion of a chunk's rows and its cross-entropies."""
    rows, every = evaluate(logits, options)
    log_p, p = shared.log_softmax(rows.fused)
    ruled_out = None
    if rows.ruled_out is not None:
        ruled_out = rows.fused == NEVER
        for values in (log_p, p):
            values.masked_fill_(ruled_out, 0.0)
    fused = shared.cross_entropy(log_p, labels, ruled_out)
    unimodal = shared.cross_entropy(every, labels, rows.ruled_out)
    return Losses(rows, p, fused, unimodal)


def differentiate_losses(
    losses: Losses,
    options: Options,
    labels: Labels,
    by_losses: Tensor,
    by_weights: Tensor | None = None,
) -> Gradients:
    """Gradients of the rows.

    Args:
        by_losses: [M + 1, R], 0 where they do not count.
        by_weights: [M, R].
    """
    by_fused, by_unimodal = by_losses[0], by_losses[1:]
    by_fused = fused_gradient(losses.rows, losses.p, by_fused, losses.fused, labels)
    upstream = Upstream(by_fused, by_weights, None, by_unimodal, losses.unimodal, labels)
    return differentiate(losses.rows, options, upstream)


class Collected:
    """Gradients of a whole batch, from those of its chunks."""

    def __init__(self, options: Options, logits: Sequence[Tensor]):
        self.options, self.batch = options, len(logits[0])
        self.shape = (len(logits), *logits[0].shape)
        self.logits: Tensor | None = None
        self.rows: list[tuple[Tensor | None, ...]] = []

    def add(self, found: Gradients, start: int, stop: int) -> None:
        if stop - start == self.batch:
            self.logits = found.logits
        else:
            if self.logits is None:
                self.logits = found.logits.new_empty(self.shape)
            self.logits[:, start:stop] = found.logits
        self.rows.append(found[1:])

    def total(self) -> tuple[Tensor | None, ...]:
        """By the fields of the options and by the logits."""
        prior, gate, temperature, kappa, scale, _ = self.options
        by_score, *rows = (shared.joined(values) for values in zip(*self.rows))
        by_temperature, by_kappa, by_scale = rows
        by_prior = by_gate = None
        if by_score is not None:
            by_prior = by_score.sum(1) if _wanted(prior) else None
            by_gate = by_score.mT.contiguous() if _wanted(gate) else None
        if by_scale is not None:
            by_scale = by_scale.sum(0) if scale.dim() else by_scale.sum()
        by_temperature, by_kappa = _summed(by_temperature, temperature), _summed(by_kappa, kappa)
        return by_prior, by_gate, by_temperature, by_kappa, by_scale, None, *self.logits.unbind()


def _summed(rows: Tensor | None, parameter: Tensor | float) -> Tensor | None:
    """[M, B] summed to a parameter's shape, [] or [M]."""
    if rows is None or not _wanted(parameter):
        return None
    return rows.sum(1) if parameter.dim() else rows.sum()

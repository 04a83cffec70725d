"""Gated fusion and its cross-entropies on a CPU (method page, sections 4 and 5).

Rows go through in chunks that stay in cache, forward and backward, with the gradients written out.
Backward goes through the chunks again instead of keeping [M, B, K], except where there is only one.

Arguments are those of ``reference``, of one dtype, float32 or float64, and not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels.cpu import shared
from iib_kernels.cpu.fusion_rows import (
    Collected,
    Options,
    Upstream,
    differentiate,
    differentiate_losses,
    evaluate,
    evaluate_losses,
)
from iib_kernels.cpu.shared import Labels, part


def is_plain(impl: str, logits: object, options: Options, targets: Tensor | None = None) -> bool:
    """Whether a call is of the common kind, which needs no other checks than these.

    That is: a list of logits [B, K] of one dtype, numbers for parameters, no mask, and every target
    one of the classes. The full checks took 45 us of 290 us for forward and backward at
    (64, 31, 2).
    """
    if impl != "auto" or torch.compiler.is_compiling():
        return False
    if type(logits) not in (list, tuple) or not logits or options.mask is not None:
        return False
    first, (prior, gate, *numbers, _) = logits[0], options
    if not isinstance(first, Tensor) or first.dim() != 2 or not first.shape[1]:
        return False
    dtype, batch, count = first.dtype, len(first), len(logits)
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    if any(type(number) not in (float, int) for number in numbers) or not numbers[0] > 0:
        return False
    expected = [(rows, first.shape) for rows in logits]
    expected += [(prior, (count,)), (gate, (batch, count))]
    for value, shape in expected:
        if value is not None and (
            not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape
        ):
            return False
    if not shared.takes(impl, *logits, prior, gate, targets):
        return False
    return targets is None or _all_classes(targets, *first.shape)


def _all_classes(targets: object, batch: int, classes: int) -> bool:
    """Whether targets are [B] int64 in [0, K)."""
    if not isinstance(targets, Tensor) or targets.dtype is not torch.int64:
        return False
    if targets.shape != (batch,) or not batch:
        return False
    low, high = targets.aminmax()
    return low.item() >= 0 and high.item() < classes


def gated_fusion(
    logits: Sequence[Tensor],
    log_prior: Tensor | None = None,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits [..., K], weights [..., M] and uncertainty [..., M] of M logits [..., K].

    ``scale`` is a number, a tensor [], or [B] for one a row of logits [B, K]. Differentiable in
    everything but the mask.
    """
    options = Options(log_prior, gate_logits, temperature, uncertainty_weight, scale, mask)
    leading = logits[0].shape[:-1]
    if len(leading) == 1:
        return _GatedFusion.apply(*options, *logits)
    outputs = _GatedFusion.apply(*_flat_options(options), *_flat(logits))
    return tuple(value.reshape(*leading, -1) for value in outputs)


def fusion_cross_entropy(
    logits: Sequence[Tensor],
    targets: Tensor,
    log_prior: Tensor | None = None,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "none",
    complete: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the fused logits, cross-entropies of each modality's, and fusion weights.

    [] and [M], or [...] and [..., M] with ``reduction="none"``, 0 in rows that do not count; and
    [..., M]. Each is that of :func:`~iib_kernels.reference.cross_entropy`, with class ``weight``
    [K], by whose sum over the targets that count a mean is divided, as in ``F.cross_entropy``.
    ``complete`` says that no target is to be ignored.
    """
    options = Options(log_prior, gate_logits, temperature, uncertainty_weight, scale, mask)
    leading = targets.shape
    if len(leading) != 1:
        logits, options, targets = _flat(logits), _flat_options(options), targets.reshape(-1)
    labels = shared.labels_of(
        targets,
        options.mask,
        len(logits),
        logits[0].dtype,
        ignore_index,
        reduction,
        weight,
        label_smoothing,
        complete,
    )
    fused, unimodal, weights = _FusionCrossEntropy.apply(
        labels, reduction != "none", *options, *logits
    )
    if len(leading) != 1:
        weights = weights.reshape(*leading, -1)
        if reduction == "none":
            fused, unimodal = fused.reshape(leading), unimodal.reshape(*leading, -1)
    return fused, unimodal, weights


def _flat(values: Sequence[Tensor]) -> list[Tensor]:
    """The leading dimensions in one."""
    return [value.reshape(-1, value.shape[-1]) for value in values]


def _flat_options(options: Options) -> Options:
    gate, mask = (
        None if value is None else value.reshape(-1, value.shape[-1])
        for value in (options.gate_logits, options.mask)
    )
    return options._replace(gate_logits=gate, mask=mask)


class _GatedFusion(torch.autograd.Function):
    """(Options' fields, M logits) -> fused, weights, uncertainty."""

    @staticmethod
    def forward(ctx, *arguments):
        options, logits = Options(*arguments[:6]), arguments[6:]
        spans, small = _chunks(logits), []
        fused = None if len(spans) == 1 else logits[0].new_empty(logits[0].shape)
        _keep(ctx, arguments, logits)
        for start, stop in spans:
            chosen = options.rows(start, stop, len(logits[0]))
            rows, _ = evaluate(_rows(logits, start, stop), chosen)
            small.append((rows.weights, rows.uncertainty))
            if fused is not None:
                fused[start:stop] = rows.fused
            if ctx.work is not None:
                # Not the output itself: a circle that nothing would free
                ctx.work.append(rows._replace(fused=rows.fused.detach()))
        if fused is None:
            fused = rows.fused
        weights, uncertainty = (shared.joined(values) for values in zip(*small))
        return fused, _samples_first(weights), _samples_first(uncertainty)

    @staticmethod
    def backward(ctx, *upstream):
        arguments = _kept(ctx)
        if torch.is_grad_enabled():
            return shared.by_reference(
                lambda values: _reference_fusion(values)[:3], arguments, upstream
            )
        options, logits = Options(*arguments[:6]), arguments[6:]
        collected = Collected(options, logits)
        for number, (start, stop) in enumerate(_chunks(logits)):
            chosen = options.rows(start, stop, len(logits[0]))
            if ctx.work:
                rows = ctx.work[number]
            else:
                rows, _ = evaluate(_rows(logits, start, stop), chosen)
            fused, *others = (part(value, start, stop) for value in upstream)
            others = (None if value is None else value.mT for value in others)
            collected.add(differentiate(rows, chosen, Upstream(fused, *others)), start, stop)
        return collected.total()


class _FusionCrossEntropy(torch.autograd.Function):
    """(Labels, whether to sum up, Options' fields, M logits) -> fused, unimodal, weights."""

    @staticmethod
    def forward(ctx, labels, total, *arguments):
        options, logits = Options(*arguments[:6]), arguments[6:]
        ctx.labels, ctx.total, small = labels, total, []
        _keep(ctx, arguments, logits)
        for start, stop in _chunks(logits):
            true = labels.rows(start, stop)
            losses = evaluate_losses(
                _rows(logits, start, stop), options.rows(start, stop, len(logits[0])), true
            )
            small.append((losses.joint(true), losses.rows.weights))
            if ctx.work is not None:
                ctx.work.append(losses)
        loss, weights = (shared.joined(values) for values in zip(*small))
        if total:
            loss = (loss * labels.share).sum(1)
            return loss[0], loss[1:], _samples_first(weights)
        return loss[0], _samples_first(loss[1:]), _samples_first(weights)

    @staticmethod
    def backward(ctx, by_fused, by_unimodal, by_weights):
        arguments, labels = _kept(ctx), ctx.labels
        if torch.is_grad_enabled():
            upstream = by_fused, by_unimodal, by_weights
            function = lambda values: _by_reference(labels, ctx.total, values)
            return None, None, *shared.by_reference(function, arguments, upstream)
        options, logits = Options(*arguments[:6]), arguments[6:]
        by_losses = _joint(by_fused, by_unimodal, labels)
        by_weights = None if by_weights is None else by_weights.mT
        collected = Collected(options, logits)
        for number, (start, stop) in enumerate(_chunks(logits)):
            chosen, true = options.rows(start, stop, len(logits[0])), labels.rows(start, stop)
            if ctx.work:
                losses = ctx.work[number]
            else:
                losses = evaluate_losses(_rows(logits, start, stop), chosen, true)
            by_rows = part(by_losses, start, stop, 1), part(by_weights, start, stop, 1)
            collected.add(differentiate_losses(losses, chosen, true, *by_rows), start, stop)
        return None, None, *collected.total()


def _joint(by_fused: Tensor | None, by_unimodal: Tensor | None, labels: Labels) -> Tensor:
    """Upstream gradients of the rows' losses, [M + 1, B], of [] and [M], or of [B] and [B, M]."""
    share = labels.share
    by_fused = share.new_zeros(()) if by_fused is None else by_fused
    if by_unimodal is None:
        by_unimodal = share.new_zeros(len(share) - 1)
    by_unimodal = by_unimodal.mT if by_unimodal.dim() == 2 else by_unimodal.unsqueeze(1)
    by_losses = torch.cat([by_fused.expand(1, by_unimodal.shape[1]), by_unimodal]) * share
    return by_losses if labels.counts is None else by_losses.masked_fill_(~labels.counts, 0.0)


def _by_reference(
    labels: Labels, total: bool, values: Sequence[Tensor | float | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`_FusionCrossEntropy` gives, by the reference."""
    fused, weights, _, scores = _reference_fusion(values)
    counts = torch.ones_like(labels.share, dtype=torch.bool)
    counts = counts if labels.counts is None else labels.counts
    how = labels.weight, labels.smoothing
    fused = reference.cross_entropy(fused, labels.index.squeeze(1), counts[0], *how)
    unimodal = reference.cross_entropy(
        scores, labels.index.expand(weights.shape), counts[1:].mT, *how
    )
    if total:
        fused = (fused * labels.share[0]).sum()
        unimodal = (unimodal * labels.share[1:].mT).sum(0)
    return fused, unimodal, weights


def _reference_fusion(values: Sequence[Tensor | float | None]) -> tuple[Tensor, ...]:
    """The reference's fusion of Options' fields and logits."""
    options = Options(*values[:6])
    if isinstance(options.scale, Tensor) and options.scale.dim():
        options = options._replace(scale=options.scale.unsqueeze(1))
    return reference.gated_fusion(values[6:], *options)


def _samples_first(rows: Tensor) -> Tensor:
    """[B, M] of [M, B]; never a view, which could be written to."""
    return rows.mT.clone(memory_format=torch.contiguous_format)


def _chunks(logits: Sequence[Tensor]) -> list[tuple[int, int]]:
    return shared.chunks(len(logits), *logits[0].shape)


def _rows(logits: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    return [part(value, start, stop) for value in logits]


def _keep(ctx, arguments: Sequence[Tensor | float | None], logits: Sequence[Tensor]) -> None:
    """Saves arguments, and makes room for the work of a small batch."""
    ctx.set_materialize_grads(False)
    ctx.numbers = [None if isinstance(value, Tensor) else value for value in arguments]
    keeps = any(ctx.needs_input_grad) and shared.keeps(len(logits), *logits[0].shape)
    ctx.work = [] if keeps else None
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in arguments))


def _kept(ctx) -> list[Tensor | float | None]:
    """The arguments again."""
    tensors = ctx.saved_tensors
    return [a if b is None else b for a, b in zip(ctx.numbers, tensors)]

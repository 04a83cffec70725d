"""Prototype contrast and alignment on a CPU (method page, section 3).

One product a modality for the scores and one for the gradient, in chunks of rows. The posteriors
are kept for backward while they stay below the bound of all work arrays; beyond it backward takes
the scores' product again, so that memory does not grow with [M, B, K].

Arguments are those of ``reference``, of one dtype, float32 or float64, and not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels import _chunks, reference
from iib_kernels.cpu import alignment_rows, shared
from iib_kernels.cpu.alignment_rows import Counts, Rows, Tables, counts_of, tables_of, usable
from iib_kernels.cpu.shared import part

LEAST_ROWS = 64  # of a chunk: fewer make slow products
WORK_ELEMENTS = 2**19  # of a work array [M, rows, K]; products want more rows than a fusion's do
WORK_ARRAYS = 6  # of that size alive at once in one chunk, forward or backward


def alignment_loss(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    targets: Tensor,
    budgets: Tensor,
    temperature: float = 0.2,
    metric: str = "cosine",
    seen: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    unit_prototypes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contrast, alignment and confidence, each [B, M], and which of them count, [B, M] bool.

    Differentiable in the features. ``unit_prototypes`` says that the prototypes are of unit length
    already, which saves the cosine a copy.
    """
    dtype, count = features[0].dtype, len(features)
    counts = counts_of(targets, mask, seen, count, ignore_index)
    tables = tables_of(prototypes, budgets, temperature, metric, seen, unit_prototypes, dtype)
    given = temperature, metric, seen, mask, ignore_index
    again = lambda rows: reference.alignment_loss(
        usable(rows, counts), tables.prototypes, targets, budgets.to(dtype), *given
    )[:2]
    outputs = _Alignment.apply(again, counts, tables, *features)
    known = targets.new_ones(targets.shape, dtype=torch.bool).expand(count, -1)
    return *outputs, (known if counts.counts is None else counts.counts).mT


class _Alignment(torch.autograd.Function):
    """(the reference, Counts, Tables, M features) -> contrast, alignment, confidence, [B, M] each.

    What each chunk gives is written into arrays made beforehand: with torch.utils.checkpoint, what
    the chunks left behind in the heap kept glibc from reusing the freed work arrays.
    """

    @staticmethod
    def forward(ctx, again, counts, tables, *features):
        count, batch, classes = len(features), len(features[0]), tables.offset.shape[2]
        log_true, divergence = features[0].new_empty(2, count, batch)
        bytes_kept = count * batch * classes * features[0].element_size()
        ctx.kept = [] if any(ctx.needs_input_grad) and bytes_kept <= _chunks.CHUNK_BYTES else None
        for start, stop in chunks(count, batch, classes, features[0].dtype):
            true = counts.rows(start, stop)
            rows = alignment_rows.evaluate(
                usable([part(value, start, stop) for value in features], true), true, tables
            )
            log_true[:, start:stop], divergence[:, start:stop] = rows.log_true, rows.divergence
            if ctx.kept is not None:
                ctx.kept.append(rows)
        contrastive, alignment, confidence, strength = alignment_rows.losses(
            log_true, divergence, counts, tables
        )
        ctx.again, ctx.counts, ctx.tables = again, counts, tables
        ctx.save_for_backward(strength, *features)
        outputs = tuple(value.mT.contiguous() for value in (contrastive, alignment, confidence))
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, by_contrastive, by_alignment, _):
        strength, *features = ctx.saved_tensors
        if torch.is_grad_enabled():
            upstream = by_contrastive, by_alignment
            return None, None, None, *shared.by_reference(ctx.again, features, upstream)
        contrast, pull = by_contrastive.mT, by_alignment.mT * strength
        if ctx.counts.counts is not None:
            contrast = contrast.where(ctx.counts.counts, 0.0)
        gradients = [torch.empty_like(value) for value in features]
        differentiate(features, ctx.counts, ctx.tables, contrast, pull, gradients, ctx.kept)
        return None, None, None, *gradients


def differentiate(
    features: Sequence[Tensor],
    counts: Counts,
    tables: Tables,
    contrast: Tensor,
    pull: Tensor,
    out: Sequence[Tensor],
    kept: Sequence[Rows] | None,
) -> None:
    """Writes the features' gradients for those of C_m and of the divergence, [M, B] each."""
    spans = chunks(len(features), len(features[0]), tables.offset.shape[2], features[0].dtype)
    for number, (start, stop) in enumerate(spans):
        true = counts.rows(start, stop)
        values = usable([part(value, start, stop) for value in features], true)
        rows = kept[number] if kept else alignment_rows.evaluate(values, true, tables)
        alignment_rows.differentiate(
            values,
            rows,
            true,
            tables,
            part(contrast, start, stop, 1),
            part(pull, start, stop, 1),
            [part(value, start, stop) for value in out],
        )


def chunks(count: int, batch: int, classes: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """(start, stop) of the rows that are worked on at once."""
    most = _chunks.rows_per_chunk(count * classes, dtype, WORK_ARRAYS)
    rows = max(LEAST_ROWS, WORK_ELEMENTS // (count * classes))
    return _chunks.spans(batch, min(most, rows))

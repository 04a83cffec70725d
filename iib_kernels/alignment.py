"""Prototype contrast and budget-conditioned relative alignment of all modalities (method page, section 3)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iib_kernels import reference
from iib_kernels._checks import check_choice, check_device, check_float, check_mask, check_shape, check_targets, refuse_grad
from iib_kernels._chunks import rows_per_chunk
from iib_kernels._runtime import choose, compute_dtype
from iib_kernels.prototype import check_modalities


class AlignmentOutput(NamedTuple):
    """What :func:`alignment_loss` returns; float32 (float64 for float64 features). [M], or [B, M] with ``reduction="none"``."""

    contrastive: Tensor  #: C_m = -log q_m(i, y_i), nats
    alignment: Tensor  #: A_m = delta_m(i) KL(q_a || q_m); 0 for the anchor
    confidence: Tensor  #: q_m(i, y_i), the evidence for the right class, in [0, 1]; not differentiated


def alignment_loss(
    features: Sequence[Tensor], prototypes: Sequence[Tensor], targets: Tensor, budgets: Tensor | Sequence[float], *, temperature: float = 0.2,
    metric: str = "cosine", seen: Tensor | Sequence[Tensor] | None = None, mask: Tensor | None = None, ignore_index: int = -100,
    reduction: str = "mean", impl: str = "auto",
) -> AlignmentOutput:
    """Prototype contrastive loss, relative alignment and evidence of every modality (method page, section 3).

    With q_m(i, .) = softmax_k(-d2_m(i, k) / tau), anchor a = argmax b and rho_m = b_m / b_a (1 where every budget is 0):
    C_m = -log q_m(i, y_i); delta_m = max(0, rho_m q_a(i, y_i) - q_m(i, y_i)); A_m = delta_m KL(q_a || q_m), 0 for the anchor. delta and q_a carry no
    gradient: a weaker modality is corrected only while its evidence for the right class is below the share of the anchor's that its budget promises, and
    never towards an anchor that is wrong about the sample.

    Args:
        features: M tensors [B, D_m], float16, bfloat16, float32 or float64.
        prototypes: M tensors [K, D_m].
        targets: [B] class indices; rows with ``ignore_index`` contribute nothing. Out of range: ValueError in eager mode on the CPU, ignored elsewhere.
        budgets: [M], in [0, 1].
        temperature: tau > 0.
        metric: ``"cosine"`` or ``"sqeuclidean"``.
        seen: [K] bool, or M of them: classes not seen are left out of the softmax, and rows of such a class contribute nothing to that modality.
        mask: [B, M] bool, True = present. A missing modality contributes 0 (its features may hold anything), a missing anchor makes A = 0 in its rows.
        reduction: ``"mean"`` over the rows that count for each modality (0 where there is none), ``"sum"``, or ``"none"`` (0 in rows that do not count).

    Half types are computed in float32; gradients come in the features' dtype. Differentiable in the features only: prototypes and budgets that ask for a
    gradient raise ValueError. Memory stays bounded: rows are processed in chunks, and recomputed in backward where there is more than one.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> audio, visual = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.2, 0.3]])
    >>> out = alignment_loss([audio, visual], [torch.eye(2), torch.eye(2)], torch.tensor([0]), [0.9, 0.6])
    >>> out.confidence  # visual is below 2/3 of audio's evidence ...
    tensor([0.9999, 0.0588])
    >>> out.alignment  # ... so it is drawn towards audio's posterior, on its own prototypes
    tensor([0.0000, 1.7216])
    """
    check_choice(reduction, ("mean", "sum", "none"), "reduction")
    features, prototypes, seen = check_modalities(features, prototypes, seen, metric)
    batch, classes, device = len(features[0]), len(prototypes[0]), features[0].device
    targets = check_targets(targets, (batch,), classes, ignore_index)
    mask = check_mask(mask, (batch, len(features)))
    dtype = compute_dtype(*features)
    if not isinstance(budgets, Tensor):
        budgets = torch.tensor([float(value) for value in budgets], dtype=dtype, device=device)
    check_shape(check_float(budgets, "budgets"), (len(features),), "budgets", "[M]")
    refuse_grad("budgets", budgets)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    check_device(features[0], targets=targets, mask=mask, budgets=budgets)
    choose(impl, *features)
    with torch.autocast(device.type, enabled=False):
        rows = [values.to(dtype) for values in features]
        if mask is not None:
            rows = [torch.where(mask[:, index, None], values, 0.0) for index, values in enumerate(rows)]
        tables = [values.to(dtype) for values in prototypes]
        if metric == "cosine":
            tables = [reference.normalize(values) for values in tables]  # once, not once a chunk
        budgets = budgets.to(dtype)

        def part(start: int, stop: int, *chunk: Tensor) -> tuple[Tensor, ...]:
            return reference.alignment_loss(
                chunk, tables, targets[start:stop], budgets, temperature, metric, seen, None if mask is None else mask[start:stop], ignore_index
            )

        size = rows_per_chunk(classes * len(features))
        if batch <= size:
            contrastive, alignment, confidence, counts = part(0, batch, *rows)
        else:
            parts = [
                checkpoint(part, start, min(start + size, batch), *(values[start:start + size] for values in rows), use_reentrant=False, preserve_rng_state=False)
                for start in range(0, batch, size)
            ]
            contrastive, alignment, confidence, counts = (torch.cat(column) for column in zip(*parts))
    confidence = confidence.detach()
    if reduction == "none":
        return AlignmentOutput(contrastive, alignment, confidence)
    divisor = counts.sum(0).clamp_min(1) if reduction == "mean" else 1
    return AlignmentOutput(contrastive.sum(0) / divisor, alignment.sum(0) / divisor, confidence.sum(0) / divisor)

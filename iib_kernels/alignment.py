"""Prototype contrast and budget-conditioned relative alignment (method page, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import (
    check_choice,
    check_device,
    check_float,
    check_mask,
    check_number,
    check_shape,
    check_targets,
    describe,
    refuse_grad,
)
from iib_kernels._chunks import rows_per_chunk, spans
from iib_kernels._runtime import choose, compute_dtype, full_precision
from iib_kernels.compat import apply, distinct, exportable
from iib_kernels.cpu import alignment as cpu_alignment
from iib_kernels.cpu.shared import takes as cpu_takes
from iib_kernels.ops.alignment.autograd import AlignmentLossFunction
from iib_kernels.prototype import check_modalities, without_unseen

WORK_ARRAYS = 8  # [M, rows, K] arrays alive at once in one chunk, forward or backward


@exportable
class AlignmentOutput(NamedTuple):
    """What :func:`alignment_loss` returns; float32 (float64 for float64 features).

    Each is [M], or [B, M] with ``reduction="none"``.
    """

    contrastive: Tensor  #: C_m = -log q_m(i, y_i), nats
    alignment: Tensor  #: A_m = delta_m(i) KL(q_a || q_m); 0 for the anchor
    confidence: Tensor  #: q_m(i, y_i) in [0, 1], evidence for the right class; not differentiated


def alignment_loss(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    targets: Tensor,
    budgets: Tensor | Sequence[float],
    *,
    temperature: float = 0.2,
    metric: str = "cosine",
    unit_prototypes: bool = False,
    seen: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> AlignmentOutput:
    """Contrastive loss, relative alignment and evidence of every modality (method page, section 3).

    With q_m(i, .) = softmax_k(-d2_m(i, k) / tau), the anchor a = argmax b and rho_m = b_m / b_a (1
    where every budget is 0)::

        C_m     = -log q_m(i, y_i)
        delta_m = max(0, rho_m q_a(i, y_i) - q_m(i, y_i))
        A_m     = delta_m KL(q_a || q_m), 0 for the anchor

    delta and q_a carry no gradient. So a weaker modality is corrected only while its evidence for
    the right class is below the share of the anchor's that its budget promises, and never towards
    an anchor that is wrong about the sample.

    Args:
        features: M tensors [B, D_m], float16, bfloat16, float32 or float64.
        prototypes: M tensors [K, D_m].
        targets: [B] class indices; rows with ``ignore_index`` contribute nothing and may hold
            anything. Out of range: ValueError in eager mode on the CPU, ignored elsewhere.
        budgets: [M], in [0, 1]; a tensor, or a sequence of numbers.
        temperature: tau > 0, a number.
        metric: ``"cosine"`` or ``"sqeuclidean"``.
        unit_prototypes: prototypes of classes that are seen have unit length, as the update leaves
            them; the cosine then takes no lengths of them.
        seen: [K] bool, or M of them. Classes not seen are left out of the softmax, and rows of such
            a class contribute nothing to that modality.
        mask: [B, M] bool, True = present. A missing modality contributes 0 (its features may hold
            anything), a missing anchor makes A = 0 in its rows.
        reduction: ``"mean"`` over the rows that count for each modality (0 where there is none),
            ``"sum"``, or ``"none"`` (0 in rows that do not count).

    All three outputs are reduced over the same rows of each modality: those whose target counts,
    with the modality present and the class seen by it.

    Half types are computed in float32; gradients come in the features' dtype. Over more than 128
    classes the kernels round prototypes, and the weights in sums of them, to the type of half
    features, and multiply in it. Differentiable, twice too, in the features only: prototypes and
    budgets that ask for a gradient raise ValueError.

    Memory stays bounded: rows are processed in chunks, and again in backward (not so for second
    derivatives, and in a graph whose batch may vary). Raises TypeError or ValueError naming the
    argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> audio, visual = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.2, 0.3]])
    >>> prototypes = [torch.eye(2), torch.eye(2)]
    >>> out = alignment_loss([audio, visual], prototypes, torch.tensor([0]), [0.9, 0.6])
    >>> out.confidence  # visual is below 2/3 of audio's evidence ...
    tensor([0.9999, 0.0588])
    >>> out.alignment  # ... so it is drawn towards audio's posterior, on its own prototypes
    tensor([0.0000, 1.7216])
    """
    check_choice(reduction, ("mean", "sum", "none"), "reduction")
    features, prototypes, seen = check_modalities(features, prototypes, seen, metric)
    batch, classes = features[0].shape[0], prototypes[0].shape[0]
    implementation = choose(impl, *features)
    targets = check_targets(
        targets, (batch,), classes, ignore_index, replace=implementation == "reference"
    )
    mask = check_mask(mask, (batch, len(features)))
    dtype = compute_dtype(*features)
    budgets = check_budgets(budgets, features)
    check_temperature(temperature, "temperature")
    check_device(features[0], targets=targets, mask=mask)
    check_unit(unit_prototypes, metric)
    cosine = metric == "cosine"
    if implementation == "triton":
        # Compiled code does not know whether it stands inside torch.func.grad
        asked = torch.compiler.is_compiling() or any(rows.requires_grad for rows in features)
        keep = torch.is_grad_enabled() and asked
        constants = float(temperature), cosine, ignore_index, len(features)
        tensors = distinct([*features, *prototypes, *(seen or [])])
        how = constants, keep, reduction
        contrastive, alignment, mean, confidence, *_ = apply(
            AlignmentLossFunction, *how, targets, budgets, mask, *tensors
        )
        return AlignmentOutput(contrastive, alignment, confidence if reduction == "none" else mean)
    if cpu_takes(impl, targets, budgets, mask, *features, *prototypes, *(seen or [])):
        contrastive, alignment, confidence, counts = cpu_alignment.alignment_loss(
            [rows.to(dtype) for rows in features],
            prototypes,
            targets,
            budgets,
            temperature,
            metric,
            seen,
            mask,
            ignore_index,
            unit_prototypes,
        )
    else:
        with full_precision(features[0]):
            rows = _rows(features, targets != ignore_index, mask, cosine, dtype)
            tables = [table.to(dtype) for table in without_unseen(prototypes, seen)]
            if cosine and not unit_prototypes:
                tables = [reference.normalize(table) for table in tables]
            seen = None if seen is None else torch.stack(seen)  # [M, K]
            budgets = budgets.to(dtype)
            contrastive, alignment, confidence, counts = apply(
                _Alignment, temperature, ignore_index, targets, budgets, seen, mask, *rows, *tables
            )
    if reduction == "none":
        return AlignmentOutput(contrastive, alignment, confidence)
    divisor = counts.sum(0).clamp_min(1) if reduction == "mean" else 1
    return AlignmentOutput(
        contrastive.sum(0) / divisor, alignment.sum(0) / divisor, confidence.sum(0) / divisor
    )


def check_temperature(value: object, name: str) -> None:
    """TypeError or ValueError unless ``value`` is a number above 0."""
    check_number(value, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above 0 and finite, got {value}")


def check_unit(unit_prototypes: object, metric: str) -> None:
    """ValueError unless ``unit_prototypes`` goes with the metric."""
    if unit_prototypes and metric != "cosine":
        raise ValueError(f"unit_prototypes: goes with the cosine alone, not with {metric!r}")


def check_budgets(budgets: Tensor | Sequence[float], features: Sequence[Tensor]) -> Tensor:
    """The budgets as a tensor [M] beside the features."""
    if not isinstance(budgets, Tensor):
        budgets = _budget_tensor(budgets, compute_dtype(*features), features[0].device)
    check_shape(check_float(budgets, "budgets"), (len(features),), "budgets", "[M]")
    refuse_grad("budgets", budgets)
    check_device(features[0], budgets=budgets)
    return budgets


def _budget_tensor(budgets: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor [M].

    It is filled on the device: a copy from the host would synchronise and could not be captured in
    a CUDA graph.
    """
    if not isinstance(budgets, Sequence):
        raise TypeError(
            f"budgets: expected a tensor [M] or a sequence of numbers, got {describe(budgets)}"
        )
    for index, value in enumerate(budgets):
        if not isinstance(value, (int, float)):
            raise TypeError(
                f"budgets[{index}]: expected a number, got {describe(value)}; "
                "pass tensors as one tensor [M]"
            )
        if not 0 <= value < math.inf:
            raise ValueError(
                f"budgets[{index}]: expected a share of the label's information, in [0, 1], "
                f"got {value}"
            )
    if not len(budgets):
        return torch.empty(0, dtype=dtype, device=device)
    return torch.stack(
        [torch.full((), float(value), dtype=dtype, device=device) for value in budgets]
    )


# ----- Plain PyTorch, in chunks of rows


def _rows(
    features: Sequence[Tensor],
    valid: Tensor,
    mask: Tensor | None,
    cosine: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Features [B, D_m] to compute with: raised, at unit length for the cosine (once, not once a
    chunk), and zero where they contribute nothing.

    What stands in such a row must not reach even its gradient, where 0 * NaN would be NaN.
    """
    rows = []
    for index, values in enumerate(features):
        present = valid if mask is None else valid & mask[:, index]  # [B]
        values = torch.where(present[:, None], values.to(dtype), 0.0)
        rows.append(reference.normalize(values) if cosine else values)
    return rows


class _Alignment(torch.autograd.Function):
    """C, A, q(y) and which rows count, each [B, M], for rows and tables normalised already.

    Takes temperature, ignore_index, targets [B], budgets [M], seen [M, K], mask [B, M], M rows
    [B, D_m] and M tables [K, D_m].

    Only inputs and [B, M] are kept; backward goes through the chunks again. Both passes write into
    arrays made beforehand: with torch.utils.checkpoint, what each chunk left behind in the heap
    kept glibc from reusing the freed work arrays, and the peak was up to 5 GB where 40 MiB were
    alive (B = 4096, K = 32768).
    """

    @staticmethod
    def forward(temperature, ignore_index, targets, budgets, seen, mask, *values):
        count = len(values) // 2
        rows, tables = values[:count], values[count:]
        batch = targets.shape[0]
        outputs = [rows[0].new_empty(batch, count) for _ in range(3)] + [
            targets.new_empty((batch, count), dtype=torch.bool)
        ]
        for start, stop in _spans(rows, tables):
            part = reference.alignment_loss(
                [value[start:stop] for value in rows],
                tables,
                targets[start:stop],
                budgets,
                temperature,
                "sqeuclidean",
                seen,
                None if mask is None else mask[start:stop],
                ignore_index,
            )
            for output, value in zip(outputs, part):
                output[start:stop] = value
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.temperature, _, targets, budgets, seen, _, *values = inputs
        confidence, counts = outputs[2:]
        ctx.mark_non_differentiable(confidence, counts)
        ctx.save_for_backward(targets, budgets, seen, confidence, counts, *values)

    @staticmethod
    def backward(ctx, grad_contrastive, grad_alignment, *_):
        targets, budgets, seen, confidence, counts, *values = ctx.saved_tensors
        count = len(values) // 2
        rows, tables = values[:count], values[count:]
        upstream = _Upstream(targets, confidence, counts, grad_contrastive, grad_alignment)
        fixed = _Fixed(ctx.temperature, budgets, seen, tables)
        gradients: tuple[Tensor, ...] = ()
        # Inside an autocast block, where backward may run, products would come out in half
        # precision. Plain operations otherwise, which autograd records with create_graph=True: so
        # second derivatives are right.
        with full_precision(targets):
            for start, stop in _spans(rows, tables):
                part = _row_gradients(
                    [row[start:stop] for row in rows],
                    _Upstream(*(value[start:stop] for value in upstream)),
                    fixed,
                )
                # Made of the parts, which under vmap (jacrev) belong to several upstream gradients
                gradients = gradients or tuple(
                    value.new_empty(row.shape) for value, row in zip(part, rows)
                )
                for gradient, value in zip(gradients, part):
                    gradient[start:stop] = value
        return (None,) * 6 + gradients + (None,) * count


class _Upstream(NamedTuple):
    """What backward knows of each row."""

    targets: Tensor  # [B]
    confidence: Tensor  # [B, M]
    counts: Tensor  # [B, M] bool
    grad_contrastive: Tensor  # [B, M]
    grad_alignment: Tensor  # [B, M]


class _Fixed(NamedTuple):
    """What is the same for all rows."""

    temperature: float
    budgets: Tensor  # [M]
    seen: Tensor | None  # [M, K]
    tables: Sequence[Tensor]  # M of [K, D_m]


def _spans(rows: Sequence[Tensor], tables: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The chunks of rows, (start, stop)."""
    size = rows_per_chunk(len(rows) * len(tables[0]), rows[0].dtype, WORK_ARRAYS)
    return spans(rows[0].shape[0], size)


def _row_gradients(rows: Sequence[Tensor], upstream: _Upstream, fixed: _Fixed) -> list[Tensor]:
    """Gradients [B, D_m] of the rows; differentiable in the rows and in the upstream gradients."""
    targets, confidence, counts, grad_contrastive, grad_alignment = upstream
    temperature, budgets, seen, tables = fixed
    anchor, relative = reference.anchor_and_relative(budgets)
    contrast = torch.where(counts, grad_contrastive, 0.0)  # [B, M]
    align = torch.where(
        reference.aligned(counts, anchor),
        grad_alignment * reference.deviation(confidence, relative, anchor),
        0.0,
    )  # [B, M]
    label = torch.where(counts, targets[:, None], 0)  # [B, M]
    q = [
        reference.prototype_log_posterior(
            row, table, temperature, "sqeuclidean", None if seen is None else seen[m]
        ).exp()
        for m, (row, table) in enumerate(zip(rows, tables))
    ]  # M of [B, K]
    q_anchor = torch.stack([value.detach() for value in q]).index_select(0, anchor[None])[0]
    gradients = []
    for m, (row, table) in enumerate(zip(rows, tables)):
        c, a = contrast[:, m, None], align[:, m, None]
        # The divergence leaves out classes that this modality has not seen; where only the anchor
        # has not, q_a is 0 anyway
        evidence = q_anchor if seen is None else torch.where(seen[m], q_anchor, 0.0)
        # By scores: -log q_y has q - 1_y, KL(q_a || q) has q sum(q_a) - q_a
        slope = q[m] * (c + a * evidence.sum(-1, keepdim=True)) - a * evidence
        slope = slope.scatter_add(1, label[:, m, None], -c)
        # By rows: scores are -|z - p_k|^2 / tau
        gradients.append((slope @ table - row * slope.sum(-1, keepdim=True)) * (2 / temperature))
    return gradients

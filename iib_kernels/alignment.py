"""Prototype contrast and budget-conditioned relative alignment of all modalities (method page, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning, reference
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
from iib_kernels._registration import register
from iib_kernels._runtime import (
    accumulator,
    apply,
    choose,
    compute_dtype,
    distinct,
    dot_options,
    first_order,
    on_device,
    scalar,
    slope_precision,
    uniform_dtype,
)
from iib_kernels.prototype import check_modalities, without_unseen

WORK_ARRAYS = 8  # [M, rows, K] arrays alive at once in one chunk, forward or backward


class AlignmentOutput(NamedTuple):
    """What :func:`alignment_loss` returns; float32 (float64 for float64 features). [M], or [B, M] with ``reduction="none"``."""

    contrastive: Tensor  #: C_m = -log q_m(i, y_i), nats
    alignment: Tensor  #: A_m = delta_m(i) KL(q_a || q_m); 0 for the anchor
    confidence: (
        Tensor  #: q_m(i, y_i), the evidence for the right class, in [0, 1]; not differentiated
    )


def alignment_loss(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    targets: Tensor,
    budgets: Tensor | Sequence[float],
    *,
    temperature: float = 0.2,
    metric: str = "cosine",
    seen: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> AlignmentOutput:
    """Prototype contrastive loss, relative alignment and evidence of every modality (method page, section 3).

    With q_m(i, .) = softmax_k(-d2_m(i, k) / tau), anchor a = argmax b and rho_m = b_m / b_a (1 where every budget is 0):
    C_m = -log q_m(i, y_i); delta_m = max(0, rho_m q_a(i, y_i) - q_m(i, y_i)); A_m = delta_m KL(q_a || q_m), 0 for the anchor. delta and q_a carry no
    gradient: a weaker modality is corrected only while its evidence for the right class is below the share of the anchor's that its budget promises, and
    never towards an anchor that is wrong about the sample.

    Args:
        features: M tensors [B, D_m], float16, bfloat16, float32 or float64.
        prototypes: M tensors [K, D_m].
        targets: [B] class indices; rows with ``ignore_index`` contribute nothing and may hold anything. Out of range: ValueError in eager mode on the CPU,
            ignored elsewhere.
        budgets: [M], in [0, 1]; a tensor, or a sequence of numbers.
        temperature: tau > 0, a number.
        metric: ``"cosine"`` or ``"sqeuclidean"``.
        seen: [K] bool, or M of them: classes not seen are left out of the softmax, and rows of such a class contribute nothing to that modality.
        mask: [B, M] bool, True = present. A missing modality contributes 0 (its features may hold anything), a missing anchor makes A = 0 in its rows.
        reduction: ``"mean"`` over the rows that count for each modality (0 where there is none), ``"sum"``, or ``"none"`` (0 in rows that do not count).

    All three outputs are reduced over the same rows of each modality: those whose target counts, with the modality present and the class seen by it. Half
    types are computed in float32; gradients come in the features' dtype. Differentiable (twice, too) in the features only: prototypes and budgets that ask
    for a gradient raise ValueError. Memory stays bounded: rows are processed in chunks, and again in backward
    (not so for second derivatives).

    Raises TypeError or ValueError naming the argument.

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
    batch, classes, device = features[0].shape[0], prototypes[0].shape[0], features[0].device
    implementation = choose(impl, *features)
    targets = check_targets(
        targets, (batch,), classes, ignore_index, replace=implementation == "reference"
    )
    mask = check_mask(mask, (batch, len(features)))
    dtype = compute_dtype(*features)
    if not isinstance(budgets, Tensor):
        budgets = _budget_tensor(budgets, dtype, device)
    check_shape(check_float(budgets, "budgets"), (len(features),), "budgets", "[M]")
    refuse_grad("budgets", budgets)
    check_number(temperature, "temperature")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number above 0 and finite, got {temperature}")
    check_device(features[0], targets=targets, mask=mask, budgets=budgets)
    if implementation == "triton":
        contrastive, alignment, confidence, counts, _ = apply(
            AlignmentLossFunction,
            float(temperature),
            metric == "cosine",
            ignore_index,
            len(features),
            targets,
            budgets,
            mask,
            *distinct([*features, *prototypes, *(seen or [])]),
        )
    else:
        contrastive, alignment, confidence, counts = _in_chunks(
            features,
            without_unseen(prototypes, seen),
            targets,
            budgets,
            temperature,
            metric,
            seen,
            mask,
            ignore_index,
            dtype,
        )
    if reduction == "none":
        return AlignmentOutput(contrastive, alignment, confidence)
    divisor = counts.sum(0).clamp_min(1) if reduction == "mean" else 1
    return AlignmentOutput(
        contrastive.sum(0) / divisor, alignment.sum(0) / divisor, confidence.sum(0) / divisor
    )


def _in_chunks(
    features, prototypes, targets, budgets, temperature, metric, seen, mask, ignore_index, dtype
) -> tuple[Tensor, ...]:
    """C, A, q and counts, [B, M], in plain PyTorch."""
    with torch.autocast(targets.device.type, enabled=False):
        valid = (targets != ignore_index)[:, None]
        present = valid if mask is None else valid & mask  # [B, 1] or [B, M]
        # What stands in a row that contributes nothing must not reach even its gradient, where 0 * NaN would be NaN
        rows = [
            torch.where(present[:, index if mask is not None else 0, None], values.to(dtype), 0.0)
            for index, values in enumerate(features)
        ]
        tables = [values.to(dtype) for values in prototypes]
        if metric == "cosine":
            rows, tables = (
                [reference.normalize(values) for values in rows],
                [reference.normalize(values) for values in tables],
            )  # once, not once a chunk
        seen = None if seen is None else torch.stack(seen)
        return _Alignment.apply(
            temperature, ignore_index, targets, budgets.to(dtype), seen, mask, *rows, *tables
        )


class _Alignment(torch.autograd.Function):
    """(temperature, ignore_index, targets [B], budgets [M], seen [M, K], mask [B, M], M rows [B, D_m], M tables [K, D_m]) -> C, A, q and counts, [B, M].

    Rows and tables are normalised already. Only inputs and [B, M] are kept; backward goes through the chunks again. Both passes write into arrays made
    beforehand: with torch.utils.checkpoint, what each chunk left behind in the heap kept glibc from reusing the freed work arrays, and the peak was up
    to 5 GB where 40 MiB were alive (B = 4096, K = 32768).
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
        gradients = _gradients(
            ctx.temperature, grad_contrastive, grad_alignment, *ctx.saved_tensors
        )
        return (None,) * 6 + gradients + (None,) * len(gradients)


def _gradients(
    temperature,
    grad_contrastive,
    grad_alignment,
    targets,
    budgets,
    seen,
    confidence,
    counts,
    *values,
) -> tuple[Tensor, ...]:
    """Gradients of the rows, chunk by chunk. Plain operations, which autograd records with ``create_graph=True``: second derivatives are right."""
    rows, tables = values[: len(values) // 2], values[len(values) // 2 :]
    gradients = tuple(torch.empty_like(value) for value in rows)
    # Inside an autocast block, where backward may run, products would come out in half precision
    with torch.autocast(targets.device.type, enabled=False):
        for a, b in _spans(rows, tables):
            part = _row_gradients(
                temperature,
                grad_contrastive[a:b],
                grad_alignment[a:b],
                targets[a:b],
                budgets,
                seen,
                confidence[a:b],
                counts[a:b],
                [row[a:b] for row in rows],
                tables,
            )
            for gradient, value in zip(gradients, part):
                gradient[a:b] = value
    return gradients


def _spans(rows: Sequence[Tensor], tables: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The chunks of rows, (start, stop)."""
    return spans(
        len(rows[0]), rows_per_chunk(len(rows) * len(tables[0]), rows[0].dtype, WORK_ARRAYS)
    )


def _row_gradients(
    temperature,
    grad_contrastive,
    grad_alignment,
    targets,
    budgets,
    seen,
    confidence,
    counts,
    rows,
    tables,
) -> list[Tensor]:
    """Gradients [B, D_m] of the rows, given those of C and A [B, M]; differentiable in the rows and in what is given."""
    anchor, relative = reference.anchor_and_relative(budgets)
    contrast = torch.where(counts, grad_contrastive, 0.0)  # [B, M]
    align = torch.where(
        reference.aligned(counts, anchor),
        grad_alignment * reference.deviation(confidence, relative, anchor),
        0.0,
    )
    label = torch.where(counts, targets[:, None], 0)
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
        # The divergence leaves out classes that this modality has not seen; where only the anchor has not, q_a is 0 anyway
        evidence = q_anchor if seen is None else torch.where(seen[m], q_anchor, 0.0)
        # By scores: -log q_y has q - 1_y, KL(q_a || q) has q sum(q_a) - q_a
        slope = q[m] * (c + a * evidence.sum(-1, keepdim=True)) - a * evidence
        slope = slope.scatter_add(1, label[:, m, None], -c)
        # By rows: scores are -|z - p_k|^2 / tau
        gradients.append((slope @ table - row * slope.sum(-1, keepdim=True)) * (2 / temperature))
    return gradients


def _budget_tensor(budgets: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor [M], filled on the device: a copy from the host would synchronise and could not be captured in a CUDA graph."""
    if not isinstance(budgets, Sequence):
        raise TypeError(
            f"budgets: expected a tensor [M] or a sequence of numbers, got {describe(budgets)}"
        )
    for index, value in enumerate(budgets):
        if not isinstance(value, (int, float)):
            raise TypeError(
                f"budgets[{index}]: expected a number, got {describe(value)}; pass tensors as one tensor [M]"
            )
        if not 0 <= value < math.inf:
            raise ValueError(
                f"budgets[{index}]: expected a share of the label's information, in [0, 1], got {value}"
            )
    return (
        torch.stack([torch.full((), float(value), dtype=dtype, device=device) for value in budgets])
        if len(budgets)
        else torch.empty(0, dtype=dtype)
    )


# ----- Triton: launchers, operators, autograd Function


def _shared(
    features, prototypes, targets, budgets, temperature, seen, mask, ignore_index, dtype
) -> list:
    """The arguments that all three kernels begin with."""
    strides = lambda values, place: tuple(value.stride(place) for value in values)
    return [
        tuple(features),
        strides(features, 0),
        strides(features, 1),
        tuple(prototypes),
        strides(prototypes, 0),
        strides(prototypes, 1),
        _widths(features),
        targets,
        targets.stride(0),
        ignore_index,
        budgets,
        budgets.stride(0),
        scalar(temperature, dtype, targets.device),
        tuple(value.contiguous() for value in seen) or None,
        mask,
        *((0, 0) if mask is None else mask.stride()),
    ]


def _widths(features) -> tuple[int, ...]:
    """D_m of every modality."""
    return tuple(values.shape[1] for values in features)


def _options(features, prototypes, cosine, seen, dtype) -> dict:
    """Constant arguments common to the kernels."""
    return {
        "M": len(features),
        "COSINE": cosine,
        "SEEN": bool(seen),
        "NUMBER_POINTER": dtype == torch.float64,
        "ACC": accumulator(dtype),
        **dot_options(*features, *prototypes),
    }


def _tiled(prototypes) -> bool:
    """Whether the classes need several blocks, and forward keeps its sums for backward."""
    return prototypes[0].shape[0] > _tuning.ALIGNMENT_CLASSES


def _launch_forward(
    features, prototypes, targets, budgets, temperature, cosine, seen, mask, ignore_index
):
    from iib_kernels._kernels.alignment import alignment_forward

    outputs = _forward_fake(
        features, prototypes, targets, budgets, temperature, cosine, seen, mask, ignore_index
    )
    batch, classes = targets.shape[0], prototypes[0].shape[0]
    if not batch:
        return outputs
    dtype = compute_dtype(*features)
    results = (*outputs[:4], outputs[4] if _tiled(prototypes) else None)

    def launch(config: _tuning.Launch) -> None:
        alignment_forward[(-(-batch // config.blocks["BLOCK_B"]),)](
            *_shared(
                features, prototypes, targets, budgets, temperature, seen, mask, ignore_index, dtype
            ),
            *results,
            batch,
            classes,
            **_options(features, prototypes, cosine, seen, dtype),
            **config.options(),
        )

    with on_device(features[0]):
        width = max(_widths(features))
        _tuning.run(
            ("alignment", batch, classes, width, len(features), features[0].dtype),
            _tuning.alignment(classes, width, len(features), _widest(features, prototypes)),
            launch,
        )
    return outputs


def _widest(*groups) -> int:
    """Bytes of the widest element."""
    return max(value.dtype.itemsize for group in groups for value in group)


def _forward_fake(
    features, prototypes, targets, budgets, temperature, cosine, seen, mask, ignore_index
):
    size, dtype = (targets.shape[0], len(features)), compute_dtype(*features)
    like = features[0].new_empty
    statistics = like(targets.shape[0] if _tiled(prototypes) else 0, 2 * size[1], dtype=dtype)
    return *(like(size, dtype=dtype) for _ in range(3)), like(size, dtype=torch.bool), statistics


def _launch_backward(
    features,
    prototypes,
    targets,
    budgets,
    temperature,
    cosine,
    seen,
    mask,
    ignore_index,
    confidence,
    statistics,
    grad_contrastive,
    grad_alignment,
):
    from iib_kernels._kernels import alignment as kernels

    batch, classes = targets.shape[0], prototypes[0].shape[0]
    gradients = [values.new_empty(values.shape) for values in features]
    if not batch:
        return gradients
    dtype, width = compute_dtype(*features), max(_widths(features))
    kinds = [values.dtype for values in features]
    upstream = []
    for value in (grad_contrastive, grad_alignment):
        upstream += [value, *((0, 0) if value is None else value.stride())]
    if _tiled(prototypes):
        features, prototypes = uniform_dtype(features), uniform_dtype(prototypes)
        gradients = [values.new_empty(values.shape) for values in features]
    options = {
        **_options(features, prototypes, cosine, seen, dtype),
        "SLOPE_PRECISION": slope_precision(*features, *prototypes),
    }
    shared = _shared(
        features, prototypes, targets, budgets, temperature, seen, mask, ignore_index, dtype
    )
    rest = (*upstream, tuple(gradients), batch, classes)

    def launch_block(config: _tuning.Launch) -> None:
        kernels.alignment_backward_block[(-(-batch // config.blocks["BLOCK_B"]),)](
            *shared, *rest, **options, **config.options()
        )

    def launch_tiled(config: _tuning.Launch) -> None:
        grid = (
            -(-batch // config.blocks["BLOCK_B"]),
            len(features),
            -(-width // config.blocks["CHUNK"]),
        )
        kernels.alignment_backward_tiled[grid](
            *shared, confidence, statistics, *rest, **options, **config.options()
        )

    with on_device(features[0]):
        key, itemsize = (
            (batch, classes, width, len(features), features[0].dtype),
            _widest(features, prototypes),
        )
        if _tiled(prototypes):
            _tuning.run(
                ("alignment_backward_tiled", *key),
                _tuning.alignment_tiled(width, itemsize),
                launch_tiled,
            )
        else:
            _tuning.run(
                ("alignment_backward", *key),
                _tuning.alignment(classes, width, len(features), itemsize),
                launch_block,
            )
    return [gradient.to(kind) for gradient, kind in zip(gradients, kinds)]


def _backward_fake(features, *_):
    return [values.new_empty(values.shape) for values in features]


_ARGUMENTS = (
    "Tensor[] features, Tensor[] prototypes, Tensor targets, Tensor budgets, float temperature, bool cosine, Tensor[] seen, Tensor? mask, "
    "int ignore_index"
)
_FORWARD = register(
    f"alignment_loss({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _forward_fake,
)
_BACKWARD = register(
    f"alignment_loss_backward({_ARGUMENTS}, Tensor confidence, Tensor statistics, Tensor? grad_contrastive, Tensor? grad_alignment) -> Tensor[]",
    _launch_backward,
    _backward_fake,
)


def _split(values, count: int) -> tuple:
    """Features, prototypes and seen of M modalities from one row of tensors."""
    return values[:count], values[count : 2 * count], values[2 * count :]


def _call_backward(
    temperature,
    cosine,
    ignore_index,
    count,
    targets,
    budgets,
    mask,
    confidence,
    statistics,
    grad_contrastive,
    grad_alignment,
    *values,
):
    """The backward operator; its gradients in one tuple."""
    features, prototypes, seen = _split(values, count)
    return tuple(
        _BACKWARD(
            features,
            prototypes,
            targets,
            budgets,
            temperature,
            cosine,
            seen,
            mask,
            ignore_index,
            confidence,
            statistics,
            grad_contrastive,
            grad_alignment,
        )
    )


class AlignmentLossFunction(torch.autograd.Function):
    """(temperature, cosine, ignore_index, M, targets [B], budgets [M], mask, M features, M prototypes, M seen or none) -> C, A, q(y) and which rows count,
    each [B, M], and what backward needs. See :func:`alignment_loss`, which checks."""

    @staticmethod
    def forward(temperature, cosine, ignore_index, count, targets, budgets, mask, *values):
        features, prototypes, seen = _split(values, count)
        return _FORWARD(
            features, prototypes, targets, budgets, temperature, cosine, seen, mask, ignore_index
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *ctx.constants, targets, budgets, mask = inputs[:7]
        _, _, confidence, counts, statistics = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(confidence, counts, statistics)
        ctx.save_for_backward(targets, budgets, mask, confidence, statistics, *inputs[7:])

    @staticmethod
    def backward(ctx, grad_contrastive, grad_alignment, *_):
        gradients = ()
        if grad_contrastive is not None or grad_alignment is not None:
            saved = ctx.saved_tensors
            gradients = first_order(
                "alignment_loss",
                _call_backward,
                *ctx.constants,
                *saved[:5],
                grad_contrastive,
                grad_alignment,
                *saved[5:],
            )
        needed = (
            value if need else None for value, need in zip(gradients, ctx.needs_input_grad[7:])
        )
        return (
            (None,) * 7 + tuple(needed) + (None,) * (len(ctx.needs_input_grad) - 7 - len(gradients))
        )

"""Gated fusion, and the same with all its cross-entropies.

See method page, section 4 for the fusion and method page, section 5 for the cross-entropies.
"""

from __future__ import annotations

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
    check_shape,
    check_targets,
    describe,
    tensor_list,
)
from iib_kernels._runtime import apply, choose, compute_dtype, distinct
from iib_kernels.ops.fusion.autograd import FusionCrossEntropyFunction, GatedFusionFunction


class FusionOutput(NamedTuple):
    """What :func:`gated_fusion` returns."""

    logits: Tensor  #: [..., K] fused logits, in the logits' dtype
    weights: Tensor  #: [..., M] float32 (float64 for float64 logits), sum to 1 over the modalities
    uncertainty: Tensor  #: [..., M] float32 (float64), normalised entropy in [0, 1]


class FusionLossOutput(NamedTuple):
    """What :func:`fusion_cross_entropy` returns; float32 (float64 for float64 logits).

    The shapes are those of a reduction; with ``reduction="none"`` ``fused`` is [...] and
    ``unimodal`` [..., M].
    """

    fused: Tensor  #: [] cross-entropy of the fused logits, nats
    unimodal: Tensor  #: [M] cross-entropies of the temperature-scaled logits, nats
    weights: Tensor  #: [..., M] fusion weights


def gated_fusion(
    logits: Sequence[Tensor] | Tensor,
    log_prior: Tensor | None = None,
    *,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> FusionOutput:
    """Fuse the modalities' logits by prior, uncertainty and gate (method page, section 4).

    The fused logits are f = scale * sum_m w_m t_m with t_m = l_m / T_m. The weights w are a
    softmax, over the modalities present, of ``log_prior - uncertainty_weight * u + gate_logits``,
    where u_m = H(softmax(t_m)) / log K is the normalised entropy (0 when K = 1).

    ``gated_fusion(logits)`` alone works: the prior is uniform.

    Args:
        logits: M tensors [..., K], or one tensor [M, ..., K]; float16, bfloat16, float32 or
            float64. Entries may be -inf (a class ruled out).
        log_prior: [M], eta * log pi.
        gate_logits: [..., M], the gate's further terms.
        temperature: T > 0, a number or [M].
        uncertainty_weight: kappa, a number or [M].
        scale: gamma, a number or a tensor []. M makes uniform weights the plain product of experts.
        mask: [..., M] bool, True = present. What stands in a missing modality's logits has no
            effect, NaN included.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Half types are computed in float32; each gradient comes in its input's dtype. Differentiable in
    everything but the mask.

    Raises TypeError or ValueError naming the argument. A sample without any modality present is a
    ValueError in eager mode on the CPU. Elsewhere, where looking would synchronise, its row is NaN:
    never a uniform guess.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> audio, visual = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    >>> fused = gated_fusion([audio, visual], uncertainty_weight=2.0)
    >>> fused.weights  # audio is sure, visual is not
    tensor([[0.8423, 0.1577]])
    >>> fused.logits
    tensor([[3.3690, 0.0158, 0.0000]])
    """
    logits, arguments, dtype = _prepare(
        logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
    )
    if choose(impl, *logits) == "triton":
        leading, count = logits[0].shape[:-1], len(logits)
        fused, weights, uncertainty, _ = apply(GatedFusionFunction, *_flat(logits, **arguments))
        return FusionOutput(
            fused.reshape(logits[0].shape),
            weights.reshape(*leading, count),
            uncertainty.reshape(*leading, count),
        )
    arguments = _raised(logits, arguments)
    with torch.autocast(logits[0].device.type, enabled=False):
        fused, weights, uncertainty, _ = reference.gated_fusion(**arguments)
    return FusionOutput(fused.to(dtype), weights, uncertainty)


def fusion_cross_entropy(
    logits: Sequence[Tensor] | Tensor,
    targets: Tensor,
    log_prior: Tensor | None = None,
    *,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> FusionLossOutput:
    """Cross-entropies of the fused logits and of every modality's own, in nats, with the weights.

    Fusion is that of :func:`gated_fusion` (method page, section 4), the cross-entropies are those
    of the objective (method page, section 5). The unimodal ones are of t_m = l_m / T_m, which is
    l_m at T = 1.

    Args:
        targets: [...] class indices; rows with ``ignore_index`` contribute nothing. Out of range:
            ValueError in eager mode on the CPU, ignored elsewhere.
        reduction: ``"mean"`` over the rows that count (for a modality: those where it is present; 0
            where there is none), ``"sum"``, or ``"none"`` (0 in rows that do not count).

    The other arguments, the dtype rule and the errors are those of :func:`gated_fusion`.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> loss = fusion_cross_entropy(logits, torch.tensor([0]), uncertainty_weight=0.0, scale=2.0)
    >>> loss.fused, loss.unimodal
    (tensor(0.3133), tensor([0.1269, 1.3133]))
    """
    check_choice(reduction, ("mean", "sum", "none"), "reduction")
    logits, arguments, _ = _prepare(
        logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
    )
    leading, count = logits[0].shape[:-1], len(logits)
    implementation = choose(impl, *logits)
    targets = check_targets(
        targets, leading, logits[0].shape[-1], ignore_index, replace=implementation == "reference"
    )
    check_device(logits[0], targets=targets)
    if implementation == "triton":
        flat = targets.reshape(-1), *_flat(logits, **arguments)
        fused, unimodal, weights, counts, _ = apply(FusionCrossEntropyFunction, ignore_index, *flat)
        weights = weights.reshape(*leading, count)
        if reduction == "none":
            unimodal = unimodal.reshape(*leading, count)
            return FusionLossOutput(fused.reshape(leading), unimodal, weights)
        divisors = (
            counts.sum(0).clamp_min(1)
            if reduction == "mean"
            else counts.new_ones(count + 1, dtype=torch.int64)
        )  # [1 + M]
        return FusionLossOutput(fused.sum() / divisors[0], unimodal.sum(0) / divisors[1:], weights)
    arguments = _raised(logits, arguments)
    with torch.autocast(logits[0].device.type, enabled=False):
        fused, weights, _, scaled = reference.gated_fusion(**arguments)
        counts = targets != ignore_index
        present = (
            counts[..., None].expand(weights.shape) if mask is None else counts[..., None] & mask
        )
        fused = _cross_entropy(fused, targets, counts)
        unimodal = _cross_entropy(scaled, targets[..., None].expand(weights.shape), present)
    if reduction == "none":
        return FusionLossOutput(fused, unimodal, weights)
    unimodal = unimodal.reshape(-1, count).sum(0)
    if reduction == "sum":
        return FusionLossOutput(fused.sum(), unimodal, weights)
    return FusionLossOutput(
        fused.sum() / counts.sum().clamp_min(1),
        unimodal / present.reshape(-1, count).sum(0).clamp_min(1),
        weights,
    )


def _cross_entropy(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """-log softmax(logits)[target] where a row counts, 0 elsewhere, whatever stands there."""
    safe = torch.where(counts[..., None], logits, 0.0)
    index = torch.where(counts, targets, 0)[..., None]
    return torch.where(counts, safe.logsumexp(-1) - safe.gather(-1, index).squeeze(-1), 0.0)


def _prepare(logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask):
    """Checked arguments: the logits as a list, the others by name, and the fused logits' dtype.

    The names are those of :func:`~iib_kernels.reference.gated_fusion`.
    """
    logits = _check_logits(logits)
    shape, count = logits[0].shape, len(logits)
    if log_prior is not None:
        check_shape(check_float(log_prior, "log_prior"), (count,), "log_prior", "[M]")
    if gate_logits is not None:
        size = (*shape[:-1], count)
        if check_float(gate_logits, "gate_logits").shape != size:
            raise ValueError(
                f"gate_logits: expected shape [..., M] = {[*size]}, got {describe(gate_logits)}"
            )
    either = ((), (count,))
    _check_parameter(temperature, "temperature", either, count)
    _check_parameter(uncertainty_weight, "uncertainty_weight", either, count)
    _check_parameter(scale, "scale", ((),), count)
    mask = check_mask(mask, (*shape[:-1], count), rows_need_one=True)
    given = {
        "log_prior": log_prior,
        "gate_logits": gate_logits,
        "temperature": temperature,
        "uncertainty_weight": uncertainty_weight,
        "scale": scale,
    }
    # A scalar tensor may stand anywhere, as everywhere in PyTorch
    sized = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    sized = {name: value for name, value in sized.items() if value.dim()}
    entries = {f"logits[{index}]": values for index, values in enumerate(logits)}
    check_device(logits[0], mask=mask, **sized, **entries)
    dtype = logits[0].dtype
    for values in logits[1:]:
        dtype = torch.promote_types(dtype, values.dtype)
    return logits, {**given, "mask": mask}, dtype


def _check_logits(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """M tensors of one shape [..., K]."""
    if isinstance(logits, Tensor):
        check_float(logits, "logits")
        if logits.dim() < 2 or not len(logits):
            raise ValueError(
                "logits: expected one tensor [M, ..., K] with M >= 1, or a sequence of [..., K], "
                f"got {describe(logits)}"
            )
        logits = list(logits.unbind(0))
    logits = tensor_list(logits, "logits")
    shape = logits[0].shape
    if not len(shape) or shape[-1] < 1:
        raise ValueError(
            f"logits[0]: expected shape [..., K] with K >= 1, got {describe(logits[0])}"
        )
    for index, values in enumerate(logits):
        if values.shape != shape:
            raise ValueError(
                f"logits[{index}]: expected shape {list(shape)} as logits[0], "
                f"got {describe(values)}"
            )
    return logits


def _check_parameter(
    value: object, name: str, sizes: Sequence[tuple[int, ...]], count: int
) -> None:
    """TypeError or ValueError unless ``value`` is a number or a tensor of one of ``sizes``."""
    if isinstance(value, Tensor):
        check_float(value, name)
        if tuple(value.shape) not in sizes:
            shapes = " or ".join("[M]" if size else "[]" for size in sizes)
            raise ValueError(
                f"{name}: expected a number or a tensor {shapes}, M = {count}, "
                f"got {describe(value)}"
            )
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number or a tensor, got {describe(value)}")
    elif name == "temperature" and not value > 0:
        raise ValueError(f"temperature: expected a number above 0, got {value}")


def _raised(logits: list[Tensor], arguments: dict) -> dict:
    """Arguments of :func:`~iib_kernels.reference.gated_fusion` in the dtype to compute in."""
    compute = compute_dtype(*logits)
    raised = {
        name: value.to(compute) if isinstance(value, Tensor) and name != "mask" else value
        for name, value in arguments.items()
    }
    return {"logits": [values.to(compute) for values in logits], **raised}


def _flat(
    logits: list[Tensor], log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
) -> tuple:
    """Arguments of the autograd Functions, with the leading dimensions in one.

    First the numbers that stand for parameters, then the mask, then tensors or None. Reshaping is a
    view where the strides allow.
    """
    count, given = len(logits), (temperature, uncertainty_weight, scale)
    numbers = [1.0 if isinstance(value, Tensor) else float(value) for value in given]
    optional = [log_prior, gate_logits]
    optional += [value if isinstance(value, Tensor) else None for value in given]
    present = iter(distinct([value for value in (*optional, *logits) if value is not None]))
    log_prior, gate, *parameters = (None if value is None else next(present) for value in optional)
    mask, gate = (None if value is None else value.reshape(-1, count) for value in (mask, gate))
    rows = [values.reshape(-1, values.shape[-1]) for values in present]
    return numbers, mask, log_prior, gate, *parameters, *rows

"""Gated fusion of modalities, and the same with all its cross-entropies (method page, section 4 and 5)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import check_choice, check_device, check_float, check_mask, check_shape, check_targets, describe, tensor_list
from iib_kernels._runtime import choose, compute_dtype


class FusionOutput(NamedTuple):
    """What :func:`gated_fusion` returns."""

    logits: Tensor  #: [..., K] fused logits, in the logits' dtype
    weights: Tensor  #: [..., M] float32 (float64 for float64 logits), sum to 1 over the modalities
    uncertainty: Tensor  #: [..., M] float32 (float64), normalised entropy in [0, 1]


class FusionLossOutput(NamedTuple):
    """What :func:`fusion_cross_entropy` returns; float32 (float64 for float64 logits)."""

    fused: Tensor  #: cross-entropy of the fused logits in nats: [], or [...] with ``reduction="none"``
    unimodal: Tensor  #: cross-entropies of the temperature-scaled logits: [M], or [..., M] with ``reduction="none"``
    weights: Tensor  #: [..., M]


def gated_fusion(
    logits: Sequence[Tensor] | Tensor, log_prior: Tensor | None = None, *, gate_logits: Tensor | None = None, temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0, scale: Tensor | float = 1.0, mask: Tensor | None = None, impl: str = "auto",
) -> FusionOutput:
    """Fuse the modalities' logits by prior, uncertainty and gate: f = scale * sum_m w_m t_m with t_m = l_m / T_m (method page, section 4).

    w = softmax over the modalities present of ``log_prior - uncertainty_weight * u + gate_logits``, u_m = H(softmax(t_m)) / log K (0 when K = 1).
    ``gated_fusion(logits)`` alone works: uniform prior.

    Args:
        logits: M tensors [..., K], or one tensor [M, ..., K]; float16, bfloat16, float32 or float64. Entries may be -inf (a class ruled out).
        log_prior: [M], eta * log pi.
        gate_logits: [..., M]: surprise term and gate network.
        temperature: T > 0, a number or [M].
        uncertainty_weight: kappa, a number or [M].
        scale: gamma, a number or a tensor []. M makes uniform weights the plain product of experts.
        mask: [..., M] bool, True = present. What stands in a missing modality's logits has no effect, NaN included.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Half types are computed in float32; each gradient comes in its input's dtype. Differentiable in everything but the mask.

    Raises TypeError or ValueError naming the argument. A sample without any modality present is a ValueError in eager mode on the CPU; elsewhere, where
    looking would synchronise, its row is NaN: never a uniform guess.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> audio, visual = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    >>> fused = gated_fusion([audio, visual], uncertainty_weight=2.0)
    >>> fused.weights  # audio is sure, visual is not
    tensor([[0.8423, 0.1577]])
    >>> fused.logits
    tensor([[3.3690, 0.0158, 0.0000]])
    """
    logits, arguments, dtype = _prepare(logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask, impl)
    with torch.autocast(logits[0].device.type, enabled=False):
        fused, weights, uncertainty, _ = reference.gated_fusion(**arguments)
    return FusionOutput(fused.to(dtype), weights, uncertainty)


def fusion_cross_entropy(
    logits: Sequence[Tensor] | Tensor, targets: Tensor, log_prior: Tensor | None = None, *, gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0, uncertainty_weight: Tensor | float = 1.0, scale: Tensor | float = 1.0, mask: Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", impl: str = "auto",
) -> FusionLossOutput:
    """The cross-entropies of the fused logits and of every modality's own, in nats, with the fusion weights (method page, sections 4 and 5).

    Args:
        targets: [...] class indices; rows with ``ignore_index`` contribute nothing. Out of range: ValueError in eager mode on the CPU, ignored elsewhere.
        reduction: ``"mean"`` over the rows that count (for a modality: those where it is present; 0 where there is none), ``"sum"`` or ``"none"``
            (0 in rows that do not count).

    The other arguments, the dtype rule and the errors are those of :func:`gated_fusion`. The unimodal cross-entropies are of t_m = l_m / T_m, which is l_m
    at T = 1.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> loss = fusion_cross_entropy(logits, torch.tensor([0]), uncertainty_weight=0.0, scale=2.0)
    >>> loss.fused, loss.unimodal
    (tensor(0.3133), tensor([0.1269, 1.3133]))
    """
    check_choice(reduction, ("mean", "sum", "none"), "reduction")
    logits, arguments, _ = _prepare(logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask, impl)
    targets = check_targets(targets, logits[0].shape[:-1], logits[0].shape[-1], ignore_index)
    check_device(logits[0], targets=targets)
    with torch.autocast(logits[0].device.type, enabled=False):
        fused, weights, _, scaled = reference.gated_fusion(**arguments)
        counts = targets != ignore_index
        present = counts[..., None].expand(weights.shape) if mask is None else counts[..., None] & mask
        fused = _cross_entropy(fused, targets, counts)
        unimodal = _cross_entropy(scaled, targets[..., None].expand(weights.shape), present)
    if reduction == "none":
        return FusionLossOutput(fused, unimodal, weights)
    unimodal = unimodal.reshape(-1, len(logits)).sum(0)
    if reduction == "sum":
        return FusionLossOutput(fused.sum(), unimodal, weights)
    return FusionLossOutput(fused.sum() / counts.sum().clamp_min(1), unimodal / present.reshape(-1, len(logits)).sum(0).clamp_min(1), weights)


def _cross_entropy(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """-log softmax(logits)[target] where a row counts, 0 elsewhere, whatever stands there."""
    safe = torch.where(counts[..., None], logits, 0.0)
    index = torch.where(counts, targets, 0)[..., None]
    return torch.where(counts, safe.logsumexp(-1) - safe.gather(-1, index).squeeze(-1), 0.0)


def _prepare(logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask, impl):
    """Checked arguments of :func:`reference.gated_fusion` in the dtype to compute in; the logits as a list, and their own dtype."""
    if isinstance(logits, Tensor):
        check_float(logits, "logits")
        if logits.dim() < 2 or not len(logits):
            raise ValueError(f"logits: expected one tensor [M, ..., K] with M >= 1, or a sequence of [..., K], got {describe(logits)}")
        logits = list(logits.unbind(0))
    logits = tensor_list(logits, "logits")
    shape, count = logits[0].shape, len(logits)
    if not len(shape) or shape[-1] < 1:
        raise ValueError(f"logits[0]: expected shape [..., K] with K >= 1, got {describe(logits[0])}")
    for index, values in enumerate(logits):
        if values.shape != shape:
            raise ValueError(f"logits[{index}]: expected shape {list(shape)} as logits[0], got {describe(values)}")
    dtype = logits[0].dtype
    for values in logits[1:]:
        dtype = torch.promote_types(dtype, values.dtype)
    if log_prior is not None:
        check_shape(check_float(log_prior, "log_prior"), (count,), "log_prior", "[M]")
    if gate_logits is not None and check_float(gate_logits, "gate_logits").shape != (*shape[:-1], count):
        raise ValueError(f"gate_logits: expected shape [..., M] = {[*shape[:-1], count]}, got {describe(gate_logits)}")
    either = ((), (count,))
    for name, value, sizes in (("temperature", temperature, either), ("uncertainty_weight", uncertainty_weight, either), ("scale", scale, ((),))):
        if isinstance(value, Tensor):
            check_float(value, name)
            if tuple(value.shape) not in sizes:
                shapes = " or ".join("[M]" if size else "[]" for size in sizes)
                raise ValueError(f"{name}: expected a number or a tensor {shapes}, M = {count}, got {describe(value)}")
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number or a tensor, got {describe(value)}")
        elif name == "temperature" and not value > 0:
            raise ValueError(f"temperature: expected a number above 0, got {value}")
    mask = check_mask(mask, (*shape[:-1], count), rows_need_one=True)
    tensors = {"log_prior": log_prior, "gate_logits": gate_logits, "temperature": temperature, "uncertainty_weight": uncertainty_weight, "scale": scale}
    check_device(logits[0], mask=mask, **{name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.dim()},
                 **{f"logits[{index}]": value for index, value in enumerate(logits)})
    choose(impl, *logits)
    compute = compute_dtype(*logits)
    raised = {name: value.to(compute) if isinstance(value, Tensor) else value for name, value in tensors.items()}
    return logits, {"logits": [values.to(compute) for values in logits], "mask": mask, **raised}, dtype

"""Gated fusion, and the same with all its cross-entropies.

See method page, section 4 for the fusion and method page, section 5 for the cross-entropies.
"""

from __future__ import annotations

import functools
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
    tensor_list,
)
from iib_kernels._runtime import choose, compute_dtype, eager_on_cpu, full_precision
from iib_kernels.compat import apply, distinct, exportable
from iib_kernels.cpu import fusion as cpu_fusion
from iib_kernels.cpu.shared import takes as cpu_takes
from iib_kernels.ops.fusion.autograd import FusionCrossEntropyFunction, GatedFusionFunction

PRESENT = "present"  # the scale that counts the modalities of each row


@exportable
class FusionOutput(NamedTuple):
    """What :func:`gated_fusion` returns."""

    logits: Tensor  #: [..., K] in the logits' dtype; of given values [..., D] in theirs
    weights: Tensor  #: [..., M] float32 (float64 for float64 logits), sum to 1 over the modalities
    uncertainty: Tensor  #: [..., M] float32 (float64), normalised entropy in [0, 1]


@exportable
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
    values: Sequence[Tensor] | None = None,
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
            ``"present"``: the number of modalities that are there in a row, so that uniform weights
            give the plain sum of their logits.
        mask: [..., M] bool, True = present. What stands in a missing modality's logits has no
            effect, NaN included.
        values: M tensors [..., D] of any floating-point dtypes and any D, features say. The same
            weights then fuse them in place of the logits: the result's ``logits`` are
            scale * sum_m w_m v_m. What stands in a missing modality's values has no effect.
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
    options = cpu_fusion.Options(
        log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
    )
    if values is None and cpu_fusion.is_plain(impl, logits, options):
        return FusionOutput(*cpu_fusion.gated_fusion(logits, *options))
    logits, arguments, dtype = prepare(
        logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
    )
    values = _check_values(values, logits)
    if values:
        dtype = functools.reduce(torch.promote_types, [rows.dtype for rows in values])
    if choose(impl, *logits) == "triton":
        leading, count = logits[0].shape[:-1], len(logits)
        numbers, mask, *tensors = _flat(logits, values, **arguments)
        outputs = apply(GatedFusionFunction, numbers, count, mask, *tensors)
        fused, weights, uncertainty = (
            value.reshape(*leading, value.shape[-1]) for value in outputs[:3]
        )
        return FusionOutput(fused, weights, uncertainty)
    arguments = _raised(logits, arguments, values)
    if not values and not _by_row(arguments) and cpu_takes(impl, *logits, *arguments.values()):
        fused, weights, uncertainty = cpu_fusion.gated_fusion(**arguments)
    else:
        with full_precision(logits[0]):
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
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
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
        weight: [K], of the classes, as in ``F.cross_entropy``: a mean's divisor is the sum of the
            weights of its rows' targets.
        label_smoothing: eps in [0, 1], as in ``F.cross_entropy``: (1 - eps) times -log p_y, plus
            eps times the mean of -log p_k over the classes that are not ruled out by -inf.
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
    options = cpu_fusion.Options(
        log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
    )
    plain = weight is None and type(label_smoothing) is float and not label_smoothing
    plain = plain and targets is not None and type(ignore_index) is int and ignore_index < 0
    if plain and cpu_fusion.is_plain(impl, logits, options, targets):
        how = {"reduction": reduction, "complete": True}
        return FusionLossOutput(*cpu_fusion.fusion_cross_entropy(logits, targets, *options, **how))
    logits, arguments, _ = prepare(
        logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
    )
    leading, count = logits[0].shape[:-1], len(logits)
    implementation = choose(impl, *logits)
    targets = check_targets(
        targets, leading, logits[0].shape[-1], ignore_index, replace=implementation == "reference"
    )
    check_labels(weight, label_smoothing, logits[0])
    check_device(logits[0], targets=targets, weight=weight)
    if implementation == "triton":
        numbers, mask, *tensors = _flat(logits, (), **arguments)
        options = ignore_index, float(label_smoothing), reduction
        outputs = apply(
            FusionCrossEntropyFunction,
            options,
            targets.reshape(-1),
            weight,
            numbers,
            mask,
            *tensors,
        )
        fused, unimodal, weights = outputs[:3]
        if len(leading) != 1:
            weights = weights.reshape(*leading, count)
            if reduction == "none":
                fused, unimodal = fused.reshape(leading), unimodal.reshape(*leading, count)
        return FusionLossOutput(fused, unimodal, weights)
    arguments = _raised(logits, arguments)
    labels = {"weight": weight, "label_smoothing": label_smoothing}
    if weight is not None:
        labels["weight"] = weight.to(arguments["logits"][0].dtype)
    if not _by_row(arguments) and cpu_takes(impl, targets, *logits, *arguments.values()):
        return FusionLossOutput(
            *cpu_fusion.fusion_cross_entropy(
                targets=targets,
                ignore_index=ignore_index,
                reduction=reduction,
                **labels,
                **arguments,
            )
        )
    with full_precision(logits[0]):
        fused, weights, _, scaled = reference.gated_fusion(**arguments)
        valid = (targets != ignore_index)[..., None]
        present = valid.expand(weights.shape) if mask is None else valid & mask
        counts = torch.cat([valid, present], -1)  # [..., 1 + M]
        every = targets[..., None].expand(weights.shape)
        fused = reference.cross_entropy(fused, targets, valid[..., 0], **labels)
        unimodal = reference.cross_entropy(scaled, every, present, **labels)
    if reduction == "none":
        return FusionLossOutput(fused, unimodal, weights)
    fused, unimodal = fused.sum(), unimodal.reshape(-1, count).sum(0)
    if reduction == "mean":
        divisors = _divisors(counts, targets, weight, fused.dtype)
        fused, unimodal = fused / divisors[0], unimodal / divisors[1:]
    return FusionLossOutput(fused, unimodal, weights)


def _divisors(counts: Tensor, targets: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What means are divided by, [1 + M]: the rows that count, or their targets' weights.

    1 where there are none, whose sum is 0.
    """
    if weight is None:
        return counts.reshape(-1, counts.shape[-1]).sum(0).clamp_min(1)
    each = weight.to(dtype)[torch.where(counts[..., 0], targets, 0).long()]
    total = torch.where(counts, each[..., None], 0).reshape(-1, counts.shape[-1]).sum(0)
    return torch.where(total == 0, 1, total)


def check_labels(weight: object, label_smoothing: object, logits: Tensor) -> None:
    """TypeError or ValueError unless both are as ``F.cross_entropy`` takes them."""
    if weight is not None:
        classes = logits.shape[-1]
        check_shape(check_float(weight, "weight"), (classes,), "weight", "[K]")
        refuse_grad("weight", weight)
    check_number(label_smoothing, "label_smoothing")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")


def _check_values(values: object, logits: list[Tensor]) -> list[Tensor] | None:
    """M tensors of one shape [..., D], or None."""
    if values is None:
        return None
    values = tensor_list(values, "values", len(logits))
    shape = (*logits[0].shape[:-1], *values[0].shape[-1:])
    for index, rows in enumerate(values):
        if rows.shape != shape or not shape[-1:] or not shape[-1]:
            leading = "".join(f"{size}, " for size in logits[0].shape[:-1])
            expected = f"{[*shape]} as values[0]" if index else f"[{leading}D] with D >= 1"
            raise ValueError(
                f"values[{index}]: expected shape [..., D] = {expected}, with the leading "
                f"dimensions of logits[0], got {describe(rows)}"
            )
    check_device(logits[0], **{f"values[{index}]": rows for index, rows in enumerate(values)})
    return values


def prepare(logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, mask):
    """Checked arguments: the logits as a list, the others by name, and the fused logits' dtype.

    The names are those of :func:`~iib_kernels.reference.gated_fusion`.
    """
    logits = check_logits(logits)
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
    check_parameter(temperature, "temperature", either, count)
    check_parameter(uncertainty_weight, "uncertainty_weight", either, count)
    check_parameter(scale, "scale", ((),), count)
    mask = check_mask(mask, (*shape[:-1], count), rows_need_one=True)
    if isinstance(scale, str) and mask is None:
        scale = float(count)
    numbers = temperature, uncertainty_weight, scale
    temperature, uncertainty_weight, scale = (beside(value, logits[0]) for value in numbers)
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
        if values.dtype != dtype:
            dtype = torch.promote_types(dtype, values.dtype)
    return logits, {**given, "mask": mask}, dtype


def check_logits(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
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


def check_parameter(value: object, name: str, sizes: Sequence[tuple[int, ...]], count: int) -> None:
    """TypeError or ValueError unless ``value`` is a number or a tensor of one of ``sizes``."""
    if name == "scale" and isinstance(value, str):
        if value != PRESENT:
            raise ValueError(f"scale: expected a number, a tensor [] or {PRESENT!r}, got {value!r}")
    elif isinstance(value, Tensor):
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


def beside(value: Tensor | float, logits: Tensor) -> Tensor | float:
    """A parameter as the kernels take it beside ``logits``: a scalar tensor of the CPU is a number.

    One that asks for a gradient goes to the logits' device, which copies from the host.
    """
    if not isinstance(value, Tensor) or value.dim() or value.device == logits.device:
        return value
    if not eager_on_cpu(value) or value.requires_grad:
        return value.to(logits.device)
    return value.item()


def _by_row(arguments: dict) -> bool:
    """Whether each row has a scale of its own."""
    return isinstance(arguments["scale"], Tensor) and arguments["scale"].dim() > 0


def _raised(logits: list[Tensor], arguments: dict, values: Sequence[Tensor] | None = None) -> dict:
    """Arguments of :func:`~iib_kernels.reference.gated_fusion` in the dtype to compute in."""
    compute = compute_dtype(*logits, *(values or ()))
    raised = {
        name: value.to(compute) if isinstance(value, Tensor) and name != "mask" else value
        for name, value in arguments.items()
    }
    if values:
        raised["values"] = [rows.to(compute) for rows in values]
    if isinstance(raised["scale"], str):
        raised["scale"] = raised["mask"].sum(-1, keepdim=True).to(compute)
    return {"logits": [rows.to(compute) for rows in logits], **raised}


def _flat(
    logits: list[Tensor],
    values: Sequence[Tensor] | None,
    log_prior,
    gate_logits,
    temperature,
    uncertainty_weight,
    scale,
    mask,
) -> tuple:
    """Arguments of the autograd Functions, with the leading dimensions in one.

    First the numbers that stand for parameters, then the mask, then tensors or None, at last the
    logits and the values. Reshaping is a view where the strides allow.
    """
    count, given = len(logits), (temperature, uncertainty_weight, scale)
    if isinstance(scale, str):  # "present": two numbers say so
        given, scale = given[:2], None
    numbers = [1.0 if isinstance(value, Tensor) else float(value) for value in given]
    optional = [log_prior, gate_logits]
    optional += [
        value if isinstance(value, Tensor) else None
        for value in (temperature, uncertainty_weight, scale)
    ]
    tensors = (*optional, *logits, *(values or ()))
    present = iter(distinct([value for value in tensors if value is not None]))
    log_prior, gate, *parameters = (None if value is None else next(present) for value in optional)
    mask, gate = (None if value is None else value.reshape(-1, count) for value in (mask, gate))
    rows = [matrix.reshape(-1, matrix.shape[-1]) for matrix in present]
    return numbers, mask, log_prior, gate, *parameters, *rows

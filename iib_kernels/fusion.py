"""Gated fusion of modalities, and the same with all its cross-entropies (method page, section 4 and 5)."""

from __future__ import annotations

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
    check_shape,
    check_targets,
    describe,
    tensor_list,
)
from iib_kernels._registration import register
from iib_kernels._runtime import (
    accumulator,
    apply,
    choose,
    compute_dtype,
    distinct,
    first_order,
    on_device,
    scalar,
)


class FusionOutput(NamedTuple):
    """What :func:`gated_fusion` returns."""

    logits: Tensor  #: [..., K] fused logits, in the logits' dtype
    weights: Tensor  #: [..., M] float32 (float64 for float64 logits), sum to 1 over the modalities
    uncertainty: Tensor  #: [..., M] float32 (float64), normalised entropy in [0, 1]


class FusionLossOutput(NamedTuple):
    """What :func:`fusion_cross_entropy` returns; float32 (float64 for float64 logits)."""

    fused: (
        Tensor  #: cross-entropy of the fused logits in nats: [], or [...] with ``reduction="none"``
    )
    unimodal: Tensor  #: cross-entropies of the temperature-scaled logits: [M], or [..., M] with ``reduction="none"``
    weights: Tensor  #: [..., M]


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
        fused, unimodal, weights, counts, _ = apply(
            FusionCrossEntropyFunction,
            ignore_index,
            targets.reshape(-1),
            *_flat(logits, **arguments),
        )
        if reduction == "none":
            return FusionLossOutput(
                fused.reshape(leading),
                unimodal.reshape(*leading, count),
                weights.reshape(*leading, count),
            )
        divisors = (
            counts.sum(0).clamp_min(1)
            if reduction == "mean"
            else counts.new_ones(count + 1, dtype=torch.int64)
        )
        return FusionLossOutput(
            fused.sum() / divisors[0],
            unimodal.sum(0) / divisors[1:],
            weights.reshape(*leading, count),
        )
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
    """Checked: the logits as a list, the other arguments of :func:`reference.gated_fusion`, and the dtype of fused logits."""
    if isinstance(logits, Tensor):
        check_float(logits, "logits")
        if logits.dim() < 2 or not len(logits):
            raise ValueError(
                f"logits: expected one tensor [M, ..., K] with M >= 1, or a sequence of [..., K], got {describe(logits)}"
            )
        logits = list(logits.unbind(0))
    logits = tensor_list(logits, "logits")
    shape, count = logits[0].shape, len(logits)
    if not len(shape) or shape[-1] < 1:
        raise ValueError(
            f"logits[0]: expected shape [..., K] with K >= 1, got {describe(logits[0])}"
        )
    for index, values in enumerate(logits):
        if values.shape != shape:
            raise ValueError(
                f"logits[{index}]: expected shape {list(shape)} as logits[0], got {describe(values)}"
            )
    dtype = logits[0].dtype
    for values in logits[1:]:
        dtype = torch.promote_types(dtype, values.dtype)
    if log_prior is not None:
        check_shape(check_float(log_prior, "log_prior"), (count,), "log_prior", "[M]")
    if gate_logits is not None and check_float(gate_logits, "gate_logits").shape != (
        *shape[:-1],
        count,
    ):
        raise ValueError(
            f"gate_logits: expected shape [..., M] = {[*shape[:-1], count]}, got {describe(gate_logits)}"
        )
    either = ((), (count,))
    for name, value, sizes in (
        ("temperature", temperature, either),
        ("uncertainty_weight", uncertainty_weight, either),
        ("scale", scale, ((),)),
    ):
        if isinstance(value, Tensor):
            check_float(value, name)
            if tuple(value.shape) not in sizes:
                shapes = " or ".join("[M]" if size else "[]" for size in sizes)
                raise ValueError(
                    f"{name}: expected a number or a tensor {shapes}, M = {count}, got {describe(value)}"
                )
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number or a tensor, got {describe(value)}")
        elif name == "temperature" and not value > 0:
            raise ValueError(f"temperature: expected a number above 0, got {value}")
    mask = check_mask(mask, (*shape[:-1], count), rows_need_one=True)
    tensors = {
        "log_prior": log_prior,
        "gate_logits": gate_logits,
        "temperature": temperature,
        "uncertainty_weight": uncertainty_weight,
        "scale": scale,
    }
    check_device(
        logits[0],
        mask=mask,
        **{
            name: value
            for name, value in tensors.items()
            if isinstance(value, Tensor) and value.dim()
        },
        **{f"logits[{index}]": value for index, value in enumerate(logits)},
    )
    return logits, {**tensors, "mask": mask}, dtype


def _raised(logits: list[Tensor], arguments: dict) -> dict:
    """Arguments of :func:`reference.gated_fusion` in the dtype to compute in."""
    compute = compute_dtype(*logits)
    raised = {
        name: value.to(compute) if isinstance(value, Tensor) and name != "mask" else value
        for name, value in arguments.items()
    }
    return {"logits": [values.to(compute) for values in logits], **raised}


def _flat(
    logits: list[Tensor], log_prior, gate_logits, temperature, uncertainty_weight, scale, mask
) -> tuple:
    """Arguments of the Functions: the numbers that stand for parameters, then tensors or None; leading dimensions in one (a view where strides allow)."""
    count, given = len(logits), (temperature, uncertainty_weight, scale)
    numbers = [1.0 if isinstance(value, Tensor) else float(value) for value in given]
    tensors = [value if isinstance(value, Tensor) else None for value in given]
    parameters = iter(
        distinct(
            [value for value in (log_prior, gate_logits, *tensors, *logits) if value is not None]
        )
    )
    log_prior, gate, *tensors = (
        None if value is None else next(parameters) for value in (log_prior, gate_logits, *tensors)
    )
    mask, gate = (None if value is None else value.reshape(-1, count) for value in (mask, gate))
    return (
        numbers,
        mask,
        log_prior,
        gate,
        *tensors,
        *(values.reshape(-1, values.shape[-1]) for values in parameters),
    )


# ----- Triton: launchers, operators, autograd Functions


def _strides(value: Tensor | None, size: int = 2) -> tuple[int, ...]:
    """Strides of a tensor, zeros for None and for a parameter [] that stands for all modalities."""
    return (0,) * size if value is None or value.dim() == 0 else value.stride()


def _parameters(logits, temperature, uncertainty_weight, scale, numbers, dtype) -> list:
    """Pointer, stride and number of each of the three parameters; the scale has one entry."""
    arguments = []
    for value, number in zip((temperature, uncertainty_weight, scale), numbers):
        if value is None:
            number = scalar(number, dtype, logits[0].device)
            value, number = (number, 1.0) if isinstance(number, Tensor) else (None, number)
        arguments += [value, *_strides(value, 1), number]
    del arguments[-2]  # the scale's stride
    return arguments


def _sizes(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """Rows, classes and modalities."""
    return (*logits[0].shape, len(logits))


def _statistics_size(logits: Sequence[Tensor], cross_entropy: bool) -> tuple[int, ...]:
    """Shape of what forward keeps for backward: nothing where one block holds all classes."""
    batch, classes, count = _sizes(logits)
    return (batch if classes > _tuning.FUSION_CLASSES else 0, 3 * count + 2)


def _forward(
    logits,
    log_prior,
    gate_logits,
    temperature,
    uncertainty_weight,
    scale,
    numbers,
    mask,
    targets,
    ignore_index,
    outputs,
) -> None:
    """Launch: fill fused, weights, uncertainty, nll, unimodal, counts (some None) and statistics."""
    from iib_kernels._kernels.fusion import fusion_forward

    batch, classes, count = _sizes(logits)
    if not batch:
        return
    dtype = compute_dtype(*logits)
    one_block = classes <= _tuning.FUSION_CLASSES

    def launch(config: _tuning.Launch) -> None:
        fusion_forward[(-(-batch // config.blocks["BLOCK_B"]),)](
            tuple(logits),
            tuple(values.stride(0) for values in logits),
            tuple(values.stride(1) for values in logits),
            log_prior,
            *_strides(log_prior, 1),
            gate_logits,
            *_strides(gate_logits),
            *_parameters(logits, temperature, uncertainty_weight, scale, numbers, dtype),
            mask,
            *_strides(mask),
            targets,
            *_strides(targets, 1),
            ignore_index,
            *outputs,
            batch,
            classes,
            M=count,
            ACC=accumulator(dtype),
            ONE_BLOCK=one_block,
            **config.options(),
        )

    with on_device(logits[0]):
        _tuning.run(
            ("fusion", batch, classes, count, dtype, targets is None),
            _tuning.fusion(classes, count, dtype == torch.float64),
            launch,
        )


def _backward(
    logits,
    temperature,
    uncertainty_weight,
    scale,
    numbers,
    mask,
    targets,
    ignore_index,
    weights,
    statistics,
    grad_fused,
    grad_weights,
    grad_uncertainty,
    grad_nll,
    grad_unimodal,
    need_logits,
    need_parameters,
    gate_dtype,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Launch: gradients of the logits, of the gate's logits, and of log_prior, uncertainty_weight, temperature [M each] and scale [1] in one tensor."""
    from iib_kernels._kernels.fusion import fusion_backward

    batch, classes, count = _sizes(logits)
    dtype = compute_dtype(*logits)
    grads = [values.new_empty(values.shape) for values in logits] if need_logits else []
    grad_gate = logits[0].new_empty(
        (batch, count) if gate_dtype is not None else 0, dtype=gate_dtype or dtype
    )
    if not batch:
        return (
            grads,
            grad_gate,
            logits[0].new_zeros(3 * count + 1 if need_parameters else 0, dtype=dtype),
        )
    partial = None

    def launch(config: _tuning.Launch) -> None:
        nonlocal partial
        programs = -(-batch // config.blocks["BLOCK_B"])
        partial = (
            logits[0].new_empty(programs, 3 * count + 1, dtype=dtype) if need_parameters else None
        )
        fusion_backward[(programs,)](
            tuple(logits),
            tuple(values.stride(0) for values in logits),
            tuple(values.stride(1) for values in logits),
            *_parameters(logits, temperature, uncertainty_weight, scale, numbers, dtype),
            mask,
            *_strides(mask),
            targets,
            *_strides(targets, 1),
            ignore_index,
            weights,
            statistics,
            grad_fused,
            *_strides(grad_fused),
            grad_weights,
            *_strides(grad_weights),
            grad_uncertainty,
            *_strides(grad_uncertainty),
            grad_nll,
            *_strides(grad_nll, 1),
            grad_unimodal,
            *_strides(grad_unimodal),
            tuple(grads) or None,
            None if gate_dtype is None else grad_gate,
            partial,
            batch,
            classes,
            M=count,
            CROSS_ENTROPY=targets is not None,
            ACC=accumulator(dtype),
            ONE_BLOCK=classes <= _tuning.FUSION_CLASSES,
            **config.options(),
        )

    with on_device(logits[0]):
        key = ("fusion_backward", batch, classes, count, dtype, targets is None)
        _tuning.run(key, _tuning.fusion(classes, count, dtype == torch.float64), launch)
    return (
        grads,
        grad_gate,
        partial.sum(0) if need_parameters else logits[0].new_empty(0, dtype=dtype),
    )


def _fusion(logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, numbers, mask):
    fused, weights, uncertainty, statistics = outputs = _fusion_fake(
        logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, numbers, mask
    )
    _forward(
        logits,
        log_prior,
        gate_logits,
        temperature,
        uncertainty_weight,
        scale,
        numbers,
        mask,
        None,
        0,
        (fused, weights, uncertainty, None, None, None, statistics),
    )
    return outputs


def _fusion_fake(
    logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, numbers, mask
):
    (batch, classes, count), dtype = _sizes(logits), compute_dtype(*logits)
    kind = logits[0].dtype
    for values in logits[1:]:
        kind = torch.promote_types(kind, values.dtype)
    like = logits[0].new_empty
    return (
        like(batch, classes, dtype=kind),
        like(batch, count, dtype=dtype),
        like(batch, count, dtype=dtype),
        like(_statistics_size(logits, False), dtype=dtype),
    )


def _fusion_backward(
    logits,
    temperature,
    uncertainty_weight,
    scale,
    numbers,
    mask,
    weights,
    statistics,
    grad_fused,
    grad_weights,
    grad_uncertainty,
    need_logits,
    need_parameters,
    gate_dtype,
):
    return _backward(
        logits,
        temperature,
        uncertainty_weight,
        scale,
        numbers,
        mask,
        None,
        0,
        weights,
        statistics,
        grad_fused,
        grad_weights,
        grad_uncertainty,
        None,
        None,
        need_logits,
        need_parameters,
        gate_dtype,
    )


def _fusion_backward_fake(logits, *rest):
    (batch, _, count), dtype = _sizes(logits), compute_dtype(*logits)
    need_logits, need_parameters, gate_dtype = rest[-3:]
    like = logits[0].new_empty
    return (
        [values.new_empty(values.shape) for values in logits] if need_logits else [],
        like((batch, count) if gate_dtype is not None else 0, dtype=gate_dtype or dtype),
        like(3 * count + 1 if need_parameters else 0, dtype=dtype),
    )


def _losses(
    logits,
    targets,
    log_prior,
    gate_logits,
    temperature,
    uncertainty_weight,
    scale,
    numbers,
    mask,
    ignore_index,
):
    fused, unimodal, weights, counts, statistics = outputs = _losses_fake(
        logits,
        targets,
        log_prior,
        gate_logits,
        temperature,
        uncertainty_weight,
        scale,
        numbers,
        mask,
        ignore_index,
    )
    _forward(
        logits,
        log_prior,
        gate_logits,
        temperature,
        uncertainty_weight,
        scale,
        numbers,
        mask,
        targets,
        ignore_index,
        (None, weights, None, fused, unimodal, counts, statistics),
    )
    return outputs


def _losses_fake(
    logits,
    targets,
    log_prior,
    gate_logits,
    temperature,
    uncertainty_weight,
    scale,
    numbers,
    mask,
    ignore_index,
):
    (batch, _, count), dtype = _sizes(logits), compute_dtype(*logits)
    like = logits[0].new_empty
    return (
        like(batch, dtype=dtype),
        like(batch, count, dtype=dtype),
        like(batch, count, dtype=dtype),
        like(batch, count + 1, dtype=torch.bool),
        like(_statistics_size(logits, True), dtype=dtype),
    )


def _losses_backward(
    logits,
    targets,
    temperature,
    uncertainty_weight,
    scale,
    numbers,
    mask,
    ignore_index,
    weights,
    statistics,
    grad_nll,
    grad_unimodal,
    grad_weights,
    need_logits,
    need_parameters,
    gate_dtype,
):
    return _backward(
        logits,
        temperature,
        uncertainty_weight,
        scale,
        numbers,
        mask,
        targets,
        ignore_index,
        weights,
        statistics,
        None,
        grad_weights,
        None,
        grad_nll,
        grad_unimodal,
        need_logits,
        need_parameters,
        gate_dtype,
    )


_PARAMETERS = (
    "Tensor? temperature, Tensor? uncertainty_weight, Tensor? scale, float[] numbers, Tensor? mask"
)
_NEEDS = (
    "bool need_logits, bool need_parameters, ScalarType? gate_dtype) -> (Tensor[], Tensor, Tensor)"
)
_FUSION = register(
    f"gated_fusion(Tensor[] logits, Tensor? log_prior, Tensor? gate_logits, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fusion,
    _fusion_fake,
)
_FUSION_BACKWARD = register(
    f"gated_fusion_backward(Tensor[] logits, {_PARAMETERS}, Tensor weights, Tensor statistics, Tensor? grad_fused, Tensor? grad_weights, "
    f"Tensor? grad_uncertainty, {_NEEDS}",
    _fusion_backward,
    _fusion_backward_fake,
)
_LOSSES = register(
    f"fusion_cross_entropy(Tensor[] logits, Tensor targets, Tensor? log_prior, Tensor? gate_logits, {_PARAMETERS}, int ignore_index) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _losses,
    _losses_fake,
)
_LOSSES_BACKWARD = register(
    f"fusion_cross_entropy_backward(Tensor[] logits, Tensor targets, {_PARAMETERS}, int ignore_index, Tensor weights, Tensor statistics, "
    f"Tensor? grad_nll, Tensor? grad_unimodal, Tensor? grad_weights, {_NEEDS}",
    _losses_backward,
    _fusion_backward_fake,
)


def _call_backward(
    numbers,
    ignore_index,
    needs,
    mask,
    targets,
    temperature,
    uncertainty_weight,
    scale,
    weights,
    statistics,
    first,
    second,
    third,
    *logits,
):
    """One backward operator, by whether there are targets; its gradients in one tuple."""
    parameters = (temperature, uncertainty_weight, scale, numbers, mask)
    if targets is None:
        grads, gate, rest = _FUSION_BACKWARD(
            logits, *parameters, weights, statistics, first, second, third, *needs
        )
    else:
        grads, gate, rest = _LOSSES_BACKWARD(
            logits,
            targets,
            *parameters,
            ignore_index,
            weights,
            statistics,
            first,
            second,
            third,
            *needs,
        )
    return gate, rest, *grads


def _save(
    ctx,
    numbers,
    ignore_index,
    targets,
    mask,
    log_prior,
    gate_logits,
    parameters,
    weights,
    statistics,
    logits,
) -> None:
    """What backward needs, and which gradients it is asked for later."""
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.ignore_index = numbers, ignore_index
    ctx.kinds = [
        None if value is None else (value.dtype, value.dim()) for value in (log_prior, *parameters)
    ]
    ctx.gate_dtype = None if gate_logits is None else gate_logits.dtype
    ctx.save_for_backward(mask, targets, *parameters, weights, statistics, *logits)


def _gradients(ctx, first, second, third, needs: Sequence[bool]) -> tuple:
    """Gradients of log_prior, gate_logits, temperature, uncertainty_weight, scale and the logits, None where not asked for."""
    count = len(needs) - 5
    if first is None and second is None and third is None:
        return (None,) * len(needs)
    asked = (any(needs[5:]), any((needs[0], *needs[2:5])), ctx.gate_dtype if needs[1] else None)
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor once
    name = "gated_fusion" if saved[1] is None else "fusion_cross_entropy"
    gate, rest, *logits = first_order(
        name,
        _call_backward,
        ctx.numbers,
        ctx.ignore_index,
        asked,
        *saved[:7],
        first,
        second,
        third,
        *saved[7:],
    )
    found = []
    for place, (kind, need) in enumerate(zip(ctx.kinds, (needs[0], *needs[2:5]))):
        start = {0: 0, 1: 2 * count, 2: count, 3: 3 * count}[place]
        value = rest[start : start + (1 if place == 3 else count)] if need else None
        found.append(None if value is None else (value if kind[1] else value.sum()).to(kind[0]))
    logits = logits or [None] * count
    return (
        found[0],
        gate if needs[1] else None,
        *found[1:],
        *(value if need else None for value, need in zip(logits, needs[5:])),
    )


class GatedFusionFunction(torch.autograd.Function):
    """(numbers, mask, log_prior, gate_logits, temperature, uncertainty_weight, scale, M logits [B, K]) -> fused logits, weights, uncertainty, and what
    backward needs. ``numbers`` stands for temperature, uncertainty_weight and scale where these are None. See :func:`gated_fusion`, which checks."""

    @staticmethod
    def forward(
        numbers, mask, log_prior, gate_logits, temperature, uncertainty_weight, scale, *logits
    ):
        return _FUSION(
            logits, log_prior, gate_logits, temperature, uncertainty_weight, scale, numbers, mask
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        numbers, mask, log_prior, gate_logits, *parameters = inputs[:7]
        _, weights, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        _save(
            ctx,
            numbers,
            0,
            None,
            mask,
            log_prior,
            gate_logits,
            parameters,
            weights,
            statistics,
            inputs[7:],
        )

    @staticmethod
    def backward(ctx, grad_fused, grad_weights, grad_uncertainty, _):
        return (
            None,
            None,
            *_gradients(ctx, grad_fused, grad_weights, grad_uncertainty, ctx.needs_input_grad[2:]),
        )


class FusionCrossEntropyFunction(torch.autograd.Function):
    """(ignore_index, targets [B], and the arguments of :class:`GatedFusionFunction`) -> cross-entropies [B] of the fused logits and [B, M] of each
    modality's, weights [B, M], which of them count [B, M + 1], and what backward needs. See :func:`fusion_cross_entropy`, which checks."""

    @staticmethod
    def forward(
        ignore_index,
        targets,
        numbers,
        mask,
        log_prior,
        gate_logits,
        temperature,
        uncertainty_weight,
        scale,
        *logits,
    ):
        return _LOSSES(
            logits,
            targets,
            log_prior,
            gate_logits,
            temperature,
            uncertainty_weight,
            scale,
            numbers,
            mask,
            ignore_index,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ignore_index, targets, numbers, mask, log_prior, gate_logits, *parameters = inputs[:9]
        _, _, weights, counts, statistics = output
        ctx.mark_non_differentiable(counts, statistics)
        _save(
            ctx,
            numbers,
            ignore_index,
            targets,
            mask,
            log_prior,
            gate_logits,
            parameters,
            weights,
            statistics,
            inputs[9:],
        )

    @staticmethod
    def backward(ctx, grad_fused, grad_unimodal, grad_weights, *_):
        return (
            None,
            None,
            None,
            None,
            *_gradients(ctx, grad_fused, grad_unimodal, grad_weights, ctx.needs_input_grad[4:]),
        )

"""The fusion kernels as operators and autograd Functions (method page, section 4 and section 5).

Two operators, ``gated_fusion`` and ``fusion_cross_entropy``, share one forward and one backward
kernel: with targets the kernels give cross-entropies, without them fused logits.

Inside, the leading dimensions of the logits are one: M tensors [B, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._registration import register
from iib_kernels._runtime import accumulator, compute_dtype, first_order, on_device, scalar


class Parameters(NamedTuple):
    """Arguments that all four operators take, in the order of their schemas."""

    temperature: Tensor | None  # [M] or []
    uncertainty_weight: Tensor | None  # [M] or []
    scale: Tensor | None  # []
    numbers: Sequence[float]  # what stands for each of the three where it is None
    mask: Tensor | None  # [B, M]


class Targets(NamedTuple):
    """The classes that cross-entropies are taken of; none for plain fusion."""

    indices: Tensor | None = None  # [B]
    ignore_index: int = 0


class Upstream(NamedTuple):
    """Gradients of the outputs; None for one that was not used or that the operator has not."""

    fused: Tensor | None = None  # [B, K]
    weights: Tensor | None = None  # [B, M]
    uncertainty: Tensor | None = None  # [B, M]
    nll: Tensor | None = None  # [B]
    unimodal: Tensor | None = None  # [B, M]


class Needs(NamedTuple):
    """Which gradients backward is asked for."""

    logits: bool
    parameters: bool
    gate_dtype: torch.dtype | None  # of the gate's gradient; None: not asked for


# ----- Launchers


def _sizes(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """Rows B, classes K and modalities M."""
    return (*logits[0].shape, len(logits))


def _strides(value: Tensor | None, size: int = 2) -> tuple[int, ...]:
    """Strides of a tensor; zeros for None and for a parameter [] that stands for all modalities."""
    return (0,) * size if value is None or value.dim() == 0 else value.stride()


def _strided(value: Tensor | None, size: int = 2) -> tuple:
    """A tensor or None, followed by its strides."""
    return value, *_strides(value, size)


def _logits_arguments(logits: Sequence[Tensor]) -> tuple:
    """The kernels' first three arguments: pointers, row strides and class strides."""
    return (
        tuple(logits),
        tuple(values.stride(0) for values in logits),
        tuple(values.stride(1) for values in logits),
    )


def _parameter_arguments(parameters: Parameters, dtype: torch.dtype, device: torch.device) -> list:
    """Pointer, stride and number of the temperature, the uncertainty weight and the scale.

    The scale has one entry and therefore no stride.
    """
    arguments = []
    for value, number in zip(parameters[:3], parameters.numbers):
        if value is None:
            number = scalar(number, dtype, device)
            value, number = (number, 1.0) if isinstance(number, Tensor) else (None, number)
        arguments += [*_strided(value, 1), number]
    del arguments[-2]
    return arguments


def _forward(
    logits, log_prior, gate_logits, parameters: Parameters, targets: Targets, outputs
) -> None:
    """Fill fused, weights, uncertainty, nll, unimodal, counts (None: not wanted) and statistics."""
    from iib_kernels.ops.fusion.kernels import fusion_forward

    batch, classes, count = _sizes(logits)
    if not batch:
        return
    dtype, device = compute_dtype(*logits), logits[0].device

    def launch(config: _tuning.Launch) -> None:
        fusion_forward[(-(-batch // config.blocks["BLOCK_B"]),)](
            *_logits_arguments(logits),
            *_strided(log_prior, 1),
            *_strided(gate_logits),
            *_parameter_arguments(parameters, dtype, device),
            *_strided(parameters.mask),
            *_strided(targets.indices, 1),
            targets.ignore_index,
            *outputs,
            batch,
            classes,
            M=count,
            ACC=accumulator(dtype),
            ONE_BLOCK=classes <= _tuning.FUSION_CLASSES,
            **config.options(),
        )

    with on_device(logits[0]):
        key = ("fusion", batch, classes, count, dtype, targets.indices is None)
        _tuning.run(key, _tuning.fusion(classes, count, dtype == torch.float64), launch)


def _backward(
    logits,
    parameters: Parameters,
    targets: Targets,
    weights,
    statistics,
    upstream: Upstream,
    needs: Needs,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the logits (M of [B, K]), of the gate's logits [B, M], and of the parameters.

    The last is one tensor [3 M + 1]: log_prior, uncertainty_weight and temperature, M entries each,
    then the scale.
    """
    from iib_kernels.ops.fusion.kernels_backward import fusion_backward

    batch, classes, count = _sizes(logits)
    dtype, device = compute_dtype(*logits), logits[0].device
    grads, grad_gate, grad_parameters = outputs = _backward_fake(logits, *needs)
    if not batch:
        return grads, grad_gate, grad_parameters.zero_()
    partial = None  # [programs, 3 M + 1]: each program's share of the parameters' gradients

    def launch(config: _tuning.Launch) -> None:
        nonlocal partial
        programs = -(-batch // config.blocks["BLOCK_B"])
        if needs.parameters:
            partial = logits[0].new_empty(programs, 3 * count + 1, dtype=dtype)
        fusion_backward[(programs,)](
            *_logits_arguments(logits),
            *_parameter_arguments(parameters, dtype, device),
            *_strided(parameters.mask),
            *_strided(targets.indices, 1),
            targets.ignore_index,
            weights,
            statistics,
            *_strided(upstream.fused),
            *_strided(upstream.weights),
            *_strided(upstream.uncertainty),
            *_strided(upstream.nll, 1),
            *_strided(upstream.unimodal),
            tuple(grads) or None,
            None if needs.gate_dtype is None else grad_gate,
            partial,
            batch,
            classes,
            M=count,
            CROSS_ENTROPY=targets.indices is not None,
            ACC=accumulator(dtype),
            ONE_BLOCK=classes <= _tuning.FUSION_CLASSES,
            **config.options(),
        )

    with on_device(logits[0]):
        key = ("fusion_backward", batch, classes, count, dtype, targets.indices is None)
        _tuning.run(key, _tuning.fusion(classes, count, dtype == torch.float64), launch)
    return (grads, grad_gate, partial.sum(0)) if needs.parameters else outputs


# ----- Operators


def _statistics_fake(logits: Sequence[Tensor]) -> Tensor:
    """What forward keeps for backward: nothing where one block holds all classes."""
    batch, classes, count = _sizes(logits)
    rows = batch if classes > _tuning.FUSION_CLASSES else 0
    return logits[0].new_empty((rows, 3 * count + 2), dtype=compute_dtype(*logits))


def _gated_fusion_fake(logits, *_):
    (batch, classes, count), dtype = _sizes(logits), compute_dtype(*logits)
    kind = logits[0].dtype
    for values in logits[1:]:
        kind = torch.promote_types(kind, values.dtype)
    like = logits[0].new_empty
    return (
        like(batch, classes, dtype=kind),
        like(batch, count, dtype=dtype),
        like(batch, count, dtype=dtype),
        _statistics_fake(logits),
    )


def _gated_fusion(logits, log_prior, gate_logits, *parameters):
    fused, weights, uncertainty, statistics = outputs = _gated_fusion_fake(logits)
    filled = (fused, weights, uncertainty, None, None, None, statistics)
    _forward(logits, log_prior, gate_logits, Parameters(*parameters), Targets(), filled)
    return outputs


def _cross_entropy_fake(logits, *_):
    (batch, _, count), dtype = _sizes(logits), compute_dtype(*logits)
    like = logits[0].new_empty
    return (
        like(batch, dtype=dtype),
        like(batch, count, dtype=dtype),
        like(batch, count, dtype=dtype),
        like(batch, count + 1, dtype=torch.bool),
        _statistics_fake(logits),
    )


def _cross_entropy(logits, targets, log_prior, gate_logits, *rest):
    *parameters, ignore_index = rest
    nll, unimodal, weights, counts, statistics = outputs = _cross_entropy_fake(logits)
    filled = (None, weights, None, nll, unimodal, counts, statistics)
    targets = Targets(targets, ignore_index)
    _forward(logits, log_prior, gate_logits, Parameters(*parameters), targets, filled)
    return outputs


def _backward_fake(logits, *rest):
    (batch, _, count), dtype = _sizes(logits), compute_dtype(*logits)
    needs = Needs(*rest[-3:])
    like = logits[0].new_empty
    gate = (0,) if needs.gate_dtype is None else (batch, count)
    return (
        [values.new_empty(values.shape) for values in logits] if needs.logits else [],
        like(gate, dtype=needs.gate_dtype or dtype),
        like(3 * count + 1 if needs.parameters else 0, dtype=dtype),
    )


def _gated_fusion_backward(logits, *rest):
    parameters, (weights, statistics, *upstream), needs = rest[:5], rest[5:-3], rest[-3:]
    fused, by_weights, uncertainty = upstream
    upstream = Upstream(fused, by_weights, uncertainty)
    return _backward(
        logits, Parameters(*parameters), Targets(), weights, statistics, upstream, Needs(*needs)
    )


def _cross_entropy_backward(logits, targets, *rest):
    parameters, (ignore_index, weights, statistics, *upstream), needs = (
        rest[:5],
        rest[5:-3],
        rest[-3:],
    )
    nll, unimodal, by_weights = upstream
    upstream = Upstream(weights=by_weights, nll=nll, unimodal=unimodal)
    targets = Targets(targets, ignore_index)
    return _backward(
        logits, Parameters(*parameters), targets, weights, statistics, upstream, Needs(*needs)
    )


_PARAMETERS = (
    "Tensor? temperature, Tensor? uncertainty_weight, Tensor? scale, float[] numbers, Tensor? mask"
)
_NEEDS = "bool need_logits, bool need_parameters, ScalarType? gate_dtype"

GATED_FUSION = register(
    f"gated_fusion(Tensor[] logits, Tensor? log_prior, Tensor? gate_logits, {_PARAMETERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _gated_fusion,
    _gated_fusion_fake,
)
GATED_FUSION_BACKWARD = register(
    f"gated_fusion_backward(Tensor[] logits, {_PARAMETERS}, Tensor weights, Tensor statistics, "
    f"Tensor? grad_fused, Tensor? grad_weights, Tensor? grad_uncertainty, {_NEEDS}) "
    "-> (Tensor[], Tensor, Tensor)",
    _gated_fusion_backward,
    _backward_fake,
)
CROSS_ENTROPY = register(
    "fusion_cross_entropy(Tensor[] logits, Tensor targets, Tensor? log_prior, "
    f"Tensor? gate_logits, {_PARAMETERS}, int ignore_index) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
)
CROSS_ENTROPY_BACKWARD = register(
    f"fusion_cross_entropy_backward(Tensor[] logits, Tensor targets, {_PARAMETERS}, "
    "int ignore_index, Tensor weights, Tensor statistics, Tensor? grad_nll, "
    f"Tensor? grad_unimodal, Tensor? grad_weights, {_NEEDS}) -> (Tensor[], Tensor, Tensor)",
    _cross_entropy_backward,
    _backward_fake,
)


# ----- Autograd Functions


def _call_backward(numbers, ignore_index, needs, mask, targets, *tensors):
    """The backward operator, by whether there are targets; its gradients in one flat tuple.

    ``tensors`` are temperature, uncertainty_weight and scale, then weights and statistics, then
    three upstream gradients, then M logits. They arrive flat because autograd sees only tensors
    that are arguments themselves (:func:`~iib_kernels._runtime.first_order`).
    """
    parameters = (*tensors[:3], numbers, mask)
    kept, upstream, logits = tensors[3:5], tensors[5:8], tensors[8:]
    if targets is None:
        gradients = GATED_FUSION_BACKWARD(logits, *parameters, *kept, *upstream, *needs)
    else:
        gradients = CROSS_ENTROPY_BACKWARD(
            logits, targets, *parameters, ignore_index, *kept, *upstream, *needs
        )
    by_logits, by_gate, by_parameters = gradients
    return by_gate, by_parameters, *by_logits


def _save(ctx, numbers, mask, inputs, kept, targets=None, ignore_index=0) -> None:
    """Keep what backward needs: ``inputs`` that get gradients, ``kept`` weights and statistics."""
    log_prior, gate_logits, *parameters = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.ignore_index = numbers, ignore_index
    ctx.kinds = [
        None if value is None else (value.dtype, value.dim()) for value in (log_prior, *parameters)
    ]
    ctx.gate_dtype = None if gate_logits is None else gate_logits.dtype
    ctx.save_for_backward(mask, targets, *parameters, *kept, *inputs[5:])


def _gradients(ctx, upstream: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple:
    """Gradients of log_prior, gate_logits, temperature, uncertainty_weight, scale and M logits.

    None where ``needs`` does not ask for one. ``upstream`` is in the operator's own order.
    """
    if all(value is None for value in upstream):
        return (None,) * len(needs)
    by_prior, by_gate, *by_parameters = needs[:5]
    count = len(needs) - 5
    wanted = Needs(
        any(needs[5:]), any((by_prior, *by_parameters)), ctx.gate_dtype if by_gate else None
    )
    saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor once
    grad_gate, grad_parameters, *grad_logits = first_order(
        "gated_fusion" if saved[1] is None else "fusion_cross_entropy",
        _call_backward,
        ctx.numbers,
        ctx.ignore_index,
        wanted,
        *saved[:7],
        *upstream,
        *saved[7:],
    )
    # As backward orders them, see _backward: (start, length) of what belongs to each
    places = ((0, count), (2 * count, count), (count, count), (3 * count, 1))
    found = []
    for (start, length), kind, need in zip(places, ctx.kinds, (by_prior, *by_parameters)):
        if not need:
            found.append(None)
            continue
        dtype, dimensions = kind
        value = grad_parameters[start : start + length]
        found.append((value if dimensions else value.sum()).to(dtype))
    grad_logits = grad_logits or [None] * count
    return (
        found[0],
        grad_gate if by_gate else None,
        *found[1:],
        *(value if need else None for value, need in zip(grad_logits, needs[5:])),
    )


class GatedFusionFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.gated_fusion`, which checks the arguments, for autograd.

    Takes numbers, mask [B, M], log_prior [M], gate_logits [B, M], temperature, uncertainty_weight,
    scale and M logits [B, K]; ``numbers`` stands for temperature, uncertainty_weight and scale
    where these are None. Gives fused logits, weights, uncertainty, and what backward needs.
    """

    @staticmethod
    def forward(numbers, mask, log_prior, gate_logits, *tensors):
        parameters, logits = tensors[:3], tensors[3:]
        return GATED_FUSION(logits, log_prior, gate_logits, *parameters, numbers, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        numbers, mask, *inputs = inputs
        _, weights, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        _save(ctx, numbers, mask, inputs, (weights, statistics))

    @staticmethod
    def backward(ctx, grad_fused, grad_weights, grad_uncertainty, _):
        upstream = grad_fused, grad_weights, grad_uncertainty
        return None, None, *_gradients(ctx, upstream, ctx.needs_input_grad[2:])


class FusionCrossEntropyFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.fusion_cross_entropy`, which checks, for autograd.

    Takes ignore_index, targets [B], and the arguments of :class:`GatedFusionFunction`. Gives the
    cross-entropies of the fused logits [B] and of each modality's [B, M], weights [B, M], which of
    them count [B, M + 1], and what backward needs.
    """

    @staticmethod
    def forward(ignore_index, targets, numbers, mask, log_prior, gate_logits, *tensors):
        parameters, logits = (*tensors[:3], numbers, mask), tensors[3:]
        return CROSS_ENTROPY(logits, targets, log_prior, gate_logits, *parameters, ignore_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ignore_index, targets, numbers, mask, *inputs = inputs
        _, _, weights, counts, statistics = output
        ctx.mark_non_differentiable(counts, statistics)
        _save(ctx, numbers, mask, inputs, (weights, statistics), targets, ignore_index)

    @staticmethod
    def backward(ctx, grad_fused, grad_unimodal, grad_weights, *_):
        upstream = grad_fused, grad_unimodal, grad_weights
        return (None,) * 4 + _gradients(ctx, upstream, ctx.needs_input_grad[4:])

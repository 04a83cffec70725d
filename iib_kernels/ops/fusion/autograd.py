"""The fusion kernels as operators and autograd Functions (method page, section 4 and section 5).

Inside, the leading dimensions of the logits are one: M tensors [B, K].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from iib_kernels._registration import register
from iib_kernels._runtime import compute_dtype
from iib_kernels.compat import first_order
from iib_kernels.ops.fusion import launch
from iib_kernels.ops.fusion.arguments import Gating, Labels, Parameters
from iib_kernels.ops.fusion.launch import Needs

# ----- Operators


def _gated_fusion_fake(logits, values, *_):
    (batch, _, count), rows = launch.sizes(logits), values or logits
    dtype = compute_dtype(*logits, *values)
    like = logits[0].new_empty
    kind = functools.reduce(torch.promote_types, (matrix.dtype for matrix in rows))
    return (
        like(batch, rows[0].shape[1], dtype=kind),
        like(batch, count, dtype=dtype),
        like(batch, count, dtype=dtype),
        launch.statistics(logits, values),
    )


def _gated_fusion(logits, values, log_prior, gate_logits, *parameters):
    outputs = _gated_fusion_fake(logits, values)
    if len(logits[0]):
        gating = Gating(Parameters(*parameters), log_prior, gate_logits)
        launch.fusion(logits, values, gating, *outputs)
    return outputs


def _gated_fusion_backward_fake(logits, values, *rest):
    return tuple(launch.empty_gradients(logits, Needs(*rest[-4:]), values))


def _gated_fusion_backward(logits, values, *rest):
    parameters, (weights, kept), upstream = Parameters(*rest[:5]), rest[5:7], rest[7:10]
    needs = Needs(*rest[10:])
    return tuple(launch.fusion_backward(logits, values, parameters, weights, kept, upstream, needs))


def _cross_entropy_fake(logits, *rest):
    (batch, _, count), dtype = launch.sizes(logits), compute_dtype(*logits)
    like = functools.partial(logits[0].new_empty, dtype=dtype)
    rows, divisors = ((batch,), 0) if rest[-1] == "none" else ((), count + 1)
    return (
        like(rows),
        like((*rows, count)),
        like((batch, count)),
        launch.statistics(logits, labels=Labels(*rest[:4])),
        like(divisors),
    )


def _cross_entropy(logits, *rest):
    outputs = _cross_entropy_fake(logits, *rest)
    if len(logits[0]):
        gating = Gating(Parameters(*rest[6:-1]), *rest[4:6])
        launch.cross_entropy(logits, Labels(*rest[:4]), gating, rest[-1], *outputs)
        return outputs
    fused, unimodal, *others, divisors = outputs
    return fused.zero_(), unimodal.zero_(), *others, divisors.fill_(1)


def _cross_entropy_backward_fake(logits, *rest):
    return tuple(launch.empty_gradients(logits, Needs(*rest[-3:])))[:3]


def _cross_entropy_backward(logits, *rest):
    labels, parameters, saved = Labels(*rest[:4]), Parameters(*rest[4:9]), rest[9:12]
    upstream, needs = rest[12:15], Needs(*rest[15:])
    return tuple(
        launch.cross_entropy_backward(logits, labels, parameters, *saved, upstream, needs)
    )[:3]


_LABELS = "Tensor targets, int ignore_index, Tensor? class_weight, float label_smoothing"
_GATING = "Tensor? log_prior, Tensor? gate_logits"
_PARAMETERS = (
    "Tensor? temperature, Tensor? uncertainty_weight, Tensor? scale, float[] numbers, Tensor? mask"
)
_NEEDS = "bool need_logits, bool need_parameters, ScalarType? gate_dtype"

GATED_FUSION = register(
    f"gated_fusion(Tensor[] logits, Tensor[] values, {_GATING}, {_PARAMETERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _gated_fusion,
    _gated_fusion_fake,
)
GATED_FUSION_BACKWARD = register(
    f"gated_fusion_backward(Tensor[] logits, Tensor[] values, {_PARAMETERS}, Tensor weights, "
    "Tensor statistics, Tensor? grad_fused, Tensor? grad_weights, Tensor? grad_uncertainty, "
    f"{_NEEDS}, bool need_values) -> (Tensor[], Tensor, Tensor, Tensor[])",
    _gated_fusion_backward,
    _gated_fusion_backward_fake,
)
CROSS_ENTROPY = register(
    f"fusion_cross_entropy(Tensor[] logits, {_LABELS}, {_GATING}, {_PARAMETERS}, str reduction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
)
CROSS_ENTROPY_BACKWARD = register(
    f"fusion_cross_entropy_backward(Tensor[] logits, {_LABELS}, {_PARAMETERS}, Tensor weights, "
    "Tensor statistics, Tensor divisors, Tensor? grad_fused, Tensor? grad_unimodal, "
    "Tensor? grad_weights, "
    f"{_NEEDS}) -> (Tensor[], Tensor, Tensor)",
    _cross_entropy_backward,
    _cross_entropy_backward_fake,
)


# ----- Autograd Functions


def _call_fusion_backward(numbers, count, needs, mask, *tensors):
    """The backward operator of gated fusion; its gradients in one flat tuple.

    ``tensors`` are temperature, uncertainty_weight and scale, then weights and statistics, then
    three upstream gradients, then M logits and the values. They arrive flat because autograd sees
    only tensors that are arguments themselves (:func:`~iib_kernels.compat.first_order`).
    """
    parameters, rest = (*tensors[:3], numbers, mask), tensors[3:8]
    logits, values = tensors[8 : 8 + count], tensors[8 + count :]
    found = GATED_FUSION_BACKWARD(logits, values, *parameters, *rest, *needs)
    by_logits, by_gate, by_parameters, by_values = found
    return by_gate, by_parameters, *by_logits, *by_values


def _call_cross_entropy_backward(numbers, options, needs, mask, targets, class_weight, *tensors):
    """The same of the cross-entropies; ``options`` are ignore_index and label_smoothing.

    Divisors come behind the statistics.
    """
    labels = targets, options[0], class_weight, options[1]
    parameters, rest, logits = (*tensors[:3], numbers, mask), tensors[3:9], tensors[9:]
    found = CROSS_ENTROPY_BACKWARD(logits, *labels, *parameters, *rest, *needs[:3])
    by_logits, by_gate, by_parameters = found
    return by_gate, by_parameters, *by_logits


def _save(ctx, numbers, inputs, kept, *others) -> None:
    """Keep what backward needs: ``others``, then ``inputs`` that get gradients, with ``kept``
    (weights, statistics, divisors) behind the first of them.
    """
    log_prior, gate_logits, *parameters = inputs[:5]
    ctx.set_materialize_grads(False)
    ctx.numbers = numbers
    ctx.first = len(others) + 3 + len(kept)
    ctx.kinds = [
        None if value is None else (value.dtype, value.dim()) for value in (log_prior, *parameters)
    ]
    ctx.gate_dtype = None if gate_logits is None else gate_logits.dtype
    ctx.save_for_backward(*others, *parameters, *kept, *inputs[5:])


def _gradients(ctx, call, option, upstream, needs: Sequence[bool], count: int):
    """Gradients of log_prior, gate_logits, temperature, uncertainty_weight, scale, and M logits
    with the values; None where ``needs`` does not ask for one.

    ``call`` takes the numbers, ``option``, which gradients are wanted, and tensors: those saved,
    with the upstream gradients before the logits.
    """
    if all(value is None for value in upstream):
        return (None,) * len(needs)
    by_prior, by_gate, *by_parameters = needs[:5]
    by_logits, by_values = needs[5 : 5 + count], needs[5 + count :]
    wanted = Needs(
        any(by_logits),
        any((by_prior, *by_parameters)),
        ctx.gate_dtype if by_gate else None,
        any(by_values),
    )
    saved, first = ctx.saved_tensors, ctx.first  # once: checkpointing unpacks each tensor once
    grad_gate, grad_parameters, *grads = first_order(
        ctx.name,
        call,
        ctx.numbers,
        option,
        wanted,
        *saved[:first],
        *upstream,
        *saved[first:],
    )
    # As backward orders them, see launch.Gradients: (start, length) of what belongs to each
    places = ((0, count), (2 * count, count), (count, count), (3 * count, 1))
    found = []
    for (start, length), kind, need in zip(places, ctx.kinds, (by_prior, *by_parameters)):
        if not need:
            found.append(None)
            continue
        dtype, dimensions = kind
        value = grad_parameters[start : start + length]
        found.append((value if dimensions else value.sum()).to(dtype))
    grads = iter(grads)
    by_rows = []
    for group in (by_logits, by_values):
        several = [next(grads) if any(group) else None for _ in group]
        by_rows += [value if need else None for value, need in zip(several, group)]
    return found[0], grad_gate if by_gate else None, *found[1:], *by_rows


class GatedFusionFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.gated_fusion`, which checks the arguments, for autograd.

    Takes numbers, M, mask [B, M], log_prior [M], gate_logits [B, M], temperature,
    uncertainty_weight, scale, M logits [B, K] and M or no values [B, D]; ``numbers`` stands for
    temperature, uncertainty_weight and scale where these are None. Gives fused logits (values),
    weights, uncertainty, and what backward needs.
    """

    @staticmethod
    def forward(numbers, count, mask, log_prior, gate_logits, *tensors):
        parameters, logits, values = tensors[:3], tensors[3 : 3 + count], tensors[3 + count :]
        return GATED_FUSION(logits, values, log_prior, gate_logits, *parameters, numbers, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        numbers, ctx.count, mask, *inputs = inputs
        _, weights, _, kept = output
        ctx.name = "gated_fusion"
        ctx.mark_non_differentiable(kept)
        _save(ctx, numbers, inputs, (weights, kept), mask)

    @staticmethod
    def backward(ctx, grad_fused, grad_weights, grad_uncertainty, _):
        upstream, needs = (grad_fused, grad_weights, grad_uncertainty), ctx.needs_input_grad[3:]
        found = _gradients(ctx, _call_fusion_backward, ctx.count, upstream, needs, ctx.count)
        return None, None, None, *found


class FusionCrossEntropyFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.fusion_cross_entropy`, which checks, for autograd.

    Takes (ignore_index, label_smoothing, reduction), targets [B], class_weight [K] or None, and
    numbers, mask and the rest as :class:`GatedFusionFunction`, without values. Gives the
    cross-entropies of the fused logits [B] and of each modality's [B, M] (reduced: [] and [M]),
    weights [B, M], and what backward needs.
    """

    @staticmethod
    def forward(options, targets, class_weight, numbers, mask, log_prior, gate_logits, *tensors):
        labels = targets, options[0], class_weight, options[1]
        parameters, logits = (*tensors[:3], numbers, mask), tensors[3:]
        return CROSS_ENTROPY(logits, *labels, log_prior, gate_logits, *parameters, options[2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, targets, class_weight, numbers, mask, *inputs = inputs
        kept = output[2:]  # weights, statistics, divisors
        ctx.name = "fusion_cross_entropy"
        ctx.mark_non_differentiable(*kept[1:])
        _save(ctx, numbers, inputs, kept, mask, targets, class_weight)

    @staticmethod
    def backward(ctx, grad_fused, grad_unimodal, grad_weights, *_):
        upstream, needs = (grad_fused, grad_unimodal, grad_weights), ctx.needs_input_grad[5:]
        call, count = _call_cross_entropy_backward, len(needs) - 5
        return (None,) * 5 + _gradients(ctx, call, ctx.options, upstream, needs, count)

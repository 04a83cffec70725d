"""The kernels of trusted fusion as operators and an autograd Function (method page, section 4).

Inside, the leading dimensions of the logits are one: M tensors [B, K].
"""

from __future__ import annotations

import functools

import torch

from iib_kernels._registration import register
from iib_kernels._runtime import compute_dtype
from iib_kernels.compat import first_order
from iib_kernels.ops.fusion.launch import Needs
from iib_kernels.ops.trust import launch
from iib_kernels.ops.trust.launch import Trust

# ----- Operators


def _trusted_fake(logits, *_):
    (batch, classes), like = logits[0].shape, logits[0].new_empty
    kind = functools.reduce(torch.promote_types, (rows.dtype for rows in logits))
    return (
        like(batch, classes, dtype=kind),
        like(batch, len(logits), dtype=compute_dtype(*logits)),
        launch.statistics(logits),
    )


def _trusted(logits, *trust):
    outputs = _trusted_fake(logits)
    if len(logits[0]):
        launch.forward(logits, Trust(*trust), *outputs)
    return outputs


def _trusted_backward_fake(logits, *rest):
    return tuple(launch.empty_gradients(logits, Needs(*rest[-3:])))


def _trusted_backward(logits, *rest):
    trust, (kept, grad), needs = Trust(*rest[:5]), rest[5:7], Needs(*rest[7:])
    return tuple(launch.backward(logits, trust, kept, grad, needs))


_TRUST = "Tensor? trust_logits, Tensor? temperature, Tensor? scale, float[] numbers, Tensor? mask"

TRUSTED_FUSION = register(
    f"trusted_fusion(Tensor[] logits, {_TRUST}) -> (Tensor, Tensor, Tensor)",
    _trusted,
    _trusted_fake,
)
TRUSTED_FUSION_BACKWARD = register(
    f"trusted_fusion_backward(Tensor[] logits, {_TRUST}, Tensor statistics, Tensor grad, "
    "bool need_logits, bool need_parameters, ScalarType? trust_dtype) "
    "-> (Tensor[], Tensor, Tensor)",
    _trusted_backward,
    _trusted_backward_fake,
)


# ----- Autograd Function


def _call_backward(numbers, needs, mask, trust_logits, temperature, scale, kept, grad, *logits):
    """The backward operator; its gradients in one flat tuple.

    Tensors arrive flat because autograd sees only those that are arguments themselves
    (:func:`~iib_kernels.compat.first_order`).
    """
    given = trust_logits, temperature, scale, numbers, mask
    found = TRUSTED_FUSION_BACKWARD(logits, *given, kept, grad, *needs)
    by_logits, by_trust, by_parameters = found
    return by_trust, by_parameters, *by_logits


class TrustedFusionFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.trusted_fusion`, which checks the arguments, for autograd.

    Takes numbers, mask [B, M], trust_logits [M] or [B, M], temperature, scale and M logits [B, K];
    ``numbers`` stands for temperature and scale where these are None. Gives fused logits, trust,
    and what backward needs.
    """

    @staticmethod
    def forward(numbers, mask, trust_logits, temperature, scale, *logits):
        return TRUSTED_FUSION(logits, trust_logits, temperature, scale, numbers, mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors[:4], output[2], *tensors[4:])

    @staticmethod
    def backward(ctx, grad, *_):
        needs = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needs))
        mask, trust, temperature, scale, kept, *logits = ctx.saved_tensors
        parameters, count = (trust, temperature, scale), len(logits)
        by_row = needs[0] and trust.dim() == 2
        wanted = Needs(
            any(needs[3:]),
            any((needs[0] and not by_row, *needs[1:3])),
            trust.dtype if by_row else None,
        )[:3]
        grad_trust, grad_parameters, *by_logits = first_order(
            "trusted_fusion",
            _call_backward,
            ctx.numbers,
            wanted,
            mask,
            *parameters,
            kept,
            grad,
            *logits,
        )
        # As they stand in a line of the partial sums, see launch.Gradients
        totals = grad_parameters.split((count, count, 1)) if wanted[1] else (None,) * 3
        found = []
        for value, total, need in zip(parameters, totals, needs):
            if not need or total is None:
                found.append(None)
                continue
            found.append((total if value.dim() else total.sum()).to(value.dtype))
        if by_row:
            found[0] = grad_trust
        by_logits = by_logits or (None,) * count
        rows = [value if need else None for value, need in zip(by_logits, needs[3:])]
        return None, None, *found, *rows

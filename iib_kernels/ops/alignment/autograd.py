"""The alignment kernels as an operator and an autograd Function (method page, section 3)."""

from __future__ import annotations

import torch

from iib_kernels._registration import register
from iib_kernels.compat import first_order
from iib_kernels.ops.alignment.launch import Inputs, Results, backward, empty_results, forward


def _forward(*arguments):
    *inputs, keep, reduction = arguments
    return tuple(forward(Inputs(*inputs), keep, reduction))


def _forward_fake(*arguments):
    *inputs, keep, reduction = arguments
    return tuple(empty_results(Inputs(*inputs), keep, reduction))


def _backward(*arguments):
    count = len(Inputs._fields)
    inputs, kept, upstream = arguments[:count], arguments[count:-2], arguments[-2:]
    return backward(Inputs(*inputs), Results(None, None, None, *kept), *upstream)


def _backward_fake(features, *_):
    return [values.new_empty(values.shape) for values in features]


# ----- Operators

_INPUTS = (
    "Tensor[] features, Tensor[] prototypes, Tensor targets, Tensor budgets, float temperature, "
    "bool cosine, Tensor[] seen, Tensor? mask, int ignore_index"
)
ALIGNMENT_LOSS = register(
    f"alignment_loss({_INPUTS}, bool keep, str reduction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
ALIGNMENT_LOSS_BACKWARD = register(
    f"alignment_loss_backward({_INPUTS}, Tensor confidence, Tensor counts, "
    "Tensor share, Tensor pulls, Tensor divisors, Tensor? grad_contrastive, "
    "Tensor? grad_alignment) -> Tensor[]",
    _backward,
    _backward_fake,
)


# ----- Autograd Function


def _inputs(constants, targets, budgets, mask, values) -> tuple:
    """Arguments of the operators, from the Function's: its tensors come in one row."""
    temperature, cosine, ignore_index, count = constants[:4]
    features, prototypes, seen = values[:count], values[count : 2 * count], values[2 * count :]
    return features, prototypes, targets, budgets, temperature, cosine, seen, mask, ignore_index


def _call_backward(constants, targets, budgets, mask, *tensors):
    """The backward operator; its gradients in one tuple.

    ``tensors`` are what forward kept (five) and the two upstream gradients, then features,
    prototypes and seen. They arrive flat because autograd sees only tensors that are arguments
    themselves.
    """
    inputs = _inputs(constants, targets, budgets, mask, tensors[7:])
    return tuple(ALIGNMENT_LOSS_BACKWARD(*inputs, *tensors[:7]))


class AlignmentLossFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.alignment_loss`, which checks the arguments, for autograd.

    Takes temperature, cosine, ignore_index, M, whether backward will come (then forward over many
    classes keeps what it needs), the reduction, targets [B], budgets [M], mask [B, M], M features,
    M prototypes, and M ``seen`` or none. Gives C and A, the mean of q(y), and what backward needs,
    q(y) first: see launch.Results.
    """

    @staticmethod
    def forward(constants, keep, reduction, targets, budgets, mask, *values):
        inputs = _inputs(constants, targets, budgets, mask, values)
        return ALIGNMENT_LOSS(*inputs, keep, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.constants, _, _, targets, budgets, mask = inputs[:6]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(targets, budgets, mask, *output[3:], *inputs[6:])

    @staticmethod
    def backward(ctx, grad_contrastive, grad_alignment, *_):
        gradients = ()
        if grad_contrastive is not None or grad_alignment is not None:
            saved = ctx.saved_tensors
            gradients = first_order(
                "alignment_loss",
                _call_backward,
                ctx.constants,
                *saved[:8],
                grad_contrastive,
                grad_alignment,
                *saved[8:],
            )
        needed = [
            value if need else None for value, need in zip(gradients, ctx.needs_input_grad[6:])
        ]
        without = len(ctx.needs_input_grad) - 6 - len(needed)  # prototypes and seen
        return (None,) * 6 + (*needed,) + (None,) * without

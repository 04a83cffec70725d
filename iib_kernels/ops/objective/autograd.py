"""The objective as an operator and an autograd Function.

Gradients come out of the forward operator; backward multiplies them by what comes in from above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iib_kernels._registration import register
from iib_kernels.compat import first_order
from iib_kernels.ops.objective import launch

# ----- Operators


def _objective(*arguments):
    return tuple(launch.run(launch.Arguments(*arguments)))


def _objective_fake(*arguments):
    return tuple(launch.outputs(launch.Arguments(*arguments)))


def _scale_fake(gradients, factor, inputs):
    return [value.new_empty(value.shape) for value in inputs]


OBJECTIVE = register(
    "multimodal_objective(Tensor[] logits, Tensor targets, Tensor[] features, Tensor[] prototypes, "
    "Tensor? budgets, Tensor? log_prior, Tensor? gate_logits, Tensor? temperature, "
    "Tensor? uncertainty_weight, Tensor? scale, Tensor[] seen, Tensor? mask, Tensor? class_weight, "
    "float[] numbers, bool present, bool cosine, bool unit, int ignore_index, bool grad) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    _objective,
    _objective_fake,
)
SCALE_GRADIENTS = register(
    "scale_gradients(Tensor[] gradients, Tensor factor, Tensor[] inputs) -> Tensor[]",
    launch.scale_gradients,
    _scale_fake,
)


# ----- Autograd Function


def _scaled(factor: Tensor, *tensors: Tensor) -> tuple:
    """The backward operator, its gradients in one tuple.

    ``tensors`` are the gradients, then what they are by: autograd sees that they depend on it.
    """
    half = len(tensors) // 2
    return tuple(SCALE_GRADIENTS(tensors[:half], factor, tensors[half:]))


class MultimodalObjectiveFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.multimodal_objective`, which checks, for autograd.

    Takes ``constants`` (numbers, present, cosine, unit, ignore_index, whether gradients are asked
    for), M, nine tensors or None (targets [B], budgets, log_prior, gate_logits, temperature,
    uncertainty_weight, scale, mask, class_weight), then M logits [B, K], and M each or none of
    features [B, D_m], prototypes [K, D_m] and ``seen`` [K]. Gives the loss [], its parts [3 M + 1],
    the fusion weights [B, M], and the gradients that backward will need.
    """

    @staticmethod
    def forward(constants, count, *tensors):
        targets, budgets, *parameters, mask, class_weight = tensors[:9]
        groups = [tensors[start : start + count] for start in range(9, 9 + 4 * count, count)]
        logits, features, prototypes, seen = groups
        loss, parts, weights, gradients = OBJECTIVE(
            logits,
            targets,
            features,
            prototypes,
            budgets,
            *parameters,
            seen,
            mask,
            class_weight,
            *constants,
        )
        return loss, parts, weights, *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, count, *tensors = inputs
        _, parts, weights, *gradients = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(parts, weights, *gradients)
        ctx.save_for_backward(*gradients, *tensors[9 : 9 + len(gradients)])

    @staticmethod
    def backward(ctx, grad_loss, *_):
        found = [None] * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        if grad_loss is not None and saved:
            scaled = first_order("multimodal_objective", _scaled, grad_loss, *saved)
            for place, value in enumerate(scaled, 11):
                if ctx.needs_input_grad[place]:
                    found[place] = value
        return tuple(found)

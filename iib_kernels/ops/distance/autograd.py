"""The kernels of the matrix of distances as operators and an autograd Function.

See method page, section 2.
"""

from __future__ import annotations

import torch

from iib_kernels._registration import register
from iib_kernels._runtime import compute_dtype
from iib_kernels.compat import first_order
from iib_kernels.ops.distance import launch

# ----- Calls


def _distance(features, prototypes, cosine, keep):
    outputs = _distance_fake(features, prototypes, cosine, keep)
    if outputs[0].numel():
        launch.forward(features, prototypes, cosine, *outputs)
    return outputs


def _distance_fake(features, prototypes, cosine, keep):
    dtype = compute_dtype(features, prototypes)
    batch, classes = features.shape[0], prototypes.shape[0]
    like = features.new_empty
    # The gradient of the cosine takes the distances before they are rounded to half precision
    exact = (batch, classes) if keep and features.dtype != dtype else (0, 0)
    return (
        like(batch, classes),
        like(batch if keep else 0, dtype=dtype),
        like(classes if keep else 0, dtype=dtype),
        like(exact, dtype=dtype),
    )


def _distance_backward(
    features,
    prototypes,
    cosine,
    squares,
    prototype_squares,
    distance,
    grad,
    need_features,
    need_prototypes,
):
    needs = need_features, need_prototypes
    outputs = _distance_gradients(features, prototypes, *needs)
    if not grad.numel():
        return tuple(output.zero_() for output in outputs)
    if features.shape[1]:
        places = [output if need else None for output, need in zip(outputs, needs)]
        lengths = squares, prototype_squares
        launch.backward(features, prototypes, cosine, *lengths, distance, grad, places)
    return outputs


def _distance_gradients(features, prototypes, need_features, need_prototypes):
    return tuple(
        value.new_empty(value.shape if need else 0)
        for value, need in ((features, need_features), (prototypes, need_prototypes))
    )


def _distance_backward_fake(features, prototypes, *rest):
    return _distance_gradients(features, prototypes, *rest[-2:])


# ----- Operators

DISTANCE = register(
    "prototype_distance(Tensor features, Tensor prototypes, bool cosine, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _distance,
    _distance_fake,
)
DISTANCE_BACKWARD = register(
    "prototype_distance_backward(Tensor features, Tensor prototypes, bool cosine, Tensor squares, "
    "Tensor prototype_squares, Tensor distance, Tensor grad, bool need_features, "
    "bool need_prototypes) -> (Tensor, Tensor)",
    _distance_backward,
    _distance_backward_fake,
)


# ----- Autograd Function


class PrototypeDistanceFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.prototype_distance`, which checks, for autograd.

    Takes features [B, D], prototypes [K, D], cosine and keep. Gives squared distances [B, K] and,
    with ``keep``, what the cosine's backward needs.
    """

    @staticmethod
    def forward(features, prototypes, cosine, keep):
        return DISTANCE(features, prototypes, cosine, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, prototypes, ctx.cosine, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(features, prototypes, *output)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 4
        features, prototypes, distance, squares, prototype_squares, exact = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        gradients = first_order(
            "prototype_distance",
            DISTANCE_BACKWARD,
            features,
            prototypes,
            ctx.cosine,
            squares,
            prototype_squares,
            distance if features.dtype == squares.dtype else exact,
            grad,
            *needs,
        )
        return *(value if need else None for value, need in zip(gradients, needs)), None, None

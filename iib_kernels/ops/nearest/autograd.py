"""The kernels of the nearest prototype as operators and an autograd Function.

All modalities go into one launch (method page, section 2).
"""

from __future__ import annotations

import torch

from iib_kernels._registration import register
from iib_kernels._runtime import compute_dtype
from iib_kernels.compat import first_order
from iib_kernels.ops.nearest import launch

# ----- Calls


def _nearest(features, prototypes, cosine, seen):
    distance, index = outputs = _nearest_fake(features)
    if len(index):
        launch.forward(features, prototypes, cosine, seen, distance, index)
    return outputs


def _nearest_fake(features, *_):
    size, like = (features[0].shape[0], len(features)), features[0].new_empty
    return like(size, dtype=compute_dtype(*features)), like(size, dtype=torch.int64)


def _nearest_backward(features, prototypes, cosine, index, grad):
    gradients = _nearest_backward_fake(features)
    if len(index):
        launch.backward(features, prototypes, cosine, index, grad, gradients)
    return gradients


def _nearest_backward_fake(features, *_):
    return [values.new_empty(values.shape) for values in features]


# ----- Operators

NEAREST = register(
    "nearest_prototype(Tensor[] features, Tensor[] prototypes, bool cosine, Tensor[] seen) "
    "-> (Tensor, Tensor)",
    _nearest,
    _nearest_fake,
)
NEAREST_BACKWARD = register(
    "nearest_prototype_backward(Tensor[] features, Tensor[] prototypes, bool cosine, Tensor index, "
    "Tensor grad) -> Tensor[]",
    _nearest_backward,
    _nearest_backward_fake,
)


# ----- Autograd Function


def _call_nearest_backward(cosine, count, index, grad, *tables):
    """The backward operator; its gradients in one tuple."""
    return tuple(NEAREST_BACKWARD(tables[:count], tables[count:], cosine, index, grad))


class NearestPrototypeFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.nearest_prototype`, which checks, for autograd.

    Takes cosine, M, M features [B, D_m], M prototypes [K, D_m], and M ``seen`` [K] or none. Gives
    squared distance and index of the nearest prototype, [B, M].
    """

    @staticmethod
    def forward(cosine, count, *values):
        return NEAREST(values[:count], values[count : 2 * count], cosine, values[2 * count :])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cosine, ctx.count = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs[2 : 2 + 2 * ctx.count])

    @staticmethod
    def backward(ctx, grad, _):
        needs = ctx.needs_input_grad[2:]
        gradients = ()
        if grad is not None:
            index, *tables = ctx.saved_tensors
            gradients = first_order(
                "nearest_prototype",
                _call_nearest_backward,
                ctx.cosine,
                ctx.count,
                index,
                grad,
                *tables,
            )
        needed = [value if need else None for value, need in zip(gradients, needs)]
        without = len(needs) - len(needed)  # prototypes and seen
        return None, None, *needed, *(None,) * without

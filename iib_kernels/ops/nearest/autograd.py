"""The kernels of the nearest prototype as operators and an autograd Function.

All modalities go into one launch (method page, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._registration import register
from iib_kernels._runtime import (
    accumulator,
    compute_dtype,
    dot_options,
    first_order,
    on_device,
    uniform_dtype,
)

# ----- Launchers


def _rows_and_tables(features: Sequence[Tensor], prototypes: Sequence[Tensor]) -> tuple:
    """The arguments that both kernels begin with: pointers and strides of both, and all D_m."""
    strides = lambda values, place: tuple(value.stride(place) for value in values)
    return (
        tuple(features),
        strides(features, 0),
        strides(features, 1),
        tuple(prototypes),
        strides(prototypes, 0),
        strides(prototypes, 1),
        _widths(features),
    )


def _widths(features: Sequence[Tensor]) -> tuple[int, ...]:
    """D_m of every modality."""
    return tuple(values.shape[1] for values in features)


def _nearest(features, prototypes, cosine, seen):
    from iib_kernels.ops.nearest.kernels import nearest_forward

    distance, index = outputs = _nearest_fake(features)
    batch, classes, count = features[0].shape[0], prototypes[0].shape[0], len(features)
    if not batch:
        return outputs
    dtype, width = compute_dtype(*features), max(_widths(features))
    features, prototypes = uniform_dtype(features), uniform_dtype(prototypes)
    itemsize = max(features[0].dtype.itemsize, prototypes[0].dtype.itemsize)

    def launch(config: _tuning.Launch) -> None:
        nearest_forward[(-(-batch // config.blocks["BLOCK_B"]), count)](
            *_rows_and_tables(features, prototypes),
            tuple(known.contiguous() for known in seen) or None,
            distance,
            index,
            batch,
            classes,
            M=count,
            COSINE=cosine,
            SEEN=bool(seen),
            ACC=accumulator(dtype),
            **dot_options(*features, *prototypes),
            **config.options(),
        )

    with on_device(features[0]):
        key = ("nearest", batch, classes, width, count, features[0].dtype)
        _tuning.run(key, _tuning.distance(batch, classes, width, itemsize), launch)
    return outputs


def _nearest_fake(features, *_):
    size, like = (features[0].shape[0], len(features)), features[0].new_empty
    return like(size, dtype=compute_dtype(*features)), like(size, dtype=torch.int64)


def _nearest_backward(features, prototypes, cosine, index, grad):
    from iib_kernels.ops.nearest.kernels import nearest_backward

    kinds, batch, count = [values.dtype for values in features], features[0].shape[0], len(features)
    dtype, width = compute_dtype(*features), max(_widths(features))
    features, prototypes = uniform_dtype(features), uniform_dtype(prototypes)
    gradients = [values.new_empty(values.shape) for values in features]

    def launch(config: _tuning.Launch) -> None:
        nearest_backward[(-(-batch // config.blocks["BLOCK_B"]), count)](
            *_rows_and_tables(features, prototypes),
            index,
            grad,
            *grad.stride(),
            tuple(gradients),
            batch,
            M=count,
            COSINE=cosine,
            ACC=accumulator(dtype),
            ONE_BLOCK=width <= config.blocks["BLOCK_D"],
            **config.options(),
        )

    if batch:
        with on_device(features[0]):
            key = ("nearest_backward", batch, width, count, features[0].dtype)
            _tuning.run(key, _tuning.nearest_backward(width), launch)
    return [gradient.to(kind) for gradient, kind in zip(gradients, kinds)]


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

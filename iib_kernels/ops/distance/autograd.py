"""The kernels of the matrix of distances as operators and an autograd Function.

See method page, section 2.
"""

from __future__ import annotations

import torch

from iib_kernels import _tuning
from iib_kernels._registration import register
from iib_kernels._runtime import (
    accumulator,
    compute_dtype,
    dot_options,
    first_order,
    on_device,
    slope_precision,
)

# ----- Launchers


def _blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def _distance(features, prototypes, cosine, keep):
    from iib_kernels.ops.distance.kernels import distance_forward

    distance, squares, prototype_squares, exact = outputs = _distance_fake(
        features, prototypes, cosine, keep
    )
    (batch, width), classes = features.shape, prototypes.shape[0]
    if not batch * classes:
        return outputs
    dtype = compute_dtype(features, prototypes)
    itemsize = max(features.dtype.itemsize, prototypes.dtype.itemsize)

    def launch(config: _tuning.Launch) -> None:
        rows, columns = config.blocks["BLOCK_B"], config.blocks["BLOCK_K"]
        distance_forward[(_blocks(batch, rows), _blocks(classes, columns))](
            features,
            *features.stride(),
            prototypes,
            *prototypes.stride(),
            distance,
            exact if exact.numel() else None,
            squares if keep else None,
            prototype_squares if keep else None,
            batch,
            classes,
            width,
            COSINE=cosine,
            ACC=accumulator(dtype),
            **dot_options(features, prototypes),
            **config.options(),
        )

    with on_device(features):
        key = ("distance", batch, classes, width, features.dtype)
        _tuning.run(key, _tuning.distance(batch, classes, width, itemsize), launch)
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
    from iib_kernels.ops.distance.kernels import distance_backward

    grad_features, grad_prototypes = outputs = _distance_gradients(
        features, prototypes, need_features, need_prototypes
    )
    (batch, width), classes = features.shape, prototypes.shape[0]
    if not batch * classes:
        return tuple(output.zero_() for output in outputs)
    if not width:
        return outputs
    dtype = compute_dtype(features, prototypes)
    itemsize = max(features.dtype.itemsize, prototypes.dtype.itemsize)

    def launch(config: _tuning.Launch) -> None:
        rows, columns, chunk = (config.blocks[name] for name in ("BLOCK_B", "BLOCK_K", "CHUNK"))
        row_programs = _blocks(batch, rows) if need_features else 0
        class_programs = _blocks(classes, columns) if need_prototypes else 0
        # One block of classes is read once and serves all components; several are shared among
        # programs
        whole = classes <= columns and not need_prototypes
        span = _blocks(width, chunk) * chunk if whole else chunk
        distance_backward[(row_programs + class_programs, _blocks(width, span))](
            features,
            *features.stride(),
            squares if cosine else None,
            prototypes,
            *prototypes.stride(),
            prototype_squares if cosine else None,
            grad,
            *grad.stride(),
            distance,
            grad_features if need_features else None,
            grad_prototypes if need_prototypes else None,
            batch,
            classes,
            width,
            row_programs,
            span,
            COSINE=cosine,
            ACC=accumulator(dtype),
            PRECISION=slope_precision(features, prototypes),
            ONE_ROW_BLOCK=batch <= rows,
            ONE_CLASS_BLOCK=classes <= columns,
            **config.options(),
        )

    with on_device(features):
        needs = need_features, need_prototypes
        key = ("distance_backward", batch, classes, width, features.dtype, *needs)
        _tuning.run(key, _tuning.distance_backward(batch, classes, width, itemsize), launch)
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

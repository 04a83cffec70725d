"""Distances to class prototypes, and the nearest prototype (method page, section 2)."""

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
    check_shape,
    describe,
    refuse_grad,
    tensor_list,
)
from iib_kernels._chunks import rows_per_chunk, spans
from iib_kernels._registration import register
from iib_kernels._runtime import (
    accumulator,
    apply,
    choose,
    compute_dtype,
    distinct,
    dot_options,
    first_order,
    on_device,
    slope_precision,
    uniform_dtype,
)

METRICS = ("cosine", "sqeuclidean")
SEARCH_ARRAYS = 4  # [rows, K] arrays alive at once in the search for the nearest prototype: products, distances, and both again with unseen classes out


class NearestOutput(NamedTuple):
    """What :func:`nearest_prototype` returns."""

    distance: Tensor  #: [B, M] squared distance, float32 (float64 for float64 features)
    index: (
        Tensor  #: [B, M] int64, the class of the nearest prototype; -1 where no class has been seen
    )


def prototype_distance(
    features: Tensor, prototypes: Tensor, *, metric: str = "cosine", impl: str = "auto"
) -> Tensor:
    """Squared distances d2(i, k) = |z_i|^2 + |p_k|^2 - 2 z_i . p_k, clamped at 0 (method page, section 2).

    Args:
        features: [..., D].
        prototypes: [K, D].
        metric: ``"cosine"`` normalises rows first, so that d2 = 2 - 2 cos in [0, 4] (a zero row stays zero: d2 = 1); ``"sqeuclidean"`` does not.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns [..., K] in the features' dtype. Half types are computed in float32; each gradient comes in its input's dtype. Differentiable in both.

    Raises TypeError or ValueError naming the argument. Source: arXiv 2603.17347; this project's own formulation.

    >>> prototype_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([[0., 2.]])
    """
    check_choice(metric, METRICS, "metric")
    check_shape(check_float(prototypes, "prototypes"), (None, None), "prototypes", "[K, D]")
    if check_float(features, "features").dim() < 1 or features.shape[-1] != prototypes.shape[1]:
        raise ValueError(
            f"features: expected shape [..., D] with D = {prototypes.shape[1]} as in prototypes, got {describe(features)}"
        )
    check_device(features, prototypes=prototypes)
    if choose(impl, features, prototypes) == "triton":
        asked = (
            torch.compiler.is_compiling() or features.requires_grad or prototypes.requires_grad
        )  # compiled code does not know inside func.grad
        keep = metric == "cosine" and torch.is_grad_enabled() and asked
        rows, table = distinct([features, prototypes])
        distance = apply(
            PrototypeDistanceFunction,
            rows.flatten(0, -2) if rows.dim() > 1 else rows[None],
            table,
            metric == "cosine",
            keep,
        )[0]
        return distance.reshape(*features.shape[:-1], prototypes.shape[0])
    dtype = compute_dtype(features, prototypes)
    with torch.autocast(features.device.type, enabled=False):
        return reference.prototype_distance(features.to(dtype), prototypes.to(dtype), metric).to(
            features.dtype
        )


def nearest_prototype(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    *,
    metric: str = "cosine",
    seen: Tensor | Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> NearestOutput:
    """For every modality the squared distance to the nearest prototype of a seen class, and that class (method page, sections 2 and 4).

    Args:
        features: M tensors [B, D_m].
        prototypes: M tensors [K, D_m].
        metric: as in :func:`prototype_distance`.
        seen: [K] bool, or M of them; classes not seen yet are left out. All by default. Where none has been seen: distance 0, index -1.

    Half types are computed in float32. The gradient reaches the features through the winning prototype; prototypes get none (ValueError if they ask for
    one). [B, K] is never held at once: rows are processed in chunks of bounded size, and memory is otherwise O(B D + K D). Of several nearest, any one.

    Raises TypeError or ValueError naming the argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> nearest_prototype([torch.tensor([[3.0, 0.1]])], [torch.eye(2)]).index
    tensor([[0]])
    """
    features, prototypes, seen = check_modalities(features, prototypes, seen, metric)
    if choose(impl, *features) == "triton":
        tables = distinct([*features, *prototypes, *(seen or [])])
        return NearestOutput(
            *apply(NearestPrototypeFunction, metric == "cosine", len(features), *tables)
        )
    prototypes = without_unseen(prototypes, seen)
    dtype = compute_dtype(*features)
    distances, indices = [], []
    with torch.autocast(features[0].device.type, enabled=False):
        for index, (rows, table) in enumerate(zip(features, prototypes)):
            rows, table, known = (
                rows.to(dtype),
                table.to(dtype),
                None if seen is None else seen[index],
            )
            if metric == "cosine":
                rows, table = (
                    reference.normalize(rows),
                    reference.normalize(table),
                )  # once, not once a chunk
            with torch.no_grad():
                size = rows_per_chunk(len(table), dtype, SEARCH_ARRAYS)
                winner = torch.cat(
                    [
                        reference.nearest_prototype(rows[a:b], table, "sqeuclidean", known)[1]
                        for a, b in spans(len(rows), size)
                    ]
                )
            none = winner < 0
            best = table[winner.clamp_min(0)]
            # the same expression as the matrix of distances, for one prototype a row
            distance = (
                rows.square().sum(-1) + best.square().sum(-1) - 2 * (rows * best).sum(-1)
            ).clamp_min(0)
            distances.append(torch.where(none, 0.0, distance))
            indices.append(winner)
    return NearestOutput(torch.stack(distances, 1), torch.stack(indices, 1))


def check_modalities(
    features, prototypes, seen, metric: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Checked features [B, D_m], prototypes [K, D_m] and seen [K] of every modality."""
    check_choice(metric, METRICS, "metric")
    features = tensor_list(features, "features")
    prototypes = tensor_list(prototypes, "prototypes", len(features))
    refuse_grad("prototypes", *prototypes)
    first = check_shape(prototypes[0], (None, None), "prototypes[0]", "[K, D_0]")
    if not len(first):
        raise ValueError(f"prototypes[0]: expected at least one class, got {describe(first)}")
    for index, (rows, table) in enumerate(zip(features, prototypes)):
        check_shape(table, (len(first), None), f"prototypes[{index}]", f"[K, D_{index}]")
        check_shape(
            rows,
            (features[0].shape[0] if features[0].dim() else None, table.shape[1]),
            f"features[{index}]",
            f"[B, D_{index}]",
        )
        check_device(features[0], **{f"features[{index}]": rows, f"prototypes[{index}]": table})
    if seen is not None:
        if not isinstance(seen, (Tensor, Sequence)):
            raise TypeError(
                f"seen: expected a bool tensor [K], or one a modality, got {describe(seen)}"
            )
        seen = [seen] * len(features) if isinstance(seen, Tensor) and seen.dim() < 2 else list(seen)
        if len(seen) != len(features):
            raise ValueError(
                f"seen: expected one bool tensor [K] or {len(features)} of them, one a modality, got {len(seen)}"
            )
        for index, known in enumerate(seen):
            if not isinstance(known, Tensor) or known.dtype != torch.bool:
                raise TypeError(f"seen[{index}]: expected a bool tensor [K], got {describe(known)}")
            check_shape(known, (len(first),), f"seen[{index}]", "[K]")
            check_device(features[0], **{f"seen[{index}]": known})
    return features, prototypes, seen


def without_unseen(prototypes: list[Tensor], seen: list[Tensor] | None) -> list[Tensor]:
    """Zeros for classes not seen yet: what stands there must not reach the features' gradient, where its weight of 0 times NaN would be NaN."""
    return (
        prototypes
        if seen is None
        else [torch.where(known[:, None], table, 0.0) for known, table in zip(seen, prototypes)]
    )


# ----- Triton: launchers, operators, autograd Functions


def _blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def _distance(features, prototypes, cosine, keep):
    from iib_kernels._kernels.prototype import distance_forward

    distance, squares, prototype_squares, exact = outputs = _distance_fake(
        features, prototypes, cosine, keep
    )
    (batch, width), classes = features.shape, prototypes.shape[0]
    if not batch * classes:
        return outputs
    dtype = compute_dtype(features, prototypes)
    itemsize = max(features.dtype.itemsize, prototypes.dtype.itemsize)

    def launch(config: _tuning.Launch) -> None:
        distance_forward[
            (_blocks(batch, config.blocks["BLOCK_B"]), _blocks(classes, config.blocks["BLOCK_K"]))
        ](
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
        _tuning.run(
            ("distance", batch, classes, width, features.dtype),
            _tuning.distance(batch, classes, width, itemsize),
            launch,
        )
    return outputs


def _distance_fake(features, prototypes, cosine, keep):
    dtype = compute_dtype(features, prototypes)
    batch, classes = features.shape[0], prototypes.shape[0]
    exact = (
        (batch, classes) if keep and features.dtype != dtype else (0, 0)
    )  # the gradient of the cosine takes them before rounding
    sizes = ((batch,), (classes,), exact) if keep else ((0,), (0,), exact)
    return features.new_empty(batch, classes), *(
        features.new_empty(size, dtype=dtype) for size in sizes
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
    from iib_kernels._kernels.prototype import distance_backward

    grad_features, grad_prototypes = outputs = _distance_backward_fake(
        features,
        prototypes,
        cosine,
        squares,
        prototype_squares,
        distance,
        grad,
        need_features,
        need_prototypes,
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
        # One block of classes is read once and serves all components; several are shared among programs
        span = (
            _blocks(width, chunk) * chunk if classes <= columns and not need_prototypes else chunk
        )
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
        key = (
            "distance_backward",
            batch,
            classes,
            width,
            features.dtype,
            need_features,
            need_prototypes,
        )
        _tuning.run(key, _tuning.distance_backward(batch, classes, width, itemsize), launch)
    return outputs


def _distance_backward_fake(
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
    return tuple(
        value.new_empty(value.shape if need else 0)
        for value, need in ((features, need_features), (prototypes, need_prototypes))
    )


def _strides(values, place: int) -> tuple[int, ...]:
    """Strides of several tensors in one dimension."""
    return tuple(value.stride(place) for value in values)


def _nearest(features, prototypes, cosine, seen):
    from iib_kernels._kernels.prototype import nearest_forward

    distance, index = outputs = _nearest_fake(features, prototypes, cosine, seen)
    batch, classes, count = features[0].shape[0], prototypes[0].shape[0], len(features)
    if not batch:
        return outputs
    dtype = compute_dtype(*features)
    features, prototypes = uniform_dtype(features), uniform_dtype(prototypes)
    widths = tuple(values.shape[1] for values in features)
    itemsize = max(features[0].dtype.itemsize, prototypes[0].dtype.itemsize)

    def launch(config: _tuning.Launch) -> None:
        nearest_forward[(_blocks(batch, config.blocks["BLOCK_B"]), count)](
            tuple(features),
            _strides(features, 0),
            _strides(features, 1),
            tuple(prototypes),
            _strides(prototypes, 0),
            _strides(prototypes, 1),
            widths,
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
        _tuning.run(
            ("nearest", batch, classes, max(widths), count, features[0].dtype),
            _tuning.distance(batch, classes, max(widths), itemsize),
            launch,
        )
    return outputs


def _nearest_fake(features, prototypes, cosine, seen):
    size = (features[0].shape[0], len(features))
    return features[0].new_empty(size, dtype=compute_dtype(*features)), features[0].new_empty(
        size, dtype=torch.int64
    )


def _nearest_backward(features, prototypes, cosine, index, grad):
    from iib_kernels._kernels.prototype import nearest_backward

    kinds, batch, count = [values.dtype for values in features], features[0].shape[0], len(features)
    dtype = compute_dtype(*features)
    features, prototypes = uniform_dtype(features), uniform_dtype(prototypes)
    gradients = [values.new_empty(values.shape) for values in features]
    widths = tuple(values.shape[1] for values in features)
    if not batch:
        return gradients

    def launch(config: _tuning.Launch) -> None:
        nearest_backward[(_blocks(batch, config.blocks["BLOCK_B"]), count)](
            tuple(features),
            _strides(features, 0),
            _strides(features, 1),
            tuple(prototypes),
            _strides(prototypes, 0),
            _strides(prototypes, 1),
            widths,
            index,
            grad,
            *grad.stride(),
            tuple(gradients),
            batch,
            M=count,
            COSINE=cosine,
            ACC=accumulator(dtype),
            ONE_BLOCK=max(widths) <= config.blocks["BLOCK_D"],
            **config.options(),
        )

    with on_device(features[0]):
        _tuning.run(
            ("nearest_backward", batch, max(widths), count, features[0].dtype),
            _tuning.nearest_backward(max(widths)),
            launch,
        )
    return [gradient.to(kind) for gradient, kind in zip(gradients, kinds)]


def _nearest_backward_fake(features, *_):
    return [values.new_empty(values.shape) for values in features]


_DISTANCE = register(
    "prototype_distance(Tensor features, Tensor prototypes, bool cosine, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _distance,
    _distance_fake,
)
_DISTANCE_BACKWARD = register(
    "prototype_distance_backward(Tensor features, Tensor prototypes, bool cosine, Tensor squares, Tensor prototype_squares, Tensor distance, Tensor grad, "
    "bool need_features, bool need_prototypes) -> (Tensor, Tensor)",
    _distance_backward,
    _distance_backward_fake,
)
_NEAREST = register(
    "nearest_prototype(Tensor[] features, Tensor[] prototypes, bool cosine, Tensor[] seen) -> (Tensor, Tensor)",
    _nearest,
    _nearest_fake,
)
_NEAREST_BACKWARD = register(
    "nearest_prototype_backward(Tensor[] features, Tensor[] prototypes, bool cosine, Tensor index, Tensor grad) -> Tensor[]",
    _nearest_backward,
    _nearest_backward_fake,
)


class PrototypeDistanceFunction(torch.autograd.Function):
    """(features [B, D], prototypes [K, D], cosine, keep) -> squared distances [B, K] and, with ``keep``, what backward of the cosine needs.
    See :func:`prototype_distance`, which checks."""

    @staticmethod
    def forward(features, prototypes, cosine, keep):
        return _DISTANCE(features, prototypes, cosine, keep)

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
        distance = distance if features.dtype == squares.dtype else exact
        needs = ctx.needs_input_grad[:2]
        gradients = first_order(
            "prototype_distance",
            _DISTANCE_BACKWARD,
            features,
            prototypes,
            ctx.cosine,
            squares,
            prototype_squares,
            distance,
            grad,
            *needs,
        )
        return *(value if need else None for value, need in zip(gradients, needs)), None, None


def _call_nearest_backward(cosine, count, index, grad, *tables):
    """The backward operator; its gradients in one tuple."""
    return tuple(_NEAREST_BACKWARD(tables[:count], tables[count:], cosine, index, grad))


class NearestPrototypeFunction(torch.autograd.Function):
    """(cosine, M, M features, M prototypes, M seen or none) -> squared distance and index of the nearest prototype, [B, M].
    See :func:`nearest_prototype`, which checks."""

    @staticmethod
    def forward(cosine, count, *values):
        return _NEAREST(values[:count], values[count : 2 * count], cosine, values[2 * count :])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cosine, ctx.count = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs[2 : 2 + 2 * ctx.count])

    @staticmethod
    def backward(ctx, grad, _):
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
        needed = (
            value if need else None for value, need in zip(gradients, ctx.needs_input_grad[2:])
        )
        return None, None, *needed, *(None,) * (len(ctx.needs_input_grad) - 2 - len(gradients))

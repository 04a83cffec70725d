"""Distances to class prototypes, and the nearest prototype (method page, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import (
    check_choice,
    check_device,
    check_float,
    check_shape,
    check_whole,
    describe,
    refuse_grad,
    tensor_list,
)
from iib_kernels._chunks import rows_per_chunk, spans
from iib_kernels._runtime import choose, compute_dtype, full_precision
from iib_kernels.compat import apply, distinct, exportable
from iib_kernels.ops.distance.autograd import PrototypeDistanceFunction
from iib_kernels.ops.nearest.autograd import NearestPrototypeFunction

METRICS = ("cosine", "sqeuclidean")
# [rows, K] arrays alive at once in the search for the nearest prototype: products, distances, and
# both again with unseen classes out
SEARCH_ARRAYS = 4


@exportable
class NearestOutput(NamedTuple):
    """What :func:`nearest_prototype` returns."""

    distance: Tensor  #: [B, M] squared distance, float32 (float64 for float64 features)
    index: Tensor  #: [B, M] int64, class of the nearest prototype; -1 where none has been seen


def prototype_distance(
    features: Tensor, prototypes: Tensor, *, metric: str = "cosine", impl: str = "auto"
) -> Tensor:
    """Squared distances of rows to class prototypes (method page, section 2).

    d2(i, k) = |z_i|^2 + |p_k|^2 - 2 z_i . p_k, clamped at 0.

    Args:
        features: [..., D].
        prototypes: [K, D].
        metric: ``"cosine"`` normalises rows first, so that d2 = 2 - 2 cos in [0, 4] (a zero row
            stays zero: d2 = 1); ``"sqeuclidean"`` does not.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns [..., K] in the features' dtype. Half types are computed in float32; each gradient comes
    in its input's dtype. Differentiable in both.

    Raises TypeError or ValueError naming the argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> prototype_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([[0., 2.]])
    """
    check_choice(metric, METRICS, "metric")
    check_shape(check_float(prototypes, "prototypes"), (None, None), "prototypes", "[K, D]")
    if check_float(features, "features").dim() < 1 or features.shape[-1] != prototypes.shape[1]:
        raise ValueError(
            f"features: expected shape [..., D] with D = {prototypes.shape[1]} as in prototypes, "
            f"got {describe(features)}"
        )
    check_device(features, prototypes=prototypes)
    if choose(impl, features, prototypes) == "triton":
        asked = features.requires_grad or prototypes.requires_grad
        # Compiled code does not know whether it stands inside torch.func.grad
        asked = torch.compiler.is_compiling() or asked
        keep = metric == "cosine" and torch.is_grad_enabled() and asked
        rows, table = distinct([features, prototypes])
        rows = rows.flatten(0, -2) if rows.dim() > 1 else rows[None]
        distance = apply(PrototypeDistanceFunction, rows, table, metric == "cosine", keep)[0]
        return distance.reshape(*features.shape[:-1], prototypes.shape[0])
    dtype = compute_dtype(features, prototypes)
    with full_precision(features):
        distance = reference.prototype_distance(features.to(dtype), prototypes.to(dtype), metric)
        return distance.to(features.dtype)


def nearest_prototype(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    *,
    metric: str = "cosine",
    seen: Tensor | Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> NearestOutput:
    """Squared distance to the nearest prototype of a seen class, and that class.

    For every modality, and as the gate takes it (method page, section 2 and section 4).

    Args:
        features: M tensors [B, D_m].
        prototypes: M tensors [K, D_m].
        metric: as in :func:`prototype_distance`.
        seen: [K] bool, or M of them; classes not seen yet are left out. All by default. Where none
            has been seen: distance 0, index -1.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Half types are computed in float32. The gradient reaches the features through the winning
    prototype; prototypes get none (ValueError if they ask for one). Of several nearest, any one.

    [B, K] is never held at once: rows are processed in chunks of bounded size, and memory is
    otherwise O(B D + K D). Only plain PyTorch in a graph whose batch may vary (``torch.export``,
    ``torch.compile``) has no chunks.

    Raises TypeError or ValueError naming the argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> nearest_prototype([torch.tensor([[3.0, 0.1]])], [torch.eye(2)]).index
    tensor([[0]])
    """
    features, prototypes, seen = check_modalities(features, prototypes, seen, metric)
    cosine = metric == "cosine"
    if choose(impl, *features) == "triton":
        tables = distinct([*features, *prototypes, *(seen or [])])
        return NearestOutput(*apply(NearestPrototypeFunction, cosine, len(features), *tables))
    dtype = compute_dtype(*features)
    distances, indices = [], []
    with full_precision(features[0]):
        for index, table in enumerate(without_unseen(prototypes, seen)):
            rows, table = features[index].to(dtype), table.to(dtype)
            known = None if seen is None else seen[index]
            if cosine:  # once, not once a chunk
                rows, table = reference.normalize(rows), reference.normalize(table)
            winner = _search(rows, table, known)
            best = table[winner.clamp_min(0)]
            # The expression of the matrix of distances, for one prototype a row
            squares = rows.square().sum(-1) + best.square().sum(-1)
            distance = (squares - 2 * (rows * best).sum(-1)).clamp_min(0)
            distances.append(torch.where(winner < 0, 0.0, distance))
            indices.append(winner)
    return NearestOutput(torch.stack(distances, 1), torch.stack(indices, 1))


@torch.no_grad()
def _search(rows: Tensor, table: Tensor, seen: Tensor | None) -> Tensor:
    """Class of the nearest prototype of every row [B], in chunks; -1 where none has been seen."""
    size = rows_per_chunk(len(table), rows.dtype, SEARCH_ARRAYS)
    return torch.cat(
        [
            reference.nearest_prototype(rows[start:stop], table, "sqeuclidean", seen)[1]
            for start, stop in spans(rows.shape[0], size)
        ]
    )


def check_modalities(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    seen: Tensor | Sequence[Tensor] | None,
    metric: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Checked features [B, D_m], prototypes [K, D_m] and seen [K] of every modality."""
    check_choice(metric, METRICS, "metric")
    features = tensor_list(features, "features")
    prototypes = tensor_list(prototypes, "prototypes", len(features))
    refuse_grad("prototypes", *prototypes)
    first = check_shape(prototypes[0], (None, None), "prototypes[0]", "[K, D_0]")
    if not len(first):
        raise ValueError(f"prototypes[0]: expected at least one class, got {describe(first)}")
    batch = features[0].shape[0] if features[0].dim() else None
    for index, (rows, table) in enumerate(zip(features, prototypes)):
        check_shape(table, (len(first), None), f"prototypes[{index}]", f"[K, D_{index}]")
        check_shape(rows, (batch, table.shape[1]), f"features[{index}]", f"[B, D_{index}]")
        check_device(features[0], **{f"features[{index}]": rows, f"prototypes[{index}]": table})
    if seen is not None:
        seen = _check_seen(seen, features, len(first))
    return features, prototypes, seen


def _check_seen(
    seen: Tensor | Sequence[Tensor], features: list[Tensor], classes: int
) -> list[Tensor]:
    """One bool tensor [K] a modality."""
    count = len(features)
    if not isinstance(seen, (Tensor, Sequence)):
        raise TypeError(
            f"seen: expected a bool tensor [K], or one a modality, got {describe(seen)}"
        )
    seen = [seen] * count if isinstance(seen, Tensor) and seen.dim() < 2 else list(seen)
    if len(seen) != count:
        raise ValueError(
            f"seen: expected one bool tensor [K] or {count} of them, one a modality, "
            f"got {len(seen)}"
        )
    for index, known in enumerate(seen):
        if not isinstance(known, Tensor) or known.dtype != torch.bool:
            raise TypeError(f"seen[{index}]: expected a bool tensor [K], got {describe(known)}")
        check_whole(known, f"seen[{index}]")
        check_shape(known, (classes,), f"seen[{index}]", "[K]")
        check_device(features[0], **{f"seen[{index}]": known})
    return seen


def without_unseen(prototypes: list[Tensor], seen: list[Tensor] | None) -> list[Tensor]:
    """Prototypes with zeros for classes not seen yet.

    What stands there must not reach the features' gradient, where its weight of 0 times NaN would
    be NaN.
    """
    if seen is None:
        return prototypes
    return [torch.where(known[:, None], table, 0.0) for known, table in zip(seen, prototypes)]

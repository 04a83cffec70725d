"""Distances to class prototypes, the nearest prototype, and the prototypes' moving average (method page, section 2)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import check_choice, check_device, check_float, check_integer, check_number, check_shape, check_targets, describe, refuse_grad, tensor_list
from iib_kernels._chunks import rows_per_chunk, spans
from iib_kernels._runtime import choose, compute_dtype, eager_on_cpu

METRICS = ("cosine", "sqeuclidean")
SEARCH_ARRAYS = 4  # [rows, K] arrays alive at once in the search for the nearest prototype: products, distances, and both again with unseen classes out


class NearestOutput(NamedTuple):
    """What :func:`nearest_prototype` returns."""

    distance: Tensor  #: [B, M] squared distance, float32 (float64 for float64 features)
    index: Tensor  #: [B, M] int64, the class of the nearest prototype; -1 where no class has been seen


def prototype_distance(features: Tensor, prototypes: Tensor, *, metric: str = "cosine", impl: str = "auto") -> Tensor:
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
        raise ValueError(f"features: expected shape [..., D] with D = {prototypes.shape[1]} as in prototypes, got {describe(features)}")
    check_device(features, prototypes=prototypes)
    choose(impl, features, prototypes)
    dtype = compute_dtype(features, prototypes)
    with torch.autocast(features.device.type, enabled=False):
        return reference.prototype_distance(features.to(dtype), prototypes.to(dtype), metric).to(features.dtype)


def nearest_prototype(
    features: Sequence[Tensor], prototypes: Sequence[Tensor], *, metric: str = "cosine", seen: Tensor | Sequence[Tensor] | None = None, impl: str = "auto"
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
    choose(impl, *features)
    dtype = compute_dtype(*features)
    distances, indices = [], []
    with torch.autocast(features[0].device.type, enabled=False):
        for index, (rows, table) in enumerate(zip(features, prototypes)):
            rows, table, known = rows.to(dtype), table.to(dtype), None if seen is None else seen[index]
            if metric == "cosine":
                rows, table = reference.normalize(rows), reference.normalize(table)  # once, not once a chunk
            with torch.no_grad():
                size = rows_per_chunk(len(table), dtype, SEARCH_ARRAYS)
                winner = torch.cat([reference.nearest_prototype(rows[a:b], table, "sqeuclidean", known)[1] for a, b in spans(len(rows), size)])
            none = winner < 0
            best = table[winner.clamp_min(0)]
            # the same expression as the matrix of distances, for one prototype a row
            distance = (rows.square().sum(-1) + best.square().sum(-1) - 2 * (rows * best).sum(-1)).clamp_min(0)
            distances.append(torch.where(none, 0.0, distance))
            indices.append(winner)
    return NearestOutput(torch.stack(distances, 1), torch.stack(indices, 1))


def update_prototypes(
    prototypes: Tensor, counts: Tensor, features: Tensor, targets: Tensor, *, momentum: float = 0.9, metric: str = "cosine", ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """New prototypes and counts after one batch: p <- normalise(mu p + (1 - mu) mean of its class's embeddings) (method page, section 2).

    Args:
        prototypes: [K, D]; counts: [K] int64, how many samples of each class have been seen (0 = the prototype is not set yet).
        features: [B, D]; targets: [B] class indices.
        momentum: mu in [0, 1).
        metric: with ``"cosine"`` embeddings are normalised before they are averaged, and the prototypes after; with ``"sqeuclidean"`` neither.

    A class takes the mean itself the first time; classes absent from the batch keep theirs. The inputs are untouched, nothing is differentiated, and the
    result is bitwise repeatable. Returns ``(prototypes in their dtype, counts)``. It is :func:`class_sums` and :func:`ema_from_sums`: data-parallel callers
    sum the former over processes in between.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> update_prototypes(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
    (tensor([[0., 0.],
            [1., 0.]]), tensor([0, 1]))
    """
    choose(impl, features)
    check_shape(check_float(prototypes, "prototypes"), (None, None), "prototypes", "[K, D]")
    check_shape(check_float(features, "features"), (None, prototypes.shape[1]), "features", "[B, D]")
    sums, batch_counts = class_sums(features, targets, len(prototypes), metric=metric, ignore_index=ignore_index)
    return ema_from_sums(prototypes, counts, sums, batch_counts, momentum=momentum, metric=metric)


@torch.no_grad()
def class_sums(features: Tensor, targets: Tensor, num_classes: int, *, metric: str = "cosine", ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Sums of each class's embeddings in a batch, and how many there were: the half of :func:`update_prototypes` before the all-reduce (section 2).

    Args:
        features: [B, D], float16, bfloat16, float32 or float64.
        targets: [B] class indices; rows with ``ignore_index`` count for nothing and may hold anything. Out of range: ValueError in eager mode on the
            CPU, ignored elsewhere.
        num_classes: K >= 1.
        metric: with ``"cosine"`` each embedding is normalised before it is added.

    Returns sums [K, D], float32 (float64 for float64 features), and counts [K] int64. No gradient; bitwise repeatable. Errors name the argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> class_sums(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 1]), 2)
    (tensor([[0., 0.],
            [1., 1.]]), tensor([0, 2]))
    """
    check_choice(metric, METRICS, "metric")
    check_shape(check_float(features, "features"), (None, None), "features", "[B, D]")
    check_integer(num_classes, "num_classes")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    targets = check_targets(targets, features.shape[:1], num_classes, ignore_index)
    check_device(features, targets=targets)
    with torch.autocast(features.device.type, enabled=False):
        rows = features.detach().to(compute_dtype(features))
        rows = reference.normalize(rows) if metric == "cosine" else rows
        counts = targets != ignore_index
        rows = torch.where(counts[:, None], rows, 0.0)  # an ignored row may hold anything
        place = torch.where(counts, targets, num_classes)  # ignored rows go to a row of their own, which is dropped
        if eager_on_cpu(features):
            sums = rows.new_zeros(num_classes + 1, rows.shape[1]).index_add_(0, place, rows)
            return sums[:-1], place.new_zeros(num_classes + 1).index_add_(0, place, counts.long())[:-1]
        # On a GPU, and in compiled code, index_add_ is atomic and adds in any order; a matrix product does not. Classes in chunks: [classes, B] at a time
        sums, totals = [], []
        for start, stop in spans(num_classes, rows_per_chunk(len(rows), rows.dtype, 2)):
            member = place == torch.arange(start, stop, device=place.device)[:, None]
            sums.append(member.to(rows.dtype) @ rows)
            totals.append(member.sum(1))
        return torch.cat(sums), torch.cat(totals)


@torch.no_grad()
def ema_from_sums(
    prototypes: Tensor, counts: Tensor, sums: Tensor, batch_counts: Tensor, *, momentum: float = 0.9, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """The moving average of :func:`update_prototypes`, from class sums and counts (summed over processes where there are several) (section 2).

    Args:
        prototypes: [K, D]; counts: [K] int64, samples seen before (0 = the prototype is not set yet and takes the mean itself).
        sums: [K, D] and batch_counts: [K] int64, of :func:`class_sums`. Classes with no sample keep their prototype, bit for bit.
        momentum: mu in [0, 1).
        metric: with ``"cosine"`` moved prototypes are normalised.

    Returns new prototypes [K, D] in their dtype (half types are computed in float32) and counts + batch_counts. No gradient; inputs untouched; errors name
    the argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> ema_from_sums(torch.eye(2), torch.ones(2, dtype=torch.int64), torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.tensor([4, 0]), momentum=0.5)
    (tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]]), tensor([5, 1]))
    """
    check_choice(metric, METRICS, "metric")
    check_number(momentum, "momentum")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    check_shape(check_float(prototypes, "prototypes"), (None, None), "prototypes", "[K, D]")
    check_shape(check_float(sums, "sums"), prototypes.shape, "sums", "[K, D]")
    for name, value in (("counts", counts), ("batch_counts", batch_counts)):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an int64 tensor [K], got {describe(value)}")
        check_shape(value, prototypes.shape[:1], name, "[K]")
    check_device(prototypes, counts=counts, sums=sums, batch_counts=batch_counts)
    dtype = compute_dtype(prototypes, sums)
    moved, total = reference.ema_from_sums(prototypes.detach().to(dtype), counts, sums.to(dtype), batch_counts, momentum, metric)
    return moved.to(prototypes.dtype), total


def check_modalities(features, prototypes, seen, metric: str) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
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
        check_shape(rows, (len(features[0]) if features[0].dim() else None, table.shape[1]), f"features[{index}]", f"[B, D_{index}]")
        check_device(features[0], **{f"features[{index}]": rows, f"prototypes[{index}]": table})
    if seen is not None:
        if not isinstance(seen, (Tensor, Sequence)):
            raise TypeError(f"seen: expected a bool tensor [K], or one a modality, got {describe(seen)}")
        seen = [seen] * len(features) if isinstance(seen, Tensor) and seen.dim() < 2 else list(seen)
        if len(seen) != len(features):
            raise ValueError(f"seen: expected one bool tensor [K] or {len(features)} of them, one a modality, got {len(seen)}")
        for index, known in enumerate(seen):
            if not isinstance(known, Tensor) or known.dtype != torch.bool:
                raise TypeError(f"seen[{index}]: expected a bool tensor [K], got {describe(known)}")
            check_shape(known, (len(first),), f"seen[{index}]", "[K]")
            check_device(features[0], **{f"seen[{index}]": known})
        # What stands in a class not seen yet must not reach the features' gradient, where its weight of 0 times NaN would be NaN
        prototypes = [torch.where(known[:, None], table, 0.0) for known, table in zip(seen, prototypes)]
    return features, prototypes, seen

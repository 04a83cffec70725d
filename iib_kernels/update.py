"""The prototypes' moving average, and its two halves for data-parallel training.

See method page, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_number,
    check_shape,
    check_targets,
    describe,
)
from iib_kernels._chunks import rows_per_chunk, spans
from iib_kernels._runtime import apply, choose, compute_dtype, distinct, eager_on_cpu
from iib_kernels.ops.update.autograd import CLASS_SUMS, SNAPSHOT, UpdatePrototypesFunction
from iib_kernels.prototype import METRICS


def update_prototypes(
    prototypes: Tensor,
    counts: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    momentum: float = 0.9,
    metric: str = "cosine",
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """New prototypes and counts after one batch (method page, section 2).

    p <- normalise(mu p + (1 - mu) mean of its class's embeddings). A class takes the mean itself
    the first time; classes absent from the batch keep theirs.

    Args:
        prototypes: [K, D].
        counts: [K] int64, how many samples of each class have been seen (0 = the prototype is not
            set yet).
        features: [B, D].
        targets: [B] class indices; rows with ``ignore_index`` count for nothing.
        momentum: mu in [0, 1).
        metric: with ``"cosine"`` embeddings are normalised before they are averaged, and the
            prototypes after; with ``"sqeuclidean"`` neither.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns ``(prototypes in their dtype, counts)``. The inputs are untouched, nothing is
    differentiated, and the result is bitwise repeatable. Errors name the argument.

    It is :func:`class_sums` and :func:`ema_from_sums`: data-parallel callers sum the former over
    processes in between.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> prototypes, counts = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    >>> update_prototypes(prototypes, counts, torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
    (tensor([[0., 0.],
            [1., 0.]]), tensor([0, 1]))
    """
    check_shape(check_float(prototypes, "prototypes"), (None, None), "prototypes", "[K, D]")
    size = (None, prototypes.shape[1])
    check_shape(check_float(features, "features"), size, "features", "[B, D]")
    if choose(impl, features) == "triton":
        check_choice(metric, METRICS, "metric")
        _check_moving(prototypes, momentum, counts=counts)
        targets = check_targets(
            targets, features.shape[:1], prototypes.shape[0], ignore_index, replace=False
        )
        check_device(prototypes, counts=counts, features=features, targets=targets)
        tensors = distinct([prototypes, counts, features, targets])
        constants = momentum, metric == "cosine", ignore_index
        return apply(UpdatePrototypesFunction, *tensors, *constants)
    sums, batch_counts = class_sums(
        features,
        targets,
        len(prototypes),
        metric=metric,
        ignore_index=ignore_index,
        impl="reference",
    )
    return ema_from_sums(prototypes, counts, sums, batch_counts, momentum=momentum, metric=metric)


def snapshot(prototypes: Tensor) -> Tensor:
    """A copy [K, D] of prototypes for a loss, where the same compiled forward also moves them.

    ``torch.compile`` with inductor (seen with torch 2.13, plain matrix products included) lets
    backward read a buffer in place of its ``clone()``, after the forward has written new values
    into it: the gradients are wrong, silently. This copy is one that it cannot undo.

    No gradient; errors name the argument.

    >>> table = torch.eye(2)
    >>> kept = snapshot(table)
    >>> bool((table.zero_() == 0).all()), kept.trace()
    (True, tensor(2.))
    """
    return SNAPSHOT(check_float(prototypes, "prototypes").detach())


@torch.no_grad()
def class_sums(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    metric: str = "cosine",
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums of each class's embeddings in a batch, and how many there were.

    The half of :func:`update_prototypes` before the all-reduce (method page, section 2).

    Args:
        features: [B, D], float16, bfloat16, float32 or float64.
        targets: [B] class indices; rows with ``ignore_index`` count for nothing and may hold
            anything. Out of range: ValueError in eager mode on the CPU, ignored elsewhere.
        num_classes: K >= 1.
        metric: with ``"cosine"`` each embedding is normalised before it is added.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns sums [K, D], float32 (float64 for float64 features), and counts [K] int64. No gradient;
    bitwise repeatable. Errors name the argument.

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
    implementation = choose(impl, features)
    targets = check_targets(
        targets,
        features.shape[:1],
        num_classes,
        ignore_index,
        replace=implementation == "reference",
    )
    check_device(features, targets=targets)
    if implementation == "triton":
        cosine = metric == "cosine"
        return CLASS_SUMS(features.detach(), targets, num_classes, cosine, ignore_index)
    with torch.autocast(features.device.type, enabled=False):
        rows = features.detach().to(compute_dtype(features))
        rows = reference.normalize(rows) if metric == "cosine" else rows
        counts = targets != ignore_index
        rows = torch.where(counts[:, None], rows, 0.0)  # an ignored row may hold anything
        # Ignored rows go to a row of their own, which is dropped
        place = torch.where(counts, targets, num_classes)
        if eager_on_cpu(features):
            sums = rows.new_zeros(num_classes + 1, rows.shape[1]).index_add_(0, place, rows)
            totals = place.new_zeros(num_classes + 1).index_add_(0, place, counts.long())
            return sums[:-1], totals[:-1]
        # On a GPU, and in compiled code, index_add_ is atomic and adds in any order; a matrix
        # product does not. Classes in chunks: [classes, B] at a time
        sums, totals = [], []
        for start, stop in spans(num_classes, rows_per_chunk(len(rows), rows.dtype, 2)):
            member = place == torch.arange(start, stop, device=place.device)[:, None]
            sums.append(member.to(rows.dtype) @ rows)
            totals.append(member.sum(1))
        return torch.cat(sums), torch.cat(totals)


@torch.no_grad()
def ema_from_sums(
    prototypes: Tensor,
    counts: Tensor,
    sums: Tensor,
    batch_counts: Tensor,
    *,
    momentum: float = 0.9,
    metric: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """The moving average of :func:`update_prototypes`, from class sums and counts.

    Both are summed over processes first where there are several (method page, section 2).

    Args:
        prototypes: [K, D].
        counts: [K] int64, samples seen before (0 = the prototype is not set yet and takes the mean
            itself).
        sums: [K, D], of :func:`class_sums`.
        batch_counts: [K] int64, of :func:`class_sums`. Classes with no sample keep their prototype,
            bit for bit.
        momentum: mu in [0, 1).
        metric: with ``"cosine"`` moved prototypes are normalised.

    Returns new prototypes [K, D] in their dtype (half types are computed in float32) and
    ``counts + batch_counts``. No gradient; inputs untouched; errors name the argument.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> counts = torch.ones(2, dtype=torch.int64)
    >>> sums, batch_counts = torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.tensor([4, 0])
    >>> ema_from_sums(torch.eye(2), counts, sums, batch_counts, momentum=0.5)
    (tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]]), tensor([5, 1]))
    """
    check_choice(metric, METRICS, "metric")
    check_shape(check_float(prototypes, "prototypes"), (None, None), "prototypes", "[K, D]")
    check_shape(check_float(sums, "sums"), prototypes.shape, "sums", "[K, D]")
    _check_moving(prototypes, momentum, counts=counts, batch_counts=batch_counts)
    check_device(prototypes, counts=counts, sums=sums, batch_counts=batch_counts)
    dtype = compute_dtype(prototypes, sums)
    moved, total = reference.ema_from_sums(
        prototypes.detach().to(dtype), counts, sums.to(dtype), batch_counts, momentum, metric
    )
    return moved.to(prototypes.dtype), total


def _check_moving(prototypes: Tensor, momentum: float, **counts: Tensor) -> None:
    """TypeError or ValueError unless momentum and counts [K] are fit for a moving average."""
    check_number(momentum, "momentum")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    for name, value in counts.items():
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an int64 tensor [K], got {describe(value)}")
        check_shape(value, prototypes.shape[:1], name, "[K]")

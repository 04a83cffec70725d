"""The prototypes' moving average, and its two halves for data-parallel training.

See method page, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import (
    check_choice,
    check_device,
    check_float,
    check_integer,
    check_mask,
    check_number,
    check_shape,
    check_targets,
    check_whole,
    describe,
    refuse_grad,
    tensor_list,
)
from iib_kernels._chunks import rows_per_chunk, spans
from iib_kernels._runtime import choose, compute_dtype, eager_on_cpu, full_precision
from iib_kernels.compat import apply, distinct
from iib_kernels.ops.update.autograd import CLASS_SUMS, MOVE, SNAPSHOT, UpdatePrototypesFunction
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


def update_prototypes_(
    prototypes: Sequence[Tensor],
    counts: Sequence[Tensor],
    features: Sequence[Tensor],
    targets: Tensor,
    *,
    momentum: float = 0.9,
    metric: str = "cosine",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> None:
    """Move the prototypes and counts of all modalities in place (method page, section 2).

    What :func:`update_prototypes` gives for each, in one launch. Classes absent from the batch are
    neither read nor written.

    Args:
        prototypes: M tables [K, D_m], any strides; none of them twice.
        counts: M of [K] int64, samples of each class seen before (0 = the prototype is not set yet
            and takes the batch's mean itself).
        features: M of [B, D_m]; each table keeps its own dtype, whatever the features' is.
        targets: [B] class indices; rows with ``ignore_index`` count for nothing and may hold
            anything. Out of range: ValueError in eager mode on the CPU, ignored elsewhere.
        momentum: mu in [0, 1).
        metric: as in :func:`update_prototypes`.
        mask: [B, M] bool, True = present; rows of a missing modality count for nothing there.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    No gradient; bitwise repeatable; fit for ``torch.compile`` and for CUDA graphs. Backward through
    a loss that read the tables before they moved raises: give it :func:`snapshot` of them.

    Raises TypeError or ValueError naming the argument; the tables are then as they were.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> table, counts = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    >>> update_prototypes_([table], [counts], [torch.tensor([[2.0, 0.0]])], torch.tensor([1]))
    >>> table, counts
    (tensor([[0., 0.],
            [1., 0.]]), tensor([0, 1]))
    """
    features = tensor_list(features, "features")
    prototypes = tensor_list(prototypes, "prototypes", len(features))
    refuse_grad("prototypes", *prototypes)
    check_choice(metric, METRICS, "metric")
    first = check_shape(prototypes[0], (None, None), "prototypes[0]", "[K, D_0]")
    batch = features[0].shape[0] if features[0].dim() else None
    if isinstance(counts, Tensor) or not isinstance(counts, Sequence):
        raise TypeError(f"counts: expected a sequence of int64 tensors [K], got {describe(counts)}")
    if len(counts) != len(features):
        raise ValueError(f"counts: expected {len(features)} tensors [K], got {len(counts)}")
    for index, (table, number, rows) in enumerate(zip(prototypes, counts, features)):
        name = f"prototypes[{index}]"
        check_shape(table, (len(first), None), name, f"[K, D_{index}]")
        check_shape(rows, (batch, table.shape[1]), f"features[{index}]", f"[B, D_{index}]")
        _check_moving(table, momentum, **{f"counts[{index}]": number})
        others = {name: table, f"counts[{index}]": number, f"features[{index}]": rows}
        check_device(first, **others)
        if any([table is other for other in prototypes[:index]]):
            raise ValueError(f"{name}: is given twice; each modality moves a table of its own")
        if any([number is other for other in counts[:index]]):
            raise ValueError(
                f"counts[{index}]: is given twice; each modality has counts of its own"
            )
    mask = check_mask(mask, (features[0].shape[0], len(features)))
    implementation = choose(impl, *features)
    targets = check_targets(
        targets,
        features[0].shape[:1],
        len(first),
        ignore_index,
        replace=implementation == "reference",
    )
    check_device(first, targets=targets, mask=mask)
    with torch.no_grad():
        features = [rows.detach() for rows in features]
        if implementation == "triton":
            cosine = metric == "cosine"
            MOVE(prototypes, list(counts), features, targets, mask, momentum, cosine, ignore_index)
            return
        for index, rows in enumerate(features):
            labels = targets
            if mask is not None:
                labels = targets.masked_fill(~mask[:, index], ignore_index)
            moved, total = update_prototypes(
                prototypes[index],
                counts[index],
                rows,
                labels,
                momentum=momentum,
                metric=metric,
                ignore_index=ignore_index,
                impl="reference",
            )
            prototypes[index].copy_(moved)
            counts[index].copy_(total)


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
    with full_precision(features):
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
        for start, stop in spans(num_classes, rows_per_chunk(rows.shape[0], rows.dtype, 2)):
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
        check_whole(value, name)
        check_shape(value, prototypes.shape[:1], name, "[K]")

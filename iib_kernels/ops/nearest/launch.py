"""Launches of the nearest prototype: block sizes, and whether lengths are taken before.

Up to `distance.launch.LARGE` multiplications of a modality, one launch forward. More, in half
precision or TF32: the prototypes' lengths come first, with copies in half of those that are not, so
that nothing but products stands in the search. Backward is one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels._runtime import accumulator, compute_dtype, on_device
from iib_kernels._tuning import Launch, power_of_two
from iib_kernels.ops.arguments import matrix
from iib_kernels.ops.distance.launch import (
    HALF,
    by_library,
    forward_blocks,
    is_large,
    is_narrow,
    measure,
    place_of_copy,
    product,
)

COMPONENTS = 4096  # rows of up to this many components stay in registers
STREAMED = 1024  # components at a time of wider ones


def widths(values: Sequence[Tensor]) -> tuple[int, ...]:
    """D_m of every modality."""
    return tuple(rows.shape[1] for rows in values)


class _Ready(NamedTuple):
    """What the search is given."""

    features: Sequence[Tensor]
    prototypes: Sequence[Tensor]
    squares: tuple[Tensor, ...] | None = None  # of prototypes; None: the search takes them itself
    units: tuple[bool, ...] = ()  # which prototypes are copies at unit length


def _prepare(features, prototypes, cosine, dtype) -> _Ready:
    """Lengths, and copies in the features' types with aligned rows; where products are many."""
    (batch, _), classes = features[0].shape, prototypes[0].shape[0]
    large = is_large(batch, classes, max(widths(features)))
    if not large or dtype == torch.float64 or all(by_library(rows) for rows in features):
        return _Ready(features, prototypes, None, (False,) * len(features))
    count, given = len(features), [*features, *prototypes]
    kinds = [rows.dtype for rows in features] * 2
    copies = [place_of_copy(values, kind) for values, kind in zip(given, kinds)]
    squares = [None] * count + [table.new_empty(classes, dtype=dtype) for table in prototypes]
    units = [False] * count + [
        cosine and table.dtype != rows.dtype for table, rows in zip(prototypes, features)
    ]
    wanted = [i for i in range(2 * count) if squares[i] is not None or copies[i] is not None]
    measure(*([values[i] for i in wanted] for values in (given, squares, copies, units)), dtype)
    chosen = [values if copy is None else copy for values, copy in zip(given, copies)]
    return _Ready(chosen[:count], chosen[count:], tuple(squares[count:]), tuple(units[count:]))


def forward(features, prototypes, cosine, seen, distance, index) -> None:
    """Fill distances and indices [B, M]."""
    from iib_kernels.ops.nearest.kernels import nearest_forward

    (batch, count), classes = distance.shape, prototypes[0].shape[0]
    dtype, width = compute_dtype(*features), max(widths(features))
    half = all(rows.dtype in HALF for rows in features)
    # Tiles of the widest type among the modalities fit all of them
    kind = torch.float64 if dtype == torch.float64 else features[0].dtype if half else torch.float32
    with on_device(features[0]):
        ready = _prepare(features, prototypes, cosine, dtype)
        narrow = any(map(is_narrow, (*ready.features, *ready.prototypes)))
        config = forward_blocks(batch, classes, width, kind, ready.squares is not None, narrow)
        # The minimum takes the registers of a third stage, addresses of many modalities more
        if config.num_warps == 8:
            config = config._replace(num_stages=2)
        if count > 3 and classes > 128:
            smaller = "BLOCK_K" if ready.squares is None else "BLOCK_D"
            config.blocks[smaller] = max(16, config.blocks[smaller] // 2)
        nearest_forward[(-(-batch // config.blocks["BLOCK_B"]), count)](
            tuple(matrix(rows) for rows in ready.features),
            tuple(matrix(table) for table in ready.prototypes),
            tuple(known.contiguous() for known in seen) or None,
            ready.squares,
            distance,
            index,
            batch,
            M=count,
            WIDTHS=widths(ready.features),
            CLASSES=classes,
            COSINE=cosine,
            UNITS=ready.units,
            **product(dtype),
            **config.options(),
        )


def backward(features, prototypes, cosine, index, grad, gradients) -> None:
    """Fill the gradients of the features."""
    from iib_kernels.ops.nearest.kernels import Backward, nearest_backward
    from iib_kernels.ops.nearest.streamed import nearest_backward_streamed
    from iib_kernels.ops.tiles import Matrix

    (batch, count), dtype = index.shape, compute_dtype(*features)
    sizes, streamed = widths(features), max(widths(features)) > COMPONENTS
    components = power_of_two(STREAMED if streamed else max(sizes))
    rows = max(1, 2048 // components)
    shared = {"COSINE": cosine, "ACC": accumulator(dtype)}
    arguments = (
        Backward(
            tuple(matrix(values) for values in features),
            tuple(matrix(table) for table in prototypes),
            index,
            Matrix(grad, *grad.stride()),
            tuple(gradients),
        ),
        batch,
    )
    grid = -(-batch // rows), count
    with on_device(features[0]):
        if streamed:
            blocks = Launch({"BLOCK_B": rows, "BLOCK_D": components}).options()
            nearest_backward_streamed[grid](*arguments, WIDTHS=sizes, **shared, **blocks)
        else:
            each = tuple((width, power_of_two(width)) for width in sizes)
            blocks = Launch({"BLOCK_B": rows}).options()
            nearest_backward[grid](*arguments, SIZES=each, **shared, **blocks)

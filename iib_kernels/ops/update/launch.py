"""Launches of the prototypes' update: block sizes, strides, and which kernel.

Block sizes follow from the classes, modalities and widths; from the batch only how many targets are
looked at at once, one of four variants. So an odd last batch compiles at most once again, and adds
a class's rows in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from iib_kernels import _runtime
from iib_kernels._runtime import accumulator, compute_dtype, on_device, scalar
from iib_kernels._tuning import Launch, power_of_two
from iib_kernels.ops.arguments import contiguous, matrix

COMPONENTS = 4096  # rows of up to this many components stay in registers
STREAMED = 1024  # components at a time of wider ones
PROGRAMS = 1024  # at most so many: with more classes, each takes several
WARPS = 8  # of a program: 4,096 targets and a tile of rows leave registers for two programs
SEARCH = (256, 1024, 4096)  # targets held in registers
FEW = 64  # up to this many classes there are few programs, and each gets more threads


def _few(classes: int) -> bool:
    return classes <= FEW


def search(batch: int, classes: int, modalities: int) -> dict:
    """Constants of the search for the rows of each class."""
    # Beyond the largest size targets are loaded anew for each class, and small blocks do
    block = next((size for size in SEARCH if batch <= size), SEARCH[1])
    group = power_of_two(-(-classes * modalities // PROGRAMS))
    return {"M": modalities, "GROUP": group, "BLOCK": block, "ONE_BLOCK": batch <= block}


def sizes(widths: Sequence[int], classes: int, dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """D, BLOCK_R and BLOCK_D of each modality: a tile of rows fits the registers."""
    streamed = max(widths) > COMPONENTS
    tile = (8192 if _few(classes) else 4096) // (2 if dtype == torch.float64 else 1)
    found = []
    for width in widths:
        components = power_of_two(min(width, STREAMED) if streamed else width)
        found.append((width, max(1, min(64, tile // components)), components))
    return tuple(found)


def _options() -> dict:
    """Warps, and on NVIDIA registers, of which two programs a multiprocessor leave 128 a thread."""
    options = Launch({}, WARPS, 1).options()
    return options if _runtime.hip() else {**options, "maxnreg": 128}


class _Plan:
    """What the launches of one call have in common."""

    def __init__(self, features, targets, mask, ignore_index, classes, dtype) -> None:
        from iib_kernels.ops.update.kernels import Rows, Search

        batch, count = features[0].shape[0], len(features)
        widths = [values.shape[1] for values in features]
        self.streamed = max(widths) > COMPONENTS
        how = search(batch, classes, count)
        place = lambda kind: torch.empty(count, batch, dtype=kind, device=targets.device)
        self.inverses = lambda: place(dtype)
        self.grid = (-(-classes // how["GROUP"]), count)
        self.features = tuple(matrix(values) for values in features)
        mask = contiguous(mask)
        self.rows = Rows(targets.contiguous(), mask, place(torch.int32), ignore_index)
        self.shape = batch, classes
        self.constants = {
            "HOW": Search(**how),
            "SIZES": sizes(widths, classes, dtype),
            "ACC": accumulator(dtype),
            **_options(),
        }


def move(prototypes, counts, features, targets, mask, momentum, cosine, ignore_index) -> None:
    """Move M tables [K, D_m] and counts [K] in place, in one launch."""
    batch, classes = features[0].shape[0], prototypes[0].shape[0]
    if not batch * classes:
        return
    from iib_kernels.ops.update.kernels import Counts, move_prototypes
    from iib_kernels.ops.update.streamed import move_prototypes_streamed

    dtype = compute_dtype(*features, *prototypes)
    with on_device(features[0]):
        plan = _Plan(features, targets, mask, ignore_index, classes, dtype)
        tables = tuple(matrix(table) for table in prototypes)
        numbers = tuple(Counts(value, value.stride(0)) for value in counts)
        first = plan.features, tables, numbers, plan.rows
        last = scalar(momentum, dtype, features[0].device), *plan.shape
        constants = {"NUMBER_POINTER": dtype == torch.float64, **plan.constants}
        if plan.streamed:
            inverses = plan.inverses() if cosine else None
            move_prototypes_streamed[plan.grid](*first, inverses, *last, **constants)
        else:
            move_prototypes[plan.grid](*first, *last, COSINE=cosine, **constants)


def sum_classes(features, targets, cosine, ignore_index, sums, totals) -> None:
    """Fill sums [K, D] and totals [K]."""
    batch, classes = features.shape[0], sums.shape[0]
    if not batch:
        sums.zero_()
        totals.zero_()
        return
    from iib_kernels.ops.update.kernels import class_sums
    from iib_kernels.ops.update.streamed import class_sums_streamed

    with on_device(features):
        plan = _Plan([features], targets, None, ignore_index, classes, sums.dtype)
        rest = sums, totals, *plan.shape
        if plan.streamed:
            inverses = plan.inverses() if cosine else None
            class_sums_streamed[plan.grid](
                plan.features, plan.rows, inverses, *rest, **plan.constants
            )
        else:
            class_sums[plan.grid](plan.features, plan.rows, *rest, COSINE=cosine, **plan.constants)

"""What the fusion's launches are given, as their kernels take it (loading.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels._runtime import accumulator, interpreting, scalar
from iib_kernels.ops.arguments import constant, contiguous


class Parameters(NamedTuple):
    """What weights are made of, in the order of the operators' schemas."""

    temperature: Tensor | None  # [M] or []
    uncertainty_weight: Tensor | None  # [M] or []
    scale: Tensor | None  # []
    # What stands for each of the three where it is None. Without a third, the scale is the number
    # of modalities that are there
    numbers: Sequence[float]
    mask: Tensor | None  # [B, M]


class Gating(NamedTuple):
    """The same with what is added to the uncertainties."""

    parameters: Parameters
    log_prior: Tensor | None = None  # [M]
    gate_logits: Tensor | None = None  # [B, M]


class Labels(NamedTuple):
    """What cross-entropies are taken of."""

    targets: Tensor  # [B]
    ignore_index: int
    class_weight: Tensor | None = None  # [K]
    smoothing: float = 0.0


def _strides(matrix: Tensor) -> tuple:
    """Strides of a matrix: constants where its rows are contiguous and a few rows' length apart.

    Others may go by the batch, and a constant would compile the kernel for each.
    """
    rows, columns = matrix.shape
    step, along = matrix.stride()
    if rows == 1:
        step = columns
    if (along == 1 or columns == 1) and step % columns == 0 and 0 < step <= 16 * columns:
        return constant(step), constant(1)
    return step, along


def rows_argument(matrices: Sequence[Tensor]):
    """Rows (loading.py) of one matrix a modality."""
    from iib_kernels.ops.fusion.loading import Rows

    steps, along = zip(*map(_strides, matrices))
    return Rows(tuple(matrices), steps, along)


def _parameter(value: Tensor | None, number: float, dtype: torch.dtype, device: torch.device):
    """Parameter (loading.py) from a tensor [M] or [], or a number."""
    from iib_kernels.ops.fusion.loading import Parameter

    if value is None and number != 1:
        number = scalar(number, dtype, device)
        if not isinstance(number, Tensor):
            return Parameter(None, constant(0), number)
        value = number
    if value is None:
        return Parameter(None, constant(0), constant(1.0))
    value = value.contiguous()
    return Parameter(value, constant(min(value.dim(), 1)), constant(1.0))


def gate_argument(gating: Gating, dtype: torch.dtype, device: torch.device):
    """Gate (loading.py)."""
    from iib_kernels.ops.fusion.loading import Gate

    parameters = gating.parameters
    small = (gating.log_prior, gating.gate_logits, parameters.mask)
    numbers = [
        _parameter(value, number, dtype, device)
        for value, number in zip(parameters[:3], (*parameters.numbers, 1.0))
    ]
    if len(parameters.numbers) == 2:
        # Not None: Triton 3.6 cannot tell that from a named tuple with None in it
        numbers[2] = numbers[2]._replace(ptr=None, number=None)
    return Gate(*map(contiguous, small), *numbers)


def targets_argument(labels: Labels, dtype: torch.dtype, device: torch.device):
    """Targets (loading.py)."""
    from iib_kernels.ops.fusion.loading import Parameter, Targets

    smoothing = Parameter(None, constant(0), None)
    if labels.smoothing:
        smoothing = _parameter(None, float(labels.smoothing), dtype, device)
    indices, weight = contiguous(labels.targets), contiguous(labels.class_weight)
    return Targets(indices, labels.ignore_index, weight, smoothing)


def upstream_argument(fused: Tensor | None, *small: Tensor | None):
    """Upstream (loading.py)."""
    from iib_kernels.ops.fusion.loading import Upstream

    return Upstream(None if fused is None else rows_argument([fused]), *map(contiguous, small))


@functools.cache
def plan_argument(
    classes: int,
    modalities: int,
    dtype: torch.dtype,
    joint: bool,
    rows: int,
    columns: int,
    width: int = 1,
    components: int = 1,
):
    """Plan (loading.py), in the order of its fields; ``dtype`` is what things are computed in."""
    from iib_kernels.ops.fusion.loading import Plan

    fields = classes, modalities, accumulator(dtype), joint, rows, columns, width, components
    # The compiler passes on what is a constexpr, and the interpreter counts with what is none
    return Plan(*(fields if interpreting() else map(constant, fields)))


def statistics_argument(kept: Tensor) -> Tensor | None:
    """The statistics as an argument: rows in registers have none."""
    return kept if kept.shape[1] else None

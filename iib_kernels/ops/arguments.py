"""Arguments as the launches of several operations give them to their kernels."""

from __future__ import annotations

import functools

from torch import Tensor


def contiguous(value: Tensor | None) -> Tensor | None:
    """A small tensor, whose strides are then no arguments; None stays None."""
    return None if value is None else value.contiguous()


@functools.lru_cache(256, typed=True)
def constant(value: float):
    """The number as a constant of the kernel: it belongs to the model, not to the batch."""
    from triton.language import constexpr

    return constexpr(value)


def matrix(values: Tensor):
    """A matrix as the kernels take it.

    Row-major strides are constants, from which the compiler sees how wide its loads may be: they
    are the model's. Others may change with the batch.
    """
    from iib_kernels.ops.tiles import Matrix

    row, column = values.stride()
    if column == 1 or values.shape[1] == 1:
        return Matrix(values, constant(row), constant(1))
    return Matrix(values, row, column)

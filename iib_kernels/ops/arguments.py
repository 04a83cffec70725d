"""Arguments as the launches of several operations give them to their kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
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


_tickets: dict[torch.device, Tensor] = {}


def tickets(device: torch.device) -> Tensor:
    """A counter at 0 for the programs of one launch, which leave it at 0.

    The default stream of a GPU keeps one: no CUDA graph captures that stream, and its launches
    follow one another. Elsewhere each launch has its own. A graph's memory is 0 only after the
    graph has been replayed, and an interpreted launch may be interrupted.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device).cuda_stream != 0:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if device not in _tickets:
        _tickets[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[device]


def reduction_argument(reduction: str, programs: int, means: Sequence[Tensor], divisors: Tensor):
    """Reduction (means.py) for "mean" or "sum", for a launch of so many programs."""
    from iib_kernels.ops.means import Reduction

    columns = sum(values.numel() for values in means) + len(divisors)
    sums = divisors.new_empty(programs, columns)
    mean = constant(reduction == "mean")
    return Reduction(sums, tickets(divisors.device), tuple(means), divisors, mean)

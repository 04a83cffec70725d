"""What one modality holds of a batch: a tensor, or several by field name.

A tokenizer's output is the usual case of several: ``input_ids`` and ``attention_mask``, [B, T]
each. An encoder gets a tensor as its argument, and fields by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

Values = Tensor | dict[str, Tensor]


def each(function: Callable[[Tensor], Tensor], values: Values) -> Values:
    """``function`` of the tensor, or of every field.

    >>> each(torch.neg, {"a": torch.ones(1)})
    {'a': tensor([-1.])}
    """
    if isinstance(values, dict):
        return {field: function(part) for field, part in values.items()}
    return function(values)


def parts_of(*values: Values) -> Iterator[tuple[Tensor, ...]]:
    """The tensors themselves, or field by field, of several values of the same form.

    >>> [len(pair) for pair in parts_of({"a": torch.ones(1)}, {"a": torch.zeros(1)})]
    [2]
    """
    first = values[0]
    if isinstance(first, dict):
        for field in first:
            yield tuple(cast(dict, value)[field] for value in values)
    else:
        yield values  # type: ignore[misc]


def count(values: Values) -> int:
    """B, how many samples there are."""
    return len(next(iter(values.values())) if isinstance(values, dict) else values)


def is_numeric(values: Values) -> TypeGuard[Tensor]:
    """Whether these are numbers to compute with, not ids or fields."""
    return isinstance(values, Tensor) and values.is_floating_point()


def shapes_of(values: Values) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """The shape of one sample, by field where there are several."""
    if isinstance(values, dict):
        return {field: tuple(part.shape[1:]) for field, part in values.items()}
    return tuple(values.shape[1:])


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """An array as a tensor that an encoder can take: float32, int64, uint8 or bool.

    A missing row may hold what float32 has no number for.

    >>> as_tensor(np.array([[1, 2]], dtype=np.int16)).dtype
    torch.int64
    """
    if isinstance(array, Tensor):
        array = array.detach()
        if array.dtype in (torch.bool, torch.uint8):
            return array
        return array.float() if array.is_floating_point() else array.long()
    kinds: dict[str, Any] = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
    wanted = np.uint8 if array.dtype == np.uint8 else kinds[array.dtype.kind]
    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.ascontiguousarray(array, dtype=wanted)
    if converted is array or not converted.flags.writeable or converted.base is not None:
        converted = converted.copy()  # nobody else's memory
    return torch.from_numpy(converted)

"""Splits that stay where they are: read, checked and standardised a batch at a time.

For data that memory cannot hold: arrays on the disk (a folder of ``.npy`` files), or any
``torch.utils.data.Dataset``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iibalance.data.arrays import Field, take
from iibalance.data.dataset import Batch, Split, as_rows
from iibalance.data.standardize import Standardizer
from iibalance.data.values import Values, as_tensor
from iibalance.errors import InputError

# What is held at once where a whole split would be: this many samples, and no more bytes than that.
CHUNK, CHUNK_BYTES = 1024, 256 << 20


def chunk_size(shapes: Mapping[str, Any]) -> int:
    """How many samples of these ``shapes`` (modality -> shape, or shapes by field) a chunk has.

    >>> chunk_size({"audio": (40,)}), chunk_size({"video": (32, 3, 224, 224)})
    (1024, 13)
    """
    sizes = [
        4 * math.prod(shape)
        for its in shapes.values()
        for shape in (its.values() if isinstance(its, Mapping) else [its])
    ]
    return max(2, min(CHUNK, CHUNK_BYTES // max(1, sum(sizes))))


#: Reads raw inputs of given rows of a source and of given modalities: modality -> [B, ...].
Read = Callable[[Sequence[int], Sequence[str]], dict[str, Values]]


class ArrayReader:
    """Rows of arrays that may be mapped from files (modality -> array [N, ...] or fields)."""

    def __init__(self, inputs: Mapping[str, Field]):
        self.inputs = dict(inputs)

    def __call__(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Values]:
        at = np.asarray(rows, dtype=np.int64)
        return {name: self._tensors(take(self.inputs[name], at)) for name in names}

    def _tensors(self, part: Field) -> Values:
        if isinstance(part, dict):
            return {field: as_tensor(array) for field, array in part.items()}
        return as_tensor(part)

    def __getstate__(self) -> dict:
        """For a loader's workers: of a mapped file its name and place, not what it holds."""
        return {"inputs": {name: _told(values, _Mapped.of) for name, values in self.inputs.items()}}

    def __setstate__(self, state: dict) -> None:
        self.inputs = {name: _told(values, _open) for name, values in state["inputs"].items()}


class _Mapped(NamedTuple):
    """Where a mapped array lies."""

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    order: str

    @classmethod
    def of(cls, array: Any) -> Any:
        """``array`` itself, where it is not the whole of what numpy mapped."""
        if not isinstance(array, np.memmap) or not isinstance(array.base, mmap):
            return array
        order = "C" if array.flags.c_contiguous else "F"
        return cls(str(array.filename), array.offset, array.dtype, array.shape, order)


def _open(place: Any) -> Any:
    if not isinstance(place, _Mapped):
        return place
    path, offset, dtype, shape, order = place
    return np.memmap(path, dtype, "r", offset, shape, order)  # type: ignore[call-overload]


def _told(values: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(values, dict):
        return {field: function(array) for field, array in values.items()}
    return function(values)


class LazySplit(Split):
    """N samples of one split, of which only targets, mask and groups are in memory.

    Args:
        read: gives the raw inputs of rows of the source.
        rows: [N] the rows of the source that this split has.
        targets, mask, groups: as in :class:`~iibalance.data.dataset.Split`.
        standardizer: applied to every batch.
        names: the modalities, where they are fewer than the standardizer's.
    """

    def __init__(
        self,
        read: Read,
        rows: Tensor,
        targets: Tensor,
        mask: Tensor,
        groups: Tensor | None,
        standardizer: Standardizer,
        names: Sequence[str] | None = None,
    ):
        self.read, self.rows, self.standardizer = read, rows, standardizer
        self.targets, self.mask, self.groups = targets, mask, groups
        self.names = tuple(standardizer.shapes if names is None else names)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.names

    @property
    def scale(self) -> dict[str, Tensor]:  # type: ignore[override]
        return self.standardizer.scale(self.names)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        at = torch.as_tensor(indices, dtype=torch.long)
        raw, mask = self.read(self.rows[at].tolist(), self.names), self.mask[at]
        inputs = self.standardizer.transform(raw, mask, self.names)
        bad = self.standardizer.first_bad(inputs)
        if bad is not None:
            name, row = bad
            raise InputError(
                f"data: {name} of row {int(self.rows[at[row]])} is too large to standardise in "
                "float32, or no number; rescale this feature"
            )
        return Batch(inputs, self.targets[at], mask, at)

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> LazySplit:
        at = as_rows(indices)
        return LazySplit(
            self.read,
            self.rows[at],
            self.targets[at],
            self.mask[at],
            None if self.groups is None else self.groups[at],
            self.standardizer,
            self.names,
        )

    def only(self, name: str) -> LazySplit:
        part = self.subset(self.mask[:, self.names.index(name)])
        part.names, part.mask = (name,), torch.ones(len(part), 1, dtype=torch.bool)
        return part

    def batch(self) -> Batch:
        return self.__getitems__(range(len(self)))

    def batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self.__getitems__(range(start, min(start + size, len(self))))

    def chunks(self) -> Iterator[Batch]:
        shapes = {name: self.standardizer.shapes[name] for name in self.names}
        yield from self.batches(chunk_size(shapes))

    def head(self, name: str, count: int = 2) -> Values:
        rows = self._first(name, count)
        raw, present = self.read(self.rows[rows].tolist(), [name]), self.mask[rows]
        column = present[:, [self.names.index(name)]]
        return self.standardizer.transform(raw, column, [name])[name]

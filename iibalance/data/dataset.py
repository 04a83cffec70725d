"""What every source of data gives: batches, and a data set of three splits.

Modalities keep one order everywhere: the keys of ``inputs`` and the columns of ``mask`` are the
modalities in that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iibalance.data.standardize import Standardizer
from iibalance.data.values import Values, each


class Batch(NamedTuple):
    """B samples of every modality.

    ``inputs[m]`` is [B, ...] float32, standardised, zero where missing; for token ids and raw
    inputs it is what the modality's encoder takes. ``targets`` is [B] int64; ``mask`` [B, M] bool,
    True where the modality is present, columns in the order of ``inputs``.
    """

    inputs: dict[str, Values]
    targets: Tensor
    mask: Tensor
    #: [B] row numbers in the split, where the batch was taken from one. It hides `tuple.index`.
    index: Tensor | None = None  # type: ignore[assignment]


@dataclass(eq=False)
class Split(torch.utils.data.Dataset):
    """The N samples of one split, in memory.

    It has the fields of :class:`Batch`, ``groups`` [N] int64 or None, and ``scale``, which noise is
    measured by.

    ``__getitems__`` serves a whole batch with one gather per modality: give a ``DataLoader``
    ``collate_fn=identity``.

    >>> inputs = {"a": torch.arange(6.0).view(3, 2)}
    >>> split = Split(inputs, torch.tensor([0, 1, 0]), torch.ones(3, 1, dtype=torch.bool))
    >>> loader = torch.utils.data.DataLoader(split, batch_size=2, collate_fn=identity)
    >>> [batch.targets.tolist() for batch in loader]
    [[0, 1], [0]]
    """

    inputs: dict[str, Values]
    targets: Tensor
    mask: Tensor
    groups: Tensor | None = None
    #: Modality -> what one standard deviation is, of those that are not standardised.
    scale: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities, in order."""
        return tuple(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        """One sample without the batch dimension, for ``default_collate`` to make a batch of."""
        batch = self.__getitems__([index])
        inputs = {name: each(lambda part: part[0], values) for name, values in batch.inputs.items()}
        return Batch(inputs, batch.targets[0], batch.mask[0], torch.tensor(index))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at ``indices`` [B] as one :class:`Batch` (a copy)."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Batch(
            {name: each(lambda part: part[rows], values) for name, values in self.inputs.items()},
            self.targets[rows],
            self.mask[rows],
            rows,
        )

    def subset(self, indices: Sequence[int] | Tensor | np.ndarray) -> Split:
        """A new split of the samples at ``indices``, integers or a bool [N], in that order.

        Everything is copied.
        """
        rows = as_rows(indices)
        inputs, targets, mask, _ = self.__getitems__(rows)
        groups = None if self.groups is None else self.groups[rows]
        return Split(inputs, targets, mask, groups, self.scale)

    def only(self, name: str) -> Split:
        """The samples that have modality ``name``, with that modality alone."""
        rows = self.mask[:, self.modalities.index(name)].nonzero().squeeze(1)
        return Split(
            {name: each(lambda part: part[rows], self.inputs[name])},
            self.targets[rows],
            torch.ones(len(rows), 1, dtype=torch.bool),
            None if self.groups is None else self.groups[rows],
            self.scale,
        )

    def batch(self) -> Batch:
        """Everything as one :class:`Batch` (views, no copy)."""
        return Batch(dict(self.inputs), self.targets, self.mask)

    def batches(self, size: int) -> Iterator[Batch]:
        """The samples in order, ``size`` at a time (views, no copy)."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            inputs = {
                name: each(lambda part: part[rows], values) for name, values in self.inputs.items()
            }
            yield Batch(inputs, self.targets[rows], self.mask[rows])

    def chunks(self) -> Iterator[Batch]:
        """The samples in order, as many at a time as memory is meant to hold: here all of them."""
        yield self.batch()

    def head(self, name: str, count: int = 2) -> Values:
        """The first ``count`` samples that have a modality: what an encoder is tried on.

        Where there are fewer, the first samples, whatever they hold.
        """
        return self.__getitems__(self._first(name, count)).inputs[name]

    def _first(self, name: str, count: int) -> Tensor:
        there = self.mask[:, self.modalities.index(name)].nonzero().squeeze(1)[:count]
        return there if len(there) == count else torch.arange(min(count, len(self)))


def as_rows(indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
    """Row numbers int64, of integers or of a bool [N]."""
    rows = torch.as_tensor(indices)
    return rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows.long()


def identity(batch: Any) -> Any:
    """The ``collate_fn`` for a :class:`Split`, whose ``__getitems__`` gives a batch already.

    A function and no lambda, because a loader's workers must be able to pickle it.
    """
    return batch


@dataclass(eq=False)
class MultimodalData:
    """A data set ready to train on, and what an encoder must know of each modality.

    ``shapes[m]`` is the shape of one sample as the source gave it, ``layouts[m]`` how to read it.
    The splits are standardised by ``standardizer``, which was fitted on ``train`` unless the data
    were loaded for a model that has its own.
    """

    name: str
    modalities: tuple[str, ...]
    num_classes: int
    class_names: list[str]
    train: Split
    validation: Split
    test: Split
    standardizer: Standardizer
    shapes: dict[str, Any]
    layouts: dict[str, str]

"""How X was given to ``IIBalanceClassifier.fit``, and every later X read in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy.sparse import issparse

from iibalance.data.samples import Samples, as_array
from iibalance.errors import InputError

ALONE = "x"  # the one modality of a table whose columns are not shared out
KINDS = {"": "a dict of arrays by modality", "frame": "a DataFrame", "array": "an array"}


class Form:
    """The modalities in order, and the columns of those that came in tables.

    Args:
        table: "frame" or "array" where X was one table for all modalities, else "".
        modalities: their names.
        columns: modality -> its columns, by name or position, where it came in a table.
    """

    def __init__(self, table: str, modalities: tuple[str, ...], columns: Mapping[str, list]):
        self.table, self.modalities, self.columns = table, tuple(modalities), dict(columns)

    @classmethod
    def of(cls, X: Any, columns: Mapping[str, Any] | None, mask: Any) -> tuple[Form, Samples]:
        """The form of an X to fit, and its samples. ``columns``: those of a table by modality."""
        check_kind(X)
        table = table_kind(X)
        if not table:
            samples = masked(X, mask) if isinstance(X, Samples) else _samples(X, mask=mask)
            return cls("", samples.modalities, samples.columns or {}), samples
        if columns is None:
            columns = {ALONE: list(X.columns) if table == "frame" else slice(None)}
        samples = _samples(X, columns=columns, mask=mask)
        return cls(table, samples.modalities, samples.columns or {}), samples

    def read(self, X: Any, mask: Any = None) -> Samples:
        """The samples of a later X. Its modalities come in the order of fit, as do the mask's.

        None in a dict stands for a modality that no sample has; it is left out.

        Raises InputError where X is of another form.
        """
        check_kind(X)
        table = table_kind(X)
        if table and self.table and self.modalities == (ALONE,):  # all columns, in order
            return _samples(as_array(X), columns={ALONE: slice(None)}, mask=mask)
        if table != self.table:
            raise InputError(
                f"X: was {KINDS[self.table]} in fit and is {KINDS[table]} now; give it as in fit"
            )
        if table:
            return _samples(X, columns=self.columns, mask=mask)
        if isinstance(X, Samples):
            self._check_names(X.inputs)
            return masked(X.select(self.modalities).in_order(self.columns), mask)
        self._check_names(X)
        there = [name for name in self.modalities if X[name] is not None]
        if not there:
            raise InputError(f"X: none of {', '.join(self.modalities)} is there")
        if mask is not None:
            mask = as_array(mask)
            if mask.ndim != 2 or mask.shape[1] != len(self.modalities):
                raise InputError(
                    f"mask: has shape {mask.shape}, expected a row a sample and a column each for "
                    f"{', '.join(self.modalities)}"
                )
            mask = mask[:, [self.modalities.index(name) for name in there]]
        return _samples({name: self._ordered(name, X[name]) for name in there}, mask=mask)

    def _check_names(self, given: Mapping[str, Any]) -> None:
        for name in (*given, *self.modalities):
            if name not in self.modalities or name not in given:
                state = "is not there" if name not in given else "was not trained on"
                raise InputError(
                    f"X: {name} {state}: the classifier knows {', '.join(self.modalities)}, "
                    f"X has {', '.join(map(str, given))}; give a dict with None for a modality "
                    "that no sample has"
                )

    def _ordered(self, name: str, values: Any) -> Any:
        """A DataFrame's columns in the order of fit."""
        wanted = self.columns.get(name)
        if wanted is None or not hasattr(values, "columns"):
            return values
        there = [str(column) for column in values.columns]
        for column in wanted:
            if str(column) not in there:
                raise InputError(f"X: {name}: there is no column {column!r}, which fit had")
        return values.iloc[:, [there.index(str(column)) for column in wanted]]


def check_kind(X: Any) -> None:
    """InputError for what cannot be samples."""
    if isinstance(X, torch.utils.data.Dataset):
        raise InputError("X: is a torch Dataset; iibalance.train(config, data=...) trains on one")
    if issparse(X):
        raise InputError("X: is sparse, which is not supported; give X.toarray()")
    if X is None:
        raise InputError("X: is None; give a dict of arrays by modality, or a DataFrame")


def masked(samples: Samples, mask: Any) -> Samples:
    """The same samples, present only where ``mask`` [N, M] says so too."""
    return samples if mask is None else samples.with_mask(mask)


def table_kind(X: Any) -> str:
    """What X is where it is one table for all modalities, "frame" or "array"; "" else."""
    if isinstance(X, (Samples, Mapping)):
        return ""
    return "frame" if hasattr(X, "columns") else "array"


def _samples(X: Any, **options: Any) -> Samples:
    return Samples(X, key="X: {}".format, **options)

"""Samples of several modalities as they come: checked arrays, before any split.

Every source gives :class:`Samples`, and Python code makes them from its own arrays. Nothing here
imports torch, so that bad input is refused at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from iibalance.data.arrays import (
    Field,
    all_nan,
    as_array,
    first_bad,
    is_absent,
    length,
    stack_samples,
    take,
    words_of,
)
from iibalance.data.labels import check_labels, group_codes
from iibalance.data.table import find_columns, pick_columns
from iibalance.errors import InputError, check_names

_SPLITS = {"train": 0, "validation": 1, "val": 1, "valid": 1, "dev": 1, "test": 2}
_SPLITS |= {"0": 0, "1": 1, "2": 2}


class Samples:
    """N samples of M modalities, with whatever is known of them.

    It can be sliced as an array can, so scikit-learn's ``cross_val_score`` and
    ``train_test_split`` take it, and it is what ``iibalance.train(config, data=...)`` takes.

    Args:
        inputs: modality name -> its values. These may be an array or tensor [N, ...] of real
            numbers; a list of N arrays of one shape, None where a sample lacks the modality; a
            DataFrame of numbers; or a dict of fields, such as ``{"input_ids": [N, T],
            "attention_mask": [N, T]}``, which an encoder of your own is given by name. With
            ``columns``, one DataFrame or one array [N, D] for all modalities.
        targets: [N] classes: integers, strings, booleans or whole floats.
        columns: modality name -> names (or positions) of its columns in ``inputs``; a name may be a
            pattern such as ``"audio_*"``.
        mask: [N, M] bool, True = present, columns in the order of ``inputs``. Rows of a missing
            modality may hold anything. A row of NaN alone is missing without being told.
        groups: [N] of anything: the speaker, subject or video of each sample (kept as numbers).
        split: [N] of 0 (train), 1 (validation), 2 (test), or these words.
        ids: [N] names of the samples; the row numbers by default.
        classes: [K] class names, where ``targets`` are their positions 0..K-1.

    Raises InputError naming the argument, the row and what to do.

    >>> audio, video = np.random.randn(4, 40, 26), [np.zeros((8, 8)), None, None, np.ones((8, 8))]
    >>> samples = Samples({"audio": audio, "video": video}, ["yes", "no", "no", "yes"])
    >>> samples.shape, samples.mask[:, 1].tolist(), samples[1:].targets.tolist()
    ((4, 2), [True, False, False, True], ['no', 'no', 'yes'])
    """

    inputs: dict[str, Field]
    mask: np.ndarray
    targets: np.ndarray | None
    groups: np.ndarray | None
    split: np.ndarray | None
    ids: list[str] | None
    classes: list[str] | None
    #: Modality -> names (or positions) of its columns, where it came from a table; None where none.
    columns: dict[str, list[Any]] | None

    def __init__(
        self,
        inputs: Mapping[str, Any] | Any,
        targets: Any = None,
        *,
        columns: Mapping[str, Any] | None = None,
        mask: Any = None,
        groups: Any = None,
        split: Any = None,
        ids: Any = None,
        classes: Sequence[str] | None = None,
        origin: str = "",
        key: Callable[[str], str] = "inputs: {}".format,
        target: str = "targets",
        some: bool = True,
    ):
        # `origin`, `key` and `target` are how messages call where this comes from, one modality of
        # it, and the labels. Without `some`, rows of no modality at all are taken too.
        self.origin, self.key, self.target = origin, key, target
        if columns is not None:
            columns = find_columns(inputs, columns)
            inputs = pick_columns(inputs, columns)
        if not isinstance(inputs, Mapping):
            raise self.error(
                f"inputs: is a {type(inputs).__name__}; give a dict of arrays by modality, "
                "or columns= to say which columns belong to which modality"
            )
        names = check_names(inputs)
        if columns is None:
            frames = {name: inputs[name] for name in names if hasattr(inputs[name], "columns")}
            columns = {name: list(frame.columns) for name, frame in frames.items()}
        self.columns = {name: list(which) for name, which in columns.items()} or None
        self.inputs, found = {}, []
        for name in names:
            self.inputs[name], present = self._values(name, inputs[name])
            found.append(present)
        self._check_lengths()
        count = len(found[0])
        self.mask = self._mask(mask, np.stack(found, 1))
        for column, name in enumerate(names):
            self._check_finite(name, self.mask[:, column])
        if some:
            self._check_rows()
        self.targets = None if targets is None else check_labels(targets, count, self.error, target)
        self.classes = None if classes is None else self._classes(classes)
        self.groups = None if groups is None else group_codes(groups, count, self.error)
        self.split = self._split(split)
        named = self._column("ids", ids)
        self.ids = None if named is None else words_of(named)

    def error(self, text: str) -> InputError:
        """An InputError that says where these samples come from."""
        return InputError(f"{self.origin}: {text}" if self.origin else text)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities, in order."""
        return tuple(self.inputs)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M): scikit-learn asks for it."""
        return self.mask.shape[0], self.mask.shape[1]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Any) -> Samples:
        """The samples at ``rows``: a slice, integers [n] or bool [N]. Slices are not copied."""
        if isinstance(rows, tuple):  # scikit-learn's samples[rows, ...]
            rows = rows[0]
        if not isinstance(rows, slice):
            rows = np.atleast_1d(as_array(rows, "rows"))
            rows = rows if rows.size else rows.astype(np.int64)
            if rows.dtype.kind not in "biu" or rows.ndim != 1:
                raise IndexError("samples: rows are a slice, integers or a bool a sample")
        part = object.__new__(Samples)
        part.__dict__.update(self.__dict__)
        for name in ("mask", "targets", "groups", "split"):  # first, so that numpy checks the rows
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[rows])
        part.inputs = {name: take(values, rows) for name, values in self.inputs.items()}
        if self.ids is not None:
            part.ids = [self.ids[row] for row in np.arange(len(self))[rows]]
        return part

    def with_mask(self, mask: Any) -> Samples:
        """The same samples, present only where ``mask`` [N, M] bool says so too."""
        part = self[:]
        part.mask = part._mask(mask, self.mask)
        part._check_rows()
        return part

    def select(self, names: Sequence[str]) -> Samples:
        """The same samples with the modalities ``names`` alone, in that order."""
        there = self.modalities
        for name in names:
            if name not in there:
                raise InputError(
                    f"data.modalities: there is no {name!r}; there are {', '.join(there)}"
                )
        part = self[:]
        part.inputs = {name: self.inputs[name] for name in names}
        part.mask = self.mask[:, [there.index(name) for name in names]]
        if self.columns is not None:
            kept = {name: self.columns[name] for name in names if name in self.columns}
            part.columns = kept or None
        part._check_rows()
        return part

    def in_order(self, columns: Mapping[str, Sequence[Any]]) -> Samples:
        """The same samples with the columns of tables in the order of ``columns``, by their names.

        Columns that are not named there are left out. A modality that came from no table stays as
        it is: nothing is known of its features.

        Raises InputError for a column that is not there.

        >>> import pandas as pd
        >>> samples = Samples({"audio": pd.DataFrame({"low": [1.0, 2.0], "high": [3.0, 4.0]})})
        >>> samples.in_order({"audio": ["high", "low"]}).inputs["audio"].tolist()
        [[3.0, 1.0], [4.0, 2.0]]
        """
        part = self[:]
        for name, wanted in columns.items():
            there = [str(column) for column in (self.columns or {}).get(name, ())]
            wanted = [str(column) for column in wanted]
            if not there or there == wanted:
                continue
            for column in wanted:
                if column not in there:
                    raise self.error(
                        f"columns: {name}: there is no column {column!r}, which the model was "
                        "trained on; name the columns as in training"
                    )
            at = [there.index(column) for column in wanted]
            values = self.inputs[name]
            assert isinstance(values, np.ndarray) and self.columns is not None
            part.inputs = {**part.inputs, name: values[:, at]}
            part.columns = {**(part.columns or {}), name: [self.columns[name][i] for i in at]}
        return part

    def digest(self) -> str:
        """The sha256 of everything that training depends on."""
        digest = hashlib.sha256(repr(self.classes).encode())
        columns = {"mask": self.mask, "targets": self.targets, "groups": self.groups}
        for name, values in {**self.inputs, **columns, "split": self.split}.items():
            fields = values if isinstance(values, dict) else {"": values}
            for field, array in fields.items():
                if array is not None:
                    digest.update(repr((name, field, array.shape, array.dtype.str)).encode())
                    for start in range(0, len(array), 1024):  # a mapped file need not fit memory
                        digest.update(np.ascontiguousarray(array[start : start + 1024]).tobytes())
        return digest.hexdigest()

    # What comes in, made arrays.

    def _values(self, name: str, values: Any) -> tuple[Field, np.ndarray]:
        """The values of a modality, and which rows [N] of them are there."""
        key = self.key(name)
        if isinstance(values, Mapping):
            return self._fields(key, values)
        if values is None:
            raise self.error(
                f"{key}: is None; leave a modality out that no sample has, "
                "or give None for single samples"
            )
        listed = isinstance(values, (list, tuple))
        objects = str(getattr(values, "dtype", "")) == "object" and len(values.shape) == 1
        if objects or (
            listed and any(is_absent(value) or isinstance(value, Mapping) for value in values)
        ):
            array, present = stack_samples(list(values), key)
            self._check_array(key, array, least=2)
            return array, present
        array = as_array(values, key)
        self._check_array(key, array, least=2)
        return array, ~all_nan(array)

    def _fields(self, key: str, values: Mapping[str, Any]) -> tuple[Field, np.ndarray]:
        if not values:
            raise self.error(f"{key}: holds no field; give at least one array")
        fields = {}
        for field, array in values.items():
            called = f"{key}.{field}"
            if array is None or (isinstance(array, (list, tuple)) and any(map(is_absent, array))):
                raise self.error(
                    f"{called}: holds None; give a row of zeros, and say in mask which samples "
                    "lack this modality"
                )
            fields[str(field)] = as_array(array, called)
            self._check_array(called, fields[str(field)], least=1)
        lengths = {len(array) for array in fields.values()}
        if len(lengths) > 1:
            sizes = ", ".join(f"{field}: {len(array)}" for field, array in fields.items())
            raise self.error(f"{key}: fields differ in length ({sizes})")
        return fields, np.ones(lengths.pop(), dtype=bool)

    def _check_array(self, key: str, array: np.ndarray, least: int) -> None:
        if array.dtype.kind not in "biuf":
            raise self.error(
                f"{key}: dtype {array.dtype} is not a real number; give integers or floats"
                + (", such as values.astype(float)" if array.dtype == object else "")
            )
        if array.ndim < least:
            raise self.error(
                f"{key}: has shape {array.shape}; "
                "give [N, ...], one row a sample (a single feature is [N, 1])"
            )
        if array.size == 0:
            raise self.error(
                f"{key}: is empty (shape {array.shape}); "
                "give at least one sample of at least one feature"
            )

    def _check_lengths(self) -> None:
        lengths = {name: length(values) for name, values in self.inputs.items()}
        first, count = next(iter(lengths.items()))
        for name, size in lengths.items():
            if size != count:
                raise self.error(
                    f"{self.key(name)}: has {size} rows, but {self.key(first)} has {count}; "
                    "give one row a sample"
                )

    def _check_rows(self) -> None:
        empty = np.flatnonzero(~self.mask.any(1))
        if len(empty):
            raise self.error(
                f"row {empty[0]} has none of {', '.join(self.modalities)}; "
                "remove the sample or choose other modalities"
            )

    def _check_finite(self, name: str, present: np.ndarray) -> None:
        values = self.inputs[name]
        fields = values if isinstance(values, dict) else {"": values}
        for field, array in fields.items():
            row, value = first_bad(array, present)
            if row is None:
                continue
            key = f"{self.key(name)}.{field}" if field else self.key(name)
            marked = f"mask_{name}" if self.key("") == "x_" else "mask"
            remedy = f"; clean it, or mark the row missing in {marked}"
            if self.origin and marked == "mask":
                remedy = "; clean it"  # a table has no mask
            if array.dtype.kind == "f" and not field:
                remedy += " (a row of NaN alone is missing)"
            if np.isfinite(value):
                kind = "float32" if array.dtype.kind == "f" else "int64"
                remedy = f", too large for {kind}; rescale it"
            raise self.error(f"{key}: row {row} holds {value}{remedy}")

    def _mask(self, mask: Any, found: np.ndarray) -> np.ndarray:
        """``mask`` and what the values themselves tell."""
        if mask is None:
            return found
        mask = as_array(mask, "mask")
        if mask.shape != found.shape:
            raise self.error(
                f"mask: has shape {mask.shape}, expected {found.shape}: "
                f"a column each for {', '.join(self.inputs)}"
            )
        remedy = "give bool values, True where a modality is present (such as mask > 0.5)"
        if mask.dtype.kind not in "biuf":
            raise self.error(f"mask: dtype {mask.dtype}; {remedy}")
        wrong = ~np.isin(mask, (0, 1))
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            raise self.error(
                f"mask: row {row} holds {mask[row, column]} for {list(self.inputs)[column]}; "
                f"{remedy}"
            )
        return mask.astype(bool) & found

    def _classes(self, classes: Any) -> list[str]:
        names = words_of(as_array(classes, "classes")) if np.ndim(classes) == 1 else []
        if len(names) < 2:
            raise self.error(f"classes: {classes!r} are no names; give a list of at least two")
        if len(set(names)) < len(names):
            doubled = next(name for name in names if names.count(name) > 1)
            raise self.error(f"classes: {doubled!r} is there twice; give each class its own name")
        return names

    def _column(self, name: str, values: Any) -> np.ndarray | None:
        if values is None:
            return None
        column = as_array(values, name)
        if column.shape != (len(self),):
            raise self.error(
                f"{name}: has shape {column.shape}; give one value a sample, shape ({len(self)},)"
            )
        return column

    def _split(self, values: Any) -> np.ndarray | None:
        column = self._column("split", values)
        if column is None:
            return None
        if column.dtype.kind in "OUTS":
            codes = np.array([_SPLITS.get(word.lower(), -1) for word in words_of(column)])
        elif column.dtype.kind in "iu":
            codes = column.astype(np.int64)
        else:  # floats, of which NaN is the first thing to tell
            gaps = np.isnan(column) if column.dtype.kind == "f" else np.zeros(len(column), bool)
            codes = np.where(gaps.any() & ~gaps, 0, -1)
        bad = np.flatnonzero(~np.isin(codes, (0, 1, 2)))
        if len(bad):
            raise self.error(
                f"split: row {bad[0]} holds {column[bad[0]]}; "
                "give integers 0 (train), 1 (validation), 2 (test), or these words"
            )
        return codes

"""What a user has (arrays, tensors, lists, tables) as numpy arrays, and rows of them.

Nothing here imports torch or pandas; their objects are known by what they can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iibalance.errors import InputError

#: What one modality holds: an array [N, ...], or several by field name (a tokenizer's output).
Field = np.ndarray | dict[str, np.ndarray]


def as_array(values: Any, called: str = "inputs") -> np.ndarray:
    """An array of numpy, torch, pandas or plain Python, as numpy, without a copy where it can be.

    A list that mixes words with anything else becomes an array of objects, so that no number is
    taken for a word. Raises InputError, which calls the values ``called``, for what is ragged or
    sparse.

    >>> as_array([[1.0, 2.0]]).shape
    (1, 2)
    """
    if hasattr(values, "detach"):
        return _of_tensor(values, called)
    if hasattr(values, "toarray"):
        raise InputError(f"{called}: is sparse; give a dense array, such as its .toarray()")
    if hasattr(values, "columns") and hasattr(values, "to_numpy"):
        return frame_numbers(values, called)
    if hasattr(values, "to_numpy"):
        return _of_series(values)
    if isinstance(values, np.ma.MaskedArray) and values.mask.any():
        return np.ma.filled(values.astype(np.float64), np.nan)
    if isinstance(values, (list, tuple)):
        return _of_list(values, called)
    return values if isinstance(values, np.memmap) else np.asarray(values)


def _of_tensor(values: Any, called: str) -> np.ndarray:
    if str(values.layout) != "torch.strided":
        raise InputError(f"{called}: is sparse; give a dense tensor, such as its .to_dense()")
    if values.is_floating_point() and values.dtype.itemsize < 4:  # numpy has no bfloat16
        values = values if str(values.dtype) == "torch.float16" else values.float()
    return values.numpy(force=True)


def _of_series(values: Any) -> np.ndarray:
    array = values.to_numpy()
    if array.dtype == object and getattr(values.dtype, "kind", "O") in "biuf":  # pandas' own NA
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    return array


def _of_list(values: Sequence[Any], called: str) -> np.ndarray:
    if any(hasattr(value, "detach") for value in values):
        values = [as_array(value, called) for value in values]
    words = sum(isinstance(value, (str, bytes)) for value in values)
    try:
        if 0 < words < len(values):
            return np.array(values, dtype=object)
        return np.asarray(values)
    except ValueError:
        raise InputError(
            f"{called}: its {len(values)} entries differ in shape; "
            "bring them to one, by cutting or padding"
        ) from None


def frame_numbers(frame: Any, called: str) -> np.ndarray:
    """The columns of a pandas DataFrame as one array [N, D] of numbers; NA becomes NaN.

    Raises InputError, which calls the frame ``called``, for a column that holds no numbers.
    """
    for column in frame.columns:
        values = frame[column]
        if hasattr(values, "columns"):
            raise InputError(f"{called}: column {column!r} is there twice; rename one of them")
        if getattr(values.dtype, "kind", "O") not in "biuf":
            shown = f" (row 0 holds {values.iloc[0]!r})" if len(values) else ""
            raise InputError(
                f"{called}: column {column!r} holds no numbers{shown}; make them numbers first, "
                "such as with pandas.to_numeric, or pandas.get_dummies of categories"
            )
    array = frame.to_numpy()
    if array.dtype == object:  # pandas' own types, which know NA, or bool beside floats
        kinds = {frame[column].dtype.kind for column in frame.columns}
        whole = "f" not in kinds and not frame.isna().to_numpy().any()
        wanted = np.float64 if not whole else np.bool_ if kinds == {"b"} else np.int64
        array = frame.to_numpy(dtype=wanted, **({} if whole else {"na_value": np.nan}))
    return array


def is_absent(value: Any) -> bool:
    """Whether one value stands for nothing: None, NaN, or pandas' NA and NaT.

    >>> [is_absent(value) for value in (None, float("nan"), 0, "", np.ones(2))]
    [True, True, False, False, False]
    """
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and bool(value != value)


def stack_samples(values: Sequence[Any], called: str) -> tuple[np.ndarray, np.ndarray]:
    """A list of N samples as an array [N, ...], and which of them [N] are there.

    A sample that is missing is None (or NaN, as pandas has it), and a row of 0.
    """
    there = np.array([not is_absent(value) for value in values])
    if not there.any():
        raise InputError(f"{called}: every sample is None; leave this modality out")
    if any(isinstance(value, Mapping) for value in values):
        raise InputError(
            f"{called}: its samples are dicts; give a dict of arrays [N, ...], one a field, and "
            "mask for the samples that have none"
        )
    found = [as_array(value, called) for value, known in zip(values, there) if known]
    shapes = list(dict.fromkeys(array.shape for array in found))
    if len(shapes) > 1:
        raise InputError(
            f"{called}: samples have the shapes {shapes[0]} and {shapes[1]}; "
            "bring them to one, by cutting or padding"
        )
    stacked = np.stack(found)
    array = np.zeros((len(there), *shapes[0]), dtype=stacked.dtype)
    array[there] = stacked
    return array, there


def take(values: Field, rows: Any) -> Field:
    """The rows of a modality's values, field by field."""
    if isinstance(values, dict):
        return {field: array[rows] for field, array in values.items()}
    return values[rows]


def length(values: Field) -> int:
    """N of a modality's values."""
    return len(next(iter(values.values())) if isinstance(values, dict) else values)


def shape_of(values: Field) -> Any:
    """The shape of one sample, by field where there are several."""
    if isinstance(values, dict):
        return {field: tuple(array.shape[1:]) for field, array in values.items()}
    return tuple(values.shape[1:])


def all_nan(array: np.ndarray) -> np.ndarray:
    """[N] bool: the rows of ``array`` [N, ...] that hold NaN alone."""
    if array.dtype.kind != "f":
        return np.zeros(len(array), dtype=bool)
    first: Any = (slice(None), *[0] * (array.ndim - 1))
    found = np.isnan(array[first])  # mostly that settles it
    for row in np.flatnonzero(found):
        found[row] = np.isnan(array[row]).all()
    return np.asarray(found)


def first_bad(array: np.ndarray, present: np.ndarray) -> tuple[int | None, Any]:
    """The first row of ``array`` [N, ...] that is ``present`` [N] and cannot be used, and why.

    That is a float that is none of float32's, or an integer that is none of int64's.
    """
    kind = array.dtype.kind
    if kind != "f" and array.dtype != np.uint64:
        return None, None
    limit = np.finfo(np.float32).max if kind == "f" else np.iinfo(np.int64).max
    for start in range(0, len(array), 1024):  # in blocks: no second copy of a large array
        block = slice(start, start + 1024)
        wrong = ~(np.abs(array[block]) <= limit)  # so that NaN is wrong too
        bad = wrong.reshape(len(wrong), -1).any(1) & present[block]
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            return start + at, array[start + at][wrong[at]][0]
    return None, None


def words_of(column: np.ndarray) -> list[str]:
    """[N] of anything as strings; bytes are taken for UTF-8.

    >>> words_of(np.array([b"a", b"b"])), words_of(np.array([1, 2]))
    (['a', 'b'], ['1', '2'])
    """
    return [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for value in column.tolist()
    ]

"""Columns of a table that belong to a modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from iibalance.data.arrays import as_array, frame_numbers
from iibalance.errors import InputError

Columns = Mapping[str, Any]


def pick_columns(table: Any, columns: Columns) -> dict[str, np.ndarray]:
    """Modality name -> its columns of ``table``, float or integer [N, D].

    Arguments as for :func:`find_columns`. Raises InputError also for a column that holds no
    numbers.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"a1": [1.0, 2.0], "a2": [3.0, 4.0], "v": [5.0, 6.0]})
    >>> pick_columns(frame, {"audio": "a*", "video": ["v"]})["audio"].tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    found = find_columns(table, columns)
    if hasattr(table, "columns"):
        return {
            name: frame_numbers(table[chosen], f"columns: {name}") for name, chosen in found.items()
        }
    array = as_array(table)
    return {name: array[:, positions] for name, positions in found.items()}


def find_columns(
    table: Any, columns: Columns, apart: Mapping[str, str] | None = None
) -> dict[str, list[Any]]:
    """Modality name -> its columns of ``table``, one by one: names, or positions in an array.

    Args:
        table: a pandas DataFrame, or an array [N, D] whose columns go by position.
        columns: modality name -> one name or several; a name may be a pattern such as
            ``"audio_*"``, and for an array a position or a slice.
        apart: names of columns that are no features, and what they are; no pattern matches them.

    Raises InputError for a column that is not there, is one of ``apart`` or belongs to two
    modalities.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"a1": [1.0, 2.0], "a2": [3.0, 4.0], "age": [5, 6]})
    >>> find_columns(frame, {"audio": "a*"}, {"age": "the labels"})
    {'audio': ['a1', 'a2']}
    """
    if not isinstance(columns, Mapping) or not columns:
        raise InputError(
            f"columns: {columns!r} does not name columns by modality; "
            'give a dict such as {"audio": ["a1", "a2"], "video": "v_*"}'
        )
    if hasattr(table, "columns"):
        return _of_frame(table, columns, apart or {})
    array = as_array(table)
    if array.ndim != 2:
        raise InputError(
            f"columns: a table has rows and columns, this {type(table).__name__} has shape "
            f"{array.shape}; give a DataFrame or an array [N, D]"
        )
    owner: dict[Any, str] = {}
    found = {}
    for name, which in columns.items():
        found[name] = _positions(name, which, array.shape[1]).tolist()
        _share_out(owner, name, found[name])
    return found


def _of_frame(frame: Any, columns: Columns, apart: Mapping[str, str]) -> dict[str, list[Any]]:
    there = list(frame.columns)
    owner: dict[Any, str] = {}
    found = {}
    for name, which in columns.items():
        chosen: list[Any] = []
        if isinstance(which, slice) or not hasattr(which, "__len__"):
            which = [which]
        for wanted in [which] if isinstance(which, str) else list(which):
            # The name itself goes first, whatever it would mean as a pattern.
            matching = [wanted] if wanted in there else []
            if matching and wanted in apart:
                raise InputError(
                    f"columns: {name}: {wanted!r} holds {apart[wanted]}, which is no feature; "
                    "take it out of the columns"
                )
            if not matching and isinstance(wanted, str):
                matching = [
                    column
                    for column in there
                    if fnmatchcase(str(column), wanted) and column not in apart
                ]
            if not matching:
                shown = ", ".join(map(str, there[:12])) + (", ..." if len(there) > 12 else "")
                raise InputError(
                    f"columns: {name}: there is no column {wanted!r}; there are {shown}"
                )
            chosen += [column for column in matching if column not in chosen]
        if not chosen:
            raise InputError(f"columns: {name} has no column; leave this modality out")
        _share_out(owner, name, chosen)
        found[name] = chosen
    return found


def _share_out(owner: dict[Any, str], name: str, columns: Sequence[Any]) -> None:
    """Note whose ``columns`` are; InputError where one belongs to another modality."""
    for column in columns:
        if owner.setdefault(column, name) != name:
            raise InputError(
                f"columns: {column!r} belongs to {owner[column]} and to {name}; "
                "give it to one of them"
            )


def _positions(name: str, which: Any, count: int) -> np.ndarray:
    """[D] int64: the positions, from 0, of the columns ``which`` among ``count``."""
    try:
        if which is None or which is ...:
            raise TypeError
        positions: np.ndarray = np.atleast_1d(
            np.arange(count)[which if np.size(which) else slice(0)]
        )
    except (IndexError, TypeError, ValueError):
        positions = np.zeros((0, 0))
    if positions.ndim != 1:
        raise InputError(
            f"columns: {name}: {which!r} are no positions among {count} columns; "
            "give integers below that, or a slice"
        )
    if not positions.size:
        raise InputError(f"columns: {name} has no column; leave this modality out")
    return positions

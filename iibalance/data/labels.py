"""Labels as people have them (words, numbers from 1) and as training needs them (0..K-1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from iibalance.data.arrays import as_array, is_absent, words_of
from iibalance.errors import InputError


def check_labels(
    values: Any, count: int | None, error: Callable[[str], InputError], name: str = "y"
) -> np.ndarray:
    """[N] labels: int64, bool or str. InputError (made by ``error``) for what is no class.

    Whole floats are taken for integers. Messages call the labels ``name``.

    >>> check_labels([1.0, 3.0, 1.0], 3, InputError).tolist()
    [1, 3, 1]
    """
    try:
        labels = as_array(values, name)
    except InputError as found:
        raise error(str(found)) from None
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise error(
            f"{name}: has shape {labels.shape}; several targets a sample (multi-label, one-hot) "
            "are not supported: give one class a sample, such as y.argmax(1) of a one-hot array"
        )
    if labels.ndim != 1 or (count is not None and len(labels) != count):
        wanted = f", shape ({count},)" if count is not None else ""
        raise error(f"{name}: has shape {labels.shape}; give one class a sample{wanted}")
    if not len(labels):
        raise error(f"{name}: is empty; give at least two samples")
    if labels.dtype.kind in "OfT":
        for row, value in enumerate(labels):
            if is_absent(value) or (labels.dtype.kind == "f" and np.isinf(value)):
                raise error(
                    f"{name}: row {row} holds {value}; give every sample a class, or leave it out"
                )
    if labels.dtype.kind in "OTS":
        labels = _words(labels, error, name)
    if labels.dtype.kind == "f":
        broken = np.flatnonzero(labels != np.round(labels))
        if len(broken):
            raise error(
                f"{name}: row {broken[0]} holds {labels[broken[0]]}, no class: regression is not "
                "supported, nor are continuous targets; give classes, such as "
                "numpy.digitize(y, edges)"
            )
    if labels.dtype.kind in "uf":
        row = int(np.abs(labels).argmax())
        if float(abs(labels[row])) >= 2**63:
            raise error(f"{name}: row {row} holds {labels[row]}, too large for a class number")
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "biU":
        raise error(
            f"{name}: row 0 holds {labels[0]!r} ({labels.dtype}), no class; "
            "give integers or strings"
        )
    return labels.astype(np.int64) if labels.dtype.kind == "i" else labels


def group_codes(values: Any, count: int, error: Callable[[str], InputError]) -> np.ndarray:
    """[N] int64: the groups as numbers, from whatever names them.

    >>> group_codes(["b", "a", "b"], 3, InputError).tolist()
    [1, 0, 1]
    """
    column = as_array(values, "groups")
    if column.shape != (count,):
        raise error(f"groups: has shape {column.shape}; give one value a sample, shape ({count},)")
    if column.dtype.kind in "OTf":
        for row, value in enumerate(column):
            if is_absent(value):
                raise error(f"groups: row {row} holds {value}; give every sample a group")
    if column.dtype.kind in "OT":  # of several types, which have no order
        column = np.array(words_of(column))
    return np.unique(column, return_inverse=True)[1].astype(np.int64)


def _words(labels: np.ndarray, error: Callable[[str], InputError], name: str) -> np.ndarray:
    """Objects or bytes [N] as an array of what they are, if it is one kind of thing."""
    found = [
        value.decode(errors="replace") if isinstance(value, bytes) else value
        for value in labels.tolist()
    ]
    kinds = {"str" if isinstance(value, str) else type(value).__name__ for value in found}
    if "str" in kinds and len(kinds) > 1:
        raise error(f"{name}: mixes {' and '.join(sorted(kinds))}; give labels of one kind")
    return np.array(found)


def encode_labels(
    labels: np.ndarray,
    classes: Sequence[str] | None,
    error: Callable[[str], InputError],
    name: str = "y",
) -> tuple[np.ndarray, list[str]]:
    """Labels [N] as positions int64 [N] in the K class names, and these names.

    Without ``classes`` they are the distinct labels in order. With them, integer labels are
    positions 0..K-1, whatever the names look like, and all others are names.

    Raises InputError for a position or a name that is none of the classes.

    >>> encode_labels(np.array([3, 1, 3]), None, InputError)
    (array([1, 0, 1]), ['1', '3'])
    >>> encode_labels(np.array([1, 0]), ["10", "0"], InputError)
    (array([1, 0]), ['10', '0'])
    >>> encode_labels(np.array(["0", "10"]), ["10", "0"], InputError)
    (array([1, 0]), ['10', '0'])
    """
    if classes is None:
        distinct, targets = np.unique(labels, return_inverse=True)
        if len(distinct) < 2:
            raise error(
                f"{name}: holds only class {distinct[0]}; give samples of at least two classes"
            )
        return targets.astype(np.int64), [str(label) for label in distinct.tolist()]
    if labels.dtype.kind in "iu":
        return _checked_positions(labels, len(classes), error, name), list(classes)
    return _positions_of(_as_words(labels), classes, error, name), list(classes)


def encode_as_trained(
    labels: np.ndarray,
    trained: Sequence[str],
    error: Callable[[str], InputError],
    name: str = "y",
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Labels [N] of new samples as positions int64 [N] in the classes of a trained model.

    Labels are names. Integers are names too where the model knows a class named by an integer;
    where all its classes are words, integers are positions in these.

    Args:
        trained: [K] class names of the model.
        classes: class names that came with the labels: integers are positions in these then.

    Raises InputError for a label that is none of the model's classes.

    >>> encode_as_trained(np.array([5, 0]), ["0", "2", "5"], InputError)
    array([2, 0])
    >>> encode_as_trained(np.array([1, 0]), ["no", "yes"], InputError)
    array([1, 0])
    >>> encode_as_trained(np.array([1, 0]), ["no", "yes"], InputError, classes=["yes", "no"])
    array([0, 1])
    """
    if classes is not None:
        positions, names = encode_labels(labels, classes, error, name)
        return _positions_of([names[at] for at in positions.tolist()], trained, error, name)
    if labels.dtype.kind in "iu" and not any(map(_is_integer, trained)):
        return _checked_positions(labels, len(trained), error, name)
    return _positions_of(_as_words(labels), trained, error, name)


def _is_integer(word: str) -> bool:
    """Whether a class name is what ``str`` makes of an integer."""
    return word.removeprefix("-").isdecimal()


def _as_words(labels: np.ndarray) -> list[str]:
    return [str(label) for label in labels.tolist()]


def _checked_positions(
    labels: np.ndarray, count: int, error: Callable[[str], InputError], name: str
) -> np.ndarray:
    """Integer labels, every one a position among ``count`` classes."""
    bad = np.flatnonzero((labels < 0) | (labels >= count))
    if len(bad):
        raise error(
            f"{name}: row {bad[0]} holds {labels[bad[0]]}, outside 0..{count - 1}: "
            f"classes has {count} names"
        )
    return labels.astype(np.int64)


def _positions_of(
    words: Sequence[str],
    classes: Sequence[str],
    error: Callable[[str], InputError],
    name: str,
) -> np.ndarray:
    """[N] int64: where each of the ``words`` stands among the ``classes``."""
    position = {label: index for index, label in enumerate(classes)}
    for row, word in enumerate(words):
        if word not in position:
            known = ", ".join(list(classes)[:8]) + (", ..." if len(classes) > 8 else "")
            raise error(f"{name}: row {row} holds {word!r}, which is none of the classes ({known})")
    return np.array([position[word] for word in words], dtype=np.int64)

"""A user's own data in one ``.npz`` file, and the errors that tell what is wrong with it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from iibalance.config import DataConfig
from iibalance.data.assemble import RawData
from iibalance.errors import InputError

_UNREADABLE = (  # what numpy and zipfile raise on cut and garbled files
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def read_npz(config: DataConfig) -> RawData:
    """The arrays that ``config`` asks for, checked. Never unpickles. InputError names file, key, row and value, and says what to do.

    Keys: ``x_<modality>`` [N, ...] real numbers; ``y`` [N] integers 0..K-1; optional ``mask_<modality>`` [N] bool (False = missing: the
    row may hold anything), ``config.split`` [N] of 0, 1, 2, ``config.groups`` [N] of anything, ``classes`` [K] names.
    """
    if not config.path:
        raise InputError(
            "data.path: no file is given; data.name npz needs one, such as data.path clips.npz"
        )
    file = _File(config.path)
    names = _choose(file, config.modality_list())
    targets = _targets(file)
    class_names = _class_names(file, targets)
    arrays = {name: _features(file, name, len(targets), "y") for name in names}
    mask = np.stack([_mask(file, name, len(targets)) for name in names], 1)
    for column, name in enumerate(names):
        _check_finite(file, name, arrays[name], mask[:, column])
    _check_some_modality(file, mask, names)
    return RawData(
        origin=str(file.path),
        arrays=arrays,
        targets=targets,
        mask=mask,
        groups=_groups(file, config.groups, len(targets)),
        split=_split(file, config.split, len(targets)),
        class_names=class_names,
    )


def read_inputs(
    path: str | Path, modalities: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], Tensor, Tensor | None, list[str]]:
    """Samples to predict: raw float32 inputs[m] [N, ...] (0 where missing), mask [N, M] bool, targets [N] int64 or None, N ids.

    ``y`` is optional, and so is each ``x_<modality>``: one that the file lacks is missing in every row. ``shapes[m]`` is the shape of
    one training sample. ids are the file's ``ids`` or the row numbers. Standardise with :meth:`Standardizer.transform`.
    The same errors as :func:`read_npz`; also where shapes differ from training, or a row has no modality.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/new.npz", x_audio=np.zeros((2, 5)))
    ...     inputs, mask, targets, ids = read_inputs(f"{folder}/new.npz", ["audio", "text"], {"audio": (5,), "text": (3,)})
    >>> inputs["text"].shape, mask.tolist(), targets, ids
    (torch.Size([2, 3]), [[True, False], [True, False]], None, ['0', '1'])
    """
    file = _File(path)
    there = [name for name in modalities if f"x_{name}" in file]
    if not there:
        raise InputError(
            f"{file.path}: none of {', '.join(f'x_{name}' for name in modalities)} is there; it holds {file.listing()}"
        )
    count = len(_features(file, there[0], None, ""))
    inputs, columns = {}, []
    for name in modalities:
        expected = tuple(shapes[name])
        if name not in there:
            inputs[name] = torch.zeros(count, *expected)
            columns.append(np.zeros(count, dtype=bool))
            continue
        array = _features(file, name, count, f"x_{there[0]}")
        if array.shape[1:] != expected:
            raise InputError(
                f"{file.path}: x_{name}: samples have shape {array.shape[1:]}, but the model was trained on {expected}; "
                "prepare them as for training"
            )
        present = _mask(file, name, count)
        _check_finite(file, name, array, present)
        with np.errstate(over="ignore", invalid="ignore"):  # missing rows may hold anything
            inputs[name] = torch.from_numpy(array.astype(np.float32))
        inputs[name][torch.from_numpy(~present)] = 0.0
        columns.append(present)
    mask = np.stack(columns, 1)
    _check_some_modality(file, mask, list(modalities))
    targets = torch.from_numpy(_targets(file, count)) if "y" in file else None
    ids = [str(value) for value in (_column(file, "ids", count) if "ids" in file else range(count))]
    return inputs, torch.from_numpy(mask), targets, ids


class _File:
    """An open npz whose every failure is an InputError."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file; check data.path")
        if not self.path.is_file():
            raise InputError(f"{self.path}: is a folder; give the .npz file itself")
        try:
            self.archive = np.load(self.path, allow_pickle=False)
        except PermissionError:
            raise InputError(f"{self.path}: may not be read; change its permissions") from None
        except _UNREADABLE:
            raise InputError(
                f"{self.path}: is not a readable npz file (another format, or cut short); write it with numpy.savez"
            ) from None
        if not isinstance(self.archive, np.lib.npyio.NpzFile):
            raise InputError(
                f"{self.path}: holds one array, not an npz; write named arrays with numpy.savez(path, x_audio=..., y=...)"
            )

    def __contains__(self, key: str) -> bool:
        return key in self.archive.files

    def listing(self) -> str:
        return ", ".join(self.archive.files) or "nothing"

    def read(self, key: str) -> np.ndarray:
        try:
            array = self.archive[key]
        except _UNREADABLE as error:
            if isinstance(error, ValueError) and "allow_pickle" in str(error):
                raise InputError(
                    f"{self.path}: {key}: holds pickled Python objects, which are never loaded; "
                    "save a plain array of numbers (or strings)"
                ) from None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{self.path}: {key}: cannot be read ({reason}); the file is damaged or cut short: write it again"
            ) from None
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"{self.path}: {key}: is not an array; write the file with numpy.savez"
            )
        return array

    def modalities(self) -> list[str]:
        return [key[2:] for key in self.archive.files if key.startswith("x_") and len(key) > 2]


def _choose(file: _File, asked: Sequence[str] | None) -> tuple[str, ...]:
    there = file.modalities()
    if not there:
        raise InputError(
            f"{file.path}: no modality: array names must begin with x_, such as x_audio; it holds {file.listing()}"
        )
    for name in asked or ():
        if name not in there:
            raise InputError(
                f"{file.path}: data.modalities: no x_{name}; there are {', '.join(there)}"
            )
    for name in asked or there:
        if "." in name or hasattr(nn.ModuleDict, name):  # it will name a submodule
            raise InputError(
                f"{file.path}: x_{name}: {name!r} cannot name a part of a PyTorch module; rename the array"
            )
    return tuple(asked or there)


def _features(file: _File, name: str, count: int | None, of: str) -> np.ndarray:
    key = f"x_{name}"
    array = file.read(key)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{file.path}: {key}: dtype {array.dtype} is not a real number; save integers or floats"
        )
    if array.ndim < 2:
        raise InputError(
            f"{file.path}: {key}: has shape {array.shape}; give [N, ...], one row a sample (a single feature is [N, 1])"
        )
    if count is not None and len(array) != count:
        raise InputError(
            f"{file.path}: {key}: has {len(array)} rows, but {of} has {count}; give one row a sample"
        )
    if array.size == 0:
        raise InputError(
            f"{file.path}: {key}: is empty (shape {array.shape}); give at least one sample of at least one feature"
        )
    return array


def _check_finite(file: _File, name: str, array: np.ndarray, present: np.ndarray) -> None:
    if array.dtype.kind != "f":
        return
    flat = array.reshape(len(array), -1)
    limit = np.finfo(np.float32).max
    bad = np.zeros(len(flat), dtype=bool)
    for start in range(
        0, len(flat), 1024
    ):  # in blocks: no second copy of a large array. NaN compares False
        bad[start : start + 1024] = ~(np.abs(flat[start : start + 1024]) <= limit).all(1)
    bad &= present
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = flat[row][~(np.abs(flat[row]) <= limit)][0]
        remedy = (
            ", too large for float32; rescale it"
            if np.isfinite(value)
            else f"; clean it, or mark the row missing in mask_{name}"
        )
        raise InputError(f"{file.path}: x_{name}: row {row} holds {value}{remedy}")


def _mask(file: _File, name: str, count: int) -> np.ndarray:
    key = f"mask_{name}"
    if key not in file:
        return np.ones(count, dtype=bool)
    column = _column(file, key, count)
    bad = (
        np.flatnonzero((column != 0) & (column != 1))
        if column.dtype.kind in "biu"
        else np.arange(1)
    )
    if len(bad):
        raise InputError(
            f"{file.path}: {key}: row {bad[0]} holds {column[bad[0]]!r}; give a bool array, True where {name} is present"
        )
    return column.astype(bool)


def _check_some_modality(file: _File, mask: np.ndarray, names: Sequence[str]) -> None:
    empty = np.flatnonzero(~mask.any(1))
    if len(empty):
        raise InputError(
            f"{file.path}: row {empty[0]} has none of {', '.join(names)}; remove the sample or choose other modalities"
        )


def _column(file: _File, key: str, count: int | None) -> np.ndarray:
    column = file.read(key)
    if column.ndim != 1 or (count is not None and len(column) != count):
        wanted = f", shape ({count},)" if count else ""
        raise InputError(
            f"{file.path}: {key}: has shape {column.shape}; give one value a sample{wanted}"
        )
    return column


def _targets(file: _File, count: int | None = None) -> np.ndarray:
    if "y" not in file:
        raise InputError(
            f"{file.path}: no y; add the class of each sample as y, integers from 0; it holds {file.listing()}"
        )
    column = _column(file, "y", count)
    if not len(column):
        raise InputError(f"{file.path}: y: is empty; give at least two samples")
    if column.dtype.kind not in "biu":
        raise InputError(
            f"{file.path}: y: dtype {column.dtype} is not an integer type; save class numbers from 0 (y.astype('int64'))"
        )
    bad = np.flatnonzero((column < 0) | (column > np.iinfo(np.int32).max))
    if len(bad):
        raise InputError(
            f"{file.path}: y: row {bad[0]} holds {column[bad[0]]}; labels are 0, 1, 2, ... (remove samples without a label)"
        )
    return column.astype(np.int64)


def _class_names(file: _File, targets: np.ndarray) -> list[str]:
    labels = np.unique(targets)
    if len(labels) < 2:
        raise InputError(
            f"{file.path}: y: holds only class {labels[0]}; give samples of at least two classes"
        )
    if "classes" in file:
        names = [str(name) for name in _column(file, "classes", None)]
        row = int(np.argmax(targets))
        if targets[row] >= len(names):
            raise InputError(
                f"{file.path}: y: row {row} holds {targets[row]}, outside 0..{len(names) - 1}: classes has {len(names)} names"
            )
        return names
    gaps = np.flatnonzero(labels != np.arange(len(labels)))
    if len(gaps):
        raise InputError(
            f"{file.path}: y: no sample has class {gaps[0]}, but one has {labels[-1]}; number the classes without gaps, "
            "such as numpy.unique(y, return_inverse=True)[1]"
        )
    return [str(label) for label in labels]


def _groups(file: _File, key: str | None, count: int) -> np.ndarray | None:
    if not key:
        return None
    if key not in file:
        raise InputError(
            f"{file.path}: data.groups: no column {key!r}; the file holds {file.listing()}"
        )
    return np.unique(_column(file, key, count), return_inverse=True)[1].astype(np.int64)


def _split(file: _File, key: str, count: int) -> np.ndarray | None:
    if key not in file:
        if key == "split":
            return None
        raise InputError(
            f"{file.path}: data.split: no column {key!r}; the file holds {file.listing()}"
        )
    column = _column(file, key, count)
    bad = np.flatnonzero(~np.isin(column, (0, 1, 2))) if column.dtype.kind in "iu" else np.arange(1)
    if len(bad):
        raise InputError(
            f"{file.path}: {key}: row {bad[0]} holds {column[bad[0]]!r}; give integers 0 (train), 1 (validation), 2 (test)"
        )
    return column.astype(np.int64)

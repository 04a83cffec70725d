"""An open npz file of a user's own, whose mistakes are told in one line: file, key, row, remedy."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

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


class NpzFile:
    """The arrays of an npz file, each checked as it is read. Nothing is ever unpickled.

    Every method raises InputError for what it cannot give.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise self.error("no such file; check data.path")
        if not self.path.is_file():
            raise self.error("is a folder; give the .npz file itself")
        try:
            self.archive = np.load(self.path, allow_pickle=False)
        except PermissionError:
            raise self.error("may not be read; change its permissions") from None
        except _UNREADABLE:
            raise self.error(
                "is not a readable npz file (another format, or cut short); "
                "write it with numpy.savez"
            ) from None
        if not isinstance(self.archive, np.lib.npyio.NpzFile):
            raise self.error(
                "holds one array, not an npz; "
                "write named arrays with numpy.savez(path, x_audio=..., y=...)"
            )

    def error(self, text: str) -> InputError:
        """An InputError that begins with this file's name."""
        return InputError(f"{self.path}: {text}")

    def __contains__(self, key: str) -> bool:
        return key in self.archive.files

    def listing(self) -> str:
        """What is there, for error messages."""
        return ", ".join(self.archive.files) or "nothing"

    def read(self, key: str) -> np.ndarray:
        """The array ``key``, of any shape and type but Python objects."""
        try:
            array = self.archive[key]
        except _UNREADABLE as error:
            if isinstance(error, ValueError) and "allow_pickle" in str(error):
                raise self.error(
                    f"{key}: holds pickled Python objects, which are never loaded; "
                    "save a plain array of numbers (or strings)"
                ) from None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self.error(
                f"{key}: cannot be read ({reason}); "
                "the file is damaged or cut short: write it again"
            ) from None
        if not isinstance(array, np.ndarray):
            raise self.error(f"{key}: is not an array; write the file with numpy.savez")
        return array

    def column(self, key: str, count: int | None) -> np.ndarray:
        """One value a sample [count]; any number of them where ``count`` is None."""
        column = self.read(key)
        if column.ndim != 1 or (count is not None and len(column) != count):
            wanted = f", shape ({count},)" if count else ""
            raise self.error(f"{key}: has shape {column.shape}; give one value a sample{wanted}")
        return column

    def modalities(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """The modalities ``asked`` for, or all that are there."""
        there = [key[2:] for key in self.archive.files if key.startswith("x_") and len(key) > 2]
        if not there:
            raise self.error(
                "no modality: array names must begin with x_, such as x_audio; "
                f"it holds {self.listing()}"
            )
        for name in asked or ():
            if name not in there:
                raise self.error(f"data.modalities: no x_{name}; there are {', '.join(there)}")
        for name in asked or there:
            if "." in name or hasattr(nn.ModuleDict, name):  # it will name a submodule
                raise self.error(
                    f"x_{name}: {name!r} cannot name a part of a PyTorch module; rename the array"
                )
        return tuple(asked or there)

    def features(self, name: str, count: int | None = None, of: str = "") -> np.ndarray:
        """The samples [N, ...] of a modality, real numbers; N is the ``count`` that ``of`` has."""
        key = f"x_{name}"
        array = self.read(key)
        if array.dtype.kind not in "biuf":
            raise self.error(
                f"{key}: dtype {array.dtype} is not a real number; save integers or floats"
            )
        if array.ndim < 2:
            raise self.error(
                f"{key}: has shape {array.shape}; "
                "give [N, ...], one row a sample (a single feature is [N, 1])"
            )
        if count is not None and len(array) != count:
            raise self.error(
                f"{key}: has {len(array)} rows, but {of} has {count}; give one row a sample"
            )
        if array.size == 0:
            raise self.error(
                f"{key}: is empty (shape {array.shape}); "
                "give at least one sample of at least one feature"
            )
        return array

    def mask(self, name: str, count: int) -> np.ndarray:
        """Bool [count], True where a modality is present; everywhere without ``mask_<name>``."""
        key = f"mask_{name}"
        if key not in self:
            return np.ones(count, dtype=bool)
        column = self.column(key, count)
        bad = (
            np.flatnonzero((column != 0) & (column != 1))
            if column.dtype.kind in "biu"
            else np.arange(1)
        )
        if len(bad):
            raise self.error(
                f"{key}: row {bad[0]} holds {column[bad[0]]!r}; "
                f"give a bool array, True where {name} is present"
            )
        return column.astype(bool)

    def targets(self, count: int | None = None) -> np.ndarray:
        """The class of each sample, int64 [N] of 0, 1, 2, ..."""
        if "y" not in self:
            raise self.error(
                "no y; add the class of each sample as y, integers from 0; "
                f"it holds {self.listing()}"
            )
        column = self.column("y", count)
        if not len(column):
            raise self.error("y: is empty; give at least two samples")
        if column.dtype.kind not in "biu":
            raise self.error(
                f"y: dtype {column.dtype} is not an integer type; "
                "save class numbers from 0 (y.astype('int64'))"
            )
        bad = np.flatnonzero((column < 0) | (column > np.iinfo(np.int32).max))
        if len(bad):
            raise self.error(
                f"y: row {bad[0]} holds {column[bad[0]]}; "
                "labels are 0, 1, 2, ... (remove samples without a label)"
            )
        return column.astype(np.int64)

    def class_names(self, targets: np.ndarray) -> list[str]:
        """The file's ``classes``, or the labels in ``targets`` [N] as text, which leave no gap."""
        labels = np.unique(targets)
        if len(labels) < 2:
            raise self.error(
                f"y: holds only class {labels[0]}; give samples of at least two classes"
            )
        if "classes" in self:
            names = [str(name) for name in self.column("classes", None)]
            row = int(np.argmax(targets))
            if targets[row] >= len(names):
                raise self.error(
                    f"y: row {row} holds {targets[row]}, outside 0..{len(names) - 1}: "
                    f"classes has {len(names)} names"
                )
            return names
        gaps = np.flatnonzero(labels != np.arange(len(labels)))
        if len(gaps):
            raise self.error(
                f"y: no sample has class {gaps[0]}, but one has {labels[-1]}; number the classes "
                "without gaps, such as numpy.unique(y, return_inverse=True)[1]"
            )
        return [str(label) for label in labels]

    def groups(self, key: str | None, count: int) -> np.ndarray | None:
        """The column ``key`` of anything, numbered: int64 [count]; None where none is asked for."""
        if not key:
            return None
        if key not in self:
            raise self.error(f"data.groups: no column {key!r}; the file holds {self.listing()}")
        return np.unique(self.column(key, count), return_inverse=True)[1].astype(np.int64)

    def split(self, key: str, count: int) -> np.ndarray | None:
        """The column ``key`` of 0, 1, 2: int64 [count]; None where the file has no ``split``."""
        if key not in self:
            if key == "split":
                return None
            raise self.error(f"data.split: no column {key!r}; the file holds {self.listing()}")
        column = self.column(key, count)
        bad = (
            np.flatnonzero(~np.isin(column, (0, 1, 2)))
            if column.dtype.kind in "iu"
            else np.arange(1)
        )
        if len(bad):
            raise self.error(
                f"{key}: row {bad[0]} holds {column[bad[0]]!r}; "
                "give integers 0 (train), 1 (validation), 2 (test)"
            )
        return column.astype(np.int64)

    def check_finite(self, name: str, array: np.ndarray, present: np.ndarray) -> None:
        """InputError where a row of ``array`` [N, ...] that is ``present`` [N] is no float32."""
        if array.dtype.kind != "f":
            return
        flat = array.reshape(len(array), -1)
        limit = np.finfo(np.float32).max
        bad = np.zeros(len(flat), dtype=bool)
        for start in range(0, len(flat), 1024):  # in blocks: no second copy of a large array
            block = slice(start, start + 1024)
            bad[block] = ~(np.abs(flat[block]) <= limit).all(1)  # written so that NaN is bad too
        bad &= present
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            value = flat[row][~(np.abs(flat[row]) <= limit)][0]
            remedy = (
                ", too large for float32; rescale it"
                if np.isfinite(value)
                else f"; clean it, or mark the row missing in mask_{name}"
            )
            raise self.error(f"x_{name}: row {row} holds {value}{remedy}")

    def check_some_modality(self, mask: np.ndarray, names: Sequence[str]) -> None:
        """InputError where a row of ``mask`` [N, M] has none of the modalities ``names``."""
        empty = np.flatnonzero(~mask.any(1))
        if len(empty):
            raise self.error(
                f"row {empty[0]} has none of {', '.join(names)}; "
                "remove the sample or choose other modalities"
            )

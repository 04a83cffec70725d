"""Files of named arrays: an npz, or a folder of ``.npy`` files with the same names.

What cannot be read is told in one line: file, key, remedy. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

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
    """The arrays of an npz file by name. Every method raises InputError for what it cannot give."""

    names: list[str]

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
        self.names = list(self.archive.files)

    def error(self, text: str) -> InputError:
        """An InputError that begins with this file's name."""
        return InputError(f"{self.path}: {text}")

    def __contains__(self, key: str) -> bool:
        return key in self.names

    def listing(self) -> str:
        """What is there, for error messages."""
        return ", ".join(self.names) or "nothing"

    def read(self, key: str) -> np.ndarray:
        """The array ``key``, of any shape and type but Python objects."""
        try:
            array = self._load(key)
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

    def _load(self, key: str) -> np.ndarray:
        return self.archive[key]

    def optional(self, key: str | None, option: str, default: str) -> np.ndarray | None:
        """The array that ``option`` names; None where it names none or only its default.

        InputError where a name was given and there is no such array.
        """
        if not key:
            return None
        if key not in self:
            if key == default:
                return None
            raise self.error(f"{option}: no column {key!r}; the file holds {self.listing()}")
        return self.read(key)

    def modalities(self) -> dict[str, list[str]]:
        """Modality name -> its keys: ``x_audio``, or the fields ``x_text.input_ids``, ..."""
        found: dict[str, list[str]] = {}
        for key in self.names:
            if key.startswith("x_") and len(key) > 2:
                name, dot, field = key[2:].partition(".")
                if not name or (dot and (not field or "." in field)):
                    raise self.error(
                        f"{key}: cannot name a modality; name it x_<modality>, "
                        "or x_<modality>.<field> for one of several fields"
                    )
                found.setdefault(name, []).append(key)
        for name, keys in found.items():
            if len(keys) > 1 and f"x_{name}" in keys:
                raise self.error(f"x_{name}: stands beside fields of its own ({keys[1]}); name one")
        return found

    def values(self, name: str, keys: list[str]) -> np.ndarray | dict[str, np.ndarray]:
        """The values of a modality: an array, or several by field name."""
        if keys == [f"x_{name}"]:
            return self.read(keys[0])
        return {key.partition(".")[2]: self.read(key) for key in keys}

    def mask(self, name: str, count: int) -> np.ndarray:
        """Bool [count], True where a modality is present; everywhere without ``mask_<name>``."""
        key = f"mask_{name}"
        if key not in self:
            return np.ones(count, dtype=bool)
        column = self.read(key)
        if column.shape != (count,):
            raise self.error(
                f"{key}: has shape {column.shape}; give one value a sample, shape ({count},)"
            )
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


class NpyFolder(NpzFile):
    """A folder of ``.npy`` files, each an array by its file's name; they are mapped, not loaded."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise self.error("no such folder; check data.path")
        self.names = sorted(entry.stem for entry in self.path.glob("*.npy"))
        if not self.names:
            raise self.error(
                "holds no .npy file; write one for each array, such as "
                "numpy.save('clips/x_audio.npy', audio)"
            )

    def _load(self, key: str) -> np.ndarray:
        path = self.path / f"{key}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:  # empty, or of objects: what is wrong with it is told without mapping
            return np.load(path, allow_pickle=False)

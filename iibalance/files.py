"""Files that appear whole or not at all, locks that die with their process, digests and versions.

A reader, or a restart after a crash, finds what stood in a file before or what was written to it,
never a part. Whatever cannot be read or written is an InputError that names the file.

What may come in: errors. Importing this module imports no torch, which takes seconds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Union

from filelock import FileLock, Timeout

from iibalance.errors import InputError

PathLike = Union[str, "os.PathLike[str]"]


# Whole files


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all.

    Raises InputError where the folder cannot be written (missing, read-only, disk full); the old
    content is then untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(f"{folder}/a", b"1")
    ...     os.listdir(folder)
    ['a']
    """
    path = Path(path)
    # In the same folder, because a rename across file systems would be a copy.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(scratch, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)  # the rename itself is only on disk once the folder is
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "free space or choose another folder"
        ) from error


def write_text(path: PathLike, text: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, value: Any) -> None:
    """:func:`write_bytes` of ``value`` as JSON, indented by 2, with the keys in their own order.

    Raises ValueError for NaN and infinity: JSON has none.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_text(path, text + "\n")


def write_model(
    path: PathLike, state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """:func:`write_bytes` of a ``state_dict`` of tensors, on any device, as safetensors.

    Names that share storage are each written in full.
    """
    from safetensors.torch import save  # imports torch

    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()
    }
    write_bytes(path, save(tensors, metadata=dict(metadata) if metadata else None))


def read_json(path: PathLike) -> Any:
    """The content of a JSON file.

    Raises InputError where it is missing, cut short or no JSON (NaN is none).
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    data = _read(path)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is not a whole JSON file ({error}); restore it or run again"
        ) from None


def read_model(path: PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by name, on the CPU, and the metadata of a safetensors file.

    Raises InputError where it is missing, cut short or garbled.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_model(f"{folder}/m.safetensors", {"weight": torch.ones(2)}, {"by": "iibalance"})
    ...     read_model(f"{folder}/m.safetensors")
    ({'weight': tensor([1., 1.])}, {'by': 'iibalance'})
    """
    from safetensors import SafetensorError
    from safetensors.torch import load  # imports torch

    data = _read(path)
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:
        raise _no_model(path, error) from None
    return tensors, header.get("__metadata__") or {}


def read_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file alone: no tensor is read, and torch is not imported.

    Raises InputError as :func:`read_model` does.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_model(f"{folder}/m.safetensors", {"weight": torch.ones(2)}, {"by": "iibalance"})
    ...     read_metadata(f"{folder}/m.safetensors")
    {'by': 'iibalance'}
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise _no_model(path, error) from None


def _no_model(path: PathLike, error: Exception) -> InputError:
    return InputError(
        f"{path}: is not a whole safetensors file ({error}); restore it or train again"
    )


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries (names, renames) to the disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


# Locks

# What locking a file fails with where the file system has no locks, as on some network mounts.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def take_lock(path: PathLike, *, wait: bool = True, held: str | None = None) -> FileLock:
    """Lock the file ``path``, made where it is not there; ``.release()`` what is returned.

    The system frees the lock when the process that took it dies. A forked child (a DataLoader's
    worker) does not hold it on: filelock closes its copy of the file. Where the file system has no
    locks, the process goes on as if it were alone.

    Without ``wait``, raises InputError where another process holds the lock, with the text ``held``
    if it is given. Raises InputError too where the file cannot be made.
    """
    path = Path(path)
    # Not per thread: whichever thread closes a run's folder frees its lock. No marker file in place
    # of a lock that the system does not have: a killed process would leave it behind.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise InputError(
            held
            or f"{path.parent}: another process is at work in this folder; "
            "wait for it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(
                f"{path.parent}: cannot be written ({error.strerror or error}); "
                "choose another folder"
            ) from None
    return lock


@contextmanager
def locked(path: PathLike, *, wait: bool = True, held: str | None = None) -> Iterator[None]:
    """:func:`take_lock` for the length of a ``with`` block.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with locked(f"{folder}/.lock"), locked(f"{folder}/.lock", wait=False, held="taken"):
    ...         pass
    Traceback (most recent call last):
        ...
    iibalance.errors.InputError: taken
    """
    lock = take_lock(path, wait=wait, held=held)
    try:
        yield
    finally:
        lock.release()


# Digests and versions: which data, which code, which packages made a number

PACKAGES = ("torch", "triton", "numpy", "accelerate", "scikit-learn", "iibalance")


def file_digest(path: PathLike, sync: bool = False) -> str:
    """The sha256 of a file, in hexadecimal; with ``sync`` the file is flushed to the disk first."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def data_digest(path: str | None) -> str | None:
    """The sha256 of a user's data file or folder of arrays, or None where there is none.

    >>> data_digest(None) is None
    True
    """
    if not path:
        return None
    place = Path(path).expanduser()
    if not place.is_dir():
        return file_digest(place)
    digest = hashlib.sha256()
    for file in sorted(place.glob("*.npy")):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """A digest of the two packages' source, to tell results of different versions apart."""
    digest = hashlib.sha256()
    for name in ("iibalance", "iib_kernels"):
        spec = find_spec(name)  # where it is, without importing it
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        for path in sorted(package.rglob("*.py")):
            digest.update(
                str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes()
            )
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """What is installed of the packages that numbers depend on, None for one that is not."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def recorded_command() -> list[str]:
    """The command line of this process as a person would type it, without this machine's folders.

    Absolute paths are shortened to the names of their files; ``config.yaml`` has them whole.
    """
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    start = ["python", "-m", program.parent.name] if module else [program.name]
    return [*start, *(re.sub(r"(^|[=,])/(?:[^/,=:]+/)*", r"\1", word) for word in sys.argv[1:])]

"""A run's folder: everything in it appears whole or not at all, whenever the process is killed.

    config.yaml  ...  model.safetensors       single files, replaced atomically
    checkpoints/<name>/                       files and manifest.json (size and sha256 of each), renamed into place when complete
    .lock                                     held while a process trains into the folder; the system frees it when that process dies

Names that begin with a dot are scratch: left over by a killed process, ignored by readers, removed by the next one to lock the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Union

import iib_kernels
from iibalance.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: no lock, everything else works
    fcntl = None

PathLike = Union[str, "os.PathLike[str]"]


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a restart after a crash, finds the old content or the new, never a part.

    InputError where the folder cannot be written (missing, read-only, disk full); the old content is then untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(f"{folder}/a", b"1")
    ...     os.listdir(folder)
    ['a']
    """
    path = Path(path)
    scratch = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # same folder: a rename across file systems is a copy
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
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error


def write_text(path: PathLike, text: str) -> None:
    """:func:`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, value: Any) -> None:
    """:func:`write_bytes` of ``value`` as JSON, indented by 2, keys in their own order. ValueError for NaN and infinity: JSON has none."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_text(path, text + "\n")


def write_model(
    path: PathLike, state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """:func:`write_bytes` of a ``state_dict`` of tensors (any device; shared storage is written for each name) as safetensors."""
    from safetensors.torch import (
        save,
    )  # imports torch: seconds that the other functions here can do without

    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()
    }
    write_bytes(path, save(tensors, metadata=dict(metadata) if metadata else None))


def read_json(path: PathLike) -> Any:
    """The content of a JSON file; InputError where it is missing, cut short or no JSON (NaN is none)."""

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
    """Tensors by name, on the CPU, and the metadata, of a safetensors file; InputError where it is missing, cut short or garbled.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_model(f"{folder}/m.safetensors", {"weight": torch.ones(2)}, {"made_by": "iibalance"})
    ...     read_model(f"{folder}/m.safetensors")
    ({'weight': tensor([1., 1.])}, {'made_by': 'iibalance'})
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read(path)
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not a whole safetensors file ({error}); restore it or train again"
        ) from None
    return tensors, header.get("__metadata__") or {}


def file_digest(path: PathLike, sync: bool = False) -> str:
    """The sha256 of a file, in hexadecimal; with ``sync`` the file is on the disk before it is returned."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _read(path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PACKAGES = ("torch", "triton", "numpy", "accelerate", "torchmetrics", "scikit-learn", "iibalance")


@cache
def code_digest() -> str:
    """A digest of the two packages' source, to tell results of different versions apart."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(iib_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(
                str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes()
            )
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """What is installed of the packages that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except Exception:  # not installed here: nothing to record
            found[package] = None
    return found

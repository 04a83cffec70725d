"""A run's folder: everything in it appears whole or not at all, whenever the process is killed.

    config.yaml  ...  model.safetensors       single files, replaced atomically
    checkpoints/<name>/                       files and manifest.json (size and sha256 of each),
                                              renamed into place when complete
    .lock                                     held while a process trains into the folder

Names that begin with a dot are scratch: left over by a killed process, ignored by readers, removed
by the next one to lock the folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from iibalance.errors import InputError
from iibalance.files import PathLike, file_digest, read_json, sync_folder, take_lock, write_json

MANIFEST = "manifest.json"

# What a run writes into its folder, and overwriting removes in this order. Killed between two steps
# it leaves an unfinished run, to resume or overwrite, or none: metrics.json makes a run a finished
# one, config.yaml makes a folder a run.
RUN_FILES = (
    "metrics.json",
    "evaluation-*.json",
    "report.*",
    "history.csv",
    "model.safetensors",
    "budgets.json",
    "checkpoints",
    "stages",
    "tensorboard",
    "config.yaml",
    "run.json",
)

# A lock that nothing refers to any more is freed. A run's lock is not: only `close` or the end of
# the process frees it, even where a caller forgot its RunFolder.
_held: set[FileLock] = set()


class RunFolder:
    """The folder of one training run.

    ``RunFolder(path)`` only looks; ``RunFolder.create(path)`` makes, locks and cleans the folder
    for writing. Use a created one as a context manager, or ``close()`` it, to free the lock before
    the process ends.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, RunFolder.create(f"{folder}/run") as run:
    ...     with run.checkpoint("epoch-0001") as scratch:
    ...         write_json(scratch / "state.json", {"epoch": 1})
    ...     run.latest_checkpoint().name
    'epoch-0001'
    """

    def __init__(self, path: PathLike):
        self.path = Path(path).expanduser()
        self._lock: FileLock | None = None

    @property
    def config_path(self) -> Path:
        """``config.yaml``: its presence is what makes a folder a run."""
        return self.path / "config.yaml"

    @classmethod
    def create(cls, path: PathLike, resume: bool = False, overwrite: bool = False) -> RunFolder:
        """Make ``path``, and lock it: a new folder, or what :meth:`check` allows.

        With ``resume`` the run that is there is taken as it is, with ``overwrite`` it is removed:
        what a run writes, and no other file. What a killed process left half done is removed.

        Raises InputError as :meth:`check` does.
        """
        folder = cls(path)
        folder._check(resume, overwrite)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{folder.path}: cannot be made ({error.strerror or error}); "
                "choose another folder for the run"
            ) from None
        folder._take_lock()
        try:
            folder._check(resume, overwrite)  # again: now nobody else changes it
            if overwrite:
                folder._remove_run()
            folder._clean()
        except BaseException:
            folder.close()
            raise
        return folder

    def check(self, resume: bool = False, overwrite: bool = False) -> None:
        """InputError where :meth:`create` would refuse the folder; nothing is made or changed.

        That is where the path is a file or lies below one, is in use by another process, holds a
        run already (without ``resume`` and ``overwrite``), holds none (with ``resume``), or holds
        anything but a run (with ``overwrite``).
        """
        self._check(resume, overwrite)
        if self._lock is None and (self.path / ".lock").exists():
            self._take_lock()
            self.close()

    def _check(self, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise InputError(
                "overwrite: not together with resume; "
                "resume goes on with the run, overwrite begins it anew"
            )
        try:
            is_run, names = self.config_path.is_file(), self._names()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror or error}); "
                "choose another folder for the run"
            ) from None
        if resume and not is_run:
            raise InputError(
                f"{self.path}: holds no run to resume (no config.yaml); start it without resume"
            )
        # A config.yaml alone may be anybody's: ours never stands without run.json.
        if overwrite and not (is_run and "run.json" in names) and set(names) - {"run.json"}:
            raise InputError(
                f"{self.path}: holds files but no run (no config.yaml with a run.json), and "
                "overwrite removes nothing else; choose another folder"
            )
        if is_run and not (resume or overwrite):
            raise InputError(
                f"{self.path}: holds another run; resume it, choose another folder, "
                "or give --overwrite (overwrite=True in Python) to replace it"
            )
        if not is_run and self.checkpoints():
            raise InputError(
                f"{self.path}: holds checkpoints but no config.yaml to resume them by; "
                "choose another folder"
            )

    def _names(self) -> list[str]:
        """What is in the folder, but for scratch; nothing where it is to be made."""
        check_place(self.path, "run")
        names = os.listdir(self.path) if self.path.exists() else []
        return [name for name in names if not name.startswith(".")]

    def _take_lock(self) -> None:
        self._lock = take_lock(
            self.path / ".lock",
            wait=False,
            held=f"{self.path}: another process is training into this folder; "
            "wait for it, or choose another folder",
        )
        _held.add(self._lock)

    def _remove_run(self) -> None:
        """Remove what a run writes, and no other file."""
        for entry in [entry for name in RUN_FILES for entry in self.path.glob(name)]:
            try:
                if entry.is_dir() and not entry.is_symlink():
                    _discard(entry)
                else:
                    entry.unlink()
            except OSError as error:
                raise InputError(
                    f"{entry}: cannot be removed ({error.strerror or error}); "
                    "remove it, or choose another folder"
                ) from None
        sync_folder(self.path)

    def close(self) -> None:
        """Free the lock. Harmless when repeated."""
        if self._lock is not None:
            _held.discard(self._lock)
            self._lock.release()
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def model_path(self) -> Path:
        """``model.safetensors``, which a finished run holds; InputError where it is not there."""
        path = self.path / "model.safetensors"
        if not self.path.is_dir():
            raise InputError(
                f"{self.path}: no such run folder; give the folder that train --output wrote"
            )
        if not path.is_file():
            started = self.config_path.is_file()
            hint = (
                f"go on with it: iibalance train --resume {shlex.quote(str(self.path))}"
                if started
                else "give the folder that train --output wrote"
            )
            raise InputError(f"{self.path}: holds no trained model (model.safetensors); {hint}")
        return path

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first: by name, numbers compared as numbers."""
        parent = self.path / "checkpoints"
        if not parent.is_dir():
            return []
        return sorted(
            (
                entry
                for entry in parent.iterdir()
                if entry.is_dir() and not entry.name.startswith(".")
            ),
            key=_order,
        )

    @contextmanager
    def checkpoint(self, name: str, *, keep: int = 2) -> Iterator[Path]:
        """Give a folder to save files into; when the block ends, it is ``checkpoints/<name>``.

        It appears there complete, and only then are all but the newest ``keep`` removed. If the
        block raises, nothing is kept of it.

        Raises ValueError where ``name`` is no plain file name, or does not come after the newest
        checkpoint's: names must grow, as ``epoch-0007`` and ``epoch-0008`` do.
        """
        if self._lock is None:
            raise ValueError(
                f"{self.path}: is only open for reading; "
                "RunFolder.create makes and locks a folder for writing"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"checkpoint name {name!r}: use letters, digits, '-', '_' and '.'")
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least the checkpoint just written must be kept")
        parent = self.path / "checkpoints"
        newest = self.checkpoints()[-1:]
        if newest and _order(newest[0]) >= _order(parent / name):
            raise ValueError(
                f"checkpoint name {name!r} does not come after {newest[0].name!r}: "
                "resuming would take the wrong one"
            )
        scratch = parent / f".writing-{name}"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"{scratch}: cannot be made ({error.strerror or error}); "
                "free space or choose another folder"
            ) from error
        try:
            yield scratch
            _write_manifest(scratch)
            os.rename(scratch, parent / name)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_folder(parent)
        sync_folder(self.path)
        for old in self.checkpoints()[:-keep]:  # only now that the new one is safe on disk
            _discard(old)

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None if there is none.

        Every file in it is checked against its manifest; an InputError names a damaged one.
        """
        found = self.checkpoints()
        if not found:
            return None
        remedy = f"delete {found[-1]} to resume from " + (
            "the one before" if len(found) > 1 else "the start"
        )
        _verify_manifest(found[-1], remedy)
        return found[-1]

    def _clean(self) -> None:
        parent = self.path / "checkpoints"
        for entry in [
            *self.path.glob(".*.tmp"),
            *self.path.glob(".removing-*"),
            *parent.glob(".writing-*"),
            *parent.glob(".removing-*"),
        ]:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def check_place(path: Path, what: str) -> None:
    """InputError unless ``path`` is a folder, or one can be made there for a ``what``."""
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise InputError(
            f"{path}: is a file, or lies below one; choose another folder for the {what}"
        )


def _order(path: Path) -> tuple:
    """Sort key of a checkpoint's name: epoch-9 before epoch-10."""
    parts = re.split(r"(\d+)", path.name)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts), path.name


def _discard(folder: Path) -> None:
    """Remove a folder: renamed first, so that half of one is never taken for a whole."""
    trash = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {
                "size": path.stat().st_size,
                "sha256": file_digest(path, sync=True),
            }
        elif path.is_dir():
            sync_folder(path)
    write_json(folder / MANIFEST, {"files": files})  # and with it the folder itself


def _verify_manifest(folder: Path, remedy: str) -> None:
    try:
        manifest = read_json(folder / MANIFEST)
        files = [
            (name, int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        ]
    except (InputError, KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{folder / MANIFEST}: is missing or damaged; {remedy}") from None
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: is missing; {remedy}")
        found = path.stat().st_size
        if found != size:
            word = "truncated" if found < size else "too long"
            raise InputError(f"{path}: is {word}: {found} bytes, manifest says {size}; {remedy}")
        if file_digest(path) != digest:
            raise InputError(f"{path}: is damaged: its sha256 is not the manifest's; {remedy}")

"""A run's folder survives being killed at any step, and says so when it does not."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from iibalance.errors import InputError
from iibalance.files import (
    code_digest,
    data_digest,
    file_digest,
    locked,
    read_json,
    read_model,
    recorded_command,
    write_bytes,
    write_json,
    write_model,
    write_text,
)
from iibalance.training import folder as run_folder
from iibalance.training.folder import RunFolder

fork = multiprocessing.get_context("fork")  # the children only write files
# Of module os: every step that changes what is on disk
DISK_STEPS = [
    "open",
    "fsync",
    "replace",
    "rename",
    "rmdir",
    "unlink",
    "mkdir",
]


def _save(scratch, epoch: int) -> None:
    (scratch / "state").mkdir()
    (scratch / "weights.bin").write_bytes(bytes([epoch % 256]) * 20_000)
    write_json(scratch / "state" / "trainer.json", {"epoch": epoch})


def _checkpoint(folder: RunFolder, epoch: int, keep: int = 2) -> None:
    with folder.checkpoint(f"epoch-{epoch}", keep=keep) as scratch:
        _save(scratch, epoch)


def _epoch(path) -> int:
    return -1 if path is None else read_json(path / "state" / "trainer.json")["epoch"]


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run") as folder:
        write_text(folder.config_path, "seed: 0\n")
        yield folder


# Files


def test_files_are_read_as_written(tmp_path):
    write_bytes(tmp_path / "b", b"\0\1")
    write_text(tmp_path / "t", "é\n")
    value = {"z": [1, 2.5, None], "a": "é"}
    write_json(tmp_path / "j.json", value)
    assert (tmp_path / "b").read_bytes() == b"\0\1" and (
        tmp_path / "t"
    ).read_bytes() == "é\n".encode()
    assert (tmp_path / "j.json").read_text(encoding="utf-8") == json.dumps(
        value, indent=2, ensure_ascii=False
    ) + "\n"
    assert read_json(tmp_path / "j.json") == value and list(read_json(tmp_path / "j.json")) == [
        "z",
        "a",
    ]
    assert sorted(os.listdir(tmp_path)) == ["b", "j.json", "t"]
    mask = os.umask(0)
    os.umask(mask)
    # Readable by others, as any file is
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o666 & ~mask


def test_model_is_read_as_written(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "half": torch.ones(2, dtype=torch.bfloat16),
        "view": shared.view(2, 3).t(),
        "tied": shared,
        "again": shared,
        "count": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
    }
    write_model(tmp_path / "m.safetensors", state, {"version": "1"})
    tensors, metadata = read_model(tmp_path / "m.safetensors")
    assert metadata == {"version": "1"} and set(tensors) == set(state)
    for name, tensor in state.items():
        assert torch.equal(tensors[name], tensor.detach()) and tensors[name].dtype == tensor.dtype
    write_model(tmp_path / "m.safetensors", {})
    assert read_model(tmp_path / "m.safetensors") == ({}, {})


def test_nan_is_no_json(tmp_path):
    write_json(tmp_path / "j.json", {"a": 1})
    with pytest.raises(ValueError, match="j.json"):
        write_json(tmp_path / "j.json", {"a": float("nan")})
    assert read_json(tmp_path / "j.json") == {"a": 1}
    (tmp_path / "j.json").write_text('{"a": NaN}')
    with pytest.raises(InputError, match="j.json: is not a whole JSON file .NaN is not JSON"):
        read_json(tmp_path / "j.json")


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match="none.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="none.safetensors: no such file"):
        read_model(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
    write_json(tmp_path / "j.json", {"key": [1, 2]})
    write_model(tmp_path / "m.safetensors", {"w": torch.arange(100.0)}, {"a": "b"})
    for name, read in (("j.json", read_json), ("m.safetensors", read_model)):
        whole = (tmp_path / name).read_bytes()
        for cut in {0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 3}:
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(InputError, match=f"{name}: is not a whole"):
                read(tmp_path / name)
        (tmp_path / name).write_bytes(os.urandom(200))
        with pytest.raises(InputError, match=f"{name}: is not a whole"):
            read(tmp_path / name)


def test_a_failed_write_leaves_the_old_content_and_no_scratch(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(InputError, match="a: cannot be written .No space left on device"):
                write_text(tmp_path / "a", "new")
        assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "absent" / "a", "new")


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell which file a descriptor is"
)
def test_a_file_and_its_folder_are_flushed_in_order(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (
            steps.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"),
            sync(fd),
        ),
    )
    monkeypatch.setattr(os, "replace", lambda *a: (steps.append("replace"), replace(*a)))
    write_text(tmp_path / "a", "x")
    assert steps == ["file", "replace", "folder"]


def test_digests(tmp_path, monkeypatch):
    (tmp_path / "d.npz").write_bytes(b"data" * 1_000_000)
    expected = hashlib.sha256(b"data" * 1_000_000).hexdigest()
    assert file_digest(tmp_path / "d.npz") == data_digest(str(tmp_path / "d.npz")) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_digest("~/d.npz") == expected and data_digest(None) is None
    assert len(code_digest()) == 12


def test_importing_and_digesting_imports_no_torch():
    code = "import sys; from iibalance.files import code_digest; print(code_digest(), *sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    digest, *modules = found.stdout.split()
    assert digest == code_digest() and "torch" not in modules and "iib_kernels" not in modules


# Locks


def test_a_lock_is_held_for_the_block_alone(tmp_path):
    path = tmp_path / ".lock"
    with locked(path):
        with pytest.raises(InputError, match=f"^{tmp_path}: another process is at work in this"):
            with locked(path, wait=False):
                pytest.fail("two hold one lock")
        with pytest.raises(InputError, match="^taken$"), locked(path, wait=False, held="taken"):
            pytest.fail("two hold one lock")
    with pytest.raises(KeyError), locked(path, wait=False):
        raise KeyError
    with locked(path, wait=False):
        assert path.exists()


def _add_lines(path, name: str) -> None:
    for _ in range(20):
        with locked(path.with_suffix(".lock")):
            lines = path.read_text() if path.exists() else ""
            time.sleep(0.001)
            path.write_text(f"{lines}{name}\n")


def test_waiting_processes_take_turns(tmp_path):
    children = [fork.Process(target=_add_lines, args=(tmp_path / "log", name)) for name in "abc"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted((tmp_path / "log").read_text().split()) == sorted("abc" * 20)


def _fail_to_lock(monkeypatch, number: int) -> None:
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_goes_on(tmp_path, monkeypatch, number):
    _fail_to_lock(monkeypatch, number)
    with locked(tmp_path / "a.lock", wait=False), locked(tmp_path / "a.lock"):
        pass
    RunFolder.create(tmp_path / "run").close()
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_broken_file_system_is_named(tmp_path, monkeypatch):
    _fail_to_lock(monkeypatch, errno.EIO)
    with pytest.raises(InputError, match=f"^{tmp_path}: cannot be written .Input/output error"):
        with locked(tmp_path / "a.lock"):
            pass


# The folder


def test_another_run_is_not_overwritten(run):
    run.close()
    with pytest.raises(InputError, match="holds another run; resume it, .* give --overwrite"):
        RunFolder.create(run.path)
    with RunFolder.create(run.path, resume=True) as again:
        assert again.path == run.path


def test_checkpoints_alone_are_left_alone(tmp_path):
    with RunFolder.create(tmp_path) as folder:
        _checkpoint(folder, 1)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no config.yaml.* choose another folder"):
            RunFolder.create(tmp_path, overwrite=overwrite)


def test_empty_folders_and_unrelated_files_are_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path).close()
    RunFolder.create(tmp_path).close()  # killed before it wrote a configuration: may start again
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match="holds no run to resume"):
        RunFolder.create(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_paths_that_cannot_be_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file, or lies below one"):
            RunFolder.create(path)
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.create("/proc/iibalance-run" if os.path.isdir("/proc") else "\0")


def test_unwritable_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # permissions do not bind root
    with pytest.raises(
        InputError, match="cannot be written .Permission denied.; choose another folder"
    ):
        RunFolder.create(tmp_path)


def test_one_process_at_a_time(run):
    with pytest.raises(InputError, match="another process is training into this folder"):
        RunFolder.create(run.path, resume=True)
    run.close()
    run.close()
    RunFolder.create(run.path, resume=True).close()


def _hold(path, ready) -> None:
    RunFolder.create(path)
    # As a DataLoader's worker would, it outlives its killed parent
    worker = fork.Process(target=time.sleep, args=(30,))
    worker.start()
    ready.send(worker.pid)
    time.sleep(30)


def test_a_killed_process_frees_the_lock_though_its_workers_live(tmp_path):
    ours, theirs = fork.Pipe()
    child = fork.Process(target=_hold, args=(tmp_path, theirs))
    child.start()
    worker = ours.recv()
    try:
        with pytest.raises(InputError, match="another process"):
            RunFolder.create(tmp_path)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        os.kill(worker, 0)  # it does live
        RunFolder.create(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_looking_takes_no_lock_and_makes_nothing(run, tmp_path):
    assert RunFolder(run.path).latest_checkpoint() is None
    with pytest.raises(ValueError, match="only open for reading"):
        _checkpoint(RunFolder(run.path), 1)
    assert (
        RunFolder(tmp_path / "absent").latest_checkpoint() is None
        and not (tmp_path / "absent").exists()
    )


# Checkpoints


def test_checkpoints_are_whole_ordered_and_pruned(run):
    assert run.latest_checkpoint() is None
    for epoch in (1, 2, 9, 10):  # numbers, not letters, give the order
        _checkpoint(run, epoch)
        assert _epoch(run.latest_checkpoint()) == epoch
    assert [path.name for path in run.checkpoints()] == ["epoch-9", "epoch-10"]
    assert sorted(os.listdir(run.path / "checkpoints")) == ["epoch-10", "epoch-9"]
    manifest = read_json(run.latest_checkpoint() / "manifest.json")
    assert (
        set(manifest["files"]) == {"weights.bin", "state/trainer.json"}
        and manifest["files"]["weights.bin"]["size"] == 20_000
    )


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell which file a descriptor is"
)
def test_everything_is_flushed_before_a_checkpoint_appears(run, monkeypatch):
    flushed, before = [], []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)),
    )
    monkeypatch.setattr(
        os, "rename", lambda *paths: (before.extend(flushed), flushed.clear(), rename(*paths))
    )
    with run.checkpoint("epoch-1") as scratch:
        _save(scratch, 1)
        (scratch / "plain").mkdir()
        (scratch / "plain" / "file").write_text("x")
    assert {"weights.bin", "trainer.json", "state", "plain", "file", ".writing-epoch-1"} <= set(
        before
    )
    assert any(name.startswith(".manifest.json") for name in before) and "checkpoints" in flushed


def test_a_block_that_raises_leaves_nothing(run):
    _checkpoint(run, 1)
    with pytest.raises(KeyError), run.checkpoint("epoch-2") as scratch:
        (scratch / "half").write_text("x")
        raise KeyError
    assert os.listdir(run.path / "checkpoints") == ["epoch-1"]


def test_older_ones_go_only_after_the_new_one_is_in_place(run, monkeypatch):
    for epoch in (1, 2):
        _checkpoint(run, epoch)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "_write_manifest", full)
    with pytest.raises(OSError):
        _checkpoint(run, 3)
    assert [path.name for path in run.checkpoints()] == ["epoch-1", "epoch-2"]


@pytest.mark.parametrize("name", ["epoch-1", "epoch-01", "a", "../up", ".hidden", "", "a/b"])
def test_names_must_be_plain_and_grow(run, name):
    _checkpoint(run, 1)
    with pytest.raises(ValueError, match="checkpoint name"), run.checkpoint(name):
        pass
    assert os.listdir(run.path / "checkpoints") == ["epoch-1"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda path: (path / "weights.bin").write_bytes(b"x" * 123),
            "epoch-2/weights.bin: is truncated: 123 bytes, manifest says 20000; "
            "delete .*epoch-2 to resume from the one before",
        ),
        (
            lambda path: (path / "weights.bin").write_bytes(b"x" * 20_001),
            "weights.bin: is too long: 20001 bytes, manifest says 20000; delete",
        ),
        (
            lambda path: (path / "weights.bin").write_bytes(b"\2" * 19_999 + b"\3"),
            "weights.bin: is damaged: its sha256 is not",
        ),
        (
            lambda path: (path / "state" / "trainer.json").unlink(),
            "state/trainer.json: is missing; delete .*epoch-2",
        ),
        (
            lambda path: (path / "manifest.json").unlink(),
            "manifest.json: is missing or damaged; delete .*epoch-2",
        ),
        (
            lambda path: (path / "manifest.json").write_text('{"files": {"weights'),
            "manifest.json: is missing or damaged",
        ),
        (
            lambda path: (path / "manifest.json").write_text('{"files": [1]}'),
            "manifest.json: is missing or damaged",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_deleting_it_helps(run, damage, message):
    for epoch in (1, 2):
        _checkpoint(run, epoch)
    damage(run.checkpoints()[-1])
    with pytest.raises(InputError, match=message):
        run.latest_checkpoint()
    shutil.rmtree(run.checkpoints()[-1])
    assert _epoch(run.latest_checkpoint()) == 1


def test_the_last_checkpoint_damaged_leaves_only_the_start(run):
    _checkpoint(run, 1)
    (run.checkpoints()[0] / "weights.bin").write_bytes(b"")
    with pytest.raises(InputError, match="to resume from the start"):
        run.latest_checkpoint()


# Killed


def _die_at(step: int, path) -> None:
    """Write checkpoint 3 over 1 and 2, and die before the given change to the disk."""
    count = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapper

    folder = RunFolder.create(path, resume=True)
    for name in DISK_STEPS:
        setattr(os, name, counted(getattr(os, name)))
    _checkpoint(folder, 3)
    write_json(path / "history.json", {"epoch": 3})
    os._exit(0)


@pytest.mark.slow
def test_killed_before_any_single_step(tmp_path):
    original = tmp_path / "original"
    with RunFolder.create(original) as folder:
        write_text(folder.config_path, "seed: 0\n")
        write_json(original / "history.json", {"epoch": 2})
        _checkpoint(folder, 1)
        _checkpoint(folder, 2)
    step, latest, histories = 0, [], []
    while True:
        path = tmp_path / f"step-{step}"
        shutil.copytree(original, path)
        child = fork.Process(target=_die_at, args=(step, path))
        child.start()
        child.join()
        with RunFolder.create(path, resume=True) as folder:
            latest.append(_epoch(folder.latest_checkpoint()))
            histories.append(read_json(path / "history.json")["epoch"])
            # the older ones are whole too, not half removed
            for checkpoint in folder.checkpoints():
                run_folder._verify_manifest(checkpoint, "")
            assert len(folder.checkpoints()) >= 2 and not [
                name for name in os.listdir(path / "checkpoints") if name.startswith(".")
            ]
            assert sorted(os.listdir(path)) == [
                ".lock",
                "checkpoints",
                "config.yaml",
                "history.json",
            ]
            _checkpoint(folder, 4)
            assert _epoch(folder.latest_checkpoint()) == 4
        shutil.rmtree(path)
        if child.exitcode == 0:
            break
        assert child.exitcode == 9
        step += 1
    assert (
        step > 15
        and latest == sorted(latest)
        and set(latest) == {2, 3}
        and set(histories) == {2, 3}
        and histories[-1] == 3
    )


def _write_forever(path, report) -> None:
    folder = RunFolder.create(path, resume=True)
    epoch = _epoch(folder.latest_checkpoint())
    while True:
        epoch += 1
        _checkpoint(folder, epoch)
        report.send(epoch)


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    write_text(tmp_path / "config.yaml", "seed: 0\n")
    chance = random.Random(0)
    reported = -1
    for _ in range(20):
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=_write_forever, args=(tmp_path, theirs))
        child.start()
        theirs.close()
        time.sleep(0.02 + 0.15 * chance.random())
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        try:
            while True:
                reported = ours.recv()
        except EOFError:
            pass
        folder = RunFolder(tmp_path)
        latest = _epoch(folder.latest_checkpoint())
        # What was said to be saved is there; at most the one in progress beside it
        assert latest in (
            reported,
            reported + 1,
        )
        assert latest < 1 or len(folder.checkpoints()) >= 2
        reported = latest
    assert reported > 20


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (
            ["/somewhere/iibalance/__main__.py", "train", "--data.path=/data/a/clips.npz"],
            ["python", "-m", "iibalance", "train", "--data.path=clips.npz"],
        ),
        (
            ["/usr/bin/iibalance", "compare", "--methods", "concat,/own/mine.py:Mine", "a/b.yaml"],
            ["iibalance", "compare", "--methods", "concat,mine.py:Mine", "a/b.yaml"],
        ),
    ],
)
def test_a_recorded_command_has_no_folder_of_this_machine(monkeypatch, argv, recorded):
    monkeypatch.setattr("sys.argv", argv)
    assert recorded_command() == recorded

"""Fixtures shared by all tests, and their order: quick ones first, so that a mistake shows early."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning cost several times the work on a shared machine
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: a core for each process, none for its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: ``IIBALANCE_DATA``, or ``../shared/data`` beside the repository. Skips where there is neither."""
    given = os.environ.get("IIBALANCE_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set IIBALANCE_DATA to the folder that holds avletters/, utd_mhad/, ...)")
    return folder


COMPILATION = pytest.StashKey[tuple]()


def _compile(config: pytest.Config) -> None:
    """Begin the ahead-of-time compilation in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    output = Path(tempfile.mkdtemp()) / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/aot.py", str(output)]
    process = subprocess.Popen(command, cwd=root, env={**environment, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, start_new_session=True)
    config.stash[COMPILATION] = process, output


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile, minutes of work, on cores that the other tests leave idle; ``pytest -n`` leaves none, and compiles when its tests come, which is last."""
    wanted = any(item.path.name == "test_triton_aot.py" for item in session.items)
    if wanted and not session.config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        _compile(session.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if COMPILATION in session.config.stash:
        process, output = session.config.stash[COMPILATION]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(output.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def compilation(pytestconfig) -> tuple[subprocess.Popen, Path]:
    """The process that compiles all kernels ahead of time, and the file it writes in the end."""
    if COMPILATION not in pytestconfig.stash:
        _compile(pytestconfig)
    return pytestconfig.stash[COMPILATION]


def pytest_configure(config: pytest.Config) -> None:
    """``pytest -n 2`` hands out the tests in groups, in the order that ``pytest_collection_modifyitems`` gives them."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist, config.option.loadscopereorder = "loadgroup", False


@pytest.hookimpl(tryfirst=True)  # the groups must be there when pytest-xdist reads them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = lambda item: item.get_closest_marker("slow") is not None
    waits = lambda item: item.path.name == "test_triton_aot.py"
    items.sort(key=lambda item: (slow(item), waits(item)))  # stable: the order within each part stays
    for item in items:  # one process for the quick tests of a file and one for its slow ones: they share fixtures
        item.add_marker(pytest.mark.xdist_group(f"{item.nodeid.split('::')[0]}, {'slow' if slow(item) else 'quick'}"))

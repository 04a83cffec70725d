"""Fixtures shared by all tests, and their order: quick ones first, so a mistake shows early."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

# Threads that wait by spinning cost several times the work on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# pytest -n 2: a core for each process, none for its threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is imported: kernels run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_parser() -> None:
    """The command line's parser is built once for all tests of a process.

    It takes 0.4 s to build, and the tests run more than two hundred commands.
    """
    cli = sys.modules.get("iibalance.cli.main")  # where nothing imports it, no command is run
    if cli is not None:
        cli.main_parser = functools.cache(cli.main_parser)


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> None:
    """What a file finds in memory is left out of garbage collections.

    Every training ends with a collection of its own, which would take 0.3 s to walk through all
    imported modules, longer than a small training.
    """
    if "iibalance.training.stages" in sys.modules:
        import torch._dynamo  # noqa: F401, every optimiser does
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Triton's interpreter takes half the time for the same results."""
    interpreter = sys.modules.get("interpreter")  # imported where a test runs a kernel
    if interpreter is not None and interpreter.interpreted():
        interpreter.quicken()


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Runs and comparisons draw nothing: a picture takes as long as a small training."""
    import iibalance.comparison.protocol
    import iibalance.training.stages

    nothing = lambda *_, **__: None
    monkeypatch.setattr(iibalance.training.stages, "write_report", nothing)
    monkeypatch.setattr(iibalance.comparison.protocol, "write_picture", nothing)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; skips where there is none.

    ``IIBALANCE_DATA``, or ``../shared/data`` beside the repository.
    """
    given = os.environ.get("IIBALANCE_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"no real data: {folder} is absent "
            "(set IIBALANCE_DATA to the folder that holds avletters/, utd_mhad/, ...)"
        )
    return folder


COMPILATION = pytest.StashKey[tuple]()


def _compile(config: pytest.Config) -> None:
    """Begin the ahead-of-time compilation in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    output = Path(tempfile.mkdtemp()) / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/aot.py", str(output)]
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**environment, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    config.stash[COMPILATION] = process, output


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile, minutes of work, on cores that the other tests leave idle.

    ``pytest -n`` leaves none, and compiles when its tests come, which is last.
    """
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """``pytest -n 2``: a file's quick tests go to one process, its slow ones later to one process.

    They stay together because they share fixtures.
    """
    if config.getvalue("dist") != "load":
        return None  # another way was asked for
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def schedule(self) -> None:
            if self.collection_is_completed and self.collection is None:
                nodeids = next(iter(self.registered_collections.values()))
                files = [nodeid.split("::")[0] for nodeid in nodeids]
                begins = (int(file != before) for file, before in zip(files, [None, *files]))
                self.run_of = dict(zip(nodeids, accumulate(begins)))
            super().schedule()

        def _split_scope(self, nodeid: str) -> str:
            return str(self.run_of[nodeid])

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    waits = lambda item: item.path.name == "test_triton_aot.py"
    # The sort is stable: the order within each part stays.
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, waits(item)))

"""Running a comparison's cells in as many processes as there are workers."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from tqdm.auto import tqdm

from iibalance.comparison.cells import Cell, run_cell, stands
from iibalance.config import CompareConfig
from iibalance.errors import InputError

logger = logging.getLogger(__name__)

Task = tuple[Cell, dict]  # a cell and its setting


def run_cells(
    folder: Path, config: CompareConfig, cells: Sequence[Task], name: str
) -> dict[str, str]:
    """Run those that have no result yet, in ``workers`` processes; what failed, by cell."""
    waiting = [task for task in cells if not stands(folder, *task)]
    workers = min(config.workers or os.cpu_count() or 1, max(len(waiting), 1))
    failures: dict[str, str] = {}
    done, shown = len(cells) - len(waiting), config.training.progress
    bar = tqdm(
        total=len(cells), initial=done, desc=name, unit="cell", disable=None if shown else True
    )
    if shown:
        logger.info("%s: %d cells, %d of them done, %d workers", name, len(cells), done, workers)
    run = _here if workers == 1 else _in_processes
    with bar:
        for key, failure in run(folder, config, waiting, workers):
            if failure is not None:
                failures[key] = failure
            done += 1
            if shown:
                failed = "" if failure is None else f"  failed: {failure}"
                logger.info("%s: cell %d/%d  %s%s", name, done, len(cells), key, failed)
            bar.update()
            bar.set_postfix_str(key)
    return failures


def _here(
    folder: Path, config: CompareConfig, tasks: Iterable[Task], workers: int
) -> Iterator[tuple[str, str | None]]:
    threads = torch.get_num_threads()
    try:
        for cell, setting in tasks:
            yield _attempt(str(folder), config, cell, setting)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    folder: Path, config: CompareConfig, tasks: Iterable[Task], workers: int
) -> Iterator[tuple[str, str | None]]:
    # One thread each: the cores are the workers'.
    with parallel_config(
        "loky", inner_max_num_threads=1, initializer=_follow, initargs=(os.getpid(),)
    ):
        parallel = Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        yield from parallel(delayed(_attempt)(str(folder), config, *task) for task in tasks)


def _attempt(
    folder: str, config: CompareConfig, cell: Cell, setting: dict
) -> tuple[str, str | None]:
    """Run a cell; its key, and what went wrong with its data and setting.

    Anything else that goes wrong is a bug and stops the comparison.
    """
    try:
        run_cell(folder, config, cell, setting)
    except (InputError, FloatingPointError, ValueError) as error:
        return cell.key, f"{type(error).__name__}: {' '.join(str(error).split())}"
    return cell.key, None


def _follow(parent: int) -> None:
    """In a worker: end when the process that started it is gone, however it went.

    A worker of a killed comparison would train on for nobody. Ctrl-C is for the main process, which
    ends its workers: each of them would print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""Running a comparison's cells in as many processes as there are workers."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from iibalance.comparison.cells import Cell, run_cell, stands
from iibalance.config import CompareConfig
from iibalance.errors import InputError


def run_cells(
    folder: Path, config: CompareConfig, cells: Sequence[tuple[Cell, dict]], name: str
) -> dict[str, str]:
    """Run those that have no result yet, in ``workers`` processes; returns what failed, by cell."""
    waiting = [(cell, setting) for cell, setting in cells if not stands(folder, cell, setting)]
    workers = min(config.workers or os.cpu_count() or 1, max(len(waiting), 1))
    failures: dict[str, str] = {}
    bar = tqdm(
        total=len(cells),
        initial=len(cells) - len(waiting),
        desc=name,
        unit="cell",
        disable=None if config.training.progress else not sys.stderr.isatty(),
    )
    with bar:
        if workers == 1:
            threads = torch.get_num_threads()
            for cell, setting in waiting:
                failures |= _outcome(cell, lambda: run_cell(str(folder), config, cell, setting))
                bar.update()
            torch.set_num_threads(threads)
        elif waiting:
            context = multiprocessing.get_context("spawn")
            with (
                _few_threads(),
                ProcessPoolExecutor(
                    workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
                ) as pool,
            ):
                futures = {
                    pool.submit(run_cell, str(folder), config, cell, setting): cell
                    for cell, setting in waiting
                }
                try:
                    for future in as_completed(futures):
                        failures |= _outcome(futures[future], future.result)
                        bar.update()
                        bar.set_postfix_str(futures[future].key)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return failures


def _end_with(parent: int) -> None:
    """In a worker: end when the process that started it is gone, however it went; a worker of a killed comparison would train on for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _outcome(cell: Cell, run: Callable[[], None]) -> dict[str, str]:
    try:
        run()
    except (
        InputError,
        FloatingPointError,
        ValueError,
    ) as error:  # this cell's data and setting; anything else is a bug and stops the comparison
        return {cell.key: f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {}


@contextmanager
def _few_threads() -> Iterator[None]:
    """New processes with one OpenMP thread each: the cores are the workers'."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before

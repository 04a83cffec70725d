"""Work in processes of their own, with a time limit for each piece.

A piece that hangs is ended with its process, and the next one gets a fresh process. So does what
comes after an error that a GPU does not recover from, such as an access out of bounds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import NamedTuple

START_SECONDS = 120.0  # for a process to import PyTorch


class Task(NamedTuple):
    """A piece of work: a generator function, importable by name, and its arguments."""

    function: Callable[..., Iterable]
    arguments: tuple
    label: str = ""


class Event(NamedTuple):
    """What came of a task: ``value`` any number of times, then ``done``, ``error`` or ``late``.

    ``left out`` if it was never begun.
    """

    task: Task
    kind: str
    value: object = None


def _serve(pipe, threads: int | None) -> None:
    """What a process does: tasks from the pipe until it is closed."""
    os.setsid()  # so that whatever it starts can be ended with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    if threads:
        torch.set_num_threads(threads)
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            try:
                for value in function(*arguments):
                    pipe.send(("value", value))
                pipe.send(("done", None))
            except Exception as error:
                kind = "error" if recovered() else "fatal"
                pipe.send((kind, f"{type(error).__name__}: {error}"[:500]))


def recovered() -> bool:
    """Whether the GPU, if one is in use, still works after an error in this process."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def _end_with_parent() -> None:
    """End the process and what it started when the command itself has been killed."""
    multiprocessing.parent_process().join()
    os.killpg(os.getpgid(0), signal.SIGKILL)


class _Worker:
    """One process and what it is at."""

    def __init__(self, threads: int | None):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, threads), daemon=True)
        self.process.start()
        far.close()
        self.ready, self.task = False, None
        self.until = time.monotonic() + START_SECONDS

    def give(self, task: Task, seconds: float) -> None:
        self.task, self.until = task, time.monotonic() + seconds
        self.pipe.send((task.function, task.arguments))

    def end(self, grace: float = 0.0) -> None:
        """Kill it with everything that it started; ``grace`` seconds to go by itself."""
        if grace and self.ready and not self.task:
            self.pipe.close()
            self.process.join(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Pool:
    """Processes that take tasks; ``threads`` each, or as many as PyTorch takes."""

    def __init__(self, count: int, threads: int | None = None):
        self.count, self.threads = count, threads
        self.workers: list[_Worker] = []

    def close(self) -> None:
        """End all processes."""
        while self.workers:
            self.workers.pop().end(grace=3.0)

    def run(self, tasks: Iterable[Task], limit: float, until: float) -> Iterator[Event]:
        """Events of the tasks as they come.

        None takes more than ``limit`` seconds, none begins at or goes on beyond ``until`` (by
        ``time.monotonic``). Processes are kept for the next call.
        """
        waiting = deque(tasks)
        try:
            while waiting or any(worker.task for worker in self.workers):
                if waiting and time.monotonic() >= until:
                    yield from (Event(task, "left out") for task in waiting)
                    waiting.clear()
                    continue
                while len(self.workers) < min(self.count, len(waiting)):
                    self.workers.append(_Worker(self.threads))
                for worker in self.workers:
                    if worker.ready and not worker.task and waiting:
                        worker.give(waiting.popleft(), min(limit, until - time.monotonic()))
                yield from self._listen(limit, until, bool(waiting))
        finally:  # the caller may not want the rest
            for worker in [worker for worker in self.workers if worker.task]:
                self._lose(worker)

    def _listen(self, limit: float, until: float, waiting: bool) -> Iterator[Event]:
        """Messages of all processes, and the end of those whose time is over."""
        concerned = [
            worker for worker in self.workers if worker.task or (waiting and not worker.ready)
        ]
        ends = [worker.until for worker in concerned] + ([until] if waiting else [])
        timeout = max(0.0, min(ends, default=0.0) - time.monotonic())
        heard = wait([worker.pipe for worker in concerned], timeout)
        for worker in concerned:
            if worker.pipe in heard:
                yield from self._message(worker)
            elif time.monotonic() >= worker.until:
                task = worker.task
                self._lose(worker)
                if task:
                    cut = until <= time.monotonic()
                    reason = "the section's time was over" if cut else f"over {limit:.0f} s"
                    yield Event(task, "late", reason)
                else:
                    raise RuntimeError(f"a process did not start within {START_SECONDS:.0f} s")

    def _message(self, worker: _Worker) -> Iterator[Event]:
        task = worker.task
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            self._lose(worker)
            if not task:
                raise RuntimeError(
                    f"a process ended at its start, with status {worker.process.exitcode}"
                ) from None
            yield Event(task, "error", f"its process ended with status {worker.process.exitcode}")
            return
        if kind == "ready":
            worker.ready = True
            return
        if kind == "fatal":
            self._lose(worker)
            kind = "error"
        if kind != "value":
            worker.task = None
        yield Event(task, kind, value)

    def _lose(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.end()

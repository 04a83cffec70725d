"""Launch parameters of the main kernels, tried out: block sizes, warps and stages.

It writes ``launches.csv``: for every operator, shape, precision and launch the variants with their
times, the fastest first. A person takes from it what goes into the launch tables.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
from collections.abc import Callable, Iterator

import torch

from benchmarks import timing
from benchmarks.cases import at
from benchmarks.gpu_rows import COMPILE_LIMIT, LIMIT, Row
from benchmarks.gpu_session import Session, write
from benchmarks.shapes import PRECISIONS, conditions, function, in_mode
from benchmarks.workers import Pool, Task
from iib_kernels import _tuning

# Those that take their launch from _tuning.run
SWEPT = ("multimodal_objective", "fusion_cross_entropy", "alignment_loss")
PRECISION = ("bf16", "fp32")
ORDER = (3, 4, 5, 2, 1, 0)  # of the shapes: where the launch matters most first
COLUMNS = (
    "op", "shape", "precision", "launch", "variant", "p50", "against_table", "device", "dry_run",
)  # fmt: skip


@contextlib.contextmanager
def launches(change: Callable[[str, _tuning.Launch], _tuning.Launch]) -> Iterator[dict]:
    """Every launch that goes through ``_tuning.run`` takes what ``change`` makes of the table's.

    Yields the launches seen, by name: the text parts of their keys.
    """
    original, seen = _tuning.run, {}

    def run(key, candidates, launch):
        name = " ".join(part for part in key if isinstance(part, str))
        seen[name] = candidates[0]
        return launch(change(name, candidates[0]))

    _tuning.run = run
    try:
        yield seen
    finally:
        _tuning.run = original


def variants(launch: _tuning.Launch) -> list[_tuning.Launch]:
    """The table's launch, then each block size halved and doubled, warps, and stages.

    Blocks and warps go together, as a tile's warps follow from its size; stages are tried alone.
    A block too short for the row that it should hold gives wrong values, and is refused for them.
    """
    names = list(launch.blocks)
    tiles = [launch.blocks] + [
        {**launch.blocks, name: launch.blocks[name] * factor // 2}
        for name in names
        for factor in (1, 4)
        if launch.blocks[name] * factor // 2 >= 1
    ]
    found = [
        launch._replace(blocks=blocks, num_warps=warps)
        for blocks, warps in itertools.product(tiles, (1, 2, 4, 8))
    ]
    found += [launch._replace(num_stages=stages) for stages in (1, 2, 3, 4)]
    distinct = {text(variant): variant for variant in [launch, *found]}
    return list(distinct.values())


def text(launch: _tuning.Launch) -> str:
    """As it would stand in a table."""
    return f"Launch({launch.blocks}, {launch.num_warps}, {launch.num_stages})"


def recorded(row: Row) -> Iterator[dict]:
    """The launches of one step, by name; on a CPU, which has none, a stand-in for a dry run."""
    with launches(lambda name, launch: launch) as seen:
        _step(row)()
    yield seen if row.device != "cpu" else {"stand-in": _tuning.Launch({"BLOCK_B": 16})}


def _step(row: Row) -> Callable[[], object]:
    case = row.build()
    return in_mode(function(case, row.name, row.device), case, "step")


def try_variant(
    row: Row, launch: str, variant: _tuning.Launch, milliseconds: int
) -> Iterator[float]:
    """Seconds of a step with one launch changed; 0 milliseconds: compile only.

    A variant that gives other values than the table's is an error.
    """
    clock = timing.clock(row.device)
    change = lambda name, table: variant if name == launch else table
    with clock.stream(), conditions(PRECISIONS[row.precision], row.name, row.device):
        if not milliseconds:
            with launches(change):
                _step(row)()
            yield 0.0
            return
        expected = _step(row)()
        with launches(change):
            steps = [_step(row) for _ in range(1 if row.device == "cpu" else 8)]
            for value, right in zip(steps[0](), expected):
                if not torch.allclose(value.float(), right.float(), rtol=0.05, atol=1e-3):
                    raise RuntimeError("other values than with the table's launch")
            yield timing.measure(clock, steps, milliseconds=milliseconds)["p50"]


def sweep(session: Session) -> dict:
    """All variants of all launches: compiled in all processes, then timed in one."""
    rows = [
        Row(op, shape, precision, "ours", session.device)
        for shape in [session.shapes[place] for place in ORDER if place < len(session.shapes)]
        for op in SWEPT
        if op in at(shape)
        for precision in PRECISION
    ]
    tasks: list[Task] = []
    for row in rows:
        if session.left() <= 0:
            break
        for name, launch in session.ask(Task(recorded, (row,), row.label()), COMPILE_LIMIT).items():
            for variant in variants(launch):
                label = f"{row.label()}; {name}; {text(variant)}"
                tasks.append(Task(try_variant, (row, name, variant, 20), label))
    if not tasks:
        return {"left_out": "no launch goes through iib_kernels._tuning.run here"}
    deadline = session.deadline
    session.deadline -= session.left() / 2
    pool, broken = Pool(min(16, os.cpu_count() or 1), threads=1), {}
    only_compile = [
        task._replace(arguments=(*task.arguments[:3], 0), label=task.label) for task in tasks
    ]
    try:
        for event in session.run(only_compile, COMPILE_LIMIT, pool):
            if event.kind in ("error", "late", "left out"):
                broken[event.task.label] = f"{event.kind}: {event.value}"
    finally:
        pool.close()
        session.deadline = deadline
    timed: list[dict] = []
    ready = [task for task in tasks if task.label not in broken]
    for event in session.run(ready, LIMIT):
        row, name, variant, _ = event.task.arguments
        if event.kind == "value":
            about = {"op": row.op, "shape": str(row.shape), "precision": row.precision}
            timed.append({**about, "launch": name, "variant": text(variant), "p50": event.value})
            write(session.output / "launches.csv", table(session, timed))
        elif event.kind in ("error", "late", "left out"):
            broken[event.task.label] = f"{event.kind}: {event.value}"
    return {"timed": len(timed), "failed": broken}


def table(session: Session, timed: list[dict]) -> str:
    """CSV: the variants of each launch, the fastest first, beside the table's own."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    place = lambda row: tuple(row[name] for name in COLUMNS[:4])
    own: dict[tuple, float] = {}
    for row in timed:  # the first of each launch is the table's
        own.setdefault(place(row), row["p50"])
    machine = {name: session.machine.get(name) for name in ("device", "dry_run")}
    for row in sorted(timed, key=lambda row: (*place(row), row["p50"])):
        ratio = f"{row['p50'] / own[place(row)]:.3f}"
        writer.writerow({**row, "p50": f"{row['p50']:.6g}", "against_table": ratio, **machine})
    return buffer.getvalue()

"""The rows of a GPU session: which there are, how each is compiled, and how each is timed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch._functorch import config as functorch_config

from benchmarks import timing
from benchmarks.cases import OPS, at, precisions
from benchmarks.gpu_session import Session
from benchmarks.shapes import (
    MANY,
    ODD,
    PRECISIONS,
    WITHOUT_PRODUCTS,
    Case,
    Shape,
    conditions,
    function,
    in_mode,
)
from benchmarks.workers import Pool, Task, recovered

MAX = "compiled max-autotune"

LIMIT = 25.0  # seconds that one row may take, all its modes together
COMPILE_LIMIT = 150.0  # to compile one, beside others
TUNE_LIMIT = 120.0
# Compiled references, the most telling first; each takes seconds
COMPILED = ("multimodal_objective", "alignment_loss", "fusion_cross_entropy", "gated_fusion")
TUNED = COMPILED[:2]  # max-autotune has products to choose for


class Row(NamedTuple):
    """One implementation of one operator at one shape and precision."""

    op: str
    shape: Shape
    precision: str
    name: str  #: ``ours``, ``reference``, ``compiled``, ``compiled max-autotune`` or a peer
    device: str

    def about(self) -> dict:
        """Its columns."""
        named = {"op": self.op, "shape": str(self.shape)}
        return {**named, "precision": self.precision, "row": self.name}

    def label(self) -> str:
        """It in one line."""
        return f"{self.op} {self.shape} {self.precision} {self.name}"

    def build(self) -> Case:
        """Inputs, the same for every implementation."""
        torch.manual_seed(0)
        return OPS[self.op](self.shape, PRECISIONS[self.precision], self.device)


def plan(session: Session, *names: str, shapes: Sequence[Shape] = ()) -> list[Row]:
    """Rows by these names, ``peers`` for all peers; those of one case follow each other."""
    return [
        Row(op, shape, precision, name, session.device)
        for shape in shapes or session.shapes
        for op in at(shape)
        for precision in precisions(op)
        for name in names
    ]


def plan_compiled(session: Session) -> list[Row]:
    """Compiled references. A dry run compiles one operator."""
    few = 1 if session.dry_run else None
    wanted, kept = COMPILED[-1:] if few else COMPILED, WITHOUT_PRODUCTS[:few]
    rows = [
        row
        for row in plan(session, "compiled", shapes=session.shapes[:few])
        if row.op in wanted and row.precision in kept
    ]
    return sorted(rows, key=lambda row: wanted.index(row.op))


def plan_tuned(session: Session) -> list[Row]:
    """The same by max-autotune, where there is a product to choose for, at the last common size."""
    if session.dry_run:
        return [row._replace(name=MAX) for row in plan_compiled(session)[:1]]
    shape = [shape for shape in session.shapes if TUNED[0] in at(shape)][-1]
    return [row for row in plan(session, MAX) if row.op in TUNED and row.shape == shape]


def compile_row(row: Row) -> Iterator[str]:
    """Run every mode of a row once, which fills the compilers' caches on the disk."""
    functorch_config.donated_buffer = False
    with conditions(PRECISIONS[row.precision], row.name, row.device):
        case = row.build()
        forward = function(case, row.name, row.device)
        for mode in case.modes:
            in_mode(forward, case, mode)()
        if row.device == "cuda":
            torch.cuda.synchronize()
    yield "compiled"


def measure_row(row: Row, milliseconds: int) -> Iterator[dict]:
    """Every mode of a row, or of each peer of its operator for a row named ``peers``."""
    functorch_config.donated_buffer = False  # compiled backwards are repeated on one output
    clock = timing.clock(row.device)
    names = [row.name]
    if row.name == "peers":
        case = row.build()
        names = [*case.peers, *case.lesser]
    for name in names:
        with clock.stream(), conditions(PRECISIONS[row.precision], name, row.device):
            torch._dynamo.reset()
            yield from _modes(row._replace(name=name), clock, milliseconds)


def _modes(row: Row, clock, milliseconds: int) -> Iterator[dict]:
    cases = [row.build()]
    forward = function(cases[0], row.name, row.device)
    most = max(cases[0].bytes.values())
    for mode in cases[0].modes:
        entry = {**row.about(), "mode": mode, "least_bytes": cases[0].bytes[mode]}
        if cases[0].operations.get(mode):
            entry["least_operations"] = cases[0].operations[mode]
        try:
            call = in_mode(forward, cases[0], mode)
            count = timing.copies(clock, call, 2 * most, row.device)
            cases += [row.build() for _ in range(count - len(cases))]
            calls = [call] + [in_mode(forward, case, mode) for case in cases[1:count]]
            entry |= timing.measure(clock, calls, milliseconds=milliseconds)
        except Exception as error:
            yield {**entry, "error": f"{type(error).__name__}: {error}"[:300]}
            if not recovered():
                raise  # for a fresh process
            continue
        del call, calls
        yield entry | rates(row.device, row.precision, entry)


def rates(device: str, precision: str, entry: dict) -> dict:
    """Bytes and operations a second, beside those of a copy and of a product on this device."""
    seconds = entry["p50"]
    moved = entry["least_bytes"] / seconds
    found = {
        "gigabytes_per_second": moved / 1e9,
        "share_of_copy": moved / timing.copy_of(device, entry["least_bytes"]),
    }
    if entry.get("least_operations"):
        done = entry["least_operations"] / seconds
        best = timing.product_rate(device, PRECISIONS[precision].rate)
        found |= {"teraflops": done / 1e12, "share_of_products": done / best}
    return found


def measure_ceilings(device: str) -> Iterator[dict]:
    """Copy bandwidth and product rates: what the kernels are measured against."""
    clock = timing.clock(device)
    with clock.stream():
        most = timing.LARGEST_COPY if device == "cuda" else 2**20
        names = ("fp32", "tf32", "bf16")
        yield {
            "copy, bytes a second": timing.copy_of(device, most),
            **{
                f"{name} products, operations a second": timing.product_rate(device, name)
                for name in names
            },
        }


def compile_kernels(session: Session) -> dict:
    """Our kernels for every row, and for the checks' odd sizes."""
    checked = plan(session, "ours", shapes=(ODD, MANY))
    return compile_rows(session, plan(session, "ours") + checked)


def compile_rows(session: Session, rows: Sequence[Row]) -> dict:
    """Compile rows in as many processes as there are cores; only the disk keeps the result."""
    count = 2 if session.dry_run else min(16, os.cpu_count() or 1)
    pool = Pool(count, threads=1)
    try:
        tasks = [Task(compile_row, (row,), row.label()) for row in rows]
        return _follow(session, tasks, COMPILE_LIMIT, pool)
    finally:
        pool.close()


def measure_rows(session: Session, rows: Sequence[Row], limit: float) -> dict:
    """Every mode of the rows, in one process, one row at a time."""
    session.note("ceilings", **_ceilings(session))
    milliseconds = 2 if session.dry_run else 20
    tasks = [Task(measure_row, (row, milliseconds), row.label()) for row in rows]
    return _follow(session, tasks, limit)


def measure_kernels(session: Session) -> dict:
    """The kernels, the eager reference and the peers."""
    return measure_rows(session, plan(session, "ours", "reference", "peers"), LIMIT)


def measure_compiled(session: Session) -> dict:
    """The reference through torch.compile: all compiled in a pool first, then timed."""
    rows, deadline = plan_compiled(session), session.deadline
    session.deadline -= session.left() / 2
    compiled = compile_rows(session, rows)
    session.deadline = deadline
    # One that has not been compiled would hold up the others
    ready = [row for row in rows if row.label() not in compiled["left_out"]]
    found = measure_rows(session, ready, COMPILE_LIMIT / 2)
    return {**found, "left_out": compiled["left_out"] + found["left_out"]}


def measure_autotuned(session: Session) -> dict:
    """The reference through torch.compile with max-autotune.

    It times its candidates while it compiles, so it has the GPU to itself.
    """
    return measure_rows(session, plan_tuned(session), TUNE_LIMIT)


def _ceilings(session: Session) -> dict:
    return session.ask(Task(measure_ceilings, (session.device,), "ceilings"), 60.0)


def _follow(session: Session, tasks: list[Task], limit: float, pool: Pool | None = None) -> dict:
    """Keep what the tasks give; how many came to their end, and what became of the others.

    ``wrong``: rows of ours that failed.
    """
    done, left_out, failed, wrong = 0, [], {}, []
    for event in session.run(tasks, limit, pool):
        row, label = event.task.arguments[0], event.task.label
        if event.kind == "value" and isinstance(event.value, dict):
            session.add(**event.value)
        elif event.kind == "done":
            done += 1
        elif event.kind == "left out":
            left_out.append(label)
        elif event.kind in ("error", "late"):
            failed[label] = str(event.value)
            session.add(**row.about(), mode="all", error=failed[label])
        broken = event.kind == "error" or (
            event.kind == "value" and isinstance(event.value, dict) and "error" in event.value
        )
        if broken and row.name == "ours" and label not in wrong:
            wrong.append(label)
    return {"done": done, "left_out": left_out, "failed": failed, "wrong": wrong}

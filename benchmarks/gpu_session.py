"""One session on a GPU: its options, the time that is left, its processes, and its results.

``results.csv`` holds the measurements, each row with its GPU, versions and commit, and
``sections.json`` what the sections say beside them. Both are written whole after every change, and
both take in what an earlier session left in the same folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.shapes import SHAPES, TINY
from benchmarks.workers import Event, Pool, Task

# Columns by which a row is known: a new measurement takes the place of an old one.
KEY = ("device", "sources", "dry_run", "op", "mode", "shape", "precision", "row")
MACHINE = ("device", "dry_run", "date", "commit", "sources", "torch", "triton", "cuda", "driver")
COLUMNS = (
    *("op", "mode", "shape", "precision", "row", "p20", "p50", "p80", "timer", "copies"),
    *("host_seconds", "peak_bytes", "least_bytes", "gigabytes_per_second", "share_of_copy"),
    *("least_operations", "teraflops", "share_of_products", "note", "error"),
    *MACHINE,
)
TEXTS = ("op", "mode", "shape", "precision", "row", "timer", "note", "error", *MACHINE)
DRY = "no GPU: a dry run with stand-in sizes"


class Session:
    """Options, processes, time left, and the results, which are on disk after every change."""

    def __init__(self, output: Path, *, dry_run: bool, budget_seconds: float, quick: bool = False):
        self.output, self.dry_run = output, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.shapes = TINY if dry_run else SHAPES[:3] if quick else SHAPES
        self.end = time.monotonic() + budget_seconds
        self.deadline = self.end
        # Everything that is timed runs in one process
        self.pool = Pool(1, threads=1 if dry_run else None)
        self.machine: dict = {"dry_run": dry_run}
        self.rows: dict[tuple, dict] = {}
        self.sections: dict[str, dict] = {}
        self.stopped = False
        self._take_over()

    def _take_over(self) -> None:
        """Results of an earlier session in the same folder."""
        table, notes = self.output / "results.csv", self.output / "sections.json"
        if table.exists():
            self.rows = {_key(row): row for row in read(table)}
        if notes.exists():
            self.sections = json.loads(notes.read_text(encoding="utf-8"))
        dry = [bool(row["dry_run"]) for row in self.rows.values()]
        dry += [bool(section.get("dry_run")) for section in self.sections.values()]
        if any(found != self.dry_run for found in dry):
            kinds = ("a dry run", "measurements") if self.dry_run else ("measurements", "a dry run")
            raise FileExistsError(
                f"{self.output}: {kinds[0]} cannot be written beside {kinds[1]}; "
                "give another folder"
            )

    def left(self) -> float:
        """Seconds that the running section may still take."""
        return self.deadline - time.monotonic()

    def run(self, tasks: Sequence[Task], limit: float, pool: Pool | None = None) -> Iterator[Event]:
        """Events of the tasks, within the section's time and each within ``limit`` seconds."""
        return (pool or self.pool).run(tasks, limit, self.deadline)

    def ask(self, task: Task, limit: float) -> object:
        """The one value of a task; RuntimeError if it gives none."""
        for event in self.run([task], limit):
            if event.kind == "value":
                return event.value
            if event.kind != "done":
                raise RuntimeError(f"{task.label}: {event.kind}, {event.value}")
        raise RuntimeError(f"{task.label}: nothing came")

    def add(self, **row) -> None:
        """Keep one measurement, in the place of an older one of the same thing.

        Mode ``all`` is for a row that failed before its modes: a measurement takes its place too.
        """
        row = {**row, **{name: self.machine.get(name) for name in MACHINE}}
        self.rows.pop(_key({**row, "mode": "all"}), None)
        self.rows[_key(row)] = row
        self.save()

    def note(self, section: str, **facts) -> None:
        """Keep what a section says."""
        self.sections[section] = {**facts, "dry_run": self.dry_run}
        self.save()

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        self.output.mkdir(parents=True, exist_ok=True)
        write(self.output / "results.csv", text(self.rows.values()))
        write(self.output / "sections.json", json.dumps(self.sections, indent=1))


def merged(rows: Iterable[dict]) -> list[dict]:
    """Rows of several sessions; of two of the same thing the first."""
    found: dict[tuple, dict] = {}
    for row in rows:
        found.setdefault(_key(row), row)
    return list(found.values())


def _key(row: dict) -> tuple:
    return tuple("" if row.get(name) is None else str(row[name]) for name in KEY)


def text(rows: Iterable[dict]) -> str:
    """Rows as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        short = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in row.items()
            if value is not None
        }
        writer.writerow(short)
    return buffer.getvalue()


def read(path: Path) -> list[dict]:
    """Rows of a CSV of this command; ValueError for another file."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: not a results.csv of benchmarks.on_gpu")
        rows = list(reader)
    for row in rows:
        for name, value in row.items():
            if name == "dry_run":
                row[name] = value == "True"
            elif name not in TEXTS:
                row[name] = float(value) if value else None
            else:
                row[name] = value or None
    return rows


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(content, encoding="utf-8")
    os.replace(scratch, path)

"""One session on a GPU: its options, the device, the time that is left, and the results."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from benchmarks import timing
from benchmarks.cases import SHAPES, TINY


class Session:
    """Options, device, time left, and the results, which are on disk after every change."""

    def __init__(self, output: Path, *, dry_run: bool, budget_seconds: float, quick: bool):
        self.output, self.dry_run, self.quick = output, dry_run, quick
        self.device = "cpu" if dry_run else "cuda"
        self.implementation = "reference" if dry_run else "triton"
        self.shapes = TINY if dry_run else SHAPES[:3] if quick else SHAPES
        self.end = time.monotonic() + budget_seconds
        self.deadline = self.end
        self.results = {
            "environment": {**timing.environment(self.device), "dry_run": dry_run},
            "sections": {},
            "measurements": [],
        }
        output.mkdir(parents=True, exist_ok=True)
        self.save()

    def left(self) -> float:
        """Seconds that the running section may still take."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """Write results.json, whole or not at all."""
        scratch = self.output / ".results.json.writing"
        scratch.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        os.replace(scratch, self.output / "results.json")

    def add(self, **row) -> None:
        """Keep one measurement."""
        self.results["measurements"].append(row)
        self.save()

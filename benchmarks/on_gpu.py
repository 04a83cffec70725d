"""Everything that only a GPU can show: ``python -m benchmarks.on_gpu --output DIR``, no network.

Sections, the most valuable first: the kernels are compiled in all processes that there are cores
for; the compiled test suite; bitwise repeats and errors; every row of the kernels, the eager
reference and the peers; an end-to-end step; hardware counters; the compiled references;
compute-sanitizer; max-autotune. ``sweep`` tries launch parameters and runs only on request.

Results are written after each measurement, so that the command may be stopped at any moment, and
sections that run in another session with the same folder are added to them. The exit status is 1 if
a test fails, a result does not repeat bit for bit, or an error is larger than it may be.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_checks, gpu_profile, gpu_rows, gpu_step, gpu_sweep, report, timing
from benchmarks.gpu_session import DRY, Session
from benchmarks.workers import Task


class Stopped(BaseException):
    """SIGTERM: write what there is and end."""


# name -> (what runs, its share of the time beside the others' that are still to run)
SECTIONS: dict[str, tuple[Callable[[Session], dict], float]] = {
    "compile": (gpu_rows.compile_kernels, 0.16),
    "tests": (gpu_checks.run_tests, 0.26),
    "repeats": (gpu_checks.check_repeats, 0.08),
    "kernels": (gpu_rows.measure_kernels, 0.26),
    "end_to_end": (gpu_step.measure_end_to_end, 0.06),
    "profile": (gpu_profile.profile, 0.06),
    "compiled": (gpu_rows.measure_compiled, 0.16),
    "sanitizer": (gpu_checks.run_sanitizer, 0.06),
    "autotuned": (gpu_rows.measure_autotuned, 0.10),
    "sweep": (gpu_sweep.sweep, 1.0),
}
DEFAULT = tuple(name for name in SECTIONS if name != "sweep")


def environment(device: str) -> Iterator[dict]:
    """The machine, as a process on the GPU sees it; the command itself leaves the GPU alone."""
    yield timing.environment(device)


def run(session: Session, names: Sequence[str]) -> bool:
    """The sections in order; whatever happens, results and report are written.

    Whether nothing is wrong.
    """
    try:
        session.machine |= session.ask(Task(environment, (session.device,), "environment"), 120.0)
        if session.dry_run:
            session.machine["device"] = DRY
        session.note("machine", **session.machine)
        for number, name in enumerate(names):
            shares = [SECTIONS[later][1] for later in names[number:]]
            now = time.monotonic()
            session.deadline = now + (session.end - now) * shares[0] / sum(shares)
            _section(session, name)
    except (Stopped, KeyboardInterrupt):
        session.stopped = True
        print("stopped: what there is has been written", flush=True)
    finally:
        session.pool.close()
        session.save()
        for path in report.write(
            session.output, session.machine, list(session.rows.values()), summary(session)
        ):
            print(path)
    wrong = [name for name in names if session.sections.get(name, {}).get("wrong")]
    for name in wrong:
        print(f"WRONG: {name}, see {session.output / 'sections.json'}", file=sys.stderr)
    return not wrong


def _section(session: Session, name: str) -> None:
    """Run one section and keep what it says."""
    if session.end - time.monotonic() < 1:
        session.note(name, left_out="the whole time was over")
        return
    print(f"{name} ...", flush=True)
    began = time.monotonic()
    session.sections.pop(name, None)
    try:
        outcome = SECTIONS[name][0](session)
    except Exception:
        trace = traceback.format_exc()[-4000:]
        outcome = {**session.sections.get(name, {}), "error": trace, "wrong": True}
    seconds = round(time.monotonic() - began, 1)
    session.note(name, **{**outcome, "seconds": seconds, "sources": session.machine.get("sources")})
    print(f"{name}: {seconds} s{', WRONG' if outcome.get('wrong') else ''}", flush=True)


# What the report says of a section, where it has it.
NOTED = (
    "left_out", "done", "timed", "returncode", "out_of_time", "missing", "passed", "all_bitwise",
    "largest_error", "bounds", "head_share", "failed", "wrong", "tool",
)  # fmt: skip


def summary(session: Session) -> str:
    """The sections that are no table, in words."""
    lines = ["", "## Beside the timings", ""]
    if session.stopped:
        lines.append("- The run was stopped before its end.")
    for name, section in session.sections.items():
        notes = []
        for key in NOTED:
            value = section.get(key)
            if isinstance(value, (list, dict)) and key not in ("bounds", "largest_error"):
                value = _few(value)
            if value is not None and value != "":
                notes.append(f"{key.replace('_', ' ')}: {value}")
        if "error" in section:
            notes.append("failed: " + section["error"].strip().splitlines()[-1])
        if name in ("tests", "sanitizer") and section.get("output"):
            notes.append(section["output"].strip().splitlines()[-1])
        if name in ("ceilings", "machine"):
            shown = lambda value: f"{value:.4g}" if isinstance(value, float) else value
            notes = [f"{key}: {shown(value)}" for key, value in section.items() if value]
        lines.append(f"- {name} ({section.get('seconds', 0)} s): " + ("; ".join(notes) or "done"))
    return "\n".join(lines) + "\n"


def _few(values: list | dict) -> str:
    """The first of many, and how many there are."""
    entries = (
        [f"{key}: {value}" for key, value in values.items()] if isinstance(values, dict) else values
    )
    shown = ", ".join(str(entry)[:160] for entry in entries[:4])
    return f"{shown}, ... ({len(entries)})" if len(entries) > 4 else shown


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the results; what it holds already is added to"
    )
    parser.add_argument(
        "--section",
        default=",".join(DEFAULT),
        help="which of them, by comma: " + ", ".join(SECTIONS),
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=440.0,
        help="when to stop starting new work (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="the three small shapes only")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the whole program on the CPU with tiny shapes and plain PyTorch: measures nothing",
    )
    parser.add_argument("--small-case", choices=("cpu", "cuda"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--profile-case", choices=tuple(gpu_profile.PROFILED), help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if options.small_case:
        gpu_checks.small_case(options.small_case)
        return 0
    if options.profile_case:
        gpu_profile.profile_case(options.profile_case)
        return 0
    names = [name.strip() for name in options.section.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--section: {unknown[0]!r} is none of {', '.join(SECTIONS)}")
    if options.output is None:
        parser.error("--output: a folder is needed for the results")
    if options.budget_seconds <= 0:
        parser.error(f"--budget-seconds: expected a number above 0, got {options.budget_seconds}")
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks.on_gpu: no GPU is visible to PyTorch here; "
            "--dry-run shows that the program itself works",
            file=sys.stderr,
        )
        return 2
    try:
        session = Session(
            options.output,
            dry_run=options.dry_run,
            budget_seconds=options.budget_seconds,
            quick=options.quick,
        )
    except (FileExistsError, ValueError) as error:
        print(f"benchmarks.on_gpu: {error}", file=sys.stderr)
        return 2

    def stop(*_):
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    return 0 if run(session, [name for name in SECTIONS if name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can show: ``python -m benchmarks.on_gpu --output DIR``, no network.

Sections, the most valuable first: the compiled test suite, bitwise repeats, ceilings of the device,
every benchmark of the kernels and the eager reference, an end-to-end step, compute-sanitizer, and
the compiled references, which spend their time compiling.

Results are written after each measurement, so that it may be stopped at any moment. A section that
fails is recorded with its traceback, and the others go on.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu_checks, gpu_measurements, report
from benchmarks.gpu_session import Session


class Stopped(BaseException):
    """SIGTERM: write what there is and end."""


# What the report says of a section, where it has it.
NOTED = ("left_out", "returncode", "out_of_time", "all_bitwise", "largest_error", "tool")

# name -> (what runs, the share of the whole budget that it may take)
SECTIONS: dict[str, tuple[Callable[[Session], dict], float]] = {
    "tests": (gpu_checks.run_tests, 0.30),
    "repeats": (gpu_checks.check_repeats, 0.08),
    "ceilings": (gpu_measurements.measure_ceilings, 0.05),
    "kernels": (gpu_measurements.measure_kernels, 0.25),
    "end_to_end": (gpu_measurements.measure_end_to_end, 0.10),
    "sanitizer": (gpu_checks.run_sanitizer, 0.12),
    "compiled": (gpu_measurements.measure_compiled, 0.25),
    "autotuned": (gpu_measurements.measure_autotuned, 0.15),
}


def run(session: Session, names: Sequence[str]) -> None:
    """The sections in order; whatever happens, results and report are written."""
    budget = session.left()
    try:
        for name in names:
            work, share = SECTIONS[name]
            session.deadline = min(session.end, time.monotonic() + share * budget)
            began = time.monotonic()
            if session.left() < 1:
                session.results["sections"][name] = {"left_out": "the whole time was over"}
                continue
            print(f"{name} ...", flush=True)
            try:
                outcome = work(session)
            except Exception:
                outcome = {
                    **session.results["sections"].get(name, {}),
                    "error": traceback.format_exc()[-4000:],
                }
            seconds = round(time.monotonic() - began, 1)
            session.results["sections"][name] = {**outcome, "seconds": seconds}
            session.save()
            failed = ", failed" if "error" in outcome else ""
            print(f"{name}: {seconds} s{failed}", flush=True)
    except (Stopped, KeyboardInterrupt):
        session.results["stopped"] = True
        print("stopped: what there is has been written", flush=True)
    finally:
        session.save()
        for path in report.write(
            session.output,
            session.results["environment"],
            session.results["measurements"],
            _summary(session.results),
        ):
            print(path)


def _summary(results: dict) -> str:
    """The sections that are no table, in words."""
    lines, sections = ["", "## Beside the timings", ""], results["sections"]
    if results.get("stopped"):
        lines.append("- The run was stopped before its end.")
    for name, section in sections.items():
        notes = [f"{key.replace('_', ' ')}: {section[key]}" for key in NOTED if key in section]
        if "error" in section:
            notes.append("failed: " + section["error"].strip().splitlines()[-1])
        if name == "tests" and section.get("output"):
            notes.append(section["output"].strip().splitlines()[-1])
        for step, measured in section.get("steps", {}).items():
            share = f"head {100 * measured['head_share']:.1f} % of it"
            notes.append(f"{step}: {report.duration(measured['seconds'])}, {share}")
        lines.append(f"- {name} ({section.get('seconds', 0)} s): " + ("; ".join(notes) or "done"))
    for name, value in results.get("ceilings", {}).items():
        lines.append(f"- {name}: {value if isinstance(value, dict) else f'{value:.3g}'}")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, help="folder for results.json, benchmarks.md and benchmarks.png"
    )
    parser.add_argument(
        "--sections",
        default=",".join(SECTIONS),
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
    parser.add_argument("--small-case", choices=("triton", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.small_case:
        gpu_checks.small_case(options.small_case)
        return 0
    names = [name.strip() for name in options.sections.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: {unknown[0]!r} is none of {', '.join(SECTIONS)}")
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

    def stop(*_):
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    run(
        Session(
            options.output,
            dry_run=options.dry_run,
            budget_seconds=options.budget_seconds,
            quick=options.quick,
        ),
        names,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

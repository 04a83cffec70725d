"""What a GPU session checks: the compiled tests, bitwise repeats, and compute-sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.cases import OPS, precisions
from benchmarks.gpu_rows import LIMIT, Row
from benchmarks.gpu_session import Session
from benchmarks.shapes import MANY, ODD, PRECISIONS, Case, conditions, function
from benchmarks.timing import ROOT
from benchmarks.workers import Task

SANITIZERS = (
    "compute-sanitizer",
    "/usr/local/cuda/bin/compute-sanitizer",
    "/opt/nvidia/compute-sanitizer/compute-sanitizer",
)
# Largest error of an output or a gradient, in the Euclidean norm, relative to float64's
BOUNDS = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 1e-2, "amp": 1e-2}


def run_tests(session: Session) -> dict:
    """The test suite of the kernels, compiled, over all cores, in processes of their own.

    Its output, a line a test, is in ``tests.log`` while it runs.
    """
    here = lambda name: importlib.util.find_spec(name) is not None
    if not here("pytest"):
        return {"left_out": "pytest is not installed here"}
    options = ["-v", "--tb=short", "--maxfail=10", "-p", "no:cacheprovider"]
    if session.dry_run:
        options = ["-q", "--collect-only", "-p", "no:cacheprovider"]
    elif here("xdist"):
        # By test, not by file: a few long files would leave most cores idle
        options += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    if here("pytest_timeout") and not session.dry_run:
        options += ["--timeout=300"]
    files = compiled_tests(with_hypothesis=here("hypothesis"))
    command = [sys.executable, "-m", "pytest", *options, *files]
    # A few of Triton's compilations at once, not sixteen times as many threads as cores
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = limited(command, session.left(), environment, session.output / "tests.log")
    missing = [name for name in ("xdist", "hypothesis", "pytest_timeout") if not here(name)]
    log = (session.output / "tests.log").read_text(encoding="utf-8", errors="replace")
    wrong = " FAILED" in log or (done["returncode"] != 0 and not done["out_of_time"])
    about = {"missing": missing, "command": " ".join(command[1:]), "passed": log.count(" PASSED")}
    return {**done, **about, "wrong": wrong}


def compiled_tests(*, with_hypothesis: bool) -> list[str]:
    """Files of kernel tests that run compiled where there is a GPU."""
    found = []
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "torch.cuda.is_available" not in source:
            continue
        if with_hypothesis or "import hypothesis" not in source.replace("from ", "import "):
            found.append(str(path.relative_to(ROOT)))
    return found


def limited(
    command: Sequence[str], seconds: float, environment: dict | None = None, log: Path | None = None
) -> dict:
    """Run a command for at most ``seconds``; its output goes to ``log`` as it comes.

    Returns its status, the end of its output, and whether it was stopped.
    """
    with (
        log.open("wb") if log else contextlib.nullcontext(subprocess.PIPE) as out,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            output, stopped = process.communicate(timeout=max(1.0, seconds))[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, stopped = process.communicate()[0], True
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    output = log.read_bytes() if log else output
    text = output.decode("utf-8", "replace")[-6000:]
    return {"returncode": process.returncode, "out_of_time": stopped, "output": text}


def _results(case: Case, row: str, device: str) -> list[torch.Tensor]:
    """Outputs and gradients of one step, with fixed upstream gradients."""
    outputs = list(function(case, row, device)(case.inputs))
    differentiable = [value for value in outputs if value.requires_grad]
    results = [value.detach() for value in outputs]
    if differentiable:
        generator = torch.Generator().manual_seed(1)
        upstream = [
            # Rounded to the shortest type, so that every precision gets the same numbers
            torch.randn(value.shape, generator=generator).bfloat16().to(value)
            for value in differentiable
        ]
        results += torch.autograd.grad(differentiable, case.leaves, upstream)
    return results


def raised(case: Case) -> Case:
    """The same case in float64."""
    known: dict[int, torch.Tensor] = {}

    def up(value):
        if isinstance(value, (tuple, list)):
            return type(value)(up(entry) for entry in value)
        if not value.is_floating_point():
            return value.clone()
        if id(value) not in known:
            known[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
        return known[id(value)]

    inputs = up(case.inputs)
    return Case(
        case.op, case.shape, case.run, inputs, [known[id(leaf)] for leaf in case.leaves], {}
    )


def repeat_row(row: Row, times: int) -> Iterator[dict]:
    """One operator many times on the same input.

    Each result must equal the first bit for bit, and be as near the float64 reference as
    ``BOUNDS`` says.
    """
    with conditions(PRECISIONS[row.precision], row.name, row.device):
        # Built anew each time: some work in place
        first = _results(row.build(), row.name, row.device)
        same = all(
            all(map(torch.equal, first, _results(row.build(), row.name, row.device)))
            for _ in range(times)
        )
    truth = _results(raised(row.build()), "reference", row.device)
    with conditions(PRECISIONS[row.precision], "reference", row.device):
        eager = _results(row.build(), "reference", row.device)
    errors = [
        max(_error(value, right) for value, right in zip(found, truth) if right.numel())
        for found in (first, eager)
    ]
    bound = BOUNDS[row.precision]
    yield {
        "bitwise": same,
        "error": errors[0],
        "eager_error": errors[1],
        "bound": bound,
        "wrong": not (same and errors[0] <= bound),  # NaN is wrong
    }


def _error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative error in the Euclidean norm."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


def check_repeats(session: Session) -> dict:
    """Every operator at odd and common sizes, each in its own time."""
    found, failed, wrong, left_out = {}, {}, [], []
    tasks = [
        Task(repeat_row, (row, 3 if session.dry_run else 20), row.label())
        for shape in (ODD, *[shape for shape in session.shapes[:4] if shape.width])
        for op in OPS
        for precision in precisions(op)
        for row in [Row(op, shape, precision, "ours", session.device)]
    ]
    for event in session.run(tasks, LIMIT):
        label = event.task.label
        if event.kind == "value":
            found[label] = event.value
            wrong += [label] if event.value["wrong"] else []
        elif event.kind == "left out":
            left_out.append(label)
        elif event.kind in ("error", "late"):
            failed[label] = str(event.value)
            wrong += [label] if event.kind == "error" else []
        session.note("repeats", found=found, failed=failed)
    return {
        "found": found,
        "failed": failed,
        "left_out": left_out,
        "all_bitwise": all(entry["bitwise"] for entry in found.values()),
        "largest_error": {
            name: max(errors)
            for name in BOUNDS
            if (
                errors := [entry["error"] for label, entry in found.items() if f" {name} " in label]
            )
        },
        "bounds": BOUNDS,
        "wrong": wrong,
    }


def run_sanitizer(session: Session) -> dict:
    """compute-sanitizer's memcheck over every operator at odd sizes."""
    small = [sys.executable, "-m", "benchmarks.on_gpu", "--small-case", session.device]
    if session.dry_run:
        return {**limited(small, session.left()), "left_out": "dry run: without compute-sanitizer"}
    tool = next((found for name in SANITIZERS if (found := shutil.which(name))), None)
    if tool is None:
        return {"left_out": "compute-sanitizer is not installed here"}
    # Without the cache, as neighbours in one of its blocks hide each other's overruns.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *small]
    done = limited(command, session.left(), environment)
    return {**done, "tool": tool, "wrong": done["returncode"] != 0 and not done["out_of_time"]}


def small_case(device: str) -> None:
    """Every operator, forward and backward, at odd sizes, and with many classes."""
    for shape in (ODD, MANY):
        for op in OPS:
            for precision in precisions(op):
                row = Row(op, shape, precision, "ours", device)
                with conditions(PRECISIONS[precision], "ours", device):
                    results = _results(row.build(), "ours", device)
                assert all(torch.isfinite(value).all() for value in results), row.label()
    if device == "cuda":
        torch.cuda.synchronize()
    print("small case done")

"""What a GPU session checks: the compiled tests, bitwise repeats, and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.cases import OPS, Case, Shape
from benchmarks.gpu_session import Session
from benchmarks.timing import ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ODD = Shape(37, 19, 45, 3, "odd sizes")
SANITIZERS = (
    "compute-sanitizer",
    "/usr/local/cuda/bin/compute-sanitizer",
    "/opt/nvidia/compute-sanitizer/compute-sanitizer",
)


def run_tests(session: Session) -> dict:
    """The test suite of the kernels, compiled, in a process of its own."""
    absent = lambda name: (
        subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode
    )
    missing = [name for name in ("pytest", "hypothesis") if absent(name)]
    if "pytest" in missing:
        return {"left_out": "pytest is not installed here"}
    files = ["tests/kernels/test_triton_functions.py"]
    if "hypothesis" not in missing:
        files.append("tests/kernels/test_triton_values.py")
    options = ["-q", "-p", "no:cacheprovider", *(["--collect-only"] if session.dry_run else [])]
    command = [sys.executable, "-m", "pytest", *options, *files]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = limited(command, session.left(), environment)
    return {**done, "missing": missing, "command": " ".join(command[1:])}


def limited(command: Sequence[str], seconds: float, environment: dict | None = None) -> dict:
    """Run a command for at most ``seconds``.

    Returns its status, the end of its output, and whether it was stopped.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, stopped = process.communicate(timeout=max(1.0, seconds))[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, stopped = process.communicate()[0], True
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return {"returncode": process.returncode, "out_of_time": stopped, "output": output[-6000:]}


def _gradients(case: Case, implementation: str) -> list[torch.Tensor]:
    """Outputs and gradients of one step, with fixed upstream gradients."""
    outputs = list(case.call(implementation))
    differentiable = [value for value in outputs if value.requires_grad]
    if not differentiable:
        return outputs
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    normal = lambda like: torch.randn(like.shape, generator=generator, device=like.device)
    upstream = [normal(value).to(value.dtype) for value in differentiable]
    gradients = torch.autograd.grad(differentiable, case.leaves, upstream)
    return [*(value.detach() for value in outputs), *gradients]


def check_repeats(session: Session) -> dict:
    """Every operator twenty times on the same input.

    Each result must equal the first bit for bit, and be near the reference's.
    """
    found = {}
    for shape in (ODD, *session.shapes[:3]):
        for name, build in OPS.items():
            for dtype in DTYPES:
                if session.left() < 0:
                    return {"found": found, "left_out": "the section's time was over"}
                torch.manual_seed(2)
                case = build(shape, DTYPES[dtype], session.device)
                first = _gradients(case, session.implementation)
                same = all(
                    all(map(torch.equal, first, _gradients(case, session.implementation)))
                    for _ in range(3 if session.dry_run else 20)
                )
                expected = _gradients(case, "reference")
                error = max(_error(a, b) for a, b in zip(first, expected) if b.numel())
                found[f"{name} {shape} {dtype}"] = {"bitwise": same, "relative_error": error}
                session.results["sections"]["repeats"] = {"found": found}
                session.save()
    return {
        "found": found,
        "all_bitwise": all(entry["bitwise"] for entry in found.values()),
        "largest_error": max(entry["relative_error"] for entry in found.values()),
    }


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error in the Euclidean norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def run_sanitizer(session: Session) -> dict:
    """compute-sanitizer's memcheck over every operator at odd sizes."""
    small = [sys.executable, "-m", "benchmarks.on_gpu", "--small-case", session.implementation]
    if session.dry_run:
        return {**limited(small, session.left()), "left_out": "dry run: without compute-sanitizer"}
    tool = next((found for name in SANITIZERS if (found := shutil.which(name))), None)
    if tool is None:
        return {"left_out": "compute-sanitizer is not installed here"}
    # Without the cache, as neighbours in one of its blocks hide each other's overruns.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *small]
    return {
        **limited(command, session.left(), environment),
        "tool": tool,
    }


def small_case(implementation: str) -> None:
    """Every operator, forward and backward, at odd sizes, and with many classes."""
    device = "cuda" if torch.cuda.is_available() and implementation == "triton" else "cpu"
    for shape in (ODD, Shape(5, 309, 33, 2)):
        for name, build in OPS.items():
            for dtype in DTYPES.values():
                results = _gradients(build(shape, dtype, device), implementation)
                assert all(torch.isfinite(value).all() for value in results), name
    if device == "cuda":
        torch.cuda.synchronize()
    print("small case done")

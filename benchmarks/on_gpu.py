"""Everything that only a GPU can show, in one command without network: ``python -m benchmarks.on_gpu --output DIR``.

Sections, the most valuable first: the compiled test suite, bitwise repeats, ceilings of the device, every benchmark of the kernels and the eager
reference, an end-to-end step, compute-sanitizer, and the compiled references, which spend their time compiling. Results are written after each
measurement, so that it may be stopped at any moment; a section that fails is recorded with its traceback and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import iib_kernels
from benchmarks import report, timing
from benchmarks.cases import ONLY_ALIGNMENT, OPS, SHAPES, TINY, Case, Shape, function
from benchmarks.resnet import resnet18

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ODD = Shape(37, 19, 45, 3, "odd sizes")
SANITIZERS = (
    "compute-sanitizer",
    "/usr/local/cuda/bin/compute-sanitizer",
    "/opt/nvidia/compute-sanitizer/compute-sanitizer",
)


class Stopped(BaseException):
    """SIGTERM: write what there is and end."""


class Session:
    """Options, the device, the time that is left, and the results, which are on disk after every change."""

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


def run_tests(session: Session) -> dict:
    """The test suite of the kernels, compiled, in a process of its own."""
    missing = [
        name
        for name in ("pytest", "hypothesis")
        if subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode
    ]
    if "pytest" in missing:
        return {"left_out": "pytest is not installed here"}
    files = [
        "tests/kernels/test_triton_functions.py",
        *(["tests/kernels/test_triton_values.py"] if "hypothesis" not in missing else []),
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(["--collect-only"] if session.dry_run else []),
        *files,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = _limited(command, session.left(), environment)
    return {**done, "missing": missing, "command": " ".join(command[1:])}


def _limited(command: Sequence[str], seconds: float, environment: dict | None = None) -> dict:
    """Run a command for at most ``seconds``: its status, the end of its output, and whether it was stopped."""
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
    upstream = [
        torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32).to(
            value.dtype
        )
        for value in differentiable
    ]
    return [value.detach() for value in outputs] + list(
        torch.autograd.grad(differentiable, case.leaves, upstream)
    )


def check_repeats(session: Session) -> dict:
    """Every operator twenty times on the same input: each result must equal the first bit for bit, and be near the reference's."""
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
                    all(
                        torch.equal(a, b)
                        for a, b in zip(first, _gradients(case, session.implementation))
                    )
                    for _ in range(3 if session.dry_run else 20)
                )
                expected = _gradients(case, "reference")
                error = max(
                    float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
                    for a, b in zip(first, expected)
                    if b.numel()
                )
                found[f"{name} {shape} {dtype}"] = {"bitwise": same, "relative_error": error}
                session.results["sections"]["repeats"] = {"found": found}
                session.save()
    return {
        "found": found,
        "all_bitwise": all(entry["bitwise"] for entry in found.values()),
        "largest_error": max(e["relative_error"] for e in found.values()),
    }


def measure_ceilings(session: Session) -> dict:
    """Copy bandwidth and matrix products: what the kernels are measured against."""
    small = session.dry_run
    rates = {
        "copy_bytes_per_second": timing.copy_bandwidth(
            session.device, mebibytes=1 if small else 1024
        ),
        "matmul_flops": timing.matmul_rates(session.device, side=64 if small else 8192),
    }
    session.results["ceilings"] = rates
    return rates


def _plan(session: Session, rows: Sequence[str]) -> Iterator[tuple[Case, str, str]]:
    """(case, dtype, row), one case's inputs at a time."""
    for dtype in DTYPES:
        for shape in session.shapes:
            for name, build in OPS.items():
                if (shape == ONLY_ALIGNMENT and name != "alignment_loss") or (
                    session.dry_run and "reference" not in rows and name != "gated_fusion"
                ):
                    continue  # a dry run compiles one operator only
                torch.manual_seed(0)
                case = build(shape, DTYPES[dtype], session.device)
                for row in (*rows, *(case.peers if "reference" in rows else ())):
                    yield case, dtype, row


def _measure_rows(session: Session, rows: Sequence[str]) -> dict:
    """Every mode of every planned row, until the section's time is over."""
    functorch_config.donated_buffer = False  # compiled backwards are repeated on one output
    copy, left_out = session.results.get("ceilings", {}).get("copy_bytes_per_second"), 0
    for case, dtype, row in _plan(session, rows):
        if session.left() < 0:
            left_out += 1
            continue
        if row.startswith("compiled"):
            torch._dynamo.reset()
        try:
            forward = function(case, row)
            calls = {"forward": _without_gradient(forward)}
            if case.leaves:
                calls |= {"step": _step(forward, case), "backward": _backward(forward, case)}
        except Exception as error:
            session.add(
                op=case.op,
                mode="step",
                shape=str(case.shape),
                dtype=dtype,
                row=row,
                error=f"{type(error).__name__}: {error}"[:500],
            )
            continue
        for mode, call in calls.items():
            entry = {
                "op": case.op,
                "mode": mode,
                "shape": str(case.shape),
                "dtype": dtype,
                "row": row,
                "least_bytes": case.bytes[mode],
            }
            try:
                entry |= timing.measure(
                    call, session.device, milliseconds=2 if session.dry_run else 30
                )
            except Exception as error:
                session.add(**entry, error=f"{type(error).__name__}: {error}"[:500])
                continue
            rate = case.bytes[mode] / entry.get("graph_seconds", entry["seconds"])
            session.add(
                **entry,
                gigabytes_per_second=rate / 1e9,
                **({"share_of_copy": rate / copy} if copy else {}),
            )
    return {"left_out": f"{left_out} rows: the section's time was over"} if left_out else {}


def _without_gradient(forward: Callable) -> Callable:
    """Forward alone."""

    def call():
        with torch.no_grad():
            return forward()

    return call


def _step(forward: Callable, case: Case) -> Callable:
    """Forward and backward."""

    def call():
        outputs = [value for value in forward() if value.requires_grad]
        return torch.autograd.grad(
            outputs, case.leaves, [torch.ones_like(value) for value in outputs]
        )

    return call


def _backward(forward: Callable, case: Case) -> Callable:
    """Backward of an output made once."""
    outputs = [value for value in forward() if value.requires_grad]
    upstream = [torch.randn_like(value) for value in outputs]
    return lambda: torch.autograd.grad(outputs, case.leaves, upstream, retain_graph=True)


def measure_kernels(session: Session) -> dict:
    """The kernels beside the eager reference and peers."""
    return _measure_rows(session, ("reference", *([] if session.dry_run else ["triton"])))


def measure_compiled(session: Session) -> dict:
    """The reference through torch.compile."""
    return _measure_rows(session, ("compiled",))


def measure_autotuned(session: Session) -> dict:
    """The reference through torch.compile with max-autotune."""
    return _measure_rows(session, ("compiled max-autotune",))


def measure_end_to_end(session: Session) -> dict:
    """A training step of two ResNet-18 streams, and the share of it that is the head: classifiers, alignment, fusion losses and prototypes."""
    batch, side, classes, width = (4, 32, 3, 4) if session.dry_run else (64, 224, 31, 64)
    streams = torch.nn.ModuleList([resnet18(3, width), resnet18(1, width)]).to(session.device)
    inputs = [
        torch.randn(batch, channels, side, side, device=session.device) for channels in (3, 1)
    ]
    targets = torch.randint(classes, (batch,), device=session.device)
    heads = torch.nn.ModuleList([torch.nn.Linear(8 * width, classes) for _ in streams]).to(
        session.device
    )
    tables = [F.normalize(torch.randn(classes, 8 * width, device=session.device)) for _ in streams]
    counts, budgets = (
        torch.ones(classes, dtype=torch.int64, device=session.device),
        torch.tensor([0.6, 0.4], device=session.device),
    )
    parameters = [*streams.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4)

    def losses(embeddings, implementation):
        logits = [head(values) for head, values in zip(heads, embeddings)]
        entropies = iib_kernels.fusion_cross_entropy(
            logits, targets, scale=2.0, uncertainty_weight=0.0, impl=implementation
        )
        contrastive, alignment, _ = iib_kernels.alignment_loss(
            embeddings, tables, targets, budgets, impl=implementation
        )
        for table, values in zip(tables, embeddings):
            iib_kernels.update_prototypes(
                table, counts, values.detach(), targets, impl=implementation
            )
        return entropies.fused + entropies.unimodal.sum() + contrastive.sum() + 5 * alignment.sum()

    compiled = torch.compile(lambda embeddings: losses(embeddings, "reference"), dynamic=False)
    variants = {
        "encoders alone": lambda embeddings: sum(
            values.float().square().mean() for values in embeddings
        ),
        "reference": lambda embeddings: losses(embeddings, "reference"),
    }
    if not session.dry_run:
        variants |= {
            "triton": lambda embeddings: losses(embeddings, "triton"),
            "compiled": compiled,
        }

    def step(head):
        def call():
            with torch.autocast(session.device, dtype=torch.bfloat16):
                embeddings = [stream(values) for stream, values in zip(streams, inputs)]
            head([values.float() for values in embeddings]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    found = {
        "batch": batch,
        "side": side,
        "classes": classes,
        "encoders": f"two ResNet-18, width {width}, bf16 autocast",
        "steps": {},
    }
    for name, head in variants.items():
        if session.left() < 0:
            found["left_out"] = "the section's time was over"
            break
        measured = timing.measure(
            step(head), session.device, milliseconds=5 if session.dry_run else 600
        )
        base = found["steps"].get("encoders alone", measured)["seconds"]
        found["steps"][name] = {**measured, "head_share": 1 - base / measured["seconds"]}
        session.results["sections"]["end_to_end"] = found
        session.save()
    return found


def run_sanitizer(session: Session) -> dict:
    """compute-sanitizer's memcheck over every operator at odd sizes."""
    small = [sys.executable, "-m", "benchmarks.on_gpu", "--small-case", session.implementation]
    if session.dry_run:
        return {**_limited(small, session.left()), "left_out": "dry run: without compute-sanitizer"}
    tool = next((found for name in SANITIZERS if (found := shutil.which(name))), None)
    if tool is None:
        return {"left_out": "compute-sanitizer is not installed here"}
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }  # else neighbours in one block hide each other
    return {
        **_limited(
            [tool, "--tool", "memcheck", "--error-exitcode", "9", *small],
            session.left(),
            environment,
        ),
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


# name -> (what runs, the share of the whole budget that it may take)
SECTIONS: dict[str, tuple[Callable[[Session], dict], float]] = {
    "tests": (run_tests, 0.30),
    "repeats": (check_repeats, 0.08),
    "ceilings": (measure_ceilings, 0.05),
    "kernels": (measure_kernels, 0.25),
    "end_to_end": (measure_end_to_end, 0.10),
    "sanitizer": (run_sanitizer, 0.12),
    "compiled": (measure_compiled, 0.25),
    "autotuned": (measure_autotuned, 0.15),
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
            session.results["sections"][name] = {
                **outcome,
                "seconds": round(time.monotonic() - began, 1),
            }
            session.save()
            print(
                f"{name}: {session.results['sections'][name]['seconds']} s{', failed' if 'error' in outcome else ''}",
                flush=True,
            )
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
        notes = [
            f"{key.replace('_', ' ')}: {section[key]}"
            for key in (
                "left_out",
                "returncode",
                "out_of_time",
                "all_bitwise",
                "largest_error",
                "tool",
            )
            if key in section
        ]
        if "error" in section:
            notes.append("failed: " + section["error"].strip().splitlines()[-1])
        if name == "tests" and section.get("output"):
            notes.append(section["output"].strip().splitlines()[-1])
        for step, measured in section.get("steps", {}).items():
            notes.append(
                f"{step}: {report.duration(measured['seconds'])}, head {100 * measured['head_share']:.1f} % of it"
            )
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
        small_case(options.small_case)
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
            "benchmarks.on_gpu: no GPU is visible to PyTorch here; --dry-run shows that the program itself works",
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

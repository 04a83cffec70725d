"""Hardware counters of the main kernels by Nsight Compute, where it is installed and allowed."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys

import torch

from benchmarks.gpu_checks import limited
from benchmarks.gpu_rows import Row
from benchmarks.gpu_session import Session, write
from benchmarks.shapes import PRECISIONS, SHAPES, conditions, function, in_mode

TOOLS = ("ncu", "/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/ncu")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "bytes of memory traffic",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors, % of peak",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe, % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "resident warps, % of most",
    "launch__registers_per_thread": "registers a thread",
    "launch__grid_size": "programs",
}
# The two main kernels at the size that is bound by the device, not by launches
PROFILED = {
    "fusion_cross_entropy": ("fusion_cross_entropy", SHAPES[3], "bf16"),
    "alignment_loss": ("alignment_loss", SHAPES[3], "bf16"),
}


def profile_case(name: str) -> None:
    """One step of a kernel inside a profiler's range, after it has been compiled."""
    op, shape, precision = PROFILED[name]
    row = Row(op, shape, precision, "ours", "cuda")
    with conditions(PRECISIONS[precision], "ours", "cuda"):
        case = row.build()
        step = in_mode(function(case, "ours", "cuda"), case, "step")
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile(session: Session) -> dict:
    """Every kernel that a step of the main operators launches, with its counters."""
    if session.dry_run:
        return {"left_out": "dry run: without a GPU there are no counters"}
    tool = next((found for name in TOOLS if (found := shutil.which(name))), None)
    if tool is None:
        return {"left_out": "ncu is not installed here"}
    found, failed = {}, {}
    for number, name in enumerate(PROFILED):
        command = [
            *(tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"),
            *("--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)),
            *(sys.executable, "-m", "benchmarks.on_gpu", "--profile-case", name),
        ]
        share = session.left() / (len(PROFILED) - number)
        log = session.output / f".{name}.ncu"
        done = limited(command, share, dict(os.environ), log)
        kernels = counters(log.read_text(encoding="utf-8", errors="replace"))
        log.unlink()
        if kernels:
            found[name] = kernels
        elif "ERR_NVGPUCTRPERM" in done["output"]:
            return {"tool": tool, "left_out": "ncu may not read the counters here"}
        else:
            failed[name] = "out of time" if done["out_of_time"] else done["output"][-500:]
        session.note("profile", tool=tool, kernels=found, failed=failed)
    write(session.output / "ncu.md", table(found))
    return {"tool": tool, "kernels": found, "failed": failed}


def counters(output: str) -> list[dict[str, str]]:
    """Kernels and their counters from ncu's raw CSV, which stands among a program's own lines."""
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    rows = csv.DictReader(io.StringIO("\n".join(lines[begin:])))
    return [
        {"kernel": row["Kernel Name"], **{name: row.get(name) or "" for name in METRICS}}
        for row in rows
        if row.get("Kernel Name")  # not the line of units
    ]


def table(found: dict[str, list[dict[str, str]]]) -> str:
    """Markdown: a kernel a line."""
    lines = [
        "| step of | kernel | " + " | ".join(METRICS.values()) + " |",
        "|---|---|" + "---:|" * len(METRICS),
    ]
    for name, kernels in found.items():
        for kernel in kernels:
            cells = " | ".join(kernel[metric] for metric in METRICS)
            lines.append(f"| {name} | {kernel['kernel']} | {cells} |")
    return "\n".join(lines) + "\n"

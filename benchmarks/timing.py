"""Times and memory of a call, what the device can do at most, and what machine this is."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment(device: str) -> dict:
    """Machine, versions, date and commit of a measurement."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "device": "cpu",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _output(*command: str) -> str | None:
    """First line of a command's output, None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


def measure(call: Callable[[], object], device: str, *, milliseconds: int = 50) -> dict:
    """Time and memory of ``call``.

    Its median time in seconds with the 20th and 80th percentiles, that of its graph replay, and its
    peak memory over what stood before, in bytes. On the CPU: wall time (median, least and most),
    without graph and memory.
    """
    call()
    if device != "cuda":
        times, until = [], time.perf_counter() + milliseconds / 1000
        while len(times) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return {"seconds": statistics.median(times), "low": min(times), "high": max(times)}
    from triton.testing import do_bench

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    result = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    middle, low, high = do_bench(
        call, warmup=milliseconds // 2, rep=milliseconds, quantiles=[0.5, 0.2, 0.8]
    )
    result |= {"seconds": middle / 1000, "low": low / 1000, "high": high / 1000}
    try:
        result["graph_seconds"] = graph_replay(call)
    except Exception as error:  # a peer that cannot be captured is still timed
        result["graph_error"] = f"{type(error).__name__}: {error}"[:300]
    return result


def graph_replay(call: Callable[[], object], *, calls: int = 10, replays: int = 20) -> float:
    """Median seconds of one call among ``calls`` captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / calls)
    del graph
    return statistics.median(times)


def copy_bandwidth(device: str, *, mebibytes: int = 1024) -> float:
    """Bytes a second of a copy, read and written both counted."""
    source = torch.randn(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device)["seconds"]


def matmul_rates(device: str, *, side: int = 8192) -> dict[str, float]:
    """Floating-point operations a second of a square product, by precision."""
    rates, before = {}, torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        rates[name] = 2 * side**3 / measure(lambda: a @ b, device, milliseconds=100)["seconds"]
    torch.set_float32_matmul_precision(before)
    return rates

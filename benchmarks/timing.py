"""Times of calls, what the device can do at most, and what machine this is.

On a GPU the calls are captured in a CUDA graph, which leaves out the gaps between launches. Each
works on inputs of its own, and before every replay the L2 cache is filled with something else: what
is timed comes from memory, as in training.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import hashlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], object]
LARGEST_COPY = 2**30


def environment(device: str) -> dict:
    """Machine, versions, date and commit of a measurement."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None,
        "machine": platform.machine(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "sources": sources(),
        "device": "cpu",
    }
    if facts["commit"] and _output("git", "status", "--porcelain", "--untracked-files=no"):
        facts["commit"] += " and changes"
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
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


def sources() -> str:
    """A digest of the kernels' and the benchmarks' code: names them where git is not at hand."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("iib_kernels/**/*.py"), *ROOT.glob("benchmarks/*.py")]):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    """First line of a command's output, None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


class HostClock:
    """Wall time on a CPU, whose caches are left as they are."""

    timer = "wall"

    def stream(self):
        """Where everything that is measured runs."""
        return contextlib.nullcontext()

    def capture(self, calls: Sequence[Call]) -> Call:
        """The calls as one piece of work."""
        return lambda: [call() for call in calls]

    def flush(self) -> None:
        """Put something else into the cache."""

    def seconds(self, work: Call) -> float:
        """The time that it takes."""
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def beside(self, call: Call) -> dict:
        """What else is measured of a call."""
        return {}


class GraphClock:
    """Time on a GPU, by events around replays of a CUDA graph."""

    timer = "graph, cold"

    def __init__(self) -> None:
        # Backward runs on its forward's stream, and the default stream cannot be captured
        self.side = torch.cuda.Stream()
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.other = torch.ones(cache // 2, device="cuda")  # twice the cache's bytes

    def stream(self):
        return torch.cuda.stream(self.side)

    def capture(self, calls: Sequence[Call]) -> Call:
        for call in calls[:2] * 2:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # what it frees cannot be freed during a capture
        try:
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        finally:
            gc.enable()
        return graph.replay

    def flush(self) -> None:
        self.other.sum()  # reads: what is written would have to be written back later

    def seconds(self, work: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def beside(self, call: Call) -> dict:
        """Peak memory over what stood before, in bytes, and the time until the host is free."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak, times = torch.cuda.max_memory_allocated() - before, []
        for _ in range(7):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
            torch.cuda.synchronize()
        return {"peak_bytes": peak, "host_seconds": statistics.median(times)}


@functools.cache
def clock(device: str) -> HostClock | GraphClock:
    """The clock of a device."""
    return GraphClock() if device == "cuda" else HostClock()


def measure(clock, calls: Sequence[Call], *, milliseconds: int = 30, graph: bool = True) -> dict:
    """Percentiles p20, p50 and p80 of the seconds that one of ``calls`` takes, and how.

    The calls do the same work on inputs of their own. What cannot be captured is timed without,
    and ``note`` says why.
    """
    for call in calls[:2]:
        call()
    entry = {"timer": clock.timer, "copies": len(calls), **clock.beside(calls[0])}
    plain = lambda: [call() for call in calls]
    try:
        work = clock.capture(calls) if graph else plain
    except Exception as error:
        work = plain
        entry |= {"note": f"no graph: {type(error).__name__}: {error}"[:300]}
    if work is plain and clock.timer != HostClock.timer:
        entry["timer"] = "events, cold"
    times, until = [], time.perf_counter() + milliseconds / 1000
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() < until):
        clock.flush()
        times.append(clock.seconds(work) / len(calls))
    low, *_, high = statistics.quantiles(times, n=5)
    return {**entry, "p20": low, "p50": statistics.median(times), "p80": high}


def copies(clock, call: Call, footprint: int, device: str) -> int:
    """How many sets of inputs to take turns with: so many that a replay can be timed well.

    At least two and at most 32 where a quarter of the memory holds them; one on a CPU.
    """
    if device != "cuda":
        return 1
    call()
    estimate = max(1e-6, min(clock.seconds(call) for _ in range(3)))
    fitting = torch.cuda.mem_get_info()[1] // 4 // max(1, footprint)
    return max(1, min(32, max(2, round(1e-3 / estimate)), fitting))


@functools.cache
def copy_rate(device: str, exponent: int) -> float:
    """Bytes a second, read and written, of a copy that moves 2**exponent of them, cold."""
    count = 2 if exponent > 26 else 16
    pairs = [
        (torch.randn(2**exponent // 8, device=device), torch.empty(2**exponent // 8, device=device))
        for _ in range(count)
    ]
    calls = [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]
    return 2**exponent / measure(clock(device), calls)["p50"]


def copy_of(device: str, count: int) -> float:
    """Bytes a second of a copy of as many bytes, rounded up to a power of two, up to 1 GiB."""
    exponent = max(10, (min(count, LARGEST_COPY) - 1).bit_length())
    return copy_rate(device, exponent)


@functools.cache
def product_rate(device: str, name: str, side: int | None = None) -> float:
    """Operations a second of a square product: fp32 (IEEE), tf32 or bf16."""
    side = side or (4096 if name == "fp32" else 8192) if device == "cuda" else 64
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        pairs = [torch.randn(2, side, side, device=device).to(dtype) for _ in range(2)]
        calls = [lambda pair=pair: pair[0] @ pair[1] for pair in pairs]
        return 2 * side**3 / measure(clock(device), calls, milliseconds=100)["p50"]
    finally:
        torch.set_float32_matmul_precision(before)

"""Every operator, mode and shape: the kernels, the eager and the compiled reference, and peers.

On a CPU in float32, with one thread and with two. Interpreted kernels are never timed.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import OPS, at, modes
from benchmarks.conftest import DEVICE, LEFT_OUT
from benchmarks.gpu_rows import rates
from benchmarks.shapes import CPU_SHAPES, PRECISIONS, SHAPES, conditions, function, in_mode

FOCUS = ("gated_fusion", "fusion_cross_entropy", "alignment_loss", "multimodal_objective")
PEERS = {
    "prototype_distance": ("product", "cdist"),
    "fusion_cross_entropy": ("F.cross_entropy x (M+1)",),
    "multimodal_objective": ("F.cross_entropy x (M+1)",),
}


def planned() -> list:
    """(op, mode, shape, row, threads) of what this machine can time; LEFT_OUT says what it cannot.

    The rows of a case follow each other.
    """
    found = []
    for shape in SHAPES if DEVICE == "cuda" else CPU_SHAPES:
        for op in at(shape):
            for threads in (0,) if DEVICE == "cuda" else _threads(op, shape):
                for row in ("ours", "reference", "compiled", *PEERS.get(op, ())):
                    for mode in modes(op):
                        if DEVICE == "cuda" or _on_cpu(op, row, mode):
                            name = f"{op}-{mode}-{shape}-{row}".replace(" ", "-")
                            name += f"-threads={threads}" if threads else ""
                            found.append(pytest.param(op, mode, shape, row, threads, id=name))
    if DEVICE == "cpu":
        LEFT_OUT.extend(
            [
                "triton: there is no GPU, and timings of interpreted kernels mean nothing",
                f"compiled: only {', '.join(FOCUS)}, and of these a step (gated_fusion: forward "
                "too), as each compilation takes seconds",
                f"all but these: only {CPU_SHAPES[0]}, with one thread",
                "backward alone: only with a GPU; it is in the step",
                "half types, TF32 and the larger shapes: only with a GPU",
            ]
        )
    return found


def _threads(op: str, shape) -> tuple[int, ...]:
    """Numbers of threads with which an operator is timed on a CPU."""
    if op in FOCUS:
        return (1, 2)
    return (1,) if shape == CPU_SHAPES[0] else ()


def _on_cpu(op: str, row: str, mode: str) -> bool:
    """What a CPU times in a few minutes."""
    if row == "compiled":
        return op in FOCUS and (mode == "step" or (op, mode) == ("gated_fusion", "forward"))
    return mode != "backward"


@functools.lru_cache(maxsize=1)  # one shape's inputs at a time
def case_of(op: str, shape):
    """The operator's inputs, the same for each of its rows."""
    torch.manual_seed(0)
    return OPS[op](shape, PRECISIONS["fp32"], DEVICE)


@pytest.mark.parametrize("op, mode, shape, row, threads", planned())
def test_op(benchmark, op, mode, shape, row, threads):
    """Time one row; on a GPU by a graph's replays too, as ``benchmarks.on_gpu`` does."""
    before = torch.get_num_threads()
    torch._dynamo.reset()
    case = case_of(op, shape)
    benchmark.group = f"{op} {mode} {shape} {threads or ''}"
    benchmark.extra_info |= {
        "op": op,
        "mode": mode,
        "shape": str(shape),
        "row": row,
        "precision": f"fp32, {threads} thread{'s' * (threads > 1)}" if threads else "fp32",
        "least_bytes": case.bytes[mode],
        "timer": "wall",
    }
    clock = timing.clock(DEVICE)
    with clock.stream(), conditions(PRECISIONS["fp32"], row, DEVICE):
        torch.set_num_threads(threads or before)
        try:
            call = in_mode(function(case, row, DEVICE), case, mode)
            rounds = 3 if shape.batch >= 4096 else 20
            if DEVICE == "cpu":
                benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
            else:
                benchmark.pedantic(
                    lambda: (call(), torch.cuda.synchronize()), rounds=rounds, warmup_rounds=5
                )
                entry = {"least_bytes": case.bytes[mode], **timing.measure(clock, [call])}
                benchmark.extra_info |= {**entry, **rates(DEVICE, "fp32", entry)}
        finally:
            torch.set_num_threads(before)

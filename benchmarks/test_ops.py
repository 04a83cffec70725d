"""Every operator, mode and shape.

Eager reference, compiled reference, the kernels, and a peer where one does the same work.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import MODES, ONLY_ALIGNMENT, OPS, SHAPES, timed
from benchmarks.conftest import DEVICE, LEFT_OUT

ROWS = ("reference", "compiled", "triton", "cdist")


def planned() -> list:
    """(op, mode, shape, row) of what this machine can time; LEFT_OUT says what it cannot."""
    found = []
    for shape in SHAPES:
        for op in OPS:
            if shape == ONLY_ALIGNMENT and (op != "alignment_loss" or DEVICE == "cpu"):
                continue
            for mode in MODES[:1] if op == "update_prototypes" else MODES:
                for row in ROWS:
                    if row == "cdist" and op != "prototype_distance":
                        continue
                    if DEVICE == "cpu" and (
                        row == "triton"
                        or (row == "compiled" and (shape != SHAPES[1] or mode == "backward"))
                    ):
                        continue
                    found.append(
                        pytest.param(
                            op, mode, shape, row, id=f"{op}-{mode}-{shape}-{row}".replace(" ", "-")
                        )
                    )
    if DEVICE == "cpu":
        LEFT_OUT.extend(
            [
                "triton: there is no GPU, and timings of interpreted kernels mean nothing",
                f"compiled: only {SHAPES[1]}, forward and step; each compilation takes seconds, "
                "and the command is to stay under five minutes",
                f"{ONLY_ALIGNMENT}: only with a GPU",
            ]
        )
    return found


@functools.lru_cache(maxsize=1)  # one shape's inputs at a time
def case_of(op: str, shape, dtype=torch.float32):
    """The operator's inputs, the same for each of its rows."""
    torch.manual_seed(0)
    return OPS[op](shape, dtype, DEVICE)


@pytest.mark.parametrize("op, mode, shape, row", planned())
def test_op(benchmark, bandwidth, op, mode, shape, row):
    """Time one row; on a GPU, with the share of a copy's bandwidth that its least bytes reach."""
    torch._dynamo.reset()
    case = case_of(op, shape)
    call = timed(case, row, mode)
    benchmark.group = f"{op} {mode} {shape}"
    benchmark.extra_info |= {
        "op": op,
        "mode": mode,
        "shape": str(shape),
        "row": row,
        "dtype": "fp32",
        "least_bytes": case.bytes[mode],
    }
    if DEVICE == "cpu":
        rounds = 3 if shape.batch >= 4096 else 20
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        return

    def synchronised():
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=5)
    measured = timing.measure(call, DEVICE)
    rate = case.bytes[mode] / measured.get("graph_seconds", measured["seconds"])
    benchmark.extra_info |= {
        **measured,
        "gigabytes_per_second": rate / 1e9,
        "share_of_copy": rate / bandwidth,
    }

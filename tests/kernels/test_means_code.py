"""The machine code of means that the last program of a launch takes (ops/means.py), for Hopper.

The interpreter has neither threads nor caches: it gives the right means without barriers, too.
Compiled in a process of its own: the interpreter and the compiler cannot share one.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from machine_code import compiled, rows_of, write_rows

CLASSES = {  # of a call that launches the kernel
    "cross_entropy_rows": 128,
    "cross_entropy_streamed": 5000,
    "alignment_forward": 31,
    "objective_small": 31,
}
# Loads and stores of global memory, atomic operations and barriers, whatever their predicate
OPERATION = r"^\s*(?:@!?%p\d+\s+)?((?:ld\.global|st\.global|atom|bar\.sync|barrier)[\w.]*)"


def launches(aot, kernel: str) -> list[tuple]:
    """The launches of this kernel that take means, recorded."""
    import torch

    given = torch.bfloat16, 2, CLASSES[kernel]
    calls = {
        "alignment_forward": lambda: aot._alignment(*given),
        "objective_small": lambda: aot._objective(*given),
    }
    found = aot.recorded(calls.get(kernel, lambda: aot._fusion(*given, "losses")))
    # "means" is None where losses are stored row by row; the objective always takes them
    return [
        entry
        for entry in found
        if entry[0].__name__ == kernel and entry[1].get("means", True) is not None
    ]


def compile_all() -> list[dict]:
    """What the code of every launch does in memory, in its order."""
    import aot

    return [
        {
            "kernel": kernel,
            "operations": re.findall(OPERATION, compiled(*launch).asm["ptx"], re.M),
        }
        for kernel in CLASSES
        for launch in launches(aot, kernel)
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The compiled launches: (kernel, what it does before the ticket, the ticket, after it)."""
    found = []
    for row in rows_of(__file__, tmp_path_factory.mktemp("code")):
        operations = row["operations"]
        (place,) = (i for i, name in enumerate(operations) if name.startswith("atom"))
        parts = operations[:place], operations[place], operations[place + 1 :]
        found.append((row["kernel"], *parts))
    assert {kernel for kernel, *_ in found} == {*CLASSES}
    return found


def waits(operations) -> bool:
    """Whether there is a barrier."""
    return any(name.startswith("bar") for name in operations)


def places(operations, prefix) -> list[int]:
    return [i for i, name in enumerate(operations) if name.startswith(prefix)]


@pytest.mark.slow
def test_all_threads_have_stored_before_one_draws_the_ticket(rows):
    """A ticket releases what its own thread stored; what others did, by the barrier before it."""
    for kernel, before, ticket, _ in rows:
        assert {"acq_rel", "gpu"} <= {*ticket.split(".")}, (kernel, ticket)
        last = places(before, "st.global")[-1]
        assert waits(before[last:]), (kernel, before[last:])


@pytest.mark.slow
def test_the_sums_of_others_are_read_after_the_ticket_and_not_from_the_nearest_cache(rows):
    """It may hold lines of the table from an earlier launch, and other multiprocessors' stores do
    not reach it.
    """
    for kernel, before, _, after in rows:
        loads = places(after, "ld.global")
        assert loads and waits(after[: loads[0]]), (kernel, after[:20])
        assert all(after[i].startswith("ld.global.cg") for i in loads), (kernel, after)
        assert not places(before, "ld.global.cg"), kernel


if __name__ == "__main__":
    write_rows(compile_all())

"""The machine code of attention over prototypes, for Hopper, read without a GPU.

Compiled in a process of its own: the interpreter and the compiler cannot share one.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")
from machine_code import compiled, count, instructions, rows_of, write_rows

CASES = {  # types of features and prototypes, D, and precision of float32 products
    "bf16": ("bfloat16", "bfloat16", 512, "highest"),
    "fp16": ("float16", "float16", 512, "highest"),
    "autocast": ("bfloat16", "float32", 512, "highest"),
    "tf32": ("float32", "float32", 512, "high"),
    "wide": ("bfloat16", "bfloat16", 1024, "highest"),
}


def compile_all() -> list[dict]:
    """A row for every launch of a forward that keeps, and one that does not."""
    import aot
    import torch

    from iib_kernels import _tuning
    from iib_kernels.ops.alignment import launch

    _tuning.processors = lambda device: 132
    rows = []
    for name, (features, prototypes, width, precision) in CASES.items():
        torch.set_float32_matmul_precision(precision)
        make = lambda rows, kind, width: [
            torch.empty(rows, width, dtype=getattr(torch, kind)) for _ in range(2)
        ]
        given = launch.Inputs(
            make(4096, features, width),
            make(1000, prototypes, width),
            torch.empty(4096, dtype=torch.int64),
            torch.empty(2),
            0.2,
            True,
            [torch.empty(1000, dtype=torch.bool)] * 2,
            torch.empty(4096, 2, dtype=torch.bool),
            -100,
        )
        launches = [
            entry
            for keep in (True, False)
            for entry in aot.recorded(lambda: launch.forward(given, keep))
            if entry[0].__name__.startswith(("attend", "evidence"))
        ]
        for kernel, named, options in launches:
            code = compiled(kernel, named, options)
            rows.append(
                {
                    "case": name,
                    "kernel": kernel.__name__,
                    "across": bool(named.get("ACROSS")),
                    "warps": options["num_warps"],
                    "blocks": {key: named[key] for key in named if key.startswith("BLOCK")},
                    "code": instructions(code),
                    "ttgir": code.asm["ttgir"],
                    **aot.resources(code),
                }
            )
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The compiled launches of every case."""
    return rows_of(__file__, tmp_path_factory.mktemp("code"))


@pytest.mark.slow
def test_products_are_of_warp_groups(rows):
    assert len(rows) == 3 * len(CASES)
    for row in rows:
        assert count(row, "HGMMA") and not count(row, "HMMA"), row
        # What is left are scales and maxima, no loop of a product
        assert count(row, "FFMA") < 400, row


@pytest.mark.slow
def test_no_half_precision_kernel_spills_and_no_tf32_one_much(rows):
    assert not [row for row in rows if row["spills"] > (16 if row["case"] == "tf32" else 0)]


@pytest.mark.slow
def test_prototypes_are_loaded_16_bytes_at_a_time(rows):
    for row in rows:
        copies = {name: number for name, number in row["code"].items() if name.startswith("LDGSTS")}
        assert copies.get("LDGSTS.E.BYPASS.128", 0) >= 4, row
        # The scales of a class are 4 bytes
        assert set(copies) <= {"LDGSTS.E.BYPASS.128", "LDGSTS.E"}, row
        assert not count(row, "LDG.E.U16"), row


@pytest.mark.slow
def test_no_score_is_computed_by_both_halves_of_the_warps(rows):
    """64 rows are one warp group's: with two, the classes must be shared out."""
    resident = [row for row in rows if row["kernel"] == "attend_resident"]
    assert len(resident) == 6
    for row in resident:
        layouts = re.findall(r"nvidia_mma<\{[^}]*warpsPerCTA = \[(\d+), (\d+)\]", row["ttgir"])
        assert layouts and set(layouts) == {("4", "2")}, layouts
        # 32 steps of the scores over 512 components, and the classes' steps for each of 4 means
        assert count(row, "HGMMA") == 32 + 4 * row["blocks"]["BLOCK_K"] // 16, row
        # The weights are the first factor in registers, and prototypes serve scores and means
        copies = 4 * row["blocks"]["BLOCK_K"] * 128 * 2 // 16 // 256  # a block, by 256 threads
        prefetches = 2 * (2 if row["across"] else 1)
        assert row["code"]["LDGSTS.E.BYPASS.128"] == copies * prefetches, row


@pytest.mark.slow
def test_barriers_of_a_block_of_classes_are_few(rows):
    for row in rows:
        if row["kernel"] == "attend_resident":
            assert count(row, "BAR") <= (72 if row["across"] else 45), row


if __name__ == "__main__":
    write_rows(compile_all())

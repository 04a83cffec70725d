"""Every kernel compiled ahead of time for GPUs that are not here.

It compiles, does not spill, and addresses rows with 64 bits.
"""

import collections
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "fusion_rows",
    "fusion_rows_backward",
    "trusted_rows",
    "trusted_rows_backward",
    "cross_entropy_rows",
    "cross_entropy_rows_backward",
    "objective_rows",
    "objective_small",
    "prepare",
    "conclude",
    "scale_all",
    "alignment_forward",
    "alignment_backward",
    "lay_out",
    "attend_streamed",
    "evidence",
    "losses",
    "merge",
    "gradients",
    "nearest_forward",
    "nearest_backward",
    "nearest_backward_streamed",
    "measure_rows",
    "distance_forward",
    "distance_backward",
    "gradient_from_pull",
    "move_prototypes",
    "move_prototypes_streamed",
    "class_sums",
    "class_sums_streamed",
}
MOST_SPILLS = {
    "bf16": 0,
    "fp16": 0,
    "fp32": 32,
    "tf32": 32,
    "bf16, fp32": 32,
}  # words; float64, for checking, may

SPILLING = {
    ("cross_entropy_rows_backward", "bf16"): 6,  # on sm_80
    ("objective_small", "bf16"): 64,  # with six modalities, or three of 128 classes
    ("objective_small", "fp32"): 160,
}  # more than that, for now


@pytest.fixture(scope="module")
def rows(compilation):
    """What was compiled: one row a kernel, dtype, number of modalities, size and target.

    The table of them is written to build/aot.md.
    """
    process, output = compilation
    assert process.wait(timeout=1500) == 0
    content = json.loads(output.read_text())
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "aot.md").write_text(table(content))
    return content["rows"]


def table(content) -> str:
    """Registers, shared memory and spills of every kernel, the worst over its sizes; Markdown."""
    lines = [
        f"Compiled without a GPU by `python tests/aot.py`, torch {content['torch']}, triton "
        f"{content['triton']}. Largest over the compiled",
        "sizes and numbers of modalities: registers a thread, shared memory in bytes a program, "
        "spilled words a thread.",
        "",
    ]
    lines += [
        "| kernel | dtype | target | variants | registers | shared memory | spills |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    groups = collections.defaultdict(list)
    for row in content["rows"]:
        groups[row["kernel"], row["dtype"], row["target"]].append(row)
    for (kernel, dtype, target), group in sorted(groups.items()):
        worst = (
            max(row.get(key, -1) for row in group) for key in ("registers", "shared", "spills")
        )
        lines.append(
            f"| {kernel} | {dtype} | {target} | {len(group)} | "
            + " | ".join(map(str, worst))
            + " |"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(rows):
    assert not [row for row in rows if "error" in row]
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    found = {(row["kernel"], row["target"]) for row in rows if row["dtype"] == "bf16"}
    # On Hopper half types take one that holds rows in shared memory
    found |= {
        ("attend_streamed", target) for kernel, target in found if kernel == "attend_resident"
    }
    assert found >= {(kernel, target) for kernel in KERNELS for target in targets}
    found = {(row["kernel"], row["dtype"]) for row in rows if row["target"] == "sm_90"}
    dtypes = ("bf16", "fp16", "fp32")
    found |= {("attend_streamed", dtype) for kernel, dtype in found if kernel == "attend_resident"}
    assert found >= {(kernel, dtype) for kernel in KERNELS for dtype in dtypes}
    several = {(row["kernel"], row["modalities"]) for row in rows}
    several |= {("attend_streamed", count) for kernel, count in several if "attend" in kernel}
    one = {
        "distance_forward",
        "distance_backward",
        "distance_forward_large",
        "gradient_from_pull",
        "measure_rows",
        "scale_all",
        "class_sums",
        "class_sums_streamed",
    }  # no modalities
    assert several >= {(kernel, count) for kernel in KERNELS - one for count in (2, 6)}


@pytest.mark.slow
def test_no_half_precision_kernel_spills_and_no_float32_one_much(rows):
    most = lambda row: SPILLING.get(
        (row["kernel"], row["dtype"]), MOST_SPILLS.get(row["dtype"], 10**9)
    )
    assert not [row for row in rows if row["spills"] > most(row)]


@pytest.mark.slow
def test_rows_are_addressed_with_64_bits(rows):
    assert not [
        row for row in rows if not row["wide_rows"] and "ones" not in row["sizes"]
    ]  # strides of 1 are not multiplied by


@pytest.mark.slow
def test_the_shared_memory_fits_the_devices(rows):
    most = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
    assert not [row for row in rows if row["shared"] > most[row["target"]]]

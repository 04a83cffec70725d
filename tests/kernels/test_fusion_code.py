"""The fusion kernels' machine code for sm_90, compiled ahead of time: loads, barriers, registers.

    python tests/kernels/test_fusion_code.py OUTPUT.json

compiles them. It needs TRITON_INTERPRET unset, so the test runs it in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
CASES = [
    (dtype, modalities, classes, what)
    for dtype in ("bf16", "fp32")
    for modalities, classes in ((2, 1000), (3, 1000), (3, 128), (2, 4096))
    for what in ("logits", "losses", "objective")
] + [("bf16", 2, 5000, what) for what in ("logits", "losses", "objective")]


def instructions(aot, compiled) -> Counter:
    """How often each instruction stands in the code (not how often it runs)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [aot.CUOBJDUMP, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
    return Counter(re.findall(pattern, text, re.M))


def resident_warps(registers: int, warps: int) -> int:
    """Warps that a multiprocessor holds: 65,536 registers, in units of 256 a warp."""
    return min(65536 // (-(-registers * 32 // 256) * 256 * warps), 64 // warps, 32) * warps


def main(output: str) -> None:
    """Compile every case and write what the tests look at."""
    sys.path.insert(0, str(ROOT / "tests"))
    import aot
    import triton

    rows = []
    for case in CASES:
        dtype, *rest = case
        for kernel, named, options in aot.recorded(lambda: aot._fusion(aot.DTYPES[dtype], *rest)):
            compiled = triton.compile(
                aot.source(kernel, named), target=aot.TARGETS["sm_90"], options=options
            )
            count = instructions(aot, compiled)
            total = lambda start: sum(n for name, n in count.items() if name.startswith(start))
            used = aot.resources(compiled)
            warps = options["num_warps"]
            rows.append(
                {
                    "kernel": kernel.__name__,
                    "case": case,
                    "warps": warps,
                    "registers": used["registers"],
                    "spills": used["spills"],
                    "resident": resident_warps(used["registers"], warps),
                    "barriers": total("BAR"),
                    "wide loads": count["LDG.E.128"],
                    "wide stores": count["STG.E.128"],
                    "asynchronous": total("LDGSTS"),
                    # of logits, where the case's dtype has two bytes: [B, M] and targets have not
                    "narrow loads": count["LDG.E.U16"],
                }
            )
    Path(output).write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("code") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"}
    command = [sys.executable, __file__, str(output)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=900)
    return json.loads(output.read_text())


@pytest.mark.slow
def test_logits_are_loaded_and_stored_sixteen_bytes_at_a_time(rows):
    """Also of K = 1000 in half precision. A multiple of 8 does not need one of 16."""
    for row in rows:
        dtype, modalities, classes, what = row["case"]
        if classes == 128:
            continue  # a row is two or four bytes a lane times 32
        assert row["wide loads"] >= modalities, row
        if dtype == "bf16":  # the target's logit alone, and no other load of two bytes
            gathered = "losses" in what or what == "objective"
            assert row["narrow loads"] <= modalities * gathered, row
        if "backward" in row["kernel"] or what == "objective":
            assert row["wide stores"] >= modalities, row


@pytest.mark.slow
def test_a_row_in_one_warp_needs_no_barrier_and_shared_rows_three_a_round(rows):
    assert {row["warps"] for row in rows} >= {1, 2, 4}
    for row in rows:
        if row["warps"] == 1:
            assert row["barriers"] == 0, row
        elif "rows" in row["kernel"]:
            assert row["barriers"] <= 27, row  # of nine rounds, M = 3 with six sums in two
        assert row["asynchronous"] == 0, row


@pytest.mark.slow
def test_twelve_warps_or_more_on_a_multiprocessor_and_no_spills(rows):
    for row in rows:
        assert row["resident"] >= 12 and row["spills"] == 0, row


if __name__ == "__main__":
    main(sys.argv[1])

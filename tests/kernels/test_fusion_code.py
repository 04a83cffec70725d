"""The fusion kernels' machine code for sm_90, compiled ahead of time: loads, barriers, registers.

Compiled in a process of its own: the interpreter and the compiler cannot share one.
"""

import pytest

pytest.importorskip("triton")
from machine_code import compiled, count, instructions, resident_warps, rows_of, write_rows

CASES = [
    (dtype, modalities, classes, what)
    for dtype in ("bf16", "fp32")
    for modalities, classes in ((2, 1000), (3, 1000), (3, 128), (2, 4096))
    for what in ("logits", "losses", "objective")
] + [("bf16", 2, 5000, what) for what in ("logits", "losses", "objective")]


def compile_all() -> list[dict]:
    """What the tests look at, of every case."""
    import aot

    rows = []
    for case in CASES:
        dtype, *rest = case
        for kernel, named, options in aot.recorded(lambda: aot._fusion(aot.DTYPES[dtype], *rest)):
            code = compiled(kernel, named, options)
            found, used, warps = instructions(code), aot.resources(code), options["num_warps"]
            row = {"code": found}
            rows.append(
                {
                    "kernel": kernel.__name__,
                    "case": case,
                    "warps": warps,
                    "means": named.get("means") is not None,
                    "registers": used["registers"],
                    "spills": used["spills"],
                    "resident": resident_warps(used["registers"], warps, used["shared"]),
                    "barriers": count(row, "BAR"),
                    "wide loads": found["LDG.E.128"],
                    "wide stores": found["STG.E.128"],
                    "asynchronous": count(row, "LDGSTS"),
                    # of logits, where the case's dtype has two bytes: [B, M] and targets have not
                    "narrow loads": found["LDG.E.U16"],
                }
            )
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The compiled launches of every case."""
    return rows_of(__file__, tmp_path_factory.mktemp("code"))


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
            # Where means are taken, some at a program's end, before its ticket and behind it
            assert row["barriers"] <= (4 if row["means"] else 0), row
        elif "rows" in row["kernel"]:
            assert row["barriers"] <= 27, row  # of nine rounds, M = 3 with six sums in two
        assert row["asynchronous"] == 0, row


@pytest.mark.slow
def test_twelve_warps_or_more_on_a_multiprocessor_and_no_spills(rows):
    for row in rows:
        assert row["resident"] >= 12 and row["spills"] == 0, row


if __name__ == "__main__":
    write_rows(compile_all())

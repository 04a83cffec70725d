"""The machine code of the prototypes' update, distances and nearest prototypes, for Hopper.

Read without a GPU, and compiled in a process of its own: the interpreter and the compiler cannot
share one.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from machine_code import compiled, count, instructions, resident_warps, rows_of, write_rows

# Operator, types of features and prototypes, rows, classes, widths, precision of float32 products
CASES = {
    "update": ("update", "bfloat16", "float32", 4096, 1000, (768, 768), "highest"),
    "update float32": ("update", "float32", "float32", 4096, 1000, (768,), "highest"),
    "update few": ("update", "bfloat16", "float32", 64, 6, (512, 512), "highest"),
    "update odd": ("update", "bfloat16", "float32", 64, 309, (1000, 77), "highest"),
    "distance": ("distance", "bfloat16", "bfloat16", 64, 31, (512,), "highest"),
    "distance autocast": ("distance", "bfloat16", "float32", 64, 309, (512,), "highest"),
    "distance large": ("distance", "float16", "float32", 4096, 1000, (768,), "highest"),
    "distance large odd": ("distance", "bfloat16", "bfloat16", 4096, 1000, (309,), "highest"),
    "distance large float32": ("distance", "float32", "float32", 4096, 1000, (768,), "highest"),
    "distance large tf32": ("distance", "float32", "float32", 4096, 1000, (768,), "high"),
    "nearest": ("nearest", "bfloat16", "bfloat16", 64, 31, (512, 512), "highest"),
    "nearest autocast": ("nearest", "bfloat16", "float32", 512, 309, (512, 512), "highest"),
    "nearest odd": ("nearest", "bfloat16", "bfloat16", 64, 309, (1000, 77), "highest"),
    "nearest even": ("nearest", "bfloat16", "bfloat16", 64, 309, (1000,), "highest"),
    "nearest large odd": ("nearest", "bfloat16", "float32", 4096, 1000, (768, 77), "highest"),
    "nearest large tf32": ("nearest", "float32", "float32", 4096, 1000, (768,), "high"),
}


def calls(torch):
    """(name, call of an operator) of every case."""
    for name, (operator, kind, table_kind, batch, classes, widths, precision) in CASES.items():
        make = lambda rows, kind: [torch.empty(rows, w, dtype=getattr(torch, kind)) for w in widths]
        features, tables = make(batch, kind), make(classes, table_kind)
        torch.set_float32_matmul_precision(precision)
        if operator == "update":
            counts = [torch.empty(classes, dtype=torch.int64) for _ in widths]
            targets = torch.empty(batch, dtype=torch.int64)
            given = tables, counts, features, targets, None, 0.9, True, -100
            yield name, lambda: torch.ops.iib.update_prototypes_(*given)
        elif operator == "distance":
            yield (
                name,
                lambda: torch.ops.iib.prototype_distance(features[0], tables[0], True, False),
            )
        else:
            yield name, lambda: torch.ops.iib.nearest_prototype(features, tables, True, [])


def compile_all() -> list[dict]:
    """A row for every launch of every case."""
    import aot
    import torch

    rows = []
    for name, call in calls(torch):
        for kernel, named, options in aot.recorded(call):
            code = compiled(kernel, named, options)
            rows.append(
                {
                    "case": name,
                    "kernel": kernel.__name__,
                    "warps": options["num_warps"],
                    "arguments": len(named),
                    "code": instructions(code),
                    **aot.resources(code),
                }
            )
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The compiled launches of every case."""
    return rows_of(__file__, tmp_path_factory.mktemp("code"))


def resident(row: dict) -> int:
    return resident_warps(row["registers"], row["warps"], row["shared"])


def one(rows, case, kernel):
    (found,) = (row for row in rows if row["case"] == case and row["kernel"] == kernel)
    return found


@pytest.mark.slow
def test_half_precision_and_tf32_products_are_of_warp_groups(rows):
    found = [row for row in rows if row["kernel"].startswith(("distance_forward", "nearest_for"))]
    assert {row["case"] for row in found} >= {
        name for name in CASES if not name.startswith("update") and name != "distance large float32"
    }
    for row in found:
        assert count(row, "HGMMA") and not count(row, "HMMA") and not row["spills"], row
        assert count(row, "FFMA") < 400, row  # lengths and scales, no loop of a product


@pytest.mark.slow
def test_one_odd_width_makes_no_other_modality_load_narrow(rows):
    """As many 16-byte loads stand in the code as without the odd modality, at the least."""
    odd, even = (one(rows, f"nearest {name}", "nearest_forward") for name in ("odd", "even"))
    wide = lambda row: count(row, "LDGSTS.E.BYPASS.128") + count(row, "LDG.E.128")
    narrow = lambda row: count(row, "LDG.E.U16")
    assert wide(even) and not narrow(even) and wide(odd) >= 4 and narrow(odd)
    update = one(rows, "update odd", "move_prototypes")
    assert count(update, "LDG.E.128") and count(update, "STG.E.128") and narrow(update)


@pytest.mark.slow
def test_many_rows_of_any_width_load_and_store_16_bytes(rows):
    for case, kernel in (
        ("distance large", "distance_forward_large"),
        ("distance large odd", "distance_forward_large"),
        ("nearest large odd", "nearest_forward"),
    ):
        row = one(rows, case, kernel)
        assert count(row, "LDGSTS.E.BYPASS.128") >= 16 and not count(row, "LDG.E.U16"), row
        assert not {"LDGSTS.E", "LDGSTS.E.64"} & set(row["code"]), row
        if kernel.startswith("distance"):
            assert count(row, "STG.E.128") and not count(row, "STG.E.U16"), row
    epilogue = one(rows, "distance large float32", "distance_from_products")
    assert count(epilogue, "LDG.E.128") and count(epilogue, "STG.E.128")
    copies = one(rows, "nearest large odd", "measure_rows")
    assert count(copies, "STG.E.128") and not count(copies, "STG.E.U16")


@pytest.mark.slow
def test_rows_of_the_update_load_16_bytes_and_two_programs_fit(rows):
    for name in CASES:
        if name.startswith("update"):
            row = one(rows, name, "move_prototypes")
            assert resident(row) >= 16 and not row["spills"], row
            assert count(row, "LDG.E.128"), row
    assert count(one(rows, "update", "move_prototypes"), "LDG.E.U16") == 0


@pytest.mark.slow
def test_small_launches_find_room(rows):
    for case, kernel in (("distance", "distance_forward"), ("nearest", "nearest_forward")):
        assert resident(one(rows, case, kernel)) >= 12
    for row in rows:
        assert row["arguments"] <= 20, row


if __name__ == "__main__":
    write_rows(compile_all())

"""The benchmarks' own logic, which must not be debugged on lent GPU time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, gpu_measurements, on_gpu, report, timing
from benchmarks.cases import MODES, OPS, SHAPES, TINY, Shape, function, timed
from benchmarks.gpu_session import Session

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape(6, 4, 5, 2)


def test_the_least_bytes_are_those_counted_by_hand():
    case = OPS["gated_fusion"](SMALL, torch.float32, "cpu")
    logits, per_sample, fused = 2 * 6 * 4 * 4, 6 * 2 * 4, 6 * 4 * 4
    # The gate is read; weights and uncertainty are written.
    assert case.bytes["forward"] == logits + per_sample + fused + 2 * per_sample
    assert case.bytes["backward"] == (logits + per_sample) + (fused + 2 * per_sample) + logits
    assert case.bytes["step"] == case.bytes["forward"] + case.bytes["backward"]
    half = OPS["update_prototypes"](SMALL, torch.bfloat16, "cpu")
    assert half.bytes["forward"] == 6 * 5 * 2 + 6 * 8 + 2 * (4 * 5 * 2 + 4 * 8)
    assert half.modes == ("forward",)


@pytest.mark.parametrize("op", OPS)
def test_every_row_of_an_operator_does_the_same_work(op):
    case = OPS[op](SMALL, torch.float32, "cpu")
    expected = case.call("reference")
    rows = ["auto", *case.peers]
    for row in rows:
        for found, right in zip(function(case, row)(), expected):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    for mode in case.modes[1:]:
        gradients = timed(case, "reference", mode)()
        assert [value.shape for value in gradients] == [leaf.shape for leaf in case.leaves]
        assert all(value.abs().sum() > 0 for value in gradients)


def test_the_shapes_are_those_that_the_readme_names():
    assert [tuple(shape)[:4] for shape in SHAPES] == [
        (64, 6, 512, 2),
        (64, 31, 512, 2),
        (256, 309, 512, 2),
        (4096, 1000, 768, 3),
        (8192, 32768, 512, 2),
    ]
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for batch, classes, width, modalities, _ in SHAPES:
        assert f"| {batch:,} | {classes:,} | {width} | {modalities} |\n" in readme


def test_a_measurement_is_the_median_of_what_was_called():
    waits = iter([0.0, 0.001, 0.03, 0.001])
    measured = timing.measure(lambda: time.sleep(next(waits, 0.001)), "cpu", milliseconds=1)
    assert 0.001 <= measured["seconds"] < 0.01 < measured["high"]


ENVIRONMENT = {"device": "GPU X", "torch": "2.11", "date": "2026-11-23"}
ROWS = [
    {
        "op": "a",
        "mode": "forward",
        "shape": "B=1",
        "dtype": "fp32",
        "row": "reference",
        "seconds": 0.004,
        "peak_bytes": 2**21,
    },
    {
        "op": "a",
        "mode": "forward",
        "shape": "B=1",
        "dtype": "fp32",
        "row": "triton",
        "seconds": 0.001,
        "graph_seconds": 0.0005,
        "peak_bytes": 2**20,
        "gigabytes_per_second": 812.4,
        "share_of_copy": 0.41,
    },
    {
        "op": "a",
        "mode": "forward",
        "shape": "B=1",
        "dtype": "fp32",
        "row": "compiled",
        "error": "Unsupported: no",
    },
]


def test_the_report_gives_ratios_rates_and_what_failed(tmp_path):
    saved = tmp_path / "results.json"
    saved.write_text(json.dumps({"environment": ENVIRONMENT, "measurements": ROWS}))
    report.main([str(saved), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "| B=1 | fp32 | triton | 1.00 ms | 500.00 us | 4.00 x | 1.0 MiB | 812 | 41 % |" in text
    assert "| B=1 | fp32 | compiled | Unsupported: no |" in text and "device GPU X" in text
    assert (tmp_path / "out" / "benchmarks.png").stat().st_size > 5000


def test_the_report_reads_what_pytest_benchmark_writes(tmp_path):
    saved = tmp_path / "saved.json"
    entry = {
        "extra_info": {key: ROWS[0][key] for key in ("op", "mode", "shape", "dtype", "row")},
        "stats": {"median": 0.25},
    }
    saved.write_text(json.dumps({"machine_info": {"device": "cpu"}, "benchmarks": [entry]}))
    environment, rows = report.read(saved)
    assert environment == {"device": "cpu"} and rows[0]["seconds"] == 0.25


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("[1]", "holds neither"),
        ('{"benchmarks": 3}', "holds neither"),
    ],
)
def test_the_report_names_a_file_that_it_cannot_read(tmp_path, content, words):
    saved = tmp_path / "saved.json"
    if content is not None:
        saved.write_text(content)
    with pytest.raises(SystemExit, match=f"saved.json.*{words}"):
        report.main([str(saved), "--output", str(tmp_path)])


def test_the_report_does_not_mix_machines(tmp_path):
    paths = []
    for device in ("a", "b"):
        paths.append(tmp_path / f"{device}.json")
        paths[-1].write_text(json.dumps({"environment": {"device": device}, "measurements": ROWS}))
    with pytest.raises(SystemExit, match="different machines"):
        report.main([*map(str, paths), "--output", str(tmp_path)])


def gpu_command(*arguments):
    """``python -m benchmarks.on_gpu`` as a user types it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return dict(
        args=[sys.executable, "-m", "benchmarks.on_gpu", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(**gpu_command("--output", tmp_path / "out"), capture_output=True)
    assert done.returncode == 2 and "no GPU is visible" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--sections", "kernels,speed", "--output", "x"), "--sections: 'speed' is none of tests"),
        (("--dry-run",), "--output: a folder"),
        (
            ("--dry-run", "--output", "x", "--budget-seconds", "0"),
            "--budget-seconds: expected a number above 0",
        ),
    ],
)
def test_wrong_options_are_named(capsys, arguments, words):
    with pytest.raises(SystemExit):
        on_gpu.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_goes_through_every_section(tmp_path):
    done = subprocess.run(
        **gpu_command("--dry-run", "--output", tmp_path), capture_output=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    sections = results["sections"]
    assert list(sections) == list(on_gpu.SECTIONS)
    assert not [name for name, section in sections.items() if "error" in section]
    assert sections["tests"]["returncode"] == 0
    assert sections["sanitizer"]["output"].endswith("small case done\n")
    assert sections["repeats"]["all_bitwise"]
    assert len(sections["repeats"]["found"]) == 2 * 2 * len(OPS)
    assert {(row["op"], row["mode"]) for row in results["measurements"]} == {
        (op, mode) for op in OPS for mode in MODES if op != "update_prototypes" or mode == "forward"
    }
    assert {row["row"] for row in results["measurements"]} == {
        "reference",
        "cdist",
        "compiled",
        "compiled max-autotune",
    }
    assert not [row for row in results["measurements"] if "error" in row]
    # The share's sign is not asked for: three steps of a few milliseconds on a busy machine may
    # come out either way.
    steps = sections["end_to_end"]["steps"]
    alone, whole = steps["encoders alone"], steps["reference"]
    assert whole["head_share"] == pytest.approx(1 - alone["seconds"] / whole["seconds"])
    assert alone["head_share"] == 0
    text = (tmp_path / "benchmarks.md").read_text()
    assert "A dry run on a CPU" in text and "all bitwise: True" in text
    assert (tmp_path / "benchmarks.png").exists()


def session(tmp_path, seconds=60.0):
    """A dry session with room to work."""
    return Session(tmp_path, dry_run=True, budget_seconds=seconds, quick=False)


def test_a_section_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(session):
        session.add(op="a", mode="forward", shape="B=1", row="x", seconds=1.0)
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(on_gpu.SECTIONS, "kernels", (broken, 0.5))
    on_gpu.run(session(tmp_path), ["kernels", "ceilings"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert "ZeroDivisionError: on purpose" in results["sections"]["kernels"]["error"]
    assert len(results["measurements"]) == 1
    assert results["sections"]["ceilings"]["copy_bytes_per_second"] > 0
    assert "failed: ZeroDivisionError: on purpose" in (tmp_path / "benchmarks.md").read_text()


def test_a_row_that_fails_does_not_cost_the_others(tmp_path, monkeypatch):
    build = OPS["gated_fusion"]

    def sick(*arguments):
        case = build(*arguments)
        case.call = lambda impl: (_ for _ in ()).throw(RuntimeError("out of memory"))
        return case

    monkeypatch.setitem(OPS, "gated_fusion", sick)
    on_gpu.run(session(tmp_path), ["kernels"])
    rows = json.loads((tmp_path / "results.json").read_text())["measurements"]
    assert {row["op"] for row in rows if "error" in row} == {"gated_fusion"}
    assert {row["op"] for row in rows if row.get("seconds")} == set(OPS) - {"gated_fusion"}


def test_work_that_does_not_fit_the_time_is_left_out_and_said_so(tmp_path):
    late = session(tmp_path, seconds=0.5)
    on_gpu.run(late, ["kernels"])
    assert late.results["sections"]["kernels"] == {"left_out": "the whole time was over"}
    busy = session(tmp_path)
    busy.deadline = time.monotonic() - 1
    assert "rows: the section's time was over" in gpu_measurements.measure_kernels(busy)["left_out"]


def test_a_command_that_hangs_is_stopped_and_its_output_kept():
    script = "import time; print('begun', flush=True); time.sleep(60)"
    done = gpu_checks.limited([sys.executable, "-c", script], 2.0)
    assert done["out_of_time"] and done["output"] == "begun\n" and done["returncode"] != 0


@pytest.mark.slow
def test_stopped_midway_it_leaves_whole_results(tmp_path):
    with subprocess.Popen(
        **gpu_command("--dry-run", "--sections", "kernels,compiled", "--output", tmp_path),
        stdout=subprocess.PIPE,
    ) as process:
        for line in process.stdout:
            if line.startswith("kernels:"):  # the section that compiles is running
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0 and "stopped: what there is has been written" in rest
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped"]
    assert len([row for row in results["measurements"] if row.get("seconds")]) > 10
    assert "The run was stopped before its end" in (tmp_path / "benchmarks.md").read_text()


def test_an_odd_shape_goes_through_the_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "_gradients", lambda case, impl: [torch.rand(2)])
    found = gpu_checks.check_repeats(session(tmp_path))
    assert not found["all_bitwise"]  # an operator that never repeats is seen
    assert TINY[0].batch < gpu_checks.ODD.batch

"""The benchmarks' own logic, which must not be debugged on lent GPU time."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    gpu_checks,
    gpu_profile,
    gpu_rows,
    gpu_session,
    gpu_step,
    gpu_sweep,
    on_gpu,
    report,
    timing,
)
from benchmarks.cases import OPS, UPDATES, at, modes, precisions
from benchmarks.gpu_session import Session
from benchmarks.shapes import (
    MODES,
    ODD,
    PRECISIONS,
    SHAPES,
    TINY,
    Shape,
    conditions,
    function,
    in_mode,
)
from benchmarks.workers import Event, Pool, Task
from iib_kernels import _chunks, _tuning

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape(6, 4, 5, 2)
FP32 = PRECISIONS["fp32"]


# ----- Cases


def test_the_least_bytes_are_those_counted_by_hand():
    case = OPS["gated_fusion"](SMALL, FP32, "cpu")
    logits, per_sample, fused = 2 * 6 * 4 * 4, 6 * 2 * 4, 6 * 4 * 4
    # The gate is read; weights and uncertainty are written.
    assert case.bytes["forward"] == logits + per_sample + fused + 2 * per_sample
    assert case.bytes["backward"] == (logits + per_sample) + (fused + 2 * per_sample) + logits
    assert case.bytes["step"] == case.bytes["forward"] + case.bytes["backward"]
    half = OPS["update_prototypes"](SMALL, PRECISIONS["bf16"], "cpu")
    assert half.bytes["forward"] == 6 * 5 * 2 + 6 * 8 + 2 * (4 * 5 * 2 + 4 * 8)
    assert half.modes == ("forward",)
    mixed = OPS["alignment_loss"](SMALL, PRECISIONS["amp"], "cpu")
    assert mixed.bytes["forward"] == 2 * (6 * 5 * 2 + 4 * 5 * 4) + 6 * 8 + 2 * 2 * 4
    assert mixed.operations == {"forward": 480, "backward": 480, "step": 960}  # 2 B K D M
    objective = OPS["multimodal_objective"](SMALL, FP32, "cpu")
    leaves = logits + 2 * 6 * 5 * 4
    assert objective.bytes["step"] == objective.bytes["forward"] + leaves  # one pass may do


@pytest.mark.parametrize("op", OPS)
def test_every_row_of_an_operator_does_the_same_work(op):
    for precision in precisions(op):
        build = lambda: (torch.manual_seed(0), OPS[op](SMALL, PRECISIONS[precision], "cpu"))[1]
        case = build()
        assert case.modes == modes(op)
        expected = function(case, "reference", "cpu")(case.inputs)
        tolerance = {"fp32": 1e-4, "tf32": 1e-4}.get(precision, 4e-2)
        for row in ("ours", *case.peers):
            other = build()  # some work in place
            # Of another case's inputs: nothing else is read
            for found, right in zip(function(case, row, "cpu")(other.inputs), expected):
                torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)
        for mode in case.modes[1:]:
            gradients = in_mode(function(case, "reference", "cpu"), case, mode)()
            assert [value.shape for value in gradients] == [leaf.shape for leaf in case.leaves]
            assert all(value.abs().sum() > 0 for value in gradients)
        for peer in case.lesser:
            assert all(map(torch.isfinite, function(case, peer, "cpu")(case.inputs)))


def test_the_shapes_are_those_that_the_readme_names():
    assert [tuple(shape)[:4] for shape in SHAPES] == [
        (64, 6, 512, 2),
        (64, 31, 512, 2),
        (256, 309, 512, 2),
        (4096, 1000, 768, 3),
        (65536, 1024, 0, 3),
        (8192, 32768, 512, 2),
    ]
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for batch, classes, width, modalities, _ in SHAPES:
        assert f"| {batch:,} | {classes:,} | {width or '-'} | {modalities} |\n" in readme
    assert at(SHAPES[4]) == ("gated_fusion", "fusion_cross_entropy")
    assert at(SHAPES[5]) == ("alignment_loss",)


def test_plain_pytorch_is_no_straw_man():
    before, chunk = torch.get_float32_matmul_precision(), _chunks.CHUNK_BYTES
    for name, ours, eager in (("fp32", "highest", "highest"), ("amp", "highest", "high")):
        for row, wanted in (("ours", ours), ("reference", eager), ("product", eager)):
            with conditions(PRECISIONS[name], row, "cpu"):
                assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == before and _chunks.CHUNK_BYTES == chunk


# ----- Timing


class Clock(timing.HostClock):
    """A clock that goes by the number of calls, and a record of what happened."""

    timer = "counted"

    def __init__(self, broken=False):
        self.events, self.broken = [], broken

    def capture(self, calls):
        if self.broken:
            raise RuntimeError("cannot be captured")
        return lambda: (self.events.append("replay"), [call() for call in calls])

    def flush(self):
        self.events.append("flush")

    def seconds(self, work):
        work()
        return len(self.events) / 100


def test_every_replay_begins_with_a_cold_cache_and_takes_each_input_once():
    clock, called = Clock(), []
    calls = [lambda number=number: called.append(number) for number in range(3)]
    measured = timing.measure(clock, calls, milliseconds=0)
    assert clock.events == ["flush", "replay"] * 5
    assert called[2:] == [0, 1, 2] * 5  # after a call or two to warm up
    assert measured["copies"] == 3 and measured["timer"] == "counted"
    # 2, 4, 6, 8 and 10 events, a third of each
    assert measured["p50"] == pytest.approx(0.06 / 3)
    assert measured["p20"] < measured["p50"] < measured["p80"]


def test_what_cannot_be_captured_is_timed_without_and_says_so():
    measured = timing.measure(Clock(broken=True), [lambda: None], milliseconds=0)
    assert measured["timer"] == "events, cold"
    assert measured["note"] == "no graph: RuntimeError: cannot be captured"


class Cuda:
    """As much of ``torch.cuda`` as a graph's clock takes, and what was done with it."""

    def __init__(self):
        self.done = []
        self.cuda, self.side = self, contextlib.nullcontext()
        self.Event = self.CUDAGraph = lambda **_: self
        self.Stream = lambda: self.side
        self.stream = lambda stream: stream
        self.get_device_properties = lambda _: SimpleNamespace(L2_cache_size=1000)
        self.ones = lambda count, device: torch.ones(count)

    def elapsed_time(self, end):
        return 2.0

    def max_memory_allocated(self):
        return 7

    def memory_allocated(self):
        return 3

    def __getattr__(self, name):
        return lambda: self.done.append(name)


def test_a_graph_s_clock_captures_what_it_replays(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(timing, "torch", fake)
    clock = timing.GraphClock()
    assert clock.stream() is fake.side and len(clock.other) * 4 == 2 * 1000
    measured = timing.measure(clock, [lambda: fake.done.append("call")] * 3, milliseconds=0)
    begin, end = fake.done.index("capture_begin"), fake.done.index("capture_end")
    assert fake.done[begin + 1 : end] == ["call"] * 3 and "call" not in fake.done[end:]
    assert fake.done[end + 1 : end + 5] == ["record", "replay", "record", "synchronize"]
    assert measured["p50"] == pytest.approx(0.002 / 3) and measured["peak_bytes"] == 4
    assert measured["timer"] == "graph, cold" and measured["host_seconds"] >= 0

    def sick():
        if "capture_begin" in fake.done:
            raise RuntimeError("not while capturing")

    fake.done.clear()
    with pytest.raises(RuntimeError, match="not while capturing"):
        clock.capture([sick])
    assert fake.done[-1] == "capture_end" and gc.isenabled()


def test_a_measurement_is_the_median_of_what_was_called():
    waits = iter([0.0, 0.001, 0.03, 0.001])
    call = lambda: time.sleep(next(waits, 0.001))
    measured = timing.measure(timing.HostClock(), [call], milliseconds=1)
    assert 0.001 <= measured["p50"] < 0.02


def test_shares_are_of_a_copy_of_as_many_bytes_and_of_a_product(monkeypatch):
    asked = []
    monkeypatch.setattr(
        timing, "copy_rate", lambda device, exponent: asked.append(exponent) or 2e12
    )
    monkeypatch.setattr(timing, "product_rate", lambda device, name: {"bf16": 4e14}[name])
    entry = {"p50": 1e-3, "least_bytes": 10**9, "least_operations": 10**11}
    found = gpu_rows.rates("cuda", "amp", entry)
    assert found["gigabytes_per_second"] == pytest.approx(1000) and asked == [30]
    assert found["share_of_copy"] == pytest.approx(0.5)
    assert found["share_of_products"] == pytest.approx(0.25)


# ----- Processes


def numbers(count, wait=0.0):
    """A task: numbers, each after a wait."""
    for number in range(count):
        time.sleep(wait)
        yield number


def sick():
    """A task that fails."""
    yield 1
    raise ValueError("on purpose")


def fatal():
    """A task that ends its process."""
    yield 1
    os._exit(3)


@pytest.mark.parametrize("wait", [0.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_task_that_hangs_fails_or_ends_its_process_does_not_cost_the_others(wait):
    """Each that hangs or is fatal takes a process more, a second or two to start."""
    tasks = [
        Task(numbers, (3,), "first"),
        Task(sick, (), "sick"),
        Task(numbers, (1, wait), "hangs"),
        Task(fatal, (), "fatal"),
        Task(numbers, (2,), "last"),
    ]
    pool = Pool(1, threads=1)
    try:
        events = list(pool.run(tasks, 1.5, time.monotonic() + 200))
        left = list(pool.run(tasks[:2], 1.0, time.monotonic() - 1))
    finally:
        pool.close()
    found = {}
    for event in events:
        found.setdefault(event.task.label, []).append((event.kind, event.value))
    assert found["first"] == [("value", 0), ("value", 1), ("value", 2), ("done", None)]
    assert found["sick"] == [("value", 1), ("error", "ValueError: on purpose")]
    assert found["hangs"] == ([("late", "over 2 s")] if wait else [("value", 0), ("done", None)])
    assert found["fatal"] == [("value", 1), ("error", "its process ended with status 3")]
    assert found["last"] == [("value", 0), ("value", 1), ("done", None)]
    assert [event.kind for event in left] == ["left out", "left out"]
    assert not pool.workers


class Here:
    """A pool whose tasks run in this process."""

    def __init__(self, *_, **__):
        pass

    def close(self):
        pass

    def run(self, tasks, limit, until):
        for task in tasks:
            if time.monotonic() >= until:
                yield Event(task, "left out")
                continue
            try:
                for value in task.function(*task.arguments):
                    yield Event(task, "value", value)
                yield Event(task, "done")
            except Exception as error:
                yield Event(task, "error", f"{type(error).__name__}: {error}")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Makes dry sessions in this process, with room to work."""
    for module in (gpu_session, gpu_rows, gpu_sweep):
        monkeypatch.setattr(module, "Pool", Here)

    def make(seconds=60.0, folder=tmp_path):
        found = Session(folder, dry_run=True, budget_seconds=seconds)
        found.machine["device"] = gpu_session.DRY
        found.shapes = TINY[:1]
        return found

    return make


# ----- Results


def measurement(**changes):
    """One row."""
    row = {
        "op": "a",
        "mode": "forward",
        "shape": "B=1",
        "precision": "fp32",
        "row": "reference",
        "p20": 0.0039,
        "p50": 0.004,
        "p80": 0.0042,
        "timer": "graph, cold",
        "peak_bytes": 2**21,
    }
    return {**row, **changes}


MACHINE = {"device": "GPU X", "torch": "2.11", "date": "2026-11-23", "sources": "abc"}
ROWS = [
    measurement(),
    measurement(
        row="ours",
        p20=0.0009,
        p50=0.001,
        p80=0.0011,
        host_seconds=0.0005,
        peak_bytes=2**20,
        gigabytes_per_second=812.4,
        share_of_copy=0.41,
    ),
    measurement(row="compiled", p20=None, p50=None, p80=None, error="Unsupported: no"),
]


def saved(path, rows=ROWS, **machine):
    """A results.csv."""
    machine = {"dry_run": False, **MACHINE, **machine}
    path.write_text(gpu_session.text({**row, **machine} for row in rows))
    return path


def test_the_report_gives_ratios_rates_and_what_failed(tmp_path):
    report.main([str(saved(tmp_path / "results.csv")), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert (
        "| B=1 | fp32 | ours | 1.00 ms | 900.00 us to 1.10 ms | 500.00 us | 4.00 x |  | 1.0 MiB "
        "| 812 | 41 % |  |  |" in text
    )
    assert "| B=1 | fp32 | compiled | Unsupported: no |" in text and "device GPU X" in text
    assert (tmp_path / "out" / "benchmarks.png").stat().st_size > 5000


def test_sessions_become_one_table(tmp_path):
    first = saved(tmp_path / "first.csv", ROWS[1:])
    second = saved(tmp_path / "second.csv", [*ROWS[:1], measurement(row="ours", p50=9.0)])
    report.main([str(first), str(second), "--output", str(tmp_path / "out")])
    rows = report.read(tmp_path / "out" / "results.csv")
    assert [(row["row"], row["p50"]) for row in rows] == [
        ("ours", 0.001),
        ("compiled", None),
        ("reference", 0.004),
    ]
    assert rows[0]["device"] == "GPU X" and rows[0]["dry_run"] is False


def test_a_session_adds_to_what_its_folder_holds(session):
    first = session()
    first.add(**measurement())
    first.add(**measurement(row="ours", mode="all", p50=None, error="late"))
    first.note("kernels", done=1)
    second = session()
    second.add(**measurement(row="ours", p50=0.5))
    second.add(**measurement(row="compiled", p50=0.25))
    second.add(**measurement(row="compiled", p50=0.125))
    second.note("repeats", done=2)
    rows = gpu_session.read(second.output / "results.csv")
    assert [(row["row"], row["p50"]) for row in rows] == [
        ("reference", 0.004),
        ("ours", 0.5),
        ("compiled", 0.125),
    ]
    assert set(json.loads((second.output / "sections.json").read_text())) == {"kernels", "repeats"}


def test_other_code_and_other_devices_stand_apart(tmp_path):
    one = saved(tmp_path / "one.csv")
    two = saved(tmp_path / "two.csv", [measurement(p50=0.1)], sources="def")
    report.main([str(one), str(two), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert text.count("## a, forward") == 2 and "sources abc" in text and "sources def" in text


def test_a_dry_run_is_never_written_beside_measurements(tmp_path, capsys):
    saved(tmp_path / "results.csv")
    assert on_gpu.main(["--dry-run", "--output", str(tmp_path)]) == 2
    assert "a dry run cannot be written beside measurements" in capsys.readouterr().err
    dry = saved(tmp_path / "dry.csv", dry_run=True)
    with pytest.raises(SystemExit, match="of a dry run"):
        report.main([str(tmp_path / "results.csv"), str(dry), "--output", str(tmp_path)])


def test_the_report_reads_what_pytest_benchmark_writes(tmp_path):
    path = tmp_path / "saved.json"
    entry = {
        "extra_info": {key: ROWS[0][key] for key in ("op", "mode", "shape", "precision", "row")},
        "stats": {"median": 0.25, "q1": 0.2, "q3": 0.5},
    }
    path.write_text(json.dumps({"machine_info": {"device": "cpu"}, "benchmarks": [entry]}))
    (row,) = report.read(path)
    assert row["device"] == "cpu" and row["p50"] == 0.25
    assert (row["q1"], row["q3"]) == (0.2, 0.5)  # for the picture
    report.main([str(path), "--output", str(tmp_path / "out")])
    assert (
        "| B=1 | fp32 | reference | 250.00 ms |" in (tmp_path / "out" / "benchmarks.md").read_text()
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("saved.json", None, "no such file"),
        ("saved.json", "{", "is not JSON"),
        ("saved.json", "[1]", "holds neither"),
        ("saved.json", '{"benchmarks": 3}', "holds neither"),
        ("saved.csv", "a,b\n1,2\n", "not a results.csv"),
        ("saved.csv", None, "no such file"),
    ],
)
def test_the_report_names_a_file_that_it_cannot_read(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"{name}.*{words}"):
        report.main([str(path), "--output", str(tmp_path)])


# ----- Sections


def test_a_section_that_fails_is_recorded_and_the_others_go_on(session, monkeypatch):
    def broken(session):
        session.add(**measurement(row="x", p50=1.0))
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(on_gpu.SECTIONS, "kernels", (broken, 0.5))
    dry = session()
    assert not on_gpu.run(dry, ["kernels", "profile"])
    sections = json.loads((dry.output / "sections.json").read_text())
    assert "ZeroDivisionError: on purpose" in sections["kernels"]["error"]
    assert len(gpu_session.read(dry.output / "results.csv")) == 1
    assert "left_out" in sections["profile"]
    assert "failed: ZeroDivisionError: on purpose" in (dry.output / "benchmarks.md").read_text()


def test_a_row_that_fails_does_not_cost_the_others(session, monkeypatch):
    build = OPS["gated_fusion"]

    def sick(*arguments):
        case = build(*arguments)
        case.run = lambda impl, inputs: (_ for _ in ()).throw(RuntimeError("out of memory"))
        return case

    monkeypatch.setitem(OPS, "gated_fusion", sick)
    dry = session()
    monkeypatch.setattr(gpu_rows, "at", lambda shape: ("gated_fusion", "update_prototypes_"))
    assert not on_gpu.run(dry, ["kernels"])  # ours failed, and that is wrong
    rows = gpu_session.read(dry.output / "results.csv")
    assert {row["op"] for row in rows if row["error"]} == {"gated_fusion"}
    assert {row["op"] for row in rows if row["p50"]} == {"update_prototypes_"}
    assert all(row["dry_run"] and row["device"] == gpu_session.DRY for row in rows)


def test_work_that_does_not_fit_the_time_is_left_out_and_said_so(session):
    late = session(seconds=0.5)
    on_gpu._section(late, "kernels")
    assert late.sections["kernels"]["left_out"] == "the whole time was over"
    busy = session()
    busy.deadline = time.monotonic() - 1
    found = gpu_rows.compile_kernels(busy)
    assert found["done"] == 0 and len(found["left_out"]) == len(gpu_rows.plan(busy, "ours")) + sum(
        len(precisions(op)) for op in OPS for _ in range(2)
    )


def test_a_command_that_hangs_is_stopped_and_its_output_kept(tmp_path):
    script = "import time; print('begun', flush=True); time.sleep(60)"
    for log in (None, tmp_path / "log"):
        done = gpu_checks.limited([sys.executable, "-c", script], 1.5, log=log)
        assert done["out_of_time"] and done["output"] == "begun\n" and done["returncode"] != 0


def test_the_compiled_tests_are_those_that_look_for_a_gpu():
    found = gpu_checks.compiled_tests(with_hypothesis=True)
    assert {"tests/kernels/test_triton_functions.py", "tests/kernels/test_triton_values.py"} <= {
        *found
    }
    assert "tests/kernels/test_triton_values.py" not in gpu_checks.compiled_tests(
        with_hypothesis=False
    )
    assert not [name for name in found if "aot" in name]


def test_what_does_not_repeat_is_wrong(session, monkeypatch):
    monkeypatch.setattr(gpu_checks, "OPS", {"gated_fusion": OPS["gated_fusion"]})
    dry = session()
    assert on_gpu.run(dry, ["repeats"]) and dry.sections["repeats"]["all_bitwise"]
    assert len(dry.sections["repeats"]["found"]) == 2 * 2  # an odd size too, in two precisions
    results, noise = gpu_checks._results, iter(range(10**6))

    def restless(case, row, device):
        found = results(case, row, device)
        return [found[0] + 1e-9 * (next(noise) % 2)] if row == "ours" else found

    monkeypatch.setattr(gpu_checks, "_results", restless)
    assert not on_gpu.run(dry, ["repeats"])  # the exit status is 1
    assert not dry.sections["repeats"]["all_bitwise"]


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_what_is_far_from_float64_is_wrong(factor, monkeypatch):
    row = gpu_rows.Row("gated_fusion", ODD, "fp32", "ours", "cpu")
    (good,) = gpu_checks.repeat_row(row, 1)
    assert not good["wrong"] and good["error"] < 1e-6 and good["bound"] == 1e-5
    results = gpu_checks._results

    def far(case, name, device):
        found = results(case, name, device)
        return [value * factor for value in found] if name == "ours" else found

    monkeypatch.setattr(gpu_checks, "_results", far)
    (bad,) = gpu_checks.repeat_row(row, 1)
    assert bad["wrong"]


def test_the_truth_is_in_float64_and_of_the_same_values():
    case = OPS["multimodal_objective"](SMALL, PRECISIONS["amp"], "cpu")
    truth = gpu_checks.raised(case)
    (loss,) = truth.run("reference", truth.inputs)
    assert loss.dtype == torch.float64
    gradients = torch.autograd.grad(loss, truth.leaves)
    assert all(value.dtype == torch.float64 and value.abs().sum() > 0 for value in gradients)
    assert torch.equal(truth.leaves[-1].float(), case.leaves[-1].float())


def test_the_head_s_share_is_what_it_takes_beyond_the_encoders(session, monkeypatch):
    def step(device, dry_run, variant):
        yield measurement(
            op="training_step", mode="step", row=variant, p50=0.1 if variant == "ours" else 0.08
        )

    monkeypatch.setattr(gpu_step, "measure_step", step)
    found = gpu_step.measure_end_to_end(session())
    assert found["head_share"] == {"encoders alone": 0.0, "reference": 0.0, "ours": 0.2}


NCU = """==PROF== Connected
"ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum"
"","","byte","ns"
"0","rows, a","1000","20"
"1","b","2000","30"
"""


def test_counters_are_read_from_what_ncu_prints():
    found = gpu_profile.counters(NCU)
    assert [entry["kernel"] for entry in found] == ["rows, a", "b"]
    assert found[1]["dram__bytes.sum"] == "2000" and found[0]["launch__grid_size"] == ""
    assert gpu_profile.counters("==ERROR== ERR_NVGPUCTRPERM") == []
    assert "| alignment_loss | b | 30 | 2000 |" in gpu_profile.table({"alignment_loss": found})


# ----- The sweep of launches


def test_a_launch_can_be_changed_by_its_name():
    table = _tuning.Launch({"BLOCK_B": 16}, 4)
    other = _tuning.Launch({"BLOCK_B": 32}, 8)
    took = []
    with gpu_sweep.launches(lambda name, own: other if name == "fusion rows" else own) as seen:
        _tuning.run(("fusion", "rows", 64, torch.float32), [table, other], took.append)
        _tuning.run(("alignment", 64), [table], took.append)
    assert took == [other, table] and seen == {"fusion rows": table, "alignment": table}
    _tuning.run(("fusion", "rows", 64), [table], took.append)
    assert took[-1] == table


def test_variants_begin_with_the_table_s_and_differ():
    table = _tuning.Launch({"BLOCK_B": 1, "BLOCK_K": 64}, 4, 2)
    found = gpu_sweep.variants(table)
    assert found[0] == table and len({gpu_sweep.text(variant) for variant in found}) == len(found)
    assert {variant.blocks["BLOCK_K"] for variant in found} == {32, 64, 128}
    assert {variant.blocks["BLOCK_B"] for variant in found} == {1, 2}
    assert {variant.num_stages for variant in found} == {1, 2, 3, 4}
    assert eval(gpu_sweep.text(table), {"Launch": _tuning.Launch}) == table  # to be pasted


def test_the_sweep_keeps_the_fastest_first_and_goes_on_after_a_failure(session, monkeypatch):
    table = _tuning.Launch({"BLOCK_B": 16}, 4)

    def recorded(row):
        yield {"fusion": table} if row.op == "fusion_cross_entropy" else {}

    def tried(row, name, variant, milliseconds):
        if variant.num_warps == 8 and not milliseconds:
            raise RuntimeError("out of shared memory")
        yield 1.0 / variant.blocks["BLOCK_B"]

    monkeypatch.setattr(gpu_sweep, "recorded", recorded)
    monkeypatch.setattr(gpu_sweep, "try_variant", tried)
    dry = session()
    found = gpu_sweep.sweep(dry)
    lines = (dry.output / "launches.csv").read_text().splitlines()
    assert "{'BLOCK_B': 32}" in lines[1] and ",0.500," in lines[1] and "True" in lines[1]
    assert found["timed"] == len(lines) - 1
    assert all("out of shared memory" in reason for reason in found["failed"].values())
    assert len(found["failed"]) == 3 * 2  # three tiles with eight warps, in two precisions


def test_a_variant_with_other_values_is_refused(monkeypatch):
    row = gpu_rows.Row("gated_fusion", SMALL, "fp32", "ours", "cpu")
    table = _tuning.Launch({"BLOCK_B": 16})
    (seconds,) = gpu_sweep.try_variant(row, "fusion", table, 1)
    assert seconds > 0
    outcomes = iter(range(1, 99))
    monkeypatch.setattr(gpu_sweep, "_step", lambda row: lambda: [torch.ones(2) * next(outcomes)])
    with pytest.raises(RuntimeError, match="other values"):
        list(gpu_sweep.try_variant(row, "fusion", table, 1))


# ----- The command


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
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert on_gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "no GPU is visible" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--section", "kernels,speed", "--output", "x"), "--section: 'speed' is none of compile"),
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
    names = [name for name in on_gpu.SECTIONS if name not in ("tests", "sanitizer")]
    for section in (",".join(names), "tests,sanitizer"):
        command = gpu_command(
            "--dry-run", "--output", tmp_path, "--section", section, "--budget-seconds", 900
        )
        done = subprocess.run(**command, capture_output=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((tmp_path / "sections.json").read_text())
    assert set(sections) == {*on_gpu.SECTIONS, "ceilings", "machine"}
    assert not [name for name, section in sections.items() if section.get("failed")]
    assert sections["tests"]["returncode"] == 0
    assert "tests collected" in (tmp_path / "tests.log").read_text()
    assert sections["sanitizer"]["output"].endswith("small case done\n")
    assert sections["repeats"]["all_bitwise"] and not sections["repeats"]["left_out"]
    rows = gpu_session.read(tmp_path / "results.csv")
    assert not [row for row in rows if row["error"] or not row["dry_run"]]
    timed = {(row["op"], row["mode"]) for row in rows if not row["op"].startswith("training")}
    assert timed == {(op, mode) for op in OPS for mode in modes(op)}
    assert {row["row"] for row in rows} == {
        *("ours", "reference", "compiled", "compiled max-autotune", "encoders alone"),
        *("product", "cdist", "autocast", "F.cross_entropy x (M+1)"),
    }
    assert {row["precision"] for row in rows} == set(PRECISIONS)
    assert sections["sweep"]["timed"] > 10 and (tmp_path / "launches.csv").exists()
    assert set(sections["end_to_end"]["head_share"]) == {"encoders alone", "reference", "ours"}
    text = (tmp_path / "benchmarks.md").read_text()
    assert "A dry run on a CPU" in text and "all bitwise: True" in text
    assert (tmp_path / "benchmarks.png").exists()


@pytest.mark.slow
def test_stopped_midway_it_leaves_whole_results(tmp_path):
    with subprocess.Popen(
        **gpu_command("--dry-run", "--section", "kernels,compiled", "--output", tmp_path),
        stdout=subprocess.PIPE,
    ) as process:
        for line in process.stdout:
            if line.startswith("kernels:"):  # the section that compiles is running
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0 and "stopped: what there is has been written" in rest
    rows = gpu_session.read(tmp_path / "results.csv")
    assert len([row for row in rows if row["p50"]]) > 10
    assert "The run was stopped before its end" in (tmp_path / "benchmarks.md").read_text()


def test_updates_have_no_step():
    assert [op for op in OPS if modes(op) != MODES] == ["multimodal_objective", *UPDATES]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of interpreted kernels")
def test_the_sweep_reaches_the_launches_of_the_main_kernels():
    pytest.importorskip("triton")
    for op in gpu_sweep.SWEPT:
        case = OPS[op](SMALL, FP32, "cpu")
        with gpu_sweep.launches(lambda name, own: own) as seen:
            case.run("triton", case.inputs)[0].sum().backward()
        # Forward and backward, but for the objective, whose gradients come out of its forward
        assert len(seen) >= 2 - (op == "multimodal_objective"), (op, seen)
        assert all(isinstance(launch, _tuning.Launch) for launch in seen.values())

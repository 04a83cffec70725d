"""The picture of the benchmarks: that it shows the times that were measured, legibly."""

import pytest
from legible import assert_apart_and_inside

from benchmarks.cases import OPS, at, modes, precisions
from benchmarks.picture import COLOURS, draw, picture
from benchmarks.shapes import SHAPES

NAMES = (*COLOURS, "F.cross_entropy x (M+1)")


def row(name, p50, op="gated_fusion", mode="step", shape="B=64 K=31 D=512 M=2", **more):
    return {
        **{"op": op, "mode": mode, "shape": shape, "precision": "fp32", "row": name, "p50": p50},
        **more,
    }


def points(axes):
    """Medians of a page column with their spreads, in the order drawn: (low, median, high)."""
    found = []
    for container in axes.containers:
        point, _, (bar,) = container
        low, high = bar.get_segments()[0][:, 0]
        found.append((low, point.get_xdata()[0], high))
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    "low, high, word", [("p20", "p80", "p20 to p80"), ("q1", "q3", "quartiles")]
)
def test_times_and_spreads_are_over_the_reference_s_median(low, high, word):
    rows = [
        row("reference", 0.004, **{low: 0.003, high: 0.008}),
        row("ours", 0.001, **{low: 0.0008, high: 0.002}),
        row("compiled", 0.002),
    ]
    figure = draw(rows, "a machine")
    (axes,) = figure.axes
    expected = [(0.2, 0.25, 0.5), (0.75, 1.0, 2.0), (0.5, 0.5, 0.5)]  # ours first
    assert points(axes) == [pytest.approx(values) for values in expected]
    assert texts(axes) == [
        "gated_fusion, step",
        "B=64 K=31 D=512 M=2",
        "fp32",
        "4.00 ms",
        "reference",
    ]
    low_limit, high_limit = axes.get_xlim()
    assert low_limit < 0.2 and high_limit > 2
    heading = figure.texts[0].get_text().replace("\n", " ")
    assert heading.startswith("a machine Time of one call over") and heading.endswith(word)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ours", "reference", "compiled"]


def test_the_least_time_is_a_dash_of_its_own():
    rows = [row("reference", 0.004), row("ours", 0.002, share_of_copy=0.3, share_of_products=0.5)]
    figure = draw(rows, "")
    dashes = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert [line.get_xdata()[0] for line in dashes] == [pytest.approx(0.5 * 0.002 / 0.004)]
    assert "least time" in figure.legends[0].get_texts()[-1].get_text()
    lone = draw([row("reference", 0.004), row("ours", 0.002)], "")
    assert len(lone.legends[0].get_texts()) == 2


def test_without_the_reference_a_line_says_what_it_is_measured_against():
    (axes,) = draw([row("ours", 0.001), row("compiled", 0.002)], "").axes
    assert [middle for _, middle, _ in points(axes)] == [0.5, 1.0]
    assert "2.00 ms compiled" in texts(axes) and "reference" not in texts(axes)


def test_of_two_rows_of_the_same_thing_the_first_counts():
    (axes,) = draw([row("reference", 0.004), row("reference", 0.008)], "").axes
    assert len(points(axes)) == 1 and "4.00 ms" in texts(axes)


def test_only_what_was_measured_takes_room():
    rows = [
        row("reference", 0.004, mode="forward"),
        row("reference", 0.004),
        row("reference", 0.004, shape="B=1"),
        row("reference", 0.002, op="alignment_loss"),
        row("reference", None, op="late", error="out of time"),
    ]
    (axes,) = draw([found for found in rows if found["p50"]], "").axes
    blocks = [text for text in texts(axes) if ", " in text]
    assert blocks == ["gated_fusion, forward", "gated_fusion, step", "alignment_loss, step"]
    assert len(points(axes)) == 4
    heights = sorted({round(line.get_ydata()[0], 6) for line in axes.lines if is_line(line)})
    assert len(heights) == 4  # one line a case, and none empty


def is_line(line):
    """Whether it is the pale line that a case's points stand on."""
    return list(line.get_xdata()) == [0, 1]


def test_nothing_measured_is_no_picture(tmp_path):
    path = tmp_path / "benchmarks.png"
    assert not picture([], path, "") and not picture([row("ours", None)], path, "")
    assert not list(tmp_path.iterdir())


def test_the_same_rows_have_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        assert picture([row("reference", 0.004), row("ours", 0.001)], tmp_path / name, "t")
    first, second = (tmp_path / name for name in ("one.png", "two.png"))
    assert first.read_bytes() == second.read_bytes() and len(first.read_bytes()) > 5000


def everything(names):
    """A session's rows: every operator, mode, shape and precision."""
    return [
        row(
            name,
            10.0 ** (number % 7 - 6) * (1 + 0.1 * place),
            op=op,
            mode=mode,
            shape=str(shape),
            precision=precision,
            share_of_copy=0.5,
        )
        for number, (shape, op) in enumerate((shape, op) for shape in SHAPES for op in at(shape))
        for mode in modes(op)
        for precision in precisions(op)
        for place, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [row("ours", 1e-3)],
        [row("ours", 1e-3), row("compiled", 2e-3)],
        [row("reference", 9.9e-4, precision="fp32, 2 threads"), row("a peer of a long name", 1e-3)],
        [row("reference", 5e-4, shape=f"B={size} K=32768 D=512 M=2") for size in (65536, 8192)],
        everything(NAMES),
    ],
    ids=["one", "two", "threads", "long", "everything"],
)
def test_no_two_texts_overlap_or_are_cut_off(rows):
    title = "DRY RUN, NOT A MEASUREMENT (NVIDIA H100 80GB HBM3, torch 2.13.0+cu130, 2026-11-28)"
    figure = draw(rows, title)
    figure.canvas.draw()
    found = [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label)]
    found += [*figure.texts, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = axes.xaxis.get_major_ticks()
        found += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    boxes = [(text, text.get_window_extent()) for text in found if text.get_text()]
    assert_apart_and_inside(figure, boxes)
    cases = {(found["op"], found["mode"], found["shape"], found["precision"]) for found in rows}
    drawn = [line for axes in figure.axes for line in axes.lines if is_line(line)]
    assert len(drawn) == len(cases)


def test_every_operator_has_its_blocks():
    figure = draw(everything(("ours", "reference")), "")
    blocks = [text for axes in figure.axes for text in texts(axes) if ", " in text]
    assert sorted(blocks) == sorted(f"{op}, {mode}" for op in OPS for mode in modes(op))
    assert len(figure.axes) == 4

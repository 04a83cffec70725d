"""The report page: that it shows the numbers it was given, and legibly.

It also leaves the importing program's matplotlib alone.
"""

import itertools
import math
import os
import re
import struct
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Annotation, Text

from iibalance.config import DataConfig
from iibalance.errors import InputError
from iibalance.metrics import classification_metrics, reliability_curve
from iibalance.training.report import INK, PALETTE, report_figure, report_title, write_report
from iibalance.training.report_panels import LEAST_SAMPLES, merge_bins

SHORT = ["audio", "visual", "text", "depth", "imu", "eeg"]
LONG = [
    "skeleton_joint_positions",
    "inertial_wrist_accelerometer",
    "depth_video_frontal",
    "near_infrared_thermal_camera_of_the_left_hand",
    "electroencephalogram_alpha",
    "magnetoencephalographicsensors",
]
HEADS = {"heads": True, "budgets": True}
CONCAT = {"heads": False, "budgets": False}


def page(names, *, epochs=30, heads=True, budgets=True, best=None):
    """The arguments of ``report_figure`` for a made-up run, all numbers distinct."""
    share = np.array([0.78 * 0.7**i for i in range(len(names))])
    best = best or max(1, epochs // 2)
    history = [
        {
            "epoch": epoch,
            "train.loss": 8 * math.exp(-epoch / 9) + 0.3,
            "validation.nll": 0.4 + 2.7 * math.exp(-epoch / 6),
            "lambda": 1.0,
        }
        for epoch in range(1, epochs + 1)
    ]
    for row in history if heads else ():
        row |= {
            f"validation.nll.{name}": 0.6 + 0.3 * i + 2 * math.exp(-row["epoch"] / (5 + i))
            for i, name in enumerate(names)
        }
    generator = torch.Generator().manual_seed(0)
    reliability, ece = {}, {}
    for name in ["fused", *(names if heads else [])]:
        logits = 2 * torch.randn(300, 5, generator=generator)
        targets = torch.where(torch.rand(300, generator=generator) < 0.6, logits.argmax(1), 0)
        reliability[name] = reliability_curve(logits.log_softmax(1), targets)
        ece[name] = classification_metrics(logits.log_softmax(1), targets)["ece"]
    modalities = {
        name: {"alone_accuracy": 0.85 - 0.1 * i}
        | ({"accuracy": 0.83 - 0.11 * i, "ece": ece[name]} if heads else {})
        for i, name in enumerate(names)
    }
    test = {
        "accuracy": 0.914,
        "macro_f1": 0.909,
        "nll": 0.281,
        "ece": ece["fused"],
        "brier": 0.131,
        "modalities": modalities,
        "shapley": {name: 0.4 - 0.17 * i for i, name in enumerate(names)},
    }
    if budgets:
        test["trust"] = {name: 0.98 - 0.2 * i for i, name in enumerate(names)}
        test["contributions"] = {name: 2.5 - 1.4 * i for i, name in enumerate(names)}
    metrics = {"method": "some", "best_epoch": best, "test": test}
    return {
        "history": history,
        "metrics": metrics,
        "reliability": reliability,
        "title": "A run",
        "budgets": {
            "modalities": names,
            "values": share.tolist(),
            "standard_errors": [0.01 + 0.01 * i for i in range(len(names))],
            "prior": (share / share.sum()).tolist(),
            "anchor": names[0],
        }
        if budgets
        else None,
    }


def cells(figure):
    """The four panels: (axes, texts of the legends)."""
    return [
        (cell.axes[0], [text.get_text() for legend in cell.legends for text in legend.get_texts()])
        for cell in figure.subfigs
    ]


def bars(axes):
    return [(patch.get_width(), to_hex(patch.get_facecolor()).upper()) for patch in axes.patches]


def notes(axes):
    return [text.get_text() for text in axes.texts]


# What is drawn is what was given.
def test_training_panel():
    arguments = page(SHORT[:2], best=7)
    axes, legend = cells(report_figure(**arguments))[0]
    history = arguments["history"]
    drawn = {tuple(line.get_ydata()): line for line in axes.lines}
    for key in ("train.loss", "validation.nll", "validation.nll.audio", "validation.nll.visual"):
        line = drawn[tuple(row[key] for row in history)]
        assert list(line.get_xdata()) == [row["epoch"] for row in history]
    assert legend == [
        "training loss",
        "validation NLL, fused",
        "chosen: epoch 7",
        "validation NLL, each head",
    ]
    assert drawn[(history[6]["validation.nll"],)].get_xdata() == [7]
    assert axes.get_yscale() == "log" and axes.get_xlim()[0] > 0
    fused = drawn[tuple(row["validation.nll"] for row in history)]
    assert (
        fused.get_linewidth()
        > drawn[tuple(row["validation.nll.audio"] for row in history)].get_linewidth()
    )


def test_accuracy_panel():
    axes, legend = cells(report_figure(**page(SHORT[:2])))[1]
    widths = [91.4, 85.0, 83.0, 75.0, 72.0]
    assert [width for width, _ in bars(axes)] == pytest.approx(widths) and notes(axes) == [
        f"{width:.1f}" for width in widths
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fused", "audio", "visual"]
    assert legend == ["trained alone", "its head in the joint model"]
    places = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches]
    # A name stands at its own bars
    assert list(axes.get_yticks()) == pytest.approx(
        [places[0], sum(places[1:3]) / 2, sum(places[3:]) / 2]
    )


def test_budget_panel():
    arguments = page(SHORT[:3])
    axes, legend = cells(report_figure(**arguments))[2]
    budgets, test = arguments["budgets"], arguments["metrics"]["test"]
    assert [width for width, _ in bars(axes)] == pytest.approx(budgets["values"])
    spans = [
        tuple(segment[:, 0])
        for collection in axes.collections
        for segment in collection.get_segments()
    ]
    assert spans == [
        pytest.approx((value - error, value + error))
        for value, error in zip(budgets["values"], budgets["standard_errors"], strict=True)
    ]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == list(test["trust"].values())
    assert notes(axes) == [
        f"{budgets['values'][0]:.2f} ± 0.01 ★",
        "0.98, adds +2.50 nats",
        f"{budgets['values'][1]:.2f} ± 0.02",
        "0.78, adds +1.10 nats",
        f"{budgets['values'][2]:.2f} ± 0.03",
        "0.58, adds −0.30 nats",
    ]
    assert legend == ["budget ± s.e.", "mean trust, and what it adds to the log-odds", "largest"]


def test_shapley_panel_stands_in_for_budgets():
    figure = report_figure(**page(SHORT[:4], **CONCAT))
    axes, _ = cells(figure)[2]
    assert [width for width, _ in bars(axes)] == pytest.approx([40, 23, 6, -11]) and notes(
        axes
    ) == ["+40.0", "+23.0", "+6.0", "−11.0"]
    assert "Shapley" in figure.subfigs[2].legends[0].get_title().get_text()
    assert axes.get_xlim()[0] <= -11 and axes.get_xlim()[1] >= 40


def test_reliability_panel_shows_the_ece_of_metrics():
    arguments = page(SHORT[:3])
    axes, legend = cells(report_figure(**arguments))[3]
    test = arguments["metrics"]["test"]
    expected = {"fused": test["ece"]} | {
        name: test["modalities"][name]["ece"] for name in SHORT[:3]
    }
    # Of the bins given, and not of those drawn
    assert legend == [
        "≥ 30 samples, bins merged",
        *(f"{ece:.3f} {name}" for name, ece in expected.items()),
    ]
    assert len(set(expected.values())) == 4
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    for curve in arguments["reliability"].values():
        confidence, accuracy, _ = merge_bins(*map(np.asarray, curve))
        assert (confidence.tolist(), accuracy.tolist()) in drawn and len(confidence) == 7
    assert axes.get_aspect() == 1


def test_bins_with_samples_enough_are_drawn_as_they_are():
    arguments = page(SHORT[:2])
    for name, (confidence, accuracy, count) in arguments["reliability"].items():
        arguments["reliability"][name] = confidence, accuracy, count + LEAST_SAMPLES
    axes, legend = cells(report_figure(**arguments))[3]
    assert not [text for text in legend if "merged" in text]
    drawn = [line.get_xdata().tolist() for line in axes.lines]
    assert arguments["reliability"]["fused"][0].tolist() in drawn


@pytest.mark.parametrize("seed", range(20))
def test_merged_bins_hold_enough_and_lose_nothing(seed):
    generator = np.random.default_rng(seed)
    size = generator.integers(1, 16)
    count = generator.integers(1, 60, size)
    confidence = np.sort(generator.random(size))
    accuracy = generator.random(size)
    merged = merge_bins(confidence, accuracy, count, 30)
    assert merged[2].sum() == count.sum()
    assert (merged[2] >= 30).all() or len(merged[2]) == 1
    for before, after in zip((confidence, accuracy), merged[:2], strict=True):
        assert (after * merged[2]).sum() == pytest.approx((before * count).sum(), rel=1e-12)
    assert (np.diff(merged[0]) >= 0).all()  # neighbours were merged, and no others
    edges = np.cumsum(merged[2])
    assert set(edges) <= set(np.cumsum(count)) and len(edges) <= size
    # And none without need
    if (count >= 30).all():
        assert len(edges) == size


def test_one_colour_per_modality_in_every_panel():
    names = SHORT
    training, accuracy, budget, reliability = (
        axes for axes, _ in cells(report_figure(**page(names)))
    )
    assert bars(accuracy)[0][1] == INK.upper()
    assert (
        [colour for _, colour in bars(accuracy)[2::2]]
        == [colour for _, colour in bars(budget)]
        == list(PALETTE)
    )
    heads = {line.get_xydata().tobytes(): line.get_color() for line in reliability.lines}
    curves = page(names)["reliability"]
    drawn = [np.stack(merge_bins(*map(np.asarray, curves[name]))[:2], 1) for name in names]
    assert [heads[curve.tobytes()] for curve in drawn] == list(PALETTE)
    # The tints
    assert [to_hex(line.get_color()) for line in training.lines[:6]] == [
        colour.lower() for _, colour in bars(accuracy)[1::2]
    ]
    # And in black and white
    assert len({line.get_marker() for line in reliability.lines[1:7]}) == 6


def test_headline_and_title():
    arguments = page(["audio"])
    arguments["metrics"]["test"] |= {"nll": math.nan, "ece": 0.0234}
    assert (
        report_figure(**arguments).get_suptitle()
        == "A run\nTest: accuracy 91.4 %, macro-F1 0.909, ECE 0.023, Brier 0.131"
    )


# Legible.
def visible_texts(figure):
    """Every text that is drawn, with its box in pixels; tick labels outside the view are not."""
    figure.draw_without_rendering()
    labels = {}
    for axes in figure.findobj(matplotlib.axes.Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in itertools.chain(axis.get_major_ticks(), axis.get_minor_ticks()):
                labels[id(tick.label1)] = (
                    axes.axison and low - 1e-9 <= tick.get_loc() <= high + 1e-9
                )
                labels[id(tick.label2)] = False
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and labels.get(id(text), True)
    ]
    texts = [
        text
        for text in texts
        if not (text.axes and not text.axes.axison and text not in text.axes.texts)
    ]
    return [(text, text.get_window_extent()) for text in texts]


def apart(first, second, slack=0.5):
    return (
        first.x1 - slack <= second.x0
        or second.x1 - slack <= first.x0
        or first.y1 - slack <= second.y0
        or second.y1 - slack <= first.y0
    )


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (SHORT[:1], HEADS | {"epochs": 1}),
        (LONG[:1], CONCAT),
        (SHORT[:2], HEADS | {"epochs": 200}),
        (LONG[:3], HEADS | {"epochs": 3}),
        (SHORT, HEADS),
        pytest.param(LONG, HEADS | {"epochs": 60}, marks=pytest.mark.slow),
        (LONG, CONCAT | {"epochs": 2}),
        (["$x_1$", "_hidden", "x" * 60], HEADS),
    ],
    ids=lambda value: f"{len(value)}" if isinstance(value, list) else None,
)
def test_no_text_overlaps_or_leaves_the_page(names, options):
    arguments = page(names, **options)
    arguments["title"] = (
        "iibalance on a data set with quite a long name, five seeds, encoders of width 64, "
        "budgets from unimodal trainings"
    )
    if options["budgets"]:  # the widest labels: full budgets, whole trust, much against
        arguments["budgets"]["values"][0] = 1.0
        arguments["metrics"]["test"]["trust"][names[-1]] = 1.0
        arguments["metrics"]["test"]["contributions"][names[-1]] = -12.34
    figure = report_figure(**arguments)
    texts = visible_texts(figure)
    assert len(texts) > 25
    for (first, box), (second, other) in itertools.combinations(texts, 2):
        assert apart(box, other), f"{first.get_text()!r} overlaps {second.get_text()!r}"
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1400 and box.y1 <= 1200, (
            f"{text.get_text()!r} is cut off"
        )
        assert text.get_fontsize() >= 7 and not ("$" in text.get_text() and text.get_parse_math())
        for patch in text.axes.patches if isinstance(text, Annotation) else ():
            assert apart(box, patch.get_window_extent()), f"{text.get_text()!r} lies on a bar"
    for axes in figure.findobj(matplotlib.axes.Axes):
        width, height = axes.get_window_extent().size / 200
        assert width > 1.0 and height > 1.0, "a panel was squeezed to less than an inch"
    shown = " ".join(text.get_text() for text, _ in texts)
    assert all(name.replace("_", " ").strip()[:6] in shown for name in names)


# Missing parts.
def test_nothing_given_says_so():
    figure = report_figure(history=[], metrics={}, budgets=None, reliability={}, title="empty")
    assert [notes(axes) for axes, _ in cells(figure)] == [
        ["no training history"],
        ["no test accuracy"],
        ["neither budgets nor Shapley values"],
        ["no reliability curves"],
    ]


def test_parts_missing_or_not_finite_are_left_out():
    arguments = page(SHORT[:2])
    arguments["history"][3]["validation.nll"] = math.inf
    del arguments["history"][4]["validation.nll"]
    arguments["metrics"]["test"]["modalities"]["visual"] = None  # absent from every test sample
    arguments["metrics"]["test"]["modalities"]["audio"]["alone_accuracy"] = None
    arguments["metrics"]["test"]["trust"]["visual"] = None
    arguments["metrics"]["test"]["contributions"] = None  # of more modalities than it is done for
    arguments["metrics"]["best_epoch"] = None
    arguments["budgets"] |= {"standard_errors": [0.0, 0.02], "anchor": None}
    del arguments["reliability"]["visual"]
    (training, first), (accuracy, _), (budget, third), (_, fourth) = cells(
        report_figure(**arguments)
    )
    fused = next(line.get_ydata() for line in training.lines if line.get_linewidth() > 1.7)
    assert np.isnan(fused).nonzero()[0].tolist() == [3, 4] and not any(
        "chosen" in label for label in first
    )
    assert notes(accuracy) == ["91.4", "83.0"]
    assert notes(budget) == ["0.78", "0.98", "0.55 ± 0.02"]
    assert third == ["budget ± s.e.", "mean trust, and what it adds to the log-odds"]
    assert len(fourth) == 3  # what was merged, and two curves
    arguments["budgets"]["standard_errors"] = [0.0, 0.0]  # budgets that were given, not estimated
    arguments["metrics"]["test"]["trust"] = None  # of a method without a gate
    (budget, third) = cells(report_figure(**arguments))[2]
    assert third == ["budget"] and not budget.collections and notes(budget) == ["0.78", "0.55"]


# The file.
def test_file_is_the_figure(tmp_path):
    arguments = page(SHORT[:3])
    write_report(tmp_path / "report.png", **arguments)
    assert sorted(os.listdir(tmp_path)) == ["report.pdf", "report.png", "report.svg"]
    data = (tmp_path / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1400, 1200)
    figure = report_figure(**arguments)
    figure.canvas.draw()
    pixels = (imread(tmp_path / "report.png") * 255).round().astype(np.uint8)
    assert np.array_equal(pixels, np.asarray(figure.canvas.buffer_rgba()))
    write_report(str(tmp_path / "again.png"), **arguments)
    assert (tmp_path / "again.png").read_bytes() == data


@pytest.mark.slow
def test_every_file_has_the_same_bytes_a_second_time_and_in_another_process(tmp_path):
    write_report(tmp_path / "report.png", **page(SHORT[:2]))
    code = """if True:
        import sys
        from test_report import SHORT, page, write_report
        write_report(sys.argv[1], **page(SHORT[:2]))
    """
    later = {"SOURCE_DATE_EPOCH": "86400", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again.png")],
        env={**os.environ, **later, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for form in ("png", "pdf", "svg"):
        first, second = (tmp_path / f"{name}.{form}" for name in ("report", "again"))
        assert first.read_bytes() == second.read_bytes(), form
        content = first.read_bytes()
        assert not re.search(rb"CreationDate|<dc:date|Matplotlib v|/Producer|/Creator", content), (
            form
        )
        assert str(tmp_path).encode() not in content, form


def test_letters_stay_letters(tmp_path):
    arguments = page(SHORT[:2]) | {"title": "iibalance on clips.npz"}
    write_report(tmp_path / "report.png", **arguments)
    svg = (tmp_path / "report.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    figure = report_figure(**arguments)
    shown = {line for text, _ in visible_texts(figure) for line in text.get_text().split("\n")}
    lost = {line.strip() for line in shown} - {(text or "").strip() for text in texts}
    assert not lost and {"0.78 ± 0.01 ★", "iibalance on clips.npz"} <= shown
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and b"/Subtype /Type3" not in pdf  # letters drawn as pictures
    assert b"/FontFile2" in pdf and b"DejaVuSans" in pdf


def test_the_title_names_the_data_s_file_and_no_folder():
    clips = DataConfig(name="npz", path="/home/me/data/clips.npz")
    assert report_title("qmf", "npz", clips) == "qmf on clips.npz"
    assert report_title("qmf", "npz", DataConfig(path="a/clips.npz")) == "qmf on clips.npz"
    assert (
        report_title("qmf", "folder", DataConfig(name="folder", path="a/clips/")) == "qmf on clips"
    )
    assert report_title("qmf", "digits", DataConfig()) == "qmf on digits"
    assert report_title("qmf", "mine", clips) == "qmf on mine"  # data that were given


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.png"
    path.write_text("the last one")
    moved = []

    def fail(source, target):
        moved.append((os.path.dirname(source), open(source, "rb").read()[-8:-4], os.fspath(target)))
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="disk is gone"):
        write_report(path, **page(["audio"]))
    assert moved == [(str(tmp_path), b"IEND", str(path))]  # a complete image, in the same folder
    assert path.read_text() == "the last one" and os.listdir(tmp_path) == ["report.png"]
    with pytest.raises(InputError, match="nowhere"):
        write_report(tmp_path / "nowhere" / "report.png", **page(["audio"]))


# The importing program.
def test_rc_params_neither_leak_out_nor_in(tmp_path):
    write_report(tmp_path / "plain.png", **page(["audio"]))
    style = {
        "font.size": 31,
        "figure.facecolor": "black",
        "savefig.facecolor": "red",
        "savefig.bbox": "tight",
        "lines.linewidth": 9,
        "text.color": "yellow",
        "axes.facecolor": "black",
        "axes.prop_cycle": matplotlib.cycler(color=["pink"]),
    }
    with matplotlib.rc_context(style):

        def parameters():
            # Reading that one would choose it
            return {
                key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"
            }

        before = parameters()
        write_report(tmp_path / "styled.png", **page(["audio"]))
        assert parameters() == before
        assert all(
            to_hex(axes.get_facecolor()) == "#ffffff"
            for axes, _ in cells(report_figure(**page(["audio"])))
        )
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_backend_is_not_chosen_and_no_display_needed(tmp_path):
    code = """if True:
        import sys, matplotlib
        from iibalance.training.report import write_report
        before = dict.__getitem__(matplotlib.rcParams, "backend")  # plain access would choose one
        empty = dict(metrics={}, budgets=None, reliability={}, title="t")
        write_report(sys.argv[1], history=[{"epoch": 1, "train.loss": 2.0}], **empty)
        backend = dict.__getitem__(matplotlib.rcParams, "backend")
        assert backend is before and not isinstance(before, str), "the backend was resolved"
        assert "matplotlib.pyplot" not in sys.modules
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "report.png")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.png").stat().st_size > 10_000

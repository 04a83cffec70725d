"""The comparison's picture: that it shows the ranks and their spread, legibly."""

import itertools
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from legible import assert_apart_and_inside
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from iibalance import InputError
from iibalance.comparison.picture import (
    FOCUS,
    INK,
    PALE,
    critical_difference,
    groups,
    picture,
    places,
    redraw,
    write_picture,
)
from iibalance.comparison.results import by_method, read_table
from iibalance.comparison.statistics import ranks

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results"
THREE = ("unimodal", "concat", "iibalance")


@pytest.fixture(scope="module")
def table():
    return read_table(PUBLISHED / "comparison.csv")


def of(table, *, methods=None, sets=None, names=None, focus="iibalance"):
    """What is drawn of some methods and data sets of a table, the methods called otherwise."""
    if methods is not None:
        table = table[table["method"].isin(methods)]
    if sets is not None:
        table = table[table["data"].isin(sets)]
    names = names or {}
    results = by_method(table.assign(method=table["method"].replace(names)))
    seeds = table["seed"].nunique()
    focus = names.get(focus, focus)
    return {"focus": focus, "seeds": seeds, "results": results, "ranks": ranks(results)}


def texts(figure):
    """Every text that is drawn, with its box in pixels; those of axes without axis lines too."""
    figure.canvas.draw()
    hidden = {
        id(label)
        for axes in figure.findobj(Axes)
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not axes.axison
    }
    return [
        (text, text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def assert_legible(figure):
    found = texts(figure)
    assert_apart_and_inside(figure, found)
    assert all(text.get_fontsize() >= 7 for text, _ in found)
    for axes in figure.axes:  # nor do the bars of the groups lie on a number or a name
        bars = [line for line in axes.lines if is_bar(line)]
        boxes = [line.get_window_extent() for line in bars]
        assert not any(box.overlaps(bar) for bar in boxes for _, box in found)
        assert all(bar.x1 <= figure.bbox.width for bar in boxes)


def is_bar(line):
    """Whether a line of a panel joins a group: upright, beside the panel."""
    return line.get_color() == INK and not line.get_clip_on()


def panels(figure):
    """(kind, metric) -> axes."""
    found = {}
    for axes in figure.axes:
        kind, metric = axes.get_title(loc="left").split(": ")
        found[re.sub(r" \(.*", "", kind), metric.lower().split(" (")[0]] = axes
    return found


# Facts


def test_it_shows_mean_ranks_and_standard_errors_from_best_to_worst(table):
    result = of(table, methods=("ensemble", "qmf", "sum", "iibalance"))
    for (kind, metric), axes in panels(picture(result)).items():
        expected = result["ranks"][kind][metric]
        names = [label.get_text() for label in axes.get_yticklabels()]
        means = [expected[name]["rank"] for name in names]
        assert means == sorted(means) and set(names) == set(expected)
        assert [text.get_text() for text in axes.texts] == [f"{mean:.1f}" for mean in means]
        drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert drawn == pytest.approx(means)
        by_set = places(result, kind, metric)
        assert by_set.shape == (7, 4) and by_set.sum(axis=1).eq(10).all()
        spans = [c.get_segments()[0][:, 0] for c in axes.collections if hasattr(c, "get_segments")]
        errors = by_set[names].std(ddof=1) / np.sqrt(7)
        assert [(high - low) / 2 for low, high in spans] == pytest.approx(list(errors))


def test_the_small_dots_are_the_ranks_on_each_data_set(table):
    result = of(table, methods=THREE)
    axes = panels(picture(result))["clean", "nll"]
    dots = [
        (tuple(offset), size)
        for collection in axes.collections
        if to_hex(collection.get_facecolor()[0] if len(collection.get_facecolor()) else "k") == PALE
        for offset, size in zip(collection.get_offsets(), collection.get_sizes())
    ]
    by_set = places(result, "clean", "nll")
    for row, name in enumerate(by_set):
        own = {x: size for (x, y), size in dots if y == row}
        counts = by_set[name].value_counts()
        assert own == {
            rank: 5 * count for rank, count in counts.items()
        }  # as large as their number


def test_the_focus_alone_has_its_colour(table):
    axes = panels(picture(of(table, methods=THREE, focus="concat")))["noise", "accuracy"]
    coloured = [label.get_text() for label in axes.get_yticklabels() if label.get_color() == FOCUS]
    assert coloured == ["concat"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert len([line for line in points if to_hex(line.get_color()).upper() == FOCUS]) == 1


def test_one_data_set_shows_the_ranks_of_its_seeds_and_tests_nothing(table):
    result = of(table, methods=THREE, sets=["avdigits"])
    figure = picture(result)
    axes = panels(figure)["clean", "accuracy"]
    assert [text.get_text() for text in axes.texts] == ["1.0", "2.0", "3.0"]
    assert not [line for line in axes.lines if is_bar(line)]
    values = table[(table["data"] == "avdigits") & (table["condition"] == "clean")]
    values = values[values["method"].isin(THREE) & (values["modality"] == "")]
    by_seed = values.pivot(index="seed", columns="method", values="accuracy")
    expected = by_seed.rank(axis=1, ascending=False)
    names = [label.get_text() for label in axes.get_yticklabels()]
    for name, dots in zip(names, axes.collections):
        counts = expected[name].value_counts().sort_index()
        assert list(dots.get_offsets()[:, 0]) == list(counts.index)
        assert list(dots.get_sizes()) == list(5 * counts)
    assert figure.get_suptitle() == "Rank on avdigits (1 is best), 5 seeds"


def test_who_lacks_a_data_set_is_left_out_and_named(table):
    result = of(table, methods=(*THREE, "pmr", "ogm_ge"))
    figure = picture(result)
    assert "Left out, as not every data set has them: ogm_ge, pmr" in figure.get_suptitle()
    for axes in figure.axes:
        assert len(axes.get_yticks()) == 3
    ranked = places(result, "clean", "nll")
    assert set(ranked.to_numpy().ravel()) <= {1, 1.5, 2, 2.5, 3}  # among those that are drawn


def test_a_kind_that_some_sets_lack_says_so(table):
    lacking = (table["data"] == "avdigits") & table["condition"].str.endswith("missing")
    result = of(table[~lacking], methods=THREE)
    titles = [axes.get_title(loc="left") for axes in picture(result).axes]
    assert titles[1] == "missing: accuracy (6 sets)" and titles[0] == "clean: accuracy"
    assert len(places(result, "missing", "nll")) == 6


def test_where_no_method_has_every_set_it_says_so(table):
    lacking = (table["method"] == "concat") & (table["data"] == "avdigits")
    lacking |= (table["method"] == "iibalance") & (table["data"] == "utd_si")
    figure = picture(of(table[~lacking], methods=("concat", "iibalance")))
    assert {axes.texts[0].get_text() for axes in figure.axes} == {"no method has every data set"}
    assert_legible(figure)


# The test


def test_groups_are_those_of_nemenyi_s_test(table):
    posthocs = pytest.importorskip("scikit_posthocs")
    methods = ("ensemble", "qmf", "sum", "iibalance", "concat", "mla", "agm", "unimodal")
    result = of(table, methods=methods)
    for kind, metric in itertools.product(("clean", "missing", "noise"), ("accuracy", "nll")):
        by_set = places(result, kind, metric)
        p = posthocs.posthoc_nemenyi_friedman(by_set.to_numpy()).to_numpy()
        means = by_set.mean().to_numpy()
        joined = {
            pair
            for first, last in groups(means, critical_difference(len(means), len(by_set)))
            for pair in itertools.combinations(range(first, last + 1), 2)
        }
        expected = {pair for pair in itertools.combinations(range(8), 2) if p[pair] > 0.05}
        assert joined == expected and 0 < len(expected) < 28


def test_the_bars_join_the_groups(table):
    result = of(table, methods=("ensemble", "qmf", "sum", "iibalance", "concat"))
    for (kind, metric), axes in panels(picture(result)).items():
        means = places(result, kind, metric).mean().to_numpy()
        expected = groups(means, critical_difference(5, 7))
        bars = [line.get_ydata() for line in axes.lines if is_bar(line)]
        assert [(round(low + 0.25), round(high - 0.25)) for low, high in bars] == expected


@pytest.mark.parametrize("methods, sets", [(2, 7), (5, 1)])
def test_what_is_too_little_for_a_test_has_no_difference(methods, sets):
    assert critical_difference(methods, sets) == float("inf")


# Legible


def test_no_two_texts_overlap_in_the_published_pictures(table):
    parts = table["method"].str.startswith("iibalance_")
    assert_legible(picture(of(table[~parts])))
    assert_legible(picture(of(read_table(PUBLISHED / "comparison_doubled.csv"), focus="qmf")))


@pytest.mark.slow
def test_no_two_texts_overlap_with_21_methods_on_every_set(table):
    copies = [
        table[table["method"] == name].assign(method=f"{name}_again_and_with_a_very_long_name")
        for name in ("qmf", "sum", "concat")
    ]
    result = of(pd.concat([table, *copies]))
    figure = picture(result)
    assert all(len(axes.get_yticks()) == 21 for axes in figure.axes)
    assert_legible(figure)


LONG = {name: f"my_{name}_with_a_very_long_name_of_version_2" for name in THREE}


@pytest.mark.parametrize("names", [None, LONG], ids=["short", "long"])
@pytest.mark.parametrize("sets", [["avdigits"], None], ids=["one set", "all sets"])
@pytest.mark.parametrize("kinds", [("clean",), ("clean", "noise"), None], ids=str)
def test_no_two_texts_overlap_with_three_methods(table, sets, names, kinds):
    if kinds is not None:
        table = table[[condition.split(" ")[-1] in kinds for condition in table["condition"]]]
    figure = picture(of(table, methods=THREE, sets=sets, names=names))
    assert_legible(figure)
    if names:  # told apart still
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(set(labels)) == 3 and all("…" in label for label in labels)


# The file


@pytest.mark.parametrize(
    "name, focus", [("comparison", "iibalance"), ("comparison_doubled", "ensemble")]
)
def test_published_pictures_are_those_of_their_tables(name, focus, tmp_path):
    pinned = re.findall(r"^matplotlib==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    if matplotlib.__version__ != pinned[0]:  # the first is for the Python of CI
        pytest.skip("another matplotlib draws other pixels")
    shutil.copy(PUBLISHED / f"{name}.csv", tmp_path)
    drawn = imread(redraw(tmp_path / f"{name}.csv", focus))
    assert np.array_equal(drawn, imread(PUBLISHED / f"{name}.png"))


def test_the_same_result_has_the_same_bytes(table, tmp_path):
    result = of(table, methods=THREE, sets=["avdigits", "utd_si"])
    for name in ("one.png", "two.png"):
        write_picture(tmp_path / name, result)
    first, second = (tmp_path / name for name in ("one.png", "two.png"))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_redrawing_gives_ablations_no_rank(table, tmp_path, monkeypatch):
    import iibalance.comparison.picture as module

    drawn = []
    monkeypatch.setattr(module, "write_picture", lambda path, result: drawn.append((path, result)))
    path = redraw(PUBLISHED / "comparison.csv")
    assert path == PUBLISHED / "comparison.png" == drawn[0][0]
    ranked = drawn[0][1]["ranks"]["clean"]["nll"]
    assert len(ranked) == 15 and not [name for name in ranked if name.startswith("iibalance_")]
    # As the page, which comparison.md holds, has them
    line = (
        f"| iibalance | 7 | **{drawn[0][1]['ranks']['clean']['accuracy']['iibalance']['rank']:.2f}"
    )
    assert line in (PUBLISHED / "comparison.md").read_text(encoding="utf-8")


def test_a_focus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="focus: 'mine' is no method of .*comparison.csv; it has"):
        redraw(PUBLISHED / "comparison.csv", focus="mine")

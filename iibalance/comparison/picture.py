"""A comparison's picture: mean ranks over the data sets, their spread, and what may be chance."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Transform, offset_copy

from iibalance.comparison.blocks import LEVEL, block_ranks, blocks, critical_difference
from iibalance.comparison.results import GROUPS, by_method, group_means, read_table
from iibalance.comparison.statistics import SIGNS, ablation_names, published_names, ranks
from iibalance.errors import InputError
from iibalance.files import write_bytes
from iibalance.training.report import DPI, GREY, INK, PALETTE, STYLE

NAMES = {"accuracy": "accuracy", "nll": "NLL"}
LONGEST = 26  # characters of a method's name; a longer one loses its middle
LEAST_ROWS = 4  # of a panel's height, so that few methods stay slim
FOCUS, PALE = PALETTE[1], "#b4b4b4"
# Inches: a row, what a panel needs above and below its rows, and across beside its names.
ROW, FRAME, ACROSS, LETTER = 0.165, 0.62, 2.0, 0.062


def write_picture(path: Path, result: Mapping) -> None:
    """Write :func:`picture` as PNG, whole or not at all; the same result gives the same bytes."""
    figure, image = picture(result), io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, image.getvalue())


def redraw(table: str | Path, focus: str = "iibalance") -> Path:
    """Draw a comparison again from its ``comparison.csv``; the PNG's path, beside the table.

    A method of that table which is none of :data:`iibalance.methods.METHODS` takes a rank: what it
    might be an ablation of is not in the table.

    Raises :class:`~iibalance.errors.InputError` for a ``focus`` that the table does not have.

    ``python -c "from iibalance.comparison.picture import redraw; redraw('comparison.csv')"``
    """
    path, rows = Path(table), read_table(table)
    results = by_method(rows)
    methods = dict.fromkeys(method for entries in results.values() for method in entries)
    if focus not in methods:
        raise InputError(f"focus: {focus!r} is no method of {path}; it has {', '.join(methods)}")
    parts = ablation_names(published_names(methods))
    whole = {
        name: {method: entry for method, entry in entries.items() if method not in parts}
        for name, entries in results.items()
    }
    seeds = max(len(entry["seeds"]) for entries in whole.values() for entry in entries.values())
    result = {"focus": focus, "seeds": seeds, "results": results, "ranks": ranks(whole)}
    if rows.attrs["splits"]:
        result["splits"] = seeds
    write_picture(path.with_suffix(".png"), result)
    return path.with_suffix(".png")


def picture(result: Mapping) -> Figure:
    """A panel for each metric and kind of condition; in each, the methods from best to worst.

    Of every method it shows the mean rank over the data sets (1 is best), its standard error, and
    the rank on each data set. A black bar at the right joins methods whose mean ranks are not told
    apart by Nemenyi's test (Demsar 2006, "Statistical Comparisons of Classifiers over Multiple Data
    Sets"), which takes every data set for one sample: with few of them the bars are long.

    Where there is one data set, the rank is that of the mean over seeds, with the ranks by seed
    beside it. They share their test samples, and so are neither averaged nor tested.

    With resampled splits (``splits`` in the result) it is the same over blocks, one split of one
    data set each, as :mod:`iibalance.comparison.blocks` ranks them.

    Methods that are not defined for every data set are left out, and named.
    """
    kinds = [kind for kind in GROUPS if kind in result["ranks"]]
    tables = {(metric, kind): places(result, kind, metric) for metric in SIGNS for kind in kinds}
    rows = max(table.shape[1] for table in tables.values())
    letters = max((len(_short(name)) for table in tables.values() for name in table), default=9)
    across = len(kinds) if len(kinds) < 5 else -(-len(kinds) // 2)  # a page is only so wide
    shape = (len(SIGNS) * -(-len(kinds) // across), across) if across > 1 else (1, len(SIGNS))
    width = shape[1] * (ACROSS + LETTER * letters)
    heading = _heading(result, tables, round(width * 13))
    split = bool(result.get("splits"))
    sets = max(map(len, tables.values())) if split else len(result["results"])
    height = shape[0] * (FRAME + ROW * max(rows, LEAST_ROWS)) + 0.16 * (len(heading) + 1) + 0.3
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.05)
        panels = figure.subplots(*shape, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        half = len(panels) // len(SIGNS)  # a metric begins a row of its own
        places_of = [*panels[: len(kinds)], *panels[half : half + len(kinds)]]
        for ((metric, kind), table), axes in zip(tables.items(), places_of, strict=True):
            axes.set_axis_on()
            what = "blocks" if split else "sets"
            fewer = f" ({len(table)} {what})" if 0 < len(table) < sets else ""
            title = f"{kind}: {NAMES[metric]}{fewer}"
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            if table.empty:
                axes.set_axis_off()
                axes.text(0, 0.5, "no method has every data set", transform=axes.transAxes)
                continue
            alone = sets == 1 and not split
            scattered = _by_seed(result, kind, metric, table) if alone else table
            _panel(axes, table, scattered, result["focus"])
        figure.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=9, linespacing=1.3)
        _legend(figure, sets, result["focus"], width, split)
    return figure


def places(result: Mapping, kind: str, metric: str) -> pd.DataFrame:
    """Ranks, data sets by methods, of the methods that every one of these sets has; best first.

    The sets are those with a condition of that kind. Ties share their mean rank. With resampled
    splits there is a row a block.
    """
    ranked = result["ranks"][kind][metric]
    if result.get("splits"):
        whole = {
            name: {method: entry for method, entry in entries.items() if method in ranked}
            for name, entries in result["results"].items()
        }
        return block_ranks(blocks(whole, kind, metric).values, metric)
    having = {
        name: {
            method: entry
            for method, entry in entries.items()
            if method in ranked and group_means(entry, metric).get(kind)
        }
        for name, entries in result["results"].items()
    }
    having = {name: entries for name, entries in having.items() if entries}
    complete = [method for method in ranked if all(method in had for had in having.values())]
    rows = {}
    for name, entries in having.items() if complete else ():
        found = ranks({name: {method: entries[method] for method in complete}})[kind][metric]
        rows[name] = {method: found[method]["rank"] for method in complete}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=complete)
    return table[table.mean().sort_values(kind="stable").index]


def _by_seed(result: Mapping, kind: str, metric: str, table: pd.DataFrame) -> pd.DataFrame:
    """The ranks of each seed on the one data set that ``table`` has."""
    entries = {method: result["results"][table.index[0]][method] for method in table}
    means = {method: group_means(entry, metric)[kind] for method, entry in entries.items()}
    rows = {}
    for seed in set.intersection(*map(set, means.values())):
        alone = {method: _of_seed(entry, seed) for method, entry in entries.items()}
        found = ranks({seed: alone})[kind][metric]
        rows[seed] = {method: found[method]["rank"] for method in table}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(table))


def _of_seed(entry: Mapping, seed: int) -> dict:
    """What :func:`ranks` reads of a method's results, with one of the seeds alone."""
    conditions = {
        name: {
            metric: {"values": {seed: row[metric]["values"][seed]}}
            if row[metric] is not None and seed in row[metric]["values"]
            else None
            for metric in SIGNS
        }
        for name, row in entry["conditions"].items()
    }
    return {"conditions": conditions}


def groups(means: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """The widest runs of rising ``means`` that span no more than ``difference``: first and last.

    A run of one is none, and so is one inside another.

    >>> groups([1.0, 2.0, 2.5, 4.0], 1.5)
    [(0, 2), (2, 3)]
    """
    found: list[tuple[int, int]] = []
    for first, mean in enumerate(means):
        last = max(index for index, other in enumerate(means) if other - mean <= difference)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def _panel(axes: Axes, table: pd.DataFrame, scattered: pd.DataFrame, focus: str) -> None:
    """Rows of one metric and kind: each data set's ranks, the mean with its error, the groups."""
    sets, count = table.shape
    means = table.mean().to_numpy()

    def beside(inches: float) -> Transform:
        """Right of the panel, across in inches from ``inches`` on; down in rows."""
        return offset_copy(axes.get_yaxis_transform(), axes.figure, x=inches, units="inches")

    for row, method in enumerate(table):
        where, own = np.unique(scattered[method].dropna(), return_counts=True)
        size = 5 * own * min(1.0, 20 / len(scattered))
        axes.scatter(where, [row] * len(where), s=size, color=PALE, linewidth=0, zorder=2)
        colour, ink = (FOCUS, FOCUS) if method == focus else (GREY, INK)
        error = table[method].std(ddof=1) / np.sqrt(sets) if sets > 1 else None
        style = {"marker": "o", "markersize": 4.5, "elinewidth": 1.3, "zorder": 3}
        axes.errorbar(means[row], row, xerr=error, color=colour, **style)
        style = {"ha": "right", "va": "center_baseline", "fontsize": 7, "fontweight": _weight(ink)}
        axes.text(1, row, f"{means[row]:.1f}", transform=beside(0.28), color=ink, **style)
    axes.set_ylim(max(count, LEAST_ROWS) - 0.4, -0.6)
    axes.set_yticks(range(count), [_short(method) for method in table], fontsize=7.5)
    for label, method in zip(axes.get_yticklabels(), table, strict=True):
        ink = FOCUS if method == focus else INK
        label.set(color=ink, fontweight=_weight(ink))
    axes.set_xlim(0.5, count + 0.5)
    axes.set_xticks(range(1, count + 1) if count < 7 else [1, *range(5, count + 1, 5)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="y")
    for lane, (first, last) in enumerate(groups(means, critical_difference(count, sets))):
        if sets > 1:
            down, where = [first - 0.25, last + 0.25], beside(0.34 + 0.05 * lane)
            axes.plot([1, 1], down, transform=where, clip_on=False, color=INK, linewidth=1.6)


def _weight(ink: str) -> str:
    return "bold" if ink == FOCUS else "normal"


def _heading(result: Mapping, tables: Mapping, letters: int) -> list[str]:
    """What is drawn, of how much, and who is left out."""
    drawn = {method for table in tables.values() for method in table}
    listed = {
        method for rows in result["ranks"].values() for row in rows.values() for method in row
    }
    for tests in result.get("tests", {}).values():
        listed |= {method for test in tests.values() for method in test["absent"]}
    absent = sorted(listed - drawn)
    names = list(result["results"])
    seeds = "1 seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    where = f"Rank on {names[0]}" if len(names) == 1 else f"Mean rank over {len(names)} data sets"
    heading = f"{where} (1 is best), {seeds}"
    if result.get("splits"):
        count = max(map(len, tables.values()))
        where = names[0] if len(names) == 1 else f"{len(names)} data sets"
        heading = f"Mean rank over {count} blocks (1 is best): the splits of {where}"
    if absent:
        heading += f". Left out, as not every data set has them: {', '.join(map(_short, absent))}"
    return textwrap.wrap(heading, letters)


def _legend(figure: Figure, sets: int, focus: str, width: float, split: bool) -> None:
    """What points and bars mean, under all panels."""
    mean, small = {"marker": "o", "markersize": 4.5}, {"marker": "o", "markersize": 2.4}
    bar = {"marker": "|", "markersize": 9, "markeredgewidth": 1.6}
    entries = [
        ("mean ± standard error over the data sets", mean | {"color": GREY, "linestyle": "-"}),
        ("one data set (larger: several)", small | {"color": PALE}),
        (f"not told apart (Nemenyi, {100 * LEVEL:g} %)", bar | {"color": INK}),
        (_short(focus), mean | {"color": FOCUS}),
    ]
    if split:
        entries[0] = ("mean ± standard error over the blocks", entries[0][1])
        entries[1] = ("one block (larger: several)", entries[1][1])
    elif sets == 1:
        entries[:3] = [
            ("by the mean over seeds", mean | {"color": GREY}),
            ("one seed (larger: several)", small | {"color": PALE}),
        ]
    figure.legend(
        [Line2D([], [], **{"linestyle": ""} | style) for _, style in entries],
        [label for label, _ in entries],
        loc="outside lower left",
        ncols=len(entries) if width > 8 else 1,
    )


def _short(name: str) -> str:
    """The name, without its middle where it is longer than ``LONGEST``.

    >>> _short("my_method_of_a_very_long_name_v2")
    'my_method_of_…ong_name_v2'
    """
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 2]}…{name[-(LONGEST // 2 - 2) :]}"

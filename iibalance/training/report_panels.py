"""The four panels of a run's report, and what they share.

Each panel has a cell of its own (a ``SubFigure``): title and legend at the cell's left edge, the
axes below. ``colours`` gives the modalities of the page, in its order, with one colour each.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import SubFigure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

INK, GREY, PALE = "#1a1a1a", "#7f7f7f", "#c4c4c4"
# Okabe & Ito 2008: colour-blind readers can tell them apart. In black and white, the markers do.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
BAR = 0.84  # the height of a bar; its lane is 1 high
# Samples that a point of a reliability curve has at least: then the standard error of its accuracy
# is at most 0.09.
LEAST_SAMPLES = 30
# A point that is a white ring; its edge has the colour of what it belongs to.
RING = {"marker": "o", "linestyle": "", "color": "white", "markeredgewidth": 1.3, "zorder": 4}
DOT = {"marker": "o", "linestyle": "", "markersize": 3.6}


def draw_training(
    cell: SubFigure,
    history: Sequence[Mapping[str, float]],
    best_epoch: int | None,
    best_epochs: Mapping[str, int] | None,
    colours: Mapping[str, str],
) -> None:
    """Losses by epoch, with the epochs chosen."""
    axes, title = cell.subplots(), "(a) Training"
    series = {
        key: _series(history, key)
        for key in ["train.loss", "validation.nll", *(f"validation.nll.{name}" for name in colours)]
    }
    series = {key: values for key, values in series.items() if np.isfinite(values).any()}
    if not series:
        return _nothing(cell, axes, title, "no training history")
    epochs = np.array([row["epoch"] for row in history], dtype=float)
    marker = "o" if len(epochs) < 4 else None  # a line through one point is invisible
    handles, labels = [], []

    def line(key: str, **style: Any) -> Line2D:
        return axes.plot(epochs, series[key], marker=marker, markersize=3.5, **style)[0]

    heads = tuple(
        line(f"validation.nll.{name}", color=_tint(colour, 0.5), linewidth=1.0, zorder=2)
        for name, colour in colours.items()
        if f"validation.nll.{name}" in series
    )
    for key, label, style in (
        ("train.loss", "training loss", {"color": GREY, "linestyle": (0, (4, 1.6))}),
        ("validation.nll", "validation NLL, fused", {"color": INK, "linewidth": 1.8}),
    ):
        if key in series:
            handles.append(line(key, zorder=3, **style))
            labels.append(label)
    if best_epoch is not None and best_epoch in epochs:
        axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=":", zorder=1)
        at = math.nan
        if "validation.nll" in series:
            at = series["validation.nll"][epochs == best_epoch][-1]
        handles += axes.plot([best_epoch], [at], **RING, markeredgecolor=INK, markersize=5.5)
        labels.append(f"chosen: epoch {best_epoch}")
    marks = []
    for name, epoch in (best_epochs or {}).items():  # each modality kept its own epoch
        key = f"validation.nll.{name}"
        if key in series and epoch in epochs:
            at = series[key][epochs == epoch][-1]
            marks += axes.plot([epoch], [at], **RING, markeredgecolor=colours[name], markersize=5)
    if marks:
        handles.append(tuple(marks[:1]))
        labels.append("chosen, each head its own")
    if heads:
        handles.append(heads)
        labels.append("validation NLL, each head")
    drawn = np.concatenate(list(series.values()))
    drawn = drawn[np.isfinite(drawn)]
    # A sum of losses may dwarf an NLL. A logarithmic axis needs a range wide enough for two ticks.
    if drawn.min() > 0 and drawn.max() / drawn.min() > 6:
        axes.set_yscale("log")
        decades = math.log10(drawn.max() / drawn.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    margin = max(0.02 * np.ptp(epochs), 0.5 if len(epochs) == 1 else 0.1)
    # To the left at most half an epoch, so that there is no tick for an epoch 0 that was not.
    axes.set_xlim(epochs.min() - min(margin, 0.5), epochs.max() + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set(xlabel="epoch", ylabel="loss, NLL [nats]")
    axes.grid(True)
    _header(cell, title, handles, labels)


def draw_accuracy(cell: SubFigure, test: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Test accuracy of the fused prediction, and of each modality alone and in the joint model."""
    axes, title = cell.subplots(), "(b) Test accuracy"
    heads = test.get("modalities") or {}
    found = {}
    for name in colours:
        head = heads.get(name) or {}
        pair = finite(head.get("alone_accuracy")), finite(head.get("accuracy"))
        if pair != (None, None):
            found[name] = pair
    fused = finite(test.get("accuracy"))
    if fused is None and not found:
        return _nothing(cell, axes, title, "no test accuracy")
    rows = [("fused", [(fused, INK)])] if fused is not None else []
    for name, pair in found.items():
        shades = (_tint(colours[name], 0.5), colours[name])
        rows.append((name, [bar for bar in zip(pair, shades, strict=True) if bar[0] is not None]))
    lanes = _lanes(axes, [(_wrapped(name), len(bars)) for name, bars in rows])
    for (_, bars), positions in zip(rows, lanes, strict=True):
        for (value, colour), lane in zip(bars, positions, strict=True):
            axes.barh(lane, 100 * value, height=BAR, color=colour)
            _value(axes, 100 * value, lane, f"{100 * value:.1f}")
    _value_axis(axes, 0, 100)
    axes.set_xlabel("accuracy [%]")
    handles, labels = [], []
    entries = [(_tint(GREY, 0.5), "trained alone"), (GREY, "its head in the joint model")]
    for place, (shade, label) in enumerate(entries):
        if any(pair[place] is not None for pair in found.values()):
            handles.append(Patch(color=shade))
            labels.append(label)
    _header(cell, title, handles, labels, columns=1)


def draw_budgets(
    cell: SubFigure,
    budgets: Mapping[str, Any],
    test: Mapping[str, Any],
    colours: Mapping[str, str],
) -> None:
    """Each modality's budget, the mean trust in it, and what it adds to the prediction."""
    trust, added = (test.get(key) or {} for key in ("trust", "contributions"))
    axes = cell.subplots()
    title = "(c) Budget, trust and contribution" if trust else "(c) Budget"
    names = list(budgets["modalities"])
    values = [finite(value) or 0.0 for value in budgets["values"]]
    # A standard error of 0 is that of a budget which was given, not estimated.
    given = budgets.get("standard_errors") or [None] * len(names)
    errors = [finite(error) or None for error in given]
    lanes = _lanes(axes, [(_wrapped(name), 2 if trust else 1) for name in names])
    ends = []
    for name, value, error, (upper, *lower) in zip(names, values, errors, lanes, strict=True):
        axes.barh(upper, value, height=BAR, color=colours[name])
        label = f"{value:.2f}"
        if error is not None:
            whisker = {"color": INK, "elinewidth": 0.9, "capsize": 2, "capthick": 0.9}
            axes.errorbar(value, upper, xerr=error, **whisker)
            label += f" ± {error:.2f}"
        if name == budgets.get("anchor"):
            label += " ★"
        ends.append(_value(axes, value + (error or 0), upper, label))
        its, nats = finite(trust.get(name)), finite(added.get(name))
        if lower and its is not None:
            axes.plot(its, lower[0], **DOT, color=colours[name], zorder=4, clip_on=False)
            label = f"{its:.2f}"
            if nats is not None:
                label += f", adds {nats:+.2f} nats".replace("-", "−")
            ends.append(_value(axes, its, lower[0], label, gap=6))
    _value_axis(axes, 0, max(ends))
    axes.set_xlabel("share of label information; trust")
    handles: list[Any] = [Patch(color=GREY)]
    labels = ["budget ± s.e." if any(errors) else "budget"]
    if trust:
        handles.append(Line2D([], [], **DOT, color=GREY))
        labels.append("mean trust, and what it adds to the log-odds")
    if budgets.get("anchor") in names:
        handles.append(Line2D([], [], marker="*", linestyle="", color=INK, markersize=5))
        labels.append("largest")
    _header(cell, title, handles, labels)


def draw_shapley(cell: SubFigure, shapley: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Each modality's contribution to accuracy, where there are no budgets."""
    axes, title = cell.subplots(), "(c) Shapley contribution"
    shown = [name for name in colours if finite(shapley.get(name)) is not None]
    found = {name: 100 * shapley[name] for name in shown}
    if not found:
        return _nothing(cell, axes, title, "neither budgets nor Shapley values")
    lanes = _lanes(axes, [(_wrapped(name), 1) for name in found])
    for (name, value), (lane,) in zip(found.items(), lanes, strict=True):
        axes.barh(lane, value, height=BAR, color=colours[name])
        # Right of the axis also when negative: clear of the names.
        _value(axes, max(value, 0.0), lane, f"{value:+.1f}".replace("-", "−"))
    if min(found.values()) < 0:
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=GREY, linewidth=0.7)
    _value_axis(axes, min(0.0, *found.values()), max(1.0, *found.values()))
    axes.set_xlabel("contribution to accuracy [% points]")
    _header(cell, title)


def draw_reliability(
    cell: SubFigure, reliability: Mapping[str, Sequence[Any]], colours: Mapping[str, str]
) -> None:
    """Reliability curves; the ECE of each, which is that of the bins given, is in the legend."""
    axes, title = cell.subplots(), "(d) Calibration"
    names = [name for name in ("fused", *colours) if name in reliability]
    if not names:
        return _nothing(cell, axes, title, "no reliability curves")
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    handles, labels, merged = [], [], False
    for name in reversed(names):  # fused last, on top
        confidence, accuracy, count = (np.asarray(v, dtype=float) for v in reliability[name])
        drawn = merge_bins(confidence, accuracy, count)
        merged |= len(drawn[0]) < len(confidence)
        if name == "fused":
            style = {"color": INK, "marker": "o", "linewidth": 1.8, "markersize": 3.6, "zorder": 4}
        else:
            marker = MARKERS[list(colours).index(name) % len(MARKERS)]
            style = {"color": colours[name], "marker": marker, "linewidth": 1.0, "markersize": 3}
        handles += axes.plot(*drawn[:2], **{"zorder": 3} | style)
        ece = float((count * np.abs(confidence - accuracy)).sum() / count.sum())
        # A second line is indented by spaces as wide as the number above it.
        indented = _wrapped(name, 15).replace("\n", "\n\u2007\u2008\u2007\u2007\u2007 ")
        labels.append(f"{ece:.3f} {indented}")
    axes.set(xlabel="confidence", ylabel="accuracy", aspect="equal", anchor="SW")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ticks, texts = [0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"]
    axes.set_xticks(ticks, texts)
    axes.set_yticks(ticks, texts)
    axes.grid(True)
    point = Line2D([], [], **DOT, color=GREY)
    note = ([point], [f"≥ {LEAST_SAMPLES} samples, bins merged"]) if merged else ()
    _header(cell, title, *note)
    cell.legend(
        handles[::-1],
        labels[::-1],
        loc="outside right upper",
        title="ECE",
        alignment="left",
        labelspacing=0.6,
        fontsize=7,
        title_fontsize=7,
        handlelength=1.3,
        handletextpad=0.5,
    )


def merge_bins(
    confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray, least: int = LEAST_SAMPLES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join neighbouring bins [b] of a reliability curve until each has ``least`` samples.

    From low to high confidence, a bin takes in the next while it has too few; what is left at the
    end joins the last. Samples, and their mean confidence and accuracy, stay the same. Fewer than
    ``least`` samples in all make one bin.

    >>> merge_bins(np.array([0.5, 0.7, 0.9]), np.array([0.0, 1.0, 1.0]), np.array([10, 10, 10]), 20)
    (array([0.7]), array([0.666...]), array([30]))
    """
    groups: list[int] = []  # the first bin of each
    held = least
    for index, size in enumerate(count):
        if held >= least:
            groups.append(index)
            held = 0
        held += size
    if held < least and len(groups) > 1:
        groups.pop()
    if len(groups) == len(count):
        return confidence, accuracy, count
    totals = np.add.reduceat(count, groups)
    means = (np.add.reduceat(values * count, groups) / totals for values in (confidence, accuracy))
    return *means, totals


def _header(
    cell: SubFigure,
    title: str,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
    columns: int = 2,
) -> None:
    """Panel title with the legend under it.

    They are one artist, because the layout engine sets a suptitle and a legend on top of each
    other.
    """
    cell.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        title=title,
        title_fontproperties={"weight": "bold", "size": 9},
        alignment="left",
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.15)},
    )


def _nothing(cell: SubFigure, axes: Axes, title: str, message: str) -> None:
    """A panel that has nothing to show says so."""
    _header(cell, title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", color=GREY, transform=axes.transAxes)


def _lanes(axes: Axes, groups: Sequence[tuple[str, int]]) -> list[list[float]]:
    """Lay out groups of bars from top to bottom, and return the positions of their lanes.

    A group is (its label on the y axis, its number of bars). Few bars stay slim.
    """
    lanes, centres, at = [], [], 0.0
    for _, size in groups:
        lanes.append([at + index for index in range(size)])
        centres.append(at + (size - 1) / 2)
        at += size + 0.5
    middle, extent = (at - 1.5) / 2, max(at, 7.0)
    axes.set_ylim(middle + extent / 2, middle - extent / 2)
    axes.set_yticks(centres, [label for label, _ in groups])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_bounds(at - 1.0, -0.5)
    axes.grid(True, axis="x")
    return lanes


def _value(axes: Axes, x: float, lane: float, text: str, gap: float = 4) -> float:
    """Write ``text`` right of ``x``, which is returned."""
    style = {"textcoords": "offset points", "va": "center_baseline", "fontsize": 7}
    # Legible on a grid line too. A white outline would do, but make paths of the letters in a PDF.
    legible = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.annotate(text, (x, lane), (gap, 0), bbox=legible, **style)
    return x


def _value_axis(axes: Axes, low: float, high: float) -> None:
    """Ticks that just cover ``low`` to ``high``, and nothing beyond.

    The layout engine makes the room that the value labels need.
    """
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.set_xlim(ticks[0], ticks[-1])


def _series(history: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    """The number ``key`` of every epoch, NaN where it is missing or not finite."""
    return np.array([finite(row.get(key)) for row in history], dtype=float)


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where there is none or it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    """``colour`` mixed with white: ``strength`` 1 leaves it, 0 is white."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def _wrapped(name: str, longest: int = 20) -> str:
    """The name in at most two lines of 15 characters, or up to ``longest`` where a word has more.

    Underscores become spaces, and so never hide a legend entry.
    """
    words = name.replace("_", " ").split() or ["?"]
    width = min(max(15, *map(len, words)), longest)
    lines = textwrap.wrap(" ".join(words), width)
    return "\n".join(lines if len(lines) <= 2 else [lines[0], lines[1][: width - 1].rstrip() + "…"])

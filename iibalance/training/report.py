"""One run on one page: training, accuracy, budgets and calibration (what method.md, section 6, asks to be reported).

Drawn with ``Figure`` objects inside a style context: no pyplot, no display, and neither the backend nor the rcParams of the importing
program change. Needs only numbers that a run has written: a report can be drawn again at any time.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from iibalance.files import write_bytes

SIZE_INCHES = (7.0, 6.0)  # the text width of a page; nothing is set smaller than 7 pt
DPI = 200
INK, GREY, PALE = "#1a1a1a", "#7f7f7f", "#c4c4c4"
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe & Ito 2008: told apart by colour-blind readers
MARKERS = "osD^vP"  # and in black and white
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": INK,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0.6,
    "legend.columnspacing": 1.4,
    "legend.labelspacing": 0.35,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
}


def write_report(
    path: str | os.PathLike[str],
    *,
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, Any],
    budgets: Mapping[str, Any] | None,
    reliability: Mapping[str, Sequence[Any]],
    title: str,
) -> None:
    """Draw :func:`report_figure` into the PNG file ``path``: 1400 x 1200 pixels (7 x 6 inches at 200 dpi), the same bytes for the same
    numbers.

    The file appears whole or not at all (:func:`iibalance.files.write_bytes`). Arguments are those of :func:`report_figure`.
    Raises :class:`~iibalance.errors.InputError` where the folder does not exist or cannot be written to; an earlier file is then untouched.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(f"{folder}/report.png", history=[], metrics={}, budgets=None, reliability={}, title="a run without numbers")
    ...     os.listdir(folder)
    ['report.png']
    """
    image = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = report_figure(
            history=history, metrics=metrics, budgets=budgets, reliability=reliability, title=title
        )
        figure.savefig(image, format="png", dpi=DPI, metadata={"Title": title, "Software": None})
    write_bytes(path, image.getvalue())


def report_figure(
    *,
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, Any],
    budgets: Mapping[str, Any] | None,
    reliability: Mapping[str, Sequence[Any]],
    title: str,
) -> Figure:
    """The page as a matplotlib ``Figure`` (Agg canvas), for 1 to 6 modalities. Whatever a method does not have is left out, never made up.

    - ``history``: one mapping an epoch, with ``epoch`` and any of ``train.loss``, ``validation.nll`` and ``validation.nll.<modality>``,
      in nats;
    - ``metrics``: ``best_epoch`` (or ``best_epochs`` by modality where each kept its own), and under ``test`` the
      numbers of the fused prediction (``accuracy``, ``macro_f1``, ``nll``, ``ece``,
      ``brier``), ``weights`` and ``shapley`` by modality, and ``modalities``: for each its ``accuracy`` in the joint model and
      ``alone_accuracy`` (fractions of 1);
    - ``budgets``: ``modalities`` (their order is the order of the page), ``values``, ``standard_errors``, ``prior``, ``anchor``; None draws
      the Shapley contributions in their place;
    - ``reliability``: ``"fused"`` and modalities to (confidence [b], accuracy [b], count [b]) of
      :func:`iibalance.metrics.reliability_curve`. The ECE in the legend is computed from the curve drawn.

    Numbers that are not finite are not drawn. Equations: method.md, sections 1 (budget, prior), 4 (weight) and 6.

    >>> figure = report_figure(history=[], metrics={"test": {"accuracy": 0.864}}, budgets=None, reliability={}, title="digits")
    >>> figure.get_suptitle()
    'digits\\nTest: accuracy 86.4 %'
    """
    test = metrics.get("test", {})
    names = _modalities(test, budgets, reliability)
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
        figure.suptitle(
            "\n".join([*textwrap.wrap(title, 90), *_headline(test)]),
            fontsize=9.5,
            x=0.012,
            ha="left",
            linespacing=1.4,
        )
        (training, accuracy), (contribution, calibration) = figure.subfigures(2, 2)
        _draw_training(
            training, history, metrics.get("best_epoch"), metrics.get("best_epochs"), colours
        )
        _draw_accuracy(accuracy, test, colours)
        if budgets is not None:
            _draw_budgets(contribution, budgets, test.get("weights") or {}, colours)
        else:
            _draw_shapley(contribution, test.get("shapley") or {}, colours)
        _draw_reliability(calibration, reliability, colours)
    return figure


# The four panels. Each has a cell of its own (a SubFigure): title and legend at the cell's left edge, axes below.
def _draw_training(
    cell: SubFigure,
    history: Sequence[Mapping[str, float]],
    best_epoch: int | None,
    best_epochs: Mapping[str, int] | None,
    colours: Mapping[str, str],
) -> None:
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
        at = (
            series["validation.nll"][epochs == best_epoch][-1]
            if "validation.nll" in series
            else math.nan
        )
        chosen = axes.plot(
            [best_epoch],
            [at],
            "o",
            color="white",
            markeredgecolor=INK,
            markersize=5.5,
            markeredgewidth=1.3,
            zorder=4,
        )[0]
        handles.append(chosen)
        labels.append(f"chosen: epoch {best_epoch}")
    marks = []
    for name, epoch in (best_epochs or {}).items():  # each modality kept its own epoch
        key = f"validation.nll.{name}"
        if key in series and epoch in epochs:
            at = series[key][epochs == epoch][-1]
            marks += axes.plot(
                [epoch],
                [at],
                "o",
                color="white",
                markeredgecolor=colours[name],
                markersize=5,
                markeredgewidth=1.3,
                zorder=4,
            )
    if marks:
        handles.append(tuple(marks[:1]))
        labels.append("chosen, each head its own")
    if heads:
        handles.append(heads)
        labels.append("validation NLL, each head")
    drawn = np.concatenate(list(series.values()))
    drawn = drawn[np.isfinite(drawn)]
    if (
        drawn.min() > 0 and drawn.max() / drawn.min() > 6
    ):  # a sum of losses beside an NLL: logarithmic, and wide enough for two ticks
        axes.set_yscale("log")
        decades = math.log10(drawn.max() / drawn.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    margin = max(0.02 * np.ptp(epochs), 0.5 if len(epochs) == 1 else 0.1)
    axes.set_xlim(
        epochs.min() - min(margin, 0.5), epochs.max() + margin
    )  # no tick for an epoch 0 that was not
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set(xlabel="epoch", ylabel="loss, NLL [nats]")
    axes.grid(True)
    _header(cell, title, handles, labels)


def _draw_accuracy(cell: SubFigure, test: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    axes, title = cell.subplots(), "(b) Test accuracy"
    heads = test.get("modalities") or {}
    found = {
        name: tuple(
            _finite((heads.get(name) or {}).get(key)) for key in ("alone_accuracy", "accuracy")
        )
        for name in colours
    }
    found = {name: pair for name, pair in found.items() if pair != (None, None)}
    fused = _finite(test.get("accuracy"))
    if fused is None and not found:
        return _nothing(cell, axes, title, "no test accuracy")
    rows = [("fused", [(fused, INK)])] if fused is not None else []
    for name, pair in found.items():
        shades = (_tint(colours[name], 0.5), colours[name])
        rows.append((name, [bar for bar in zip(pair, shades, strict=True) if bar[0] is not None]))
    lanes = _lanes(axes, [(_wrapped(name), len(bars)) for name, bars in rows])
    for (_, bars), positions in zip(rows, lanes, strict=True):
        for (value, colour), lane in zip(bars, positions, strict=True):
            axes.barh(lane, 100 * value, height=0.84, color=colour)
            _value(axes, 100 * value, lane, f"{100 * value:.1f}")
    _value_axis(axes, 0, 100)
    axes.set_xlabel("accuracy [%]")
    entries = [
        (Patch(color=_tint(GREY, 0.5)), "trained alone", 0),
        (Patch(color=GREY), "its head in the joint model", 1),
    ]
    entries = [
        entry[:2] for entry in entries if any(pair[entry[2]] is not None for pair in found.values())
    ]
    _header(cell, title, *zip(*entries, strict=True), columns=1)


def _draw_budgets(
    cell: SubFigure,
    budgets: Mapping[str, Any],
    weights: Mapping[str, float],
    colours: Mapping[str, str],
) -> None:
    axes, title = (
        cell.subplots(),
        "(c) Budget, prior and weight" if weights else "(c) Budget and prior",
    )
    names = list(budgets["modalities"])
    values = [_finite(value) or 0.0 for value in budgets["values"]]
    errors = [
        _finite(error) or None for error in budgets.get("standard_errors") or [None] * len(names)
    ]  # 0: given, not estimated
    prior = [_finite(value) for value in budgets.get("prior") or [None] * len(names)]
    lanes = _lanes(axes, [(_wrapped(name), 2) for name in names])
    ends = []
    for name, value, error, before, (upper, lower) in zip(
        names, values, errors, prior, lanes, strict=True
    ):
        colour, after = colours[name], _finite(weights.get(name))
        axes.barh(upper, value, height=0.84, color=colour)
        if error is not None:
            axes.errorbar(
                value, upper, xerr=error, color=INK, elinewidth=0.9, capsize=2, capthick=0.9
            )
        label = (
            f"{value:.2f}"
            + (f" ± {error:.2f}" if error is not None else "")
            + (" ★" if name == budgets.get("anchor") else "")
        )
        ends.append(_value(axes, value + (error or 0), upper, label))
        shown = [share for share in (before, after) if share is not None]
        if len(shown) == 2:
            axes.plot(shown, [lower, lower], color=_tint(colour, 0.5), linewidth=1.6, zorder=2)
        if before is not None:
            axes.plot(
                before,
                lower,
                "D",
                color="white",
                markeredgecolor=colour,
                markeredgewidth=1.1,
                markersize=5.5,
                zorder=3,
            )
        if after is not None:
            axes.plot(after, lower, "o", color=colour, markersize=3.6, zorder=4)
        if shown:
            ends.append(
                _value(
                    axes, max(shown), lower, " → ".join(f"{share:.2f}" for share in shown), gap=6
                )
            )
    _value_axis(axes, 0, max(ends))
    axes.set_xlabel("share of label information / of fusion")
    handles = [
        Patch(color=GREY),
        Line2D(
            [],
            [],
            marker="D",
            linestyle="",
            color="white",
            markeredgecolor=GREY,
            markeredgewidth=1.1,
            markersize=5.5,
        ),
    ]
    labels = ["budget ± s.e." if any(errors) else "budget", "prior"]
    if weights:
        handles.append(Line2D([], [], marker="o", linestyle="", color=GREY, markersize=3.6))
        labels.append("mean fusion weight")
    if budgets.get("anchor") in names:
        handles.append(Line2D([], [], marker="*", linestyle="", color=INK, markersize=5))
        labels.append("anchor")
    _header(cell, title, handles, labels)


def _draw_shapley(
    cell: SubFigure, shapley: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    axes, title = cell.subplots(), "(c) Shapley contribution"
    found = {
        name: 100 * shapley[name] for name in colours if _finite(shapley.get(name)) is not None
    }
    if not found:
        return _nothing(cell, axes, title, "neither budgets nor Shapley values")
    lanes = _lanes(axes, [(_wrapped(name), 1) for name in found])
    for (name, value), (lane,) in zip(found.items(), lanes, strict=True):
        axes.barh(lane, value, height=0.84, color=colours[name])
        _value(
            axes, max(value, 0.0), lane, f"{value:+.1f}".replace("-", "−")
        )  # right of the axis also when negative: clear of the names
    if min(found.values()) < 0:
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=GREY, linewidth=0.7)
    _value_axis(axes, min(0.0, *found.values()), max(1.0, *found.values()))
    axes.set_xlabel("contribution to accuracy [% points]")
    _header(cell, title)


def _draw_reliability(
    cell: SubFigure, reliability: Mapping[str, Sequence[Any]], colours: Mapping[str, str]
) -> None:
    axes, title = cell.subplots(), "(d) Calibration"
    names = [name for name in ("fused", *colours) if name in reliability]
    if not names:
        return _nothing(cell, axes, title, "no reliability curves")
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    handles, labels = [], []
    for name in reversed(names):  # fused last, on top
        confidence, accuracy, count = (
            np.asarray(values, dtype=float) for values in reliability[name]
        )
        style = {"color": INK, "marker": "o", "linewidth": 1.8, "markersize": 3.6, "zorder": 4}
        if name != "fused":
            marker = MARKERS[list(colours).index(name) % len(MARKERS)]
            style = {
                "color": colours[name],
                "marker": marker,
                "linewidth": 1.0,
                "markersize": 3,
                "zorder": 3,
            }
        handles.append(axes.plot(confidence, accuracy, **style)[0])
        ece = float((count * np.abs(confidence - accuracy)).sum() / count.sum())
        labels.append(
            f"{ece:.3f} " + _wrapped(name, 15).replace("\n", "\n\u2007\u2008\u2007\u2007\u2007 ")
        )  # spaces as wide as the digits
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="confidence",
        ylabel="accuracy",
        aspect="equal",
        anchor="SW",
    )
    ticks = [0, 0.25, 0.5, 0.75, 1]
    texts = ["0", ".25", ".5", ".75", "1"]
    axes.set_xticks(ticks, texts)
    axes.set_yticks(ticks, texts)
    axes.grid(True)
    _header(cell, title)
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


# Shared by the panels.
def _header(
    cell: SubFigure,
    title: str,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
    columns: int = 2,
) -> None:
    """Panel title with the legend under it: one artist, because the layout engine sets a suptitle and a legend on top of each other."""
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
    _header(cell, title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", color=GREY, transform=axes.transAxes)


def _lanes(axes: Axes, groups: Sequence[tuple[str, int]]) -> list[list[float]]:
    """Lays groups of bars out from top to bottom, labelled on the y axis; the positions of their lanes. Few bars stay slim."""
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
    axes.annotate(
        text,
        (x, lane),
        (gap, 0),
        textcoords="offset points",
        va="center_baseline",
        fontsize=7,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # legible on a grid line
    return x


def _value_axis(axes: Axes, low: float, high: float) -> None:
    """Ticks that just cover ``low`` to ``high``, and nothing beyond: the layout engine makes the room that the value labels need."""
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.set_xlim(ticks[0], ticks[-1])


def _modalities(
    test: Mapping[str, Any], budgets: Mapping[str, Any] | None, reliability: Mapping[str, Any]
) -> list[str]:
    sources = [
        budgets["modalities"] if budgets else [],
        *(test.get(key) or [] for key in ("modalities", "weights", "shapley")),
        reliability,
    ]
    return [
        name
        for name in dict.fromkeys(name for source in sources for name in source)
        if name != "fused"
    ]


def _headline(test: Mapping[str, Any]) -> list[str]:
    formats = {
        "accuracy": "accuracy {:.1%}",
        "macro_f1": "macro-F1 {:.3f}",
        "nll": "NLL {:.3f} nats",
        "ece": "ECE {:.3f}",
        "brier": "Brier {:.3f}",
    }
    parts = [
        text.format(test[key]).replace("%", " %")
        for key, text in formats.items()
        if _finite(test.get(key)) is not None
    ]
    return ["Test: " + ", ".join(parts)] if parts else []


def _series(history: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    values = (_finite(row.get(key)) for row in history)
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def _wrapped(name: str, longest: int = 20) -> str:
    """At most two lines of 15 characters, or ``longest`` where a word is; underscores become spaces (and so never hide a legend entry)."""
    words = name.replace("_", " ").split() or ["?"]
    width = min(max(15, *map(len, words)), longest)
    lines = textwrap.wrap(" ".join(words), width)
    return "\n".join(lines if len(lines) <= 2 else [lines[0], lines[1][: width - 1].rstrip() + "…"])

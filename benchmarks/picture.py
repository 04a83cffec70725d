"""Times as a picture: a line a case, and on it every implementation beside the eager reference.

What is drawn is the time of one call over that of the reference in the same case, so that a call of
microseconds and one of seconds share an axis; the reference's own time stands at the end of the
line. Cases that were not measured take no room.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Okabe & Ito 2008, as in the other pictures; in black and white the markers tell rows apart.
COLOURS = {
    "ours": "#0072B2",
    "reference": "#7f7f7f",
    "compiled": "#D55E00",
    "compiled max-autotune": "#E69F00",
}
MARKERS = {"ours": "o", "reference": "s", "compiled": "D", "compiled max-autotune": "d"}
OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#8a6d00", "#7b3fb5")  # peers, in order of appearance
BASES = ("reference", "compiled", "ours")  # what a line is measured against: the first there is
SPREADS = {("p20", "p80"): "p20 to p80", ("q1", "q3"): "quartiles"}

# Inches: a line, the plot, the time at its end, a letter of its name, and lines in a column.
LINE, PLOT, TIME, LETTER, TALLEST = 0.19, 2.5, 0.9, 0.068, 56
HEAD, GAP = 1.2, 0.5  # lines that an operator's name takes, and that stay free after its last


class Case(NamedTuple):
    """One line of the picture: what was measured of one operator, mode, shape and precision."""

    shape: str
    precision: str
    rows: dict[str, dict]  #: implementation -> its measurement

    @property
    def base(self) -> str:
        """The implementation that the others are measured against."""
        return next((name for name in BASES if name in self.rows), next(iter(self.rows)))


def picture(rows: Sequence[dict], path: Path, title: str) -> bool:
    """Write :func:`draw` as PNG; False where matplotlib is missing or nothing was measured."""
    from iibalance.files import write_bytes

    rows = [row for row in rows if row.get("p50")]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    if not rows:
        return False
    image = io.BytesIO()
    draw(rows, title).savefig(image, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, image.getvalue())
    return True


def draw(rows: Sequence[dict], title: str) -> Any:
    """The picture as a matplotlib ``Figure``: blocks of one operator and mode, in page columns.

    A row has ``op``, ``mode``, ``shape``, ``precision``, ``row`` and the median ``p50`` in seconds,
    and a spread where it has ``p20`` and ``p80`` or the quartiles ``q1`` and ``q3``. Of two rows of
    the same thing the first is drawn.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from iibalance.training.report import STYLE

    blocks, styles = _blocks(rows), _styles(rows)
    columns = _columns(blocks)
    cases = [case for found in blocks.values() for case in found]
    names = LETTER * max(len(case.shape) + len(case.precision) + 3 for case in cases)
    times = TIME + LETTER * max(len(_named(case)) for case in cases)
    lines = max(sum(_lines(blocks[key]) for key in column) for column in columns)
    width, plot = (names + PLOT + times) * len(columns) + 0.3, LINE * lines
    heading = _heading(title, cases, width)
    entries = len(styles) + 1
    top = 0.2 + 0.18 * len(heading)
    foot = 0.5 + 0.17 * math.ceil(entries / _entries(width))
    height = top + plot + foot
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        for index, column in enumerate(columns):
            left = 0.15 + index * (names + PLOT + times) + names
            axes = figure.add_axes((left / width, foot / height, PLOT / width, plot / height))
            _column(axes, {key: blocks[key] for key in column}, styles, lines, names)
            axes.set_xlim(_limits(cases))
        where = {"x": 0.15 / width, "y": 1 - 0.1 / height, "ha": "left", "va": "top"}
        figure.text(s="\n".join(heading), fontsize=9, linespacing=1.4, **where)
        _legend(figure, styles, any(map(_least, rows)), width, height)
    return figure


def _heading(title: str, cases: Sequence[Case], width: float) -> list[str]:
    """The title, and what is drawn."""
    found = {_spread(row) for case in cases for row in case.rows.values()}
    spreads = "".join(f", {text}" for pair, text in SPREADS.items() if pair in found)
    about = "Time of one call over that of the eager reference (left of 1: faster): median"
    return [
        line for text in (title, about + spreads) for line in textwrap.wrap(text, round(12 * width))
    ]


def _named(case: Case) -> str:
    """What a line is measured against, where that is not the reference."""
    return "" if case.base == "reference" else f" {case.base}"


def _blocks(rows: Iterable[dict]) -> dict[tuple[str, str], list[Case]]:
    """(operator, mode) -> its cases, in order of appearance."""
    found: dict[tuple[str, str], dict[tuple[str, str], Case]] = {}
    for row in rows:
        key = str(row["shape"]), str(row.get("precision") or "")
        block = found.setdefault((row["op"], row["mode"]), {})
        block.setdefault(key, Case(*key, {})).rows.setdefault(row["row"], row)
    return {key: list(cases.values()) for key, cases in found.items()}


def _lines(cases: Sequence[Case]) -> float:
    return HEAD + len(cases) + GAP


def _columns(blocks: dict[tuple[str, str], list[Case]]) -> list[list[tuple[str, str]]]:
    """The blocks in page columns of about the same height, in their order."""
    total = sum(map(_lines, blocks.values()))
    count = min(4, math.ceil(total / TALLEST))
    columns: list[list[tuple[str, str]]] = [[] for _ in range(count)]
    above = 0.0
    for key, cases in blocks.items():
        middle = above + _lines(cases) / 2
        columns[min(count - 1, int(count * middle / total))].append(key)
        above += _lines(cases)
    return [column for column in columns if column]


def _styles(rows: Sequence[dict]) -> dict[str, tuple[str, str]]:
    """name -> (colour, marker), the kernels first."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    known = [name for name in COLOURS if name in names]
    peers = [name for name in names if name not in COLOURS]
    found = {name: (COLOURS[name], MARKERS[name]) for name in known}
    for index, name in enumerate(peers):
        found[name] = (OTHERS[index % len(OTHERS)], "^v<>P"[index % 5])
    return found


def _column(axes, blocks: dict, styles: dict[str, tuple[str, str]], lines: float, names: float):
    """One page column: the names of blocks and cases, their rows, the times of the bases."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    from matplotlib.transforms import offset_copy

    def beside(inches: float, share: float = 0.0):
        """Across in inches from a side of the plot, down in lines."""
        moved = offset_copy(axes.get_yaxis_transform(), axes.figure, x=inches, units="inches")
        return {"x": share, "transform": moved, "va": "center_baseline"}

    axes.set_xscale("log")
    axes.axvline(1, color="#7f7f7f", linewidth=0.7, zorder=1)
    line = 0.0
    for (op, mode), cases in blocks.items():
        axes.text(**beside(-names), y=line, s=f"{op}, {mode}", fontsize=8, fontweight="bold")
        line += HEAD
        for index, case in enumerate(cases):
            if index == 0 or cases[index - 1].shape != case.shape:
                axes.text(**beside(-names), y=line, s=case.shape, fontsize=7)
            axes.text(**beside(-0.08), y=line, s=case.precision, fontsize=7, ha="right")
            time = duration(case.rows[case.base]["p50"]) + _named(case)
            axes.text(**beside(0.08, 1.0), y=line, s=time, fontsize=7)
            axes.axhline(line, color="#e6e6e6", linewidth=0.6, zorder=0)
            _case(axes, line, case, styles)
            line += 1
        line += GAP
    if any(case.base == "reference" for cases in blocks.values() for case in cases):
        axes.text(**beside(0.08, 1.0), y=0, s="reference", fontsize=7, color="#7f7f7f")
    axes.set_ylim(lines - GAP, -0.6)
    axes.set_yticks([])
    axes.set_xlabel("time over the reference's", fontsize=7.5)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _case(axes, line: float, case: Case, styles: dict[str, tuple[str, str]]) -> None:
    """The rows of one line, next to each other: equal times would hide each other."""
    names = [name for name in styles if name in case.rows]
    base = case.rows[case.base]["p50"]
    step = min(0.17, 0.7 / max(1, len(names) - 1))
    for index, name in enumerate(names):
        low, middle, high = (value / base for value in _values(case.rows[name]))
        colour, marker = styles[name]
        axes.errorbar(
            middle,
            line + step * (index - (len(names) - 1) / 2),
            xerr=[[middle - low], [high - middle]],
            color=colour,
            marker=marker,
            markersize=3.8,
            markeredgewidth=0,
            linewidth=1.1,
            zorder=3,
        )
    if "ours" in case.rows and (least := _least(case.rows["ours"])):
        axes.plot(least / base, line, color="black", marker="|", markersize=9, zorder=2)


def _legend(figure, styles: dict[str, tuple[str, str]], least: bool, width: float, height: float):
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4.5, linestyle="", label=name)
        for name, (colour, marker) in styles.items()
    ]
    if least:
        text = "least time that bytes and products allow"
        style = {"color": "black", "marker": "|", "markersize": 9, "linestyle": ""}
        handles.append(Line2D([], [], **style, label=text))
    where = {"loc": "lower left", "bbox_to_anchor": (0.08 / width, 0.02 / height)}
    figure.legend(handles=handles, ncols=min(_entries(width), len(handles)), **where)


def _entries(width: float) -> int:
    """How many of the legend's entries stand side by side."""
    return max(1, int(width / 1.75))


def _limits(cases: Iterable[Case]) -> tuple[float, float]:
    """What the axes span: every spread and every least time, and 1 with some room about it."""
    shares = [0.8, 1.25]
    for case in cases:
        base = case.rows[case.base]["p50"]
        shares += [value / base for row in case.rows.values() for value in _values(row)]
        shares.append((_least(case.rows.get("ours", {})) or base) / base)
    return 0.85 * min(shares), 1.18 * max(shares)


def _spread(row: dict) -> tuple[str, str] | None:
    """The keys of a row's spread."""
    return next((pair for pair in SPREADS if row.get(pair[0]) and row.get(pair[1])), None)


def _values(row: dict) -> tuple[float, float, float]:
    """Low, median and high, in seconds; all the median where there is no spread."""
    middle, pair = row["p50"], _spread(row)
    if pair is None:
        return middle, middle, middle
    return min(middle, row[pair[0]]), middle, max(middle, row[pair[1]])


def _least(row: dict) -> float:
    """Seconds that the least bytes, or the least products if they take longer, would take."""
    shares = [row.get("share_of_copy") or 0.0, row.get("share_of_products") or 0.0]
    return max(shares) * (row.get("p50") or 0.0)


def duration(seconds: float | None) -> str:
    """Seconds in a unit that can be read.

    >>> duration(0.00123), duration(4.2e-6), duration(2.5), duration(None)
    ('1.23 ms', '4.20 us', '2.50 s', '')
    """
    if seconds is None:
        return ""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.2f} {unit}"
    return ""

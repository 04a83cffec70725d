"""Times as a picture: operators by modes; in each, shapes with their precisions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COLOURS = {
    "ours": "#0b5fff",
    "reference": "#555555",
    "compiled": "#e07b00",
    "compiled max-autotune": "#a02c00",
}
OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#7b3fb5")  # peers, in order of appearance
MARKERS = {"ours": "o", "reference": "s", "compiled": "D", "compiled max-autotune": "d"}


def picture(rows: Sequence[dict], path: Path, title: str) -> bool:
    """Medians with p20 to p80, and a dash at the least time that bytes and products allow.

    False where matplotlib is missing or nothing was measured.
    """
    rows = [row for row in rows if row.get("p50")]
    try:
        import matplotlib
    except ImportError:
        return False
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    styles = _styles(rows)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = pyplot.subplots(
        len(ops),
        len(modes),
        figsize=(1.5 + 6.5 * len(modes), 1.6 + 2.7 * len(ops)),
        squeeze=False,
        layout="constrained",
    )
    for line, op in enumerate(ops):
        for column, mode in enumerate(modes):
            chosen = [row for row in rows if (row["op"], row["mode"]) == (op, mode)]
            if chosen:
                _panel(axes[line][column], chosen, styles)
                axes[line][column].set_title(f"{op}, {mode}", fontsize=9, loc="left")
            else:
                axes[line][column].set_axis_off()
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in styles.items()
    ]
    if any(_least(row) for row in rows):
        handles.append(
            Line2D([], [], color="black", marker="_", linestyle="", label="least possible")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    figure.suptitle(f"{title}\nmilliseconds of one call: median, p20 to p80", fontsize=10)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True


def _styles(rows: Sequence[dict]) -> dict[str, tuple[str, str]]:
    """name -> (colour, marker), the kernels first."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    known = [name for name in COLOURS if name in names]
    peers = [name for name in names if name not in COLOURS]
    found = {name: (COLOURS[name], MARKERS[name]) for name in known}
    for index, name in enumerate(peers):
        found[name] = (OTHERS[index % len(OTHERS)], "^v<>P"[index % 5])
    return found


def _panel(axis, rows: Sequence[dict], styles: dict[str, tuple[str, str]]) -> None:
    """One operator in one mode."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    places, labels = {}, []
    for shape in shapes:
        for precision in dict.fromkeys(
            row.get("precision") for row in rows if row["shape"] == shape
        ):
            places[shape, precision] = len(places) + 0.6 * shapes.index(shape)
            labels.append(str(precision or "").replace(", ", "\n"))
    names = [name for name in styles if any(row["row"] == name for row in rows)]
    for row in rows:
        where = places[row["shape"], row.get("precision")]
        colour, marker = styles[row["row"]]
        low, high = row.get("p20") or row["p50"], row.get("p80") or row["p50"]
        axis.errorbar(
            # Next to each other, or equal times would hide each other
            where + 0.11 * (names.index(row["row"]) - (len(names) - 1) / 2),
            1e3 * row["p50"],
            yerr=[[1e3 * max(0.0, row["p50"] - low)], [1e3 * max(0.0, high - row["p50"])]],
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1,
        )
        if row["row"] == "ours" and _least(row):
            axis.plot(where, 1e3 * _least(row), color="black", marker="_", markersize=13)
    axis.set_yscale("log")
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlim(-0.7, max(places.values()) + 0.7)
    axis.set_xticks(list(places.values()), labels, fontsize=6.5)
    axis.yaxis.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")  # else one label or none
    axis.tick_params(axis="y", which="both", labelsize=7)
    for shape in shapes:
        here = [place for (name, _), place in places.items() if name == shape]
        axis.annotate(
            shape.replace(" D=", "\nD=").replace(" two ", "\ntwo "),
            ((here[0] + here[-1]) / 2, -0.17),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=7,
        )


def _least(row: dict) -> float:
    """Seconds that the least bytes, or the least products if they take longer, would take."""
    shares = [row.get("share_of_copy") or 0.0, row.get("share_of_products") or 0.0]
    return max(shares) * row["p50"]

"""The picture of the front page: what noise in one modality costs five methods.

``python -m benchmarks.noise_picture`` draws ``results/noise.png`` from ``results/comparison.csv``.
The PNG names the table that it was drawn from by its digest, and a test holds it to that.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from iibalance.comparison.results import by_method, group_means, read_table
from iibalance.files import write_bytes
from iibalance.metrics import mean_and_stderr

RESULTS = Path(__file__).parent / "results"
TABLE, PICTURE = RESULTS / "comparison.csv", RESULTS / "noise.png"
# The rows of the front page's table, and of the published methods that are defined for all settings
# the one with the best rank under noise.
METHODS = {
    "iibalance": "iibalance",
    "ensemble_gated": "encoders trained alone,\nunder our gate",
    "g_blend": "gradient blending\n(Wang et al. 2020)",
    "ensemble": "encoders trained alone,\nsummed",
    "concat": "one classifier on\nall embeddings",
}
FOCUS, GREY, PALE, INK = "#0072B2", "#7f7f7f", "#bdbdbd", "#262626"  # as in the other pictures


class Row(NamedTuple):
    """What is drawn of one method, in percent."""

    clean: tuple[float, float]  #: accuracy on clean input, its standard error over seeds
    noise: tuple[float, float]
    settings: list[float]  #: accuracy under noise on each setting


def rows(table: Path = TABLE) -> dict[str, Row]:
    """method -> what is drawn of it: means over the settings, for each seed and then over seeds."""
    found = {}
    results = by_method(read_table(table))
    for method in METHODS:
        means = [group_means(entries[method], "accuracy") for entries in results.values()]
        pair = []
        for kind in ("clean", "noise"):
            seeds = sorted(set.intersection(*(set(row[kind]) for row in means)))
            values = [100 * fmean(row[kind][seed] for row in means) for seed in seeds]
            pair.append(mean_and_stderr(values))
        settings = [100 * fmean(row["noise"].values()) for row in means]
        found[method] = Row(*pair, settings)
    return found


def digest(table: Path = TABLE) -> str:
    """What the PNG says of the table it was drawn from."""
    return f"{table.name} sha256 {hashlib.sha256(table.read_bytes()).hexdigest()}"


def draw(found: dict[str, Row]):
    """The figure: a row a method, from its accuracy on clean input to that under noise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (method, row) in enumerate(found.items()):
        first = method == "iibalance"
        colour, weight = (FOCUS, "bold") if first else (GREY, "normal")
        ends = {"noise": row.noise, "clean": row.clean}
        axes.plot([row.noise[0], row.clean[0]], [place, place], color=colour, linewidth=1.6)
        dots = {"s": 16, "color": PALE, "edgecolor": "white", "linewidth": 0.5}
        axes.scatter(row.settings, [place] * len(row.settings), zorder=3, **dots)
        for name, (value, error) in ends.items():
            style = {"fmt": "o", "color": colour, "markersize": 7, "elinewidth": 1.6, "capsize": 3}
            inside = "white" if name == "clean" else colour
            axes.errorbar(value, place, xerr=error, markerfacecolor=inside, zorder=4, **style)
            text = f"{name}\n{value:.1f}" if first else f"{value:.1f}"
            style = {"ha": "center", "va": "bottom", "fontsize": 8.5, "fontweight": weight}
            ink = FOCUS if first else INK
            away = {"xytext": (0, 7), "textcoords": "offset points"}
            axes.annotate(text, (value, place), color=ink, **away, **style)
    axes.set_yticks(range(len(found)), [METHODS[method] for method in found], fontsize=8.5)
    axes.get_yticklabels()[0].set(color=FOCUS, fontweight="bold")
    axes.set_ylim(len(found) - 0.6, -0.9)
    axes.set_xlim(45, 100)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, color=GREY)
    axes.grid(axis="x", color="#ececec")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.set_xlabel(
        "accuracy, %: mean over seven settings, with its standard error over five seeds;\n"
        "noise: 3 standard deviations in one modality of half of the test samples, each in turn;\n"
        "small dots: the settings under noise",
        fontsize=8.5,
    )
    return figure


def main() -> None:
    """Draw the picture from the table."""
    image = io.BytesIO()
    metadata = {"Software": None, "Description": digest()}
    draw(rows()).savefig(image, format="png", dpi=200, metadata=metadata)
    write_bytes(PICTURE, image.getvalue())
    print(f"written to {PICTURE}")


if __name__ == "__main__":
    main()

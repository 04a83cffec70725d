"""Critical-difference diagrams: the average ranks of a comparison, and which may be chance."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iibalance.comparison.results import GROUPS, group_means
from iibalance.comparison.statistics import SIGNS
from iibalance.files import write_bytes
from iibalance.training.report import DPI, GREY, PALETTE, STYLE

NAMES = {"accuracy": "accuracy", "nll": "NLL"}
log = logging.getLogger(__name__)


def write_picture(path: Path, result: Mapping) -> bool:
    """Write :func:`picture` as PNG; False, and a warning, where scikit-posthocs is not there."""
    try:
        figure = picture(result)
    except ImportError:
        log.warning("no comparison.png: it needs scikit-posthocs (pip install 'iibalance[bench]')")
        return False
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, image.getvalue())
    return True


def picture(result: Mapping) -> Figure:
    """A diagram for each kind of condition and metric: average ranks, 1 is best.

    A bar joins methods whose ranks are not told apart by Nemenyi's test (alpha = 0.05) over the
    data sets, which treats every data set as one sample: with few of them the bars are long.
    Methods that are not defined for every data set are left out of the test and of the diagrams.
    """
    kinds = [kind for kind in GROUPS if kind in result["ranks"]]
    tables = {
        (kind, metric): mean_table(result, kind, metric) for kind in kinds for metric in SIGNS
    }
    lines = 1 + max(len(table.columns) for table in tables.values()) // 2
    with matplotlib.style.context(["default", STYLE]):
        height = 0.6 + len(kinds) * (0.75 + 0.19 * lines)
        figure = Figure(figsize=(10.0, height), layout="constrained")
        axes = figure.subplots(len(kinds), 2, squeeze=False)
        for (kind, metric), axis in zip(tables, axes.ravel()):
            _diagram(axis, tables[kind, metric], SIGNS[metric], result["focus"])
            axis.set_title(f"{kind}: {NAMES[metric]}", loc="left", fontsize=9, fontweight="bold")
        count = len(result["results"])
        whose = "one data set" if count == 1 else f"{count} data sets"
        figure.suptitle(
            f"Average ranks over {whose}, of the methods that each of them has; "
            f"{result['seeds']} seeds (1 is best; bars: not told apart at 5 %)",
            x=0.01,
            ha="left",
            fontsize=9.5,
        )
    return figure


def mean_table(result: Mapping, kind: str, metric: str) -> pd.DataFrame:
    """Means over seeds, data sets by ranked methods, of the methods that every set has."""
    ranked = result["ranks"][kind][metric]
    rows = {}
    for name, methods in result["results"].items():
        means = {m: group_means(methods[m], metric).get(kind) for m in ranked if m in methods}
        rows[name] = {m: np.mean(list(row.values())) for m, row in means.items() if row}
    return pd.DataFrame.from_dict(rows, orient="index").dropna(axis=1)


def _diagram(axis: Axes, table: pd.DataFrame, sign: int, focus: str) -> None:
    from scikit_posthocs import critical_difference_diagram, posthoc_nemenyi_friedman

    methods = list(table.columns)
    ranks = (sign * table).rank(axis=1).mean()
    if len(table) > 1 and len(methods) > 2:
        p = posthoc_nemenyi_friedman(table.to_numpy())
        p.index = p.columns = methods
    else:  # nothing to test: every method by itself
        p = pd.DataFrame(np.eye(len(methods)), index=methods, columns=methods)
    colours = {method: PALETTE[1] if method == focus else GREY for method in methods}
    critical_difference_diagram(
        ranks,
        p,
        ax=axis,
        color_palette=colours,
        label_props={"fontsize": 7.5},
        elbow_props={"linewidth": 0.9},
        crossbar_props={"linewidth": 2.0, "color": "#1a1a1a"},
        marker_props={"s": 14},
        text_h_margin=0.02,
    )

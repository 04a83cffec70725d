"""One run on one page: training, accuracy, budgets and calibration (method page, section 6).

It is written three times, the same figure: as PNG to look at, as PDF and SVG to print. It is drawn
with ``Figure`` objects inside a style context: no pyplot, no display, and neither the backend nor
the rcParams of the importing program change. It needs only numbers that a run has written, so a
report can be drawn again at any time.

The four panels are in :mod:`iibalance.training.report_panels`.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iibalance.config import DataConfig
from iibalance.files import write_bytes
from iibalance.training.report_panels import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    draw_accuracy,
    draw_budgets,
    draw_reliability,
    draw_shapley,
    draw_training,
    finite,
)

__all__ = [
    "DPI",
    "GREY",
    "INK",
    "MARKERS",
    "PALETTE",
    "STYLE",
    "report_figure",
    "report_title",
    "write_report",
]

SIZE_INCHES = (7.0, 6.0)  # the text width of a page; nothing is set smaller than 7 pt
DPI = 200
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
    # Letters stay letters, to be searched and edited; the same figure has the same bytes.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "iibalance",
}
# What each format says of its making by default, and is not to say: date, program and its version.
_UNSAID = {
    "png": ("Software",),
    "pdf": ("Creator", "Producer", "CreationDate"),
    "svg": ("Creator", "Date"),
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
    """Draw :func:`report_figure`, which takes the same arguments, as PNG, PDF and SVG.

    ``path`` is the PNG, of 1400 x 1200 pixels (7 x 6 inches at 200 dpi); the PDF and the SVG stand
    beside it, under the same name with their own suffix. Their text is text, in the font DejaVu
    Sans, which the PDF holds and the SVG only names. The same numbers give the same bytes. Each
    file appears whole or not at all (:func:`iibalance.files.write_bytes`).

    Raises :class:`~iibalance.errors.InputError` where the folder does not exist or cannot be
    written to; an earlier file is then untouched.

    >>> import os, tempfile
    >>> nothing = {"history": [], "metrics": {}, "budgets": None, "reliability": {}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(f"{folder}/report.png", **nothing, title="a run without numbers")
    ...     sorted(os.listdir(folder))
    ['report.pdf', 'report.png', 'report.svg']
    """
    images = {form: io.BytesIO() for form in _UNSAID}
    with matplotlib.style.context(["default", STYLE]):
        figure = report_figure(
            history=history, metrics=metrics, budgets=budgets, reliability=reliability, title=title
        )
        for form, image in images.items():
            about = {"Title": title} | dict.fromkeys(_UNSAID[form])
            figure.savefig(image, format=form, dpi=DPI, metadata=about)
    for form, image in images.items():  # none is written before all are drawn
        write_bytes(Path(path).with_suffix(f".{form}"), image.getvalue())


def report_title(method: str, data: str, config: DataConfig) -> str:
    """What a run's page is called: the method, and the data by the name of their file.

    ``data`` is the name of the data trained on, which came from elsewhere than ``config`` where
    another name stands there. Folders are left out: they are the machine's.

    >>> report_title("iibalance", "npz", DataConfig(path="/home/me/clips.npz"))
    'iibalance on clips.npz'
    >>> report_title("iibalance", "digits", DataConfig())
    'iibalance on digits'
    """
    if config.path and config.name == data:
        data = Path(config.path).name
    return f"{method} on {data}"


def report_figure(
    *,
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, Any],
    budgets: Mapping[str, Any] | None,
    reliability: Mapping[str, Sequence[Any]],
    title: str,
) -> Figure:
    """The page as a matplotlib ``Figure`` (Agg canvas), for 1 to 6 modalities.

    - ``history``: one mapping an epoch, with ``epoch`` and any of ``train.loss``,
      ``validation.nll`` and ``validation.nll.<modality>``, in nats.
    - ``metrics``: ``best_epoch``, or ``best_epochs`` by modality where each kept its own; and under
      ``test`` the numbers of the fused prediction (``accuracy``, ``macro_f1``, ``nll``, ``ece``,
      ``brier``), ``trust``, ``contributions`` and ``shapley`` by modality, and ``modalities``,
      which holds for each its ``accuracy`` in the joint model and ``alone_accuracy``. Accuracies
      are fractions of 1.
    - ``budgets``: ``modalities`` (their order is the order of the page), ``values``,
      ``standard_errors`` and ``anchor``. Where it is None, the Shapley contributions are
      drawn in their place.
    - ``reliability``: for ``"fused"`` and modalities, the curve (confidence [b], accuracy [b],
      count [b]) of :func:`iibalance.metrics.reliability_curve`. The ECE in the legend is that of
      these bins; for the drawing, bins of few samples are merged
      (:func:`iibalance.training.report_panels.merge_bins`).

    Whatever a method does not have is left out, never made up, and numbers that are not finite are
    not drawn. Budgets are defined in the method page, section 1; trust and contributions in the
    method page, section 4.

    >>> metrics = {"test": {"accuracy": 0.864}}
    >>> figure = report_figure(
    ...     history=[], metrics=metrics, budgets=None, reliability={}, title="digits"
    ... )
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
        draw_training(
            training, history, metrics.get("best_epoch"), metrics.get("best_epochs"), colours
        )
        draw_accuracy(accuracy, test, colours)
        if budgets is not None:
            draw_budgets(contribution, budgets, test, colours)
        else:
            draw_shapley(contribution, test.get("shapley") or {}, colours)
        draw_reliability(calibration, reliability, colours)
    return figure


def _modalities(
    test: Mapping[str, Any], budgets: Mapping[str, Any] | None, reliability: Mapping[str, Any]
) -> list[str]:
    sources = [
        budgets["modalities"] if budgets else [],
        *(test.get(key) or [] for key in ("modalities", "trust", "shapley")),
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
        if finite(test.get(key)) is not None
    ]
    return ["Test: " + ", ".join(parts)] if parts else []

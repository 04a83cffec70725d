"""README's tables of a comparison: ``python -m benchmarks.tables benchmarks/results/comparison.json``. A test holds README to them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

from iibalance.comparison.statistics import (
    GROUPS,
    by_rank,
    group_means,
    rank_text,
    ranks,
    spread_text,
)
from iibalance.files import read_json
from iibalance.metrics import mean_and_stderr

TIMED = ("concat", "qmf", "ensemble", "iibalance")
STARRED = 0.05


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(header), "|" + "---|" * len(header), *map(_row, rows)]


def rank_table(result: Mapping, methods: Sequence[str]) -> list[str]:
    """Average ranks in accuracy and NLL; the best of a column in bold."""
    cell = lambda kind, method: " / ".join(
        rank_text(result["ranks"][kind][metric], method, 1) for metric in ("accuracy", "nll")
    )
    rows = [
        [
            f"`{method}`",
            str(result["ranks"][GROUPS[0]]["nll"][method]["sets"]),
            *(cell(kind, method) for kind in GROUPS),
        ]
        for method in methods
    ]
    return _table(["average rank, accuracy / NLL", "sets", *GROUPS], rows)


def clean_table(result: Mapping, methods: Sequence[str]) -> list[str]:
    """Accuracy (%) and NLL of every method on every set, clean input."""

    def cell(entry: Mapping | None) -> str:
        return (
            "-"
            if entry is None
            else f"{spread_text(entry['conditions']['clean']['accuracy'], 100)} / {entry['conditions']['clean']['nll']['mean']:.3f}"
        )

    rows = [
        [f"`{method}`", *(cell(entries.get(method)) for entries in result["results"].values())]
        for method in methods
    ]
    return _table(["clean: accuracy / NLL", *result["results"]], rows)


def bootstrap_table(result: Mapping) -> list[str]:
    """The focus less the best other method of each set and kind of condition; * where p < 0.05."""

    def cell(found: Mapping) -> str:
        scaled = {
            "accuracy": f"{100 * found['accuracy']['difference']:+.1f}",
            "nll": f"{found['nll']['difference']:+.3f}",
        }
        return "; ".join(
            f"{text}{'*' if found[metric]['p'] < STARRED else ''} ({found[metric]['against']})"
            for metric, text in scaled.items()
        )

    return _table(
        ["against the best other: accuracy; NLL", *GROUPS],
        [
            [name, *(cell(kinds[kind]) for kind in GROUPS)]
            for name, kinds in result["bootstrap"].items()
        ],
    )


def ablation_table(result: Mapping) -> list[str]:
    """Each ablation less the focus, averaged over the sets."""

    def cell(kind: str, method: str) -> str:
        accuracy, nll = (
            result["ablations"][kind][metric][method] for metric in ("accuracy", "nll")
        )
        return f"{spread_text(accuracy, 100, sign='+')} / {spread_text(nll, 1, 3, sign='+')}"

    rows = [
        [f"`{method.removeprefix(result['focus'])}`", *(cell(kind, method) for kind in GROUPS)]
        for method in result["ablations"]["clean"]["nll"]
    ]
    return _table(["less the whole method, accuracy / NLL", *GROUPS], rows)


def head_table(result: Mapping) -> list[str]:
    """Accuracy of the focus's heads and of the encoders alone."""
    rows = []
    for name, entries in result["results"].items():
        ours, alone = (entries[method]["heads"] for method in (result["focus"], "unimodal"))
        rows.append(
            [
                name,
                "; ".join(
                    f"{modality} {spread_text(ours[modality]['accuracy'], 100)}, {spread_text(alone[modality]['accuracy'], 100)}"
                    for modality in ours
                ),
            ]
        )
    return _table(["set", f"head: {result['focus']}, alone"], rows)


def step_table(result: Mapping) -> list[str]:
    """Milliseconds of a training step, and the focus's over concat's."""
    spread = lambda method, name: result["results"][name][method]["seconds_a_step"]
    rows = [
        [f"`{method}`", *(spread_text(spread(method, name), 1000) for name in result["results"])]
        for method in TIMED
    ]
    median = lambda method, name: statistics.median(spread(method, name)["values"].values())
    ratio = [
        f"{median(result['focus'], name) / median('concat', name):.2f}"
        for name in result["results"]
    ]
    return _table(
        ["step, ms", *result["results"]],
        [*rows, [f"`{result['focus']}` / `concat`, medians", *ratio]],
    )


def tables(result: Mapping) -> list[list[str]]:
    """All of them, each a list of lines."""
    methods = by_rank(result["ranks"])
    found = [
        rank_table(result, methods),
        clean_table(result, methods),
        bootstrap_table(result),
        ablation_table(result),
        head_table(result),
    ]
    return (
        [*found, step_table(result)]
        if all(
            result["results"][name][method]["seconds_a_step"]
            for name in result["results"]
            for method in TIMED
        )
        else found
    )


def figures(result: Mapping) -> list[str]:
    """What README's sentences say, a line each."""
    return [
        _together(result),
        *_without_warm_start(result),
        *_means(result),
        _heads(result),
        _smallest_p(result),
    ]


def _ranked(result: Mapping) -> dict:
    """The results of the methods that have a rank."""
    return {
        name: {
            method: entry
            for method, entry in entries.items()
            if method in result["ranks"]["clean"]["nll"]
        }
        for name, entries in result["results"].items()
    }


def _pair(table: Mapping, method: str) -> str:
    return " / ".join(f"{table[metric][method]['rank']:.1f}" for metric in ("accuracy", "nll"))


def _together(result: Mapping) -> str:
    """Ranks by the mean over all conditions with a modality missing or noisy."""
    degraded = lambda entry: {
        "conditions": {
            f"{condition} noise": row
            for condition, row in entry["conditions"].items()
            if condition.endswith((" missing", " noise"))
        }
    }  # as one kind
    table = ranks(
        {
            name: {method: degraded(entry) for method, entry in entries.items()}
            for name, entries in _ranked(result).items()
        }
    )
    return "missing and noisy input together: " + ", ".join(
        f"{method} {_pair(table['noise'], method)}" for method in by_rank(table)[:3]
    )


def _without_warm_start(result: Mapping) -> list[str]:
    """Ranks with the ablation in the focus's place."""
    focus, less = result["focus"], f"{result['focus']}_no_warm_start"
    if less not in result["ablations"]["clean"]["nll"]:
        return []
    table = ranks(
        {
            name: {**entries, focus: result["results"][name][less]}
            for name, entries in _ranked(result).items()
        }
    )
    return [
        f"without the warm start, {method}: "
        + ", ".join(f"{_pair(table[kind], method)} {kind}" for kind in GROUPS)
        for method in (focus, "ensemble")
    ]


def _means(result: Mapping) -> list[str]:
    """Accuracy and NLL averaged over the sets."""

    def mean(method: str, kind: str, metric: str) -> float:
        return statistics.mean(
            statistics.mean(group_means(entries[method], metric)[kind].values())
            for entries in result["results"].values()
        )

    return [
        f"mean of {method}: "
        + ", ".join(
            f"{100 * mean(method, kind, 'accuracy'):.1f} / {mean(method, kind, 'nll'):.3f} {kind}"
            for kind in GROUPS
        )
        for method in (result["focus"], "ensemble", "ensemble_gated")
    ]


def _heads(result: Mapping) -> str:
    """The focus's heads less the encoders alone."""
    heads = [
        (name, modality, row["unimodal"])
        for name, rows in result["heads"].items()
        for modality, row in rows.items()
    ]
    mean, error = mean_and_stderr([row["mean"] for _, _, row in heads])
    low = [
        f"{name} {modality} {spread_text(row, 100)}"
        for name, modality, row in heads
        if row["mean"] < 0
    ]
    return (
        f"heads less alone: {100 * mean:+.1f} +- {100 * error:.1f}, level or above {len(heads) - len(low)} of {len(heads)}; below: "
        + ", ".join(low)
    )


def _smallest_p(result: Mapping) -> str:
    tests = sorted(
        (row["p"], name, kind, metric, row["against"])
        for name, kinds in result["bootstrap"].items()
        for kind, found in kinds.items()
        for metric, row in found.items()
    )
    return (
        "smallest p: "
        + "; ".join(
            f"{p:.3f} {name} {kind} {metric} ({against})"
            for p, name, kind, metric, against in tests[:4]
        )
        + f"; {len(tests)} tests"
    )


if __name__ == "__main__":
    comparison = read_json(sys.argv[1])
    print("\n\n".join("\n".join(lines) for lines in [*tables(comparison), figures(comparison)]))

"""The tables of benchmarks/README.md that come from a comparison's CSV.

``python -m benchmarks.tables benchmarks/results/comparison.csv`` prints them. A test holds the page
to the same figures, by value.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean

from iibalance.comparison.results import GROUPS, by_method, group_means, read_table
from iibalance.comparison.statistics import ablation_names, published_names, ranks, summary
from iibalance.comparison.tables import by_rank, pair_text, rank_text, spread_text, table

FOCUS = "iibalance"
NEAREST = ("ensemble_gated", "ensemble")  # the rivals that the page's means set beside the focus
COLD = f"{FOCUS}_no_warm_start"


def rank_table(found: Mapping, methods: Sequence[str]) -> list[str]:
    """Average ranks in accuracy and NLL; the best of a column in bold."""

    def cell(kind: str, method: str) -> str:
        texts = (rank_text(found[kind][metric], method, 1) for metric in ("accuracy", "nll"))
        return " / ".join(texts)

    sets = found[GROUPS[0]]["nll"]
    kinds = [kind for kind in GROUPS if kind in found]
    rows = [
        [f"`{method}`", str(sets[method]["sets"]), *(cell(kind, method) for kind in kinds)]
        for method in methods
    ]
    return table(["average rank, accuracy / NLL", "sets", *kinds], rows)


def mean_table(results: Mapping, methods: Sequence[str]) -> list[str]:
    """Accuracy (%) and NLL, averaged over seeds and then over the sets."""
    kinds = [kind for kind in GROUPS if kind in kinds_of(results)]
    rows = []
    for method in methods:
        accuracy, nll = (means(results, method, metric) for metric in ("accuracy", "nll"))
        cells = (f"{100 * accuracy[kind]:.1f} / {nll[kind]:.3f}" for kind in kinds)
        rows.append([f"`{method}`", *cells])
    return table(["mean over the settings", *kinds], rows)


def means(results: Mapping, method: str, metric: str) -> dict[str, float]:
    """kind of condition -> the metric of a method, averaged over seeds and then over the sets."""
    by_set = [group_means(entries[method], metric) for entries in results.values()]
    return {kind: fmean(fmean(row[kind].values()) for row in by_set) for kind in by_set[0]}


def kinds_of(results: Mapping) -> set[str]:
    """The kinds of conditions that every set has."""
    firsts = (next(iter(entries.values())) for entries in results.values())
    return set.intersection(*(set(group_means(entry, "nll")) for entry in firsts))


def clean_table(results: Mapping, methods: Sequence[str]) -> list[str]:
    """Accuracy (%) with its standard error, and NLL, of every method on every set, clean input."""

    def cell(entry: Mapping | None) -> str:
        if entry is None:
            return "-"
        clean = entry["conditions"]["clean"]
        nll = spread_text(clean["nll"], 1, 3, error=False)
        return f"{spread_text(clean['accuracy'], 100)} / {nll}"

    rows = [
        [f"`{method}`", *(cell(entries.get(method)) for entries in results.values())]
        for method in methods
    ]
    return table(["clean: accuracy / NLL", *results], rows)


def ablation_table(ablations: Mapping) -> list[str]:
    """Each ablation less the focus, averaged over the sets."""
    kinds = [kind for kind in GROUPS if kind in ablations]
    rows = []
    for method in ablations["clean"]["nll"]:
        pairs = ({m: ablations[k][m][method] for m in ("accuracy", "nll")} for k in kinds)
        name = f"`{method.removeprefix(FOCUS)}`"
        rows.append([name, *(pair_text(pair, sign="+") for pair in pairs)])
    return table(["less the whole method, accuracy / NLL", *kinds], rows)


def cold_table(results: Mapping, parts: Mapping[str, str]) -> list[str]:
    """Ranks with the focus less its warm start in the place of the focus."""
    without = {
        name: {
            method: entry
            for method, entry in entries.items()
            if method == COLD or method not in (FOCUS, *parts)
        }
        for name, entries in results.items()
    }
    found = ranks(without)
    kinds = [kind for kind in GROUPS if kind in found]
    pair = lambda kind, method: (found[kind][m][method]["rank"] for m in ("accuracy", "nll"))
    rows = [
        [f"`{method}`", *(" / ".join(f"{x:.1f}" for x in pair(kind, method)) for kind in kinds)]
        for method in (COLD, "ensemble")
    ]
    return table(["rank without the warm start", *kinds], rows)


def head_table(results: Mapping) -> list[str]:
    """Accuracy of the focus's heads and of the encoders alone."""
    rows = []
    for name, entries in results.items():
        ours, alone = (entries[method]["heads"] for method in (FOCUS, "unimodal"))
        pairs = {m: (ours[m]["accuracy"], alone[m]["accuracy"]) for m in ours}
        text = (f"{m} {', '.join(spread_text(x, 100) for x in p)}" for m, p in pairs.items())
        rows.append([name, "; ".join(text)])
    return table(["set", f"head: {FOCUS}, alone"], rows)


def tables(path: str) -> list[list[str]]:
    """All that the comparison in this CSV has figures for, each a list of lines."""
    results = by_method(read_table(path))
    methods = dict.fromkeys(method for entries in results.values() for method in entries)
    known = published_names(methods)  # the CSV has labels, not classes
    everywhere = set.intersection(*(set(entries) for entries in results.values()))
    found, parts = summary(results, FOCUS, known), ablation_names(known)
    ordered = by_rank(found["ranks"])
    shown = [method for method in (FOCUS, *NEAREST) if method in everywhere]
    drawn = [rank_table(found["ranks"], ordered), mean_table(results, shown)]
    drawn.append(clean_table(results, ordered))
    if found["ablations"]:
        drawn.append(ablation_table(found["ablations"]))
    if {FOCUS, "unimodal"} <= everywhere:
        drawn.append(head_table(results))
    if {COLD, "ensemble"} <= everywhere:
        drawn.append(cold_table(results, parts))
    return drawn


if __name__ == "__main__":
    print("\n\n".join("\n".join(lines) for lines in tables(sys.argv[1])))

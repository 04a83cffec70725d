"""README's tables of a comparison: ``python -m benchmarks.tables benchmarks/results/comparison.json``. A test holds README to them."""
from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

from iibalance.comparison import GROUPS, group_means, ranks, spread_text
from iibalance.runs import read_json

TIMED = ("concat", "qmf", "ensemble", "iibalance")
STARRED = 0.05


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(header), "|" + "---|" * len(header), *map(_row, rows)]


def rank_table(result: Mapping, methods: Sequence[str]) -> list[str]:
    """Average ranks in accuracy and NLL; the best of a column in bold."""
    def cell(kind: str, method: str) -> str:
        both = []
        for metric in ("accuracy", "nll"):
            rows = result["ranks"][kind][metric]
            text = f"{rows[method]['rank']:.1f}"
            both.append(f"**{text}**" if rows[method]["rank"] == min(row["rank"] for row in rows.values()) else text)
        return " / ".join(both)

    rows = [[f"`{method}`", str(result["ranks"][GROUPS[0]]["nll"][method]["sets"]), *(cell(kind, method) for kind in GROUPS)] for method in methods]
    return _table(["average rank, accuracy / NLL", "sets", *GROUPS], rows)


def clean_table(result: Mapping, methods: Sequence[str]) -> list[str]:
    """Accuracy (%) and NLL of every method on every set, clean input."""
    def cell(entry: Mapping | None) -> str:
        return "-" if entry is None else f"{spread_text(entry['conditions']['clean']['accuracy'], 100)} / {entry['conditions']['clean']['nll']['mean']:.3f}"

    rows = [[f"`{method}`", *(cell(entries.get(method)) for entries in result["results"].values())] for method in methods]
    return _table(["clean: accuracy / NLL", *result["results"]], rows)


def bootstrap_table(result: Mapping) -> list[str]:
    """The focus less the best other method of each set and kind of condition; * where p < 0.05."""
    def cell(found: Mapping) -> str:
        scaled = {"accuracy": f"{100 * found['accuracy']['difference']:+.1f}", "nll": f"{found['nll']['difference']:+.3f}"}
        return "; ".join(f"{text}{'*' if found[metric]['p'] < STARRED else ''} ({found[metric]['against']})" for metric, text in scaled.items())

    return _table(["against the best other: accuracy; NLL", *GROUPS], [[name, *(cell(kinds[kind]) for kind in GROUPS)] for name, kinds in result["bootstrap"].items()])


def ablation_table(result: Mapping) -> list[str]:
    """Each ablation less the focus, averaged over the sets."""
    def cell(kind: str, method: str) -> str:
        accuracy, nll = (result["ablations"][kind][metric][method] for metric in ("accuracy", "nll"))
        return f"{spread_text(accuracy, 100, sign='+')} / {spread_text(nll, 1, 3, sign='+')}"

    rows = [[f"`{method.removeprefix(result['focus'])}`", *(cell(kind, method) for kind in GROUPS)] for method in result["ablations"]["clean"]["nll"]]
    return _table(["less the whole method, accuracy / NLL", *GROUPS], rows)


def head_table(result: Mapping) -> list[str]:
    """Accuracy of the focus's heads and of the encoders alone."""
    rows = []
    for name, entries in result["results"].items():
        ours, alone = (entries[method]["heads"] for method in (result["focus"], "unimodal"))
        rows.append([name, "; ".join(f"{modality} {spread_text(ours[modality]['accuracy'], 100)}, {spread_text(alone[modality]['accuracy'], 100)}" for modality in ours)])
    return _table(["set", f"head: {result['focus']}, alone"], rows)


def step_table(result: Mapping) -> list[str]:
    """Milliseconds of a training step, and the focus's over concat's."""
    spread = lambda method, name: result["results"][name][method]["seconds_a_step"]
    rows = [[f"`{method}`", *(spread_text(spread(method, name), 1000) for name in result["results"])] for method in TIMED]
    median = lambda method, name: statistics.median(spread(method, name)["values"].values())
    ratio = [f"{median(result['focus'], name) / median('concat', name):.2f}" for name in result["results"]]
    return _table(["step, ms", *result["results"]], [*rows, [f"`{result['focus']}` / `concat`, medians", *ratio]])


def tables(result: Mapping) -> list[list[str]]:
    """All of them, each a list of lines."""
    places = lambda method: sum(result["ranks"][kind][metric][method]["rank"] for kind in GROUPS for metric in ("accuracy", "nll"))
    methods = sorted(result["ranks"]["clean"]["nll"], key=places)
    found = [rank_table(result, methods), clean_table(result, methods), bootstrap_table(result), ablation_table(result), head_table(result)]
    return [*found, step_table(result)] if all(result["results"][name][method]["seconds_a_step"] for name in result["results"] for method in TIMED) else found


def figures(result: Mapping) -> list[str]:
    """What README's sentences say: degraded input taken together, ranks without the warm start, heads over alone, smallest p."""
    ablations, focus, lines = result["ablations"]["clean"]["nll"], result["focus"], []
    ranked = {name: {method: entry for method, entry in entries.items() if method not in ablations} for name, entries in result["results"].items()}
    together = {name: {method: {"conditions": {"noise": {metric: {"values": _together(entry, metric)} for metric in ("accuracy", "nll")}}} for method, entry in entries.items()}
                for name, entries in ranked.items()}
    table = ranks(together)["noise"]
    order = sorted(table["nll"], key=lambda method: table["nll"][method]["rank"] + table["accuracy"][method]["rank"])
    lines += ["missing and noisy input together: " + ", ".join(f"{method} {table['accuracy'][method]['rank']:.1f} / {table['nll'][method]['rank']:.1f}" for method in order[:3])]
    less = f"{focus}_no_warm_start"
    if less in ablations:
        swapped = ranks({name: {method: entries[less if method == focus else method] for method in ranked[name]} for name, entries in result["results"].items()})
        for method in (focus, "ensemble"):
            lines.append(f"without the warm start, {method}: " + ", ".join(f"{swapped[kind]['accuracy'][method]['rank']:.1f} / {swapped[kind]['nll'][method]['rank']:.1f} {kind}" for kind in GROUPS))
    for method in (focus, "ensemble", "ensemble_gated"):
        means = {kind: [[statistics.mean(group_means(entries[method], metric)[kind].values()) for entries in result["results"].values()] for metric in ("accuracy", "nll")] for kind in GROUPS}
        lines.append(f"mean of {method}: " + ", ".join(f"{100 * statistics.mean(accuracy):.1f} / {statistics.mean(nll):.3f} {kind}" for kind, (accuracy, nll) in means.items()))
    heads = [(name, modality, row["unimodal"]) for name, rows in result["heads"].items() for modality, row in rows.items()]
    means = [row["mean"] for _, _, row in heads]
    lines.append(f"heads less alone: {100 * statistics.mean(means):+.1f} +- {100 * statistics.stdev(means) / len(means) ** 0.5:.1f}, level or above {sum(mean >= 0 for mean in means)} of {len(means)}; below: "
                 + ", ".join(f"{name} {modality} {spread_text(row, 100)}" for name, modality, row in heads if row["mean"] < 0))
    tests = sorted((row["p"], name, kind, metric, row["against"]) for name, kinds in result["bootstrap"].items() for kind, found in kinds.items() for metric, row in found.items())
    return [*lines, "smallest p: " + "; ".join(f"{p:.3f} {name} {kind} {metric} ({against})" for p, name, kind, metric, against in tests[:4]) + f"; {len(tests)} tests"]


def _together(entry: Mapping, metric: str) -> dict[str, float]:
    """seed -> the metric, averaged over all conditions with a modality missing or noisy."""
    rows = [row[metric]["values"] for condition, row in entry["conditions"].items() if condition.endswith((" missing", " noise"))]
    return {seed: statistics.mean(row[seed] for row in rows) for seed in rows[0]}


if __name__ == "__main__":
    comparison = read_json(sys.argv[1])
    print("\n\n".join("\n".join(lines) for lines in [*tables(comparison), figures(comparison)]))

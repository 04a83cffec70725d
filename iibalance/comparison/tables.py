"""A comparison's page, ``comparison.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from iibalance.comparison.results import GROUPS
from iibalance.comparison.split_tables import origin, split_sections, split_settings
from iibalance.comparison.statistics import best_trial
from iibalance.comparison.table_text import (
    PAIR,
    by_rank,
    pair_text,
    rank_text,
    spread_text,
    table,
)

_NOT_OWN = ("learning_rate", "weight_decay", "validation_nll", "validation_accuracy", "seeds")


def page(result: Mapping) -> str:
    """What :func:`iibalance.comparison.protocol.compare` returns, as Markdown."""
    parts = [
        ["# Comparison"],
        *_origin(result),
        _ranks(result),
        *split_sections(result),
        _ablations(result),
        _bootstrap(result),
        _heads(result),
        *(_data_set(result, name) for name in result["results"]),
        _failed(result),
        _settings(result),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _origin(result: Mapping) -> Iterable[list[str]]:
    """When, where, how and by what: the first start, and each with which it was gone on."""
    for about in (result.get("machine") or {}).get("starts", []):
        found = about["versions"].items()
        packages = ", ".join(f"{name} {number}" for name, number in found if number)
        yield [
            f"{about['date']}, {about['machine']}, {about['cores']} cores, "
            f"Python {about['python']}, {packages}."
        ]
        yield [f"Command: `{' '.join(about['command'])}`"]
    made = [f"{count} cells by {by}" for by, count in result.get("made_by", {}).items()]
    if len(made) > 1:
        yield [f"Not all of one version: {'; '.join(made)}."]
    if result.get("splits"):
        yield from origin(result)
        return
    low, seeds, tuning = (result[key] for key in ("low_data_seeds", "seeds", "tuning_seeds"))
    aside = "" if low in (0, seeds) else f" (low data: {_count(low)})"
    chosen = "seed 0" if tuning == 1 else f"seeds 0 to {tuning - 1}"
    yield [
        f"{_count(seeds)}{aside}; mean +- standard error over seeds. Accuracy and F1 in %, NLL in "
        f"nats. Settings were chosen by validation NLL with {chosen}, the same number of trials "
        "for every method; methods whose encoders are trained separately chose them for each "
        "modality by itself. The test split was used once, at the end. Seconds are of processor "
        "time, of all trainings that one model needs."
    ]


def _count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _ranks(result: Mapping) -> list[str]:
    ranks = result["ranks"]
    columns = [(kind, metric) for kind in GROUPS if kind in ranks for metric in PAIR]
    names = {"accuracy": "accuracy", "nll": "NLL"}
    rows = []
    for method in by_rank(ranks):
        found = [ranks[kind][metric] for kind, metric in columns]
        count = max(row[method]["sets"] for row in found if method in row)
        rows.append([method, str(count), *(rank_text(row, method, 2) for row in found)])
    split = bool(result.get("splits"))
    what, over = ("blocks", "data sets and splits") if split else ("sets", "data sets")
    header = ["method", what, *(f"{kind}: {names[metric]}" for kind, metric in columns)]
    return [f"## Average rank over {over}", "", *table(header, rows)]


def _ablations(result: Mapping) -> list[str]:
    found, focus = result["ablations"], result["focus"]
    kinds = [kind for kind in GROUPS if kind in found]
    if not kinds:
        return []
    methods = dict.fromkeys(method for kind in kinds for method in found[kind]["nll"])
    rows = [
        [
            method,
            *(
                pair_text({metric: found[kind][metric].get(method) for metric in PAIR}, sign="+")
                for kind in kinds
            ),
        ]
        for method in methods
    ]
    return [
        f"## Ablations of {focus}",
        "",
        f"Each less {focus}, averaged over the data sets: accuracy in points (below 0: the piece "
        "helps) / NLL in nats (above 0: it helps).",
        "",
        *table(["", *kinds], rows),
    ]


def _bootstrap(result: Mapping) -> list[str]:
    rows = []
    if "bootstrap" not in result:
        return []
    for name, kinds in result["bootstrap"].items():
        for kind, found in kinds.items():
            cells = [name, kind]
            for metric, scale, digits in (("accuracy", 100, 1), ("nll", 1, 3)):
                row = found.get(metric)
                if row is None:
                    cells += ["-", "-", "-"]
                    continue
                numbers = [
                    f"{scale * row[key]:+.{digits}f}" for key in ("difference", "low", "high")
                ]
                interval = f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
                cells += [row["against"], interval, f"{row['p']:.3f}"]
            rows.append(cells)
    header = ["data", "condition", "accuracy: against", "difference", "p"]
    header += ["NLL: against", "difference", "p"]
    return [
        f"## {result['focus']} against the best other method",
        "",
        "Paired bootstrap over seeds and test samples: difference, 95 % interval, p. Accuracy in "
        "points (more is better), NLL in nats (less is better).",
        "",
        *table(header, rows),
    ]


def _heads(result: Mapping) -> list[str]:
    """The focus's heads beside encoders trained alone, and how many of them are below."""
    rows = [
        (name, modality, row)
        for name, by_modality in result["heads"].items()
        for modality, row in by_modality.items()
    ]
    methods = list(dict.fromkeys(method for _, _, row in rows for method in row))
    if not methods:
        return []
    counts = []
    for method in methods:
        found = [row[method] for _, _, row in rows if method in row]
        low = [row for row in found if row["mean"] < 0]
        far = sum(row["error"] is not None and row["mean"] < -2 * row["error"] for row in low)
        counts.append(f"{len(found) - len(low)} of {len(found)}, {far}")
    lines = [
        [name, modality, *(spread_text(row.get(method), 100, sign="+") for method in methods)]
        for name, modality, row in rows
    ]
    last = ["level or above; below by more than two standard errors", "", *counts]
    return [
        f"## {result['focus']}'s heads against encoders trained alone",
        "",
        "Accuracy of each modality's own prediction on clean input less that of the same encoder "
        "trained alone, in points, as each method that trains them so was tuned; paired by seed.",
        "",
        *table(["data", "modality", *methods], [*lines, last]),
    ]


def _data_set(result: Mapping, name: str) -> list[str]:
    methods, modalities = result["results"][name], result["modalities"][name]
    seconds = result["train_seconds"].get(name, {})
    header = ["method", "accuracy", "macro-F1", "NLL", "ECE"]
    for modality in modalities:
        header += [f"{modality}: accuracy", "utilisation"]
    rows = []
    for method, entry in methods.items():
        clean = entry["conditions"].get("clean")
        if clean is None:
            continue
        cells = [method, *(spread_text(clean[key], 100) for key in ("accuracy", "macro_f1"))]
        cells += [spread_text(clean[key], 1, 3) for key in ("nll", "ece")]
        for modality in modalities:
            head = entry["heads"].get(modality) or {}
            cells.append(spread_text(head.get("accuracy"), 100))
            cells.append(spread_text(head.get("utilisation"), 1, 3))
        cells.append(f"{seconds[method]:.1f}" if method in seconds else "-")
        rows.append([*cells, spread_text(entry.get("seconds_a_step"), 1000)])
    lines = [f"## {name}", ""]
    if name in result.get("samples", {}):
        samples = " / ".join(str(count) for count in result["samples"][name].values())
        lines += [f"{samples} samples, {result['epochs'][name]} epochs.", ""]
    lines += table([*header, "training, s", "ms a step"], rows)
    first = next(iter(methods.values()))["conditions"]
    degraded = [condition for condition in first if condition != "clean"]
    if degraded:
        rows = [
            [method, *(pair_text(entry["conditions"].get(key), 2) for key in degraded)]
            for method, entry in methods.items()
        ]
        lines += ["", "Accuracy / NLL:", "", *table(["method", *degraded], rows)]
    return lines


def _failed(result: Mapping) -> list[str]:
    failures = [f"- {key}: {text}" for key, text in result["failures"].items()]
    return ["## Failed", "", *failures] if failures else []


def _settings(result: Mapping) -> list[str]:
    if "trials" not in result:
        return []
    if result.get("splits"):
        return split_settings(result["trials"])
    rows = []
    for row in result["trials"]:
        tried = row["tried"]
        best = tried[best_trial(tried)]
        own = [f"{key} = {value:g}" for key, value in best.items() if key not in _NOT_OWN]
        losses = ", ".join(f"{trial['validation_nll']:.3f}" for trial in tried.values())
        rows.append(
            [
                row["data"],
                row["method"],
                _by_modality(row["setting"], "learning_rate"),
                _by_modality(row["setting"], "weight_decay"),
                ", ".join(own) or "-",
                f"{best['validation_nll']:.3f}; {losses}",
            ]
        )
    header = ["data", "method", "learning rate", "weight decay", "own"]
    return [
        "## Chosen settings",
        "",
        *table([*header, "validation NLL: chosen, all"], rows),
    ]


def _by_modality(setting: Mapping, option: str) -> str:
    """A chosen value, or each modality's own."""
    own = setting.get(f"{option}s")
    if own is None:
        return f"{setting[option]:.2g}"
    return ", ".join(f"{name} {value:.2g}" for name, value in own.items())

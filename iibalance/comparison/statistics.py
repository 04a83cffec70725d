"""What a comparison found: means and standard errors, paired bootstrap, ranks; as JSON, Markdown and a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from iibalance.comparison.cells import CLEAN, REFERENCE, Cell, cell_files
from iibalance.config import CompareConfig
from iibalance.data.dataset import MultimodalData
from iibalance.files import read_json, write_bytes, write_json, write_text
from iibalance.methods import ablation_of, method_class
from iibalance.metrics import mean_and_stderr
from iibalance.training.report import DPI, GREY, INK, MARKERS, PALETTE, STYLE

METRICS = ("accuracy", "macro_f1", "nll", "ece")
LOW = "low data"
TIE = 1e-9  # means no further apart are equal: the same numbers, added in another order
GROUPS = (
    "clean",
    "missing",
    "noise",
    LOW,
)  # conditions of one kind are averaged over the modalities for ranks


def summarise(
    folder: Path,
    config: CompareConfig,
    sets: Mapping[str, MultimodalData],
    cells: Sequence[Cell],
    settings: Mapping,
    searched: Mapping,
    seconds: Mapping,
    failures: Mapping[str, str],
) -> dict:
    """Everything that ``comparison.json`` holds, from the cells' files.

    ``results`` has, for each data set and method, ``conditions`` -> metric -> mean, standard error and values by seed, ``heads`` (each modality's accuracy on clean
    input, and ``utilisation``: over that of the same encoder trained alone with the same seed), the chosen setting and the step's seconds. ``ranks``: average rank over data sets
    by kind of condition, accuracy and NLL, of all methods but the ablations of one of them; ``ablations`` sets the focus's beside it. ``heads``: what the focus's heads have over encoders
    trained alone, those of every method that trains them so. ``bootstrap``: the focus against the best of the others on each data set and kind. ``made_by``: how many of the tested
    cells each version of this code (a digest of its source) and of its libraries made.
    """
    focus, parts = focus_name(config), ablation_names(dict.fromkeys(cell.method for cell in cells))
    results: dict = {}
    made: dict[str, int] = {}
    for cell in cells:
        numbers, predictions = cell_files(folder, cell)
        if not numbers.exists():
            continue
        found = read_json(numbers)
        name = method_class(cell.method).name
        by = ", ".join(
            [
                f"code {found.get('code', 'not recorded')}",
                *(
                    f"{package} {number}"
                    for package, number in found.get("versions", {}).items()
                    if number
                ),
            ]
        )
        made[by] = made.get(by, 0) + 1
        entry = results.setdefault(cell.data, {}).setdefault(
            name,
            {
                "trial": cell.trial,
                "setting": found["setting"],
                "conditions": {},
                "heads": {},
                "seeds": [],
            },
        )
        for condition, metrics in found["test"].items():
            condition = LOW if cell.kind == "low" else condition
            row = entry["conditions"].setdefault(condition, {metric: {} for metric in METRICS})
            for metric in METRICS:
                row[metric][cell.seed] = metrics[metric]
            if condition == CLEAN:
                entry["seeds"].append(cell.seed)
                for modality, own in metrics["modalities"].items():
                    entry["heads"].setdefault(modality, {})[cell.seed] = (
                        None if own is None else own["accuracy"]
                    )
    for name, methods in results.items():
        alone = {
            modality: dict(values)
            for modality, values in methods.get(REFERENCE, {}).get("heads", {}).items()
        }
        timed = {
            method_class(method).name: times for method, times in seconds.get(name, {}).items()
        }
        for method, entry in methods.items():
            entry["conditions"] = {
                condition: {metric: _spread(values) for metric, values in row.items()}
                for condition, row in entry["conditions"].items()
            }
            heads = {}
            for modality, values in entry["heads"].items():
                shares = {
                    seed: value / alone[modality][seed]
                    for seed, value in values.items()
                    if value is not None and alone.get(modality, {}).get(seed)
                }
                heads[modality] = {"accuracy": _spread(values), "utilisation": _spread(shares)}
            entry["heads"] = heads
            times = timed.get(method, [])
            entry["seconds_a_step"] = _spread(dict(enumerate(times)))
    return {
        "focus": focus,
        "seeds": config.seeds,
        "low_data_seeds": len({cell.seed for cell in cells if cell.kind == "low"}),
        "tuning_seeds": config.tuning_seeds,
        "epochs": {name: data.epochs or config.epochs for name, data in config.data.items()},
        "trials": [
            {"data": data, "method": method_class(method).name, "tried": rows}
            for (data, method), rows in searched.items()
        ],
        "samples": {
            name: {
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
            }
            for name, data in sets.items()
        },
        "modalities": {name: list(data.modalities) for name, data in sets.items()},
        "results": results,
        "ranks": ranks(
            {
                name: {method: entry for method, entry in methods.items() if method not in parts}
                for name, methods in results.items()
            }
        ),
        "ablations": ablations(
            results, focus, [method for method, whole in parts.items() if whole == focus]
        ),
        "heads": heads_over_alone(
            results,
            focus,
            list(
                dict.fromkeys(
                    method_class(cell.method).name
                    for cell in cells
                    if not method_class(cell.method).joint
                )
            ),
        ),
        "bootstrap": {
            name: {
                kind: found
                for kind in GROUPS
                if (found := _bootstrap(folder, config, cells, results, name, kind, parts))
            }
            for name in results
        },
        "made_by": made,
        "failures": dict(failures),
    }


def group_means(entry: Mapping, metric: str) -> dict[str, dict[int, float]]:
    """kind of condition -> seed -> the metric, averaged over the conditions of that kind (one a modality)."""
    found: dict[str, list] = {}
    for condition, row in entry["conditions"].items():
        kind = condition if condition in GROUPS else condition.rsplit(" ", 1)[1]
        found.setdefault(kind, []).append(row[metric]["values"])
    return {
        kind: {
            seed: sum(row[seed] for row in rows) / len(rows)
            for seed in set.intersection(*(set(row) for row in rows))
        }
        for kind, rows in found.items()
    }


def best_trial(tried: Mapping) -> int | str:
    """The key of the trial that wins: the lowest mean validation NLL among those that most tuning seeds finished."""
    return min(tried, key=lambda trial: (-tried[trial]["seeds"], tried[trial]["validation_nll"]))


def ranks(results: Mapping) -> dict:
    """kind -> metric -> method -> {"rank": average over the data sets that have it, "sets": how many}; 1 is best, ties share their mean rank."""
    table: dict = {}
    for methods in results.values():
        for metric, sign in (("accuracy", -1), ("nll", 1)):
            means = {method: group_means(entry, metric) for method, entry in methods.items()}
            for kind in GROUPS:
                values = {
                    method: sign * sum(row[kind].values()) / len(row[kind])
                    for method, row in means.items()
                    if row.get(kind)
                }
                for method, value in values.items():
                    better = sum(other < value - TIE for other in values.values())
                    equal = sum(abs(other - value) <= TIE for other in values.values())
                    table.setdefault(kind, {}).setdefault(metric, {}).setdefault(method, []).append(
                        better + (equal + 1) / 2
                    )
    return {
        kind: {
            metric: {
                method: {"rank": sum(places) / len(places), "sets": len(places)}
                for method, places in sorted(
                    rows.items(), key=lambda item: sum(item[1]) / len(item[1])
                )
            }
            for metric, rows in by_metric.items()
        }
        for kind, by_metric in table.items()
    }


def ablations(results: Mapping, focus: str, names: Sequence[str]) -> dict:
    """kind -> metric -> ablation -> spread over seeds of (ablation - focus), averaged over the data sets: below 0 in accuracy and above 0 in NLL, the piece helps."""
    table: dict = {}
    for method in names:
        for metric in METRICS:
            by_seed: dict[str, dict[int, list[float]]] = {}
            for methods in results.values():
                if focus in methods and method in methods:
                    ours, theirs = (group_means(methods[name], metric) for name in (focus, method))
                    for kind in ours.keys() & theirs.keys():
                        for seed in ours[kind].keys() & theirs[kind].keys():
                            by_seed.setdefault(kind, {}).setdefault(seed, []).append(
                                theirs[kind][seed] - ours[kind][seed]
                            )
            for kind, found in by_seed.items():
                full = max(map(len, found.values()))  # seeds that have every set
                table.setdefault(kind, {}).setdefault(metric, {})[method] = _spread(
                    {
                        seed: sum(values) / full
                        for seed, values in found.items()
                        if len(values) == full
                    }
                )
    return table


def heads_over_alone(results: Mapping, focus: str, separate: Sequence[str]) -> dict:
    """data set -> modality -> method of encoders trained alone -> spread over seeds of (accuracy of the focus's head - that of the encoder alone), on clean input."""
    table: dict = {}
    for name, methods in results.items():
        for modality, ours in methods.get(focus, {}).get("heads", {}).items():
            for method in separate:
                theirs = methods.get(method, {}).get("heads", {}).get(modality)
                if (
                    ours["accuracy"] is None
                    or theirs is None
                    or theirs["accuracy"] is None
                    or method == focus
                ):
                    continue
                ours_by_seed, by_seed = ours["accuracy"]["values"], theirs["accuracy"]["values"]
                spread = _spread(
                    {
                        seed: value - by_seed[seed]
                        for seed, value in ours_by_seed.items()
                        if seed in by_seed
                    }
                )
                if spread is not None:
                    table.setdefault(name, {}).setdefault(modality, {})[method] = spread
    return table


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int = 0
) -> dict[str, float]:
    """Mean difference of two methods' values [seeds, samples] with its 95 % interval and two-sided p, resampling seeds and test samples with replacement,
    the same ones for both methods.

    >>> paired_bootstrap(np.ones((3, 50)), np.zeros((3, 50)), resamples=200)
    {'difference': 1.0, 'low': 1.0, 'high': 1.0, 'p': 0.00995...}
    """
    generator = np.random.default_rng(seed)
    difference = first - second
    seeds, samples = difference.shape
    means = np.empty(resamples)
    for index in range(resamples):
        rows = difference[generator.integers(seeds, size=seeds)]
        means[index] = rows[:, generator.integers(samples, size=samples)].mean()
    below, above = (means <= 0).sum(), (means >= 0).sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))),
    }


def _bootstrap(
    folder: Path,
    config: CompareConfig,
    cells: Sequence[Cell],
    results: Mapping,
    name: str,
    kind: str,
    parts: Mapping[str, str],
) -> dict:
    """The focus against the best other method by mean accuracy, and by mean NLL; ``parts`` are no others (see :func:`ablation_names`)."""
    methods, focus = results[name], focus_name(config)
    if focus not in methods:
        return {}
    found = {}
    for metric, sign in (("accuracy", -1), ("nll", 1)):
        means = {
            method: group_means(entry, metric).get(kind)
            for method, entry in methods.items()
            if method == focus or method not in parts
        }
        means = {
            method: sign * sum(row.values()) / len(row) for method, row in means.items() if row
        }
        others = {method: value for method, value in means.items() if method != focus}
        if focus not in means or not others:
            continue
        best = min(others, key=others.get)
        ours, theirs = (
            _samples(folder, cells, name, method, kind, metric) for method in (focus, best)
        )
        seeds = sorted(set(ours) & set(theirs))
        if seeds:
            found[metric] = {
                "against": best,
                **paired_bootstrap(
                    np.stack([ours[seed] for seed in seeds]),
                    np.stack([theirs[seed] for seed in seeds]),
                    resamples=config.bootstrap,
                ),
            }
    return found


def focus_name(config: CompareConfig) -> str:
    """The focus as it is called in the results."""
    return method_class(config.focus).name if ":" in config.focus else config.focus


def ablation_names(methods: Iterable[str]) -> dict[str, str]:
    """Ablation -> the method that it lacks a piece of, for those of ``methods`` whose whole is one of them too.

    >>> ablation_names(["iibalance", "iibalance_no_gate", "ensemble", "ensemble_gated"])
    {'iibalance_no_gate': 'iibalance'}
    """
    kinds = list(map(method_class, methods))
    names = {kind.name for kind in kinds}
    return {kind.name: ablation_of(kind) for kind in kinds if ablation_of(kind) in names}


def _samples(
    folder: Path, cells: Sequence[Cell], name: str, method: str, kind: str, metric: str
) -> dict[int, np.ndarray]:
    """seed -> per-sample values [N], averaged over the conditions of a kind."""
    found = {}
    for cell in cells:
        if (
            cell.data != name
            or method_class(cell.method).name != method
            or (cell.kind == "low") != (kind == LOW)
        ):
            continue
        numbers, path = cell_files(folder, cell)
        if not (numbers.exists() and path.exists()):
            continue
        with np.load(path, allow_pickle=False) as arrays:
            targets = arrays["targets"]
            names = (
                [CLEAN]
                if kind in (CLEAN, LOW)
                else [key for key in arrays.files if key.endswith(f" {kind}")]
            )
            values = []
            for key in names:
                log_p = arrays[key].astype(np.float64)
                values.append(
                    log_p.argmax(1) == targets
                    if metric == "accuracy"
                    else -log_p[np.arange(len(targets)), targets]
                )
        if values:
            found[cell.seed] = np.mean(values, axis=0)
    return found


def _spread(values: Mapping[int, float | None]) -> dict | None:
    values = {seed: value for seed, value in sorted(values.items()) if value is not None}
    if not values:
        return None
    mean, error = mean_and_stderr(list(values.values()))
    return {"mean": mean, "error": None if math.isnan(error) else error, "values": values}


def write_comparison(folder: Path, result: dict) -> None:
    """Write ``comparison.json``, ``comparison.md`` and ``comparison.png`` into ``folder``, each whole or not at all."""
    write_json(folder / "comparison.json", result)
    write_text(folder / "comparison.md", markdown(result))
    image = io.BytesIO()
    figure = picture(result)
    FigureCanvasAgg(figure)
    figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(folder / "comparison.png", image.getvalue())


def markdown(result: Mapping) -> str:
    """The tables: ranks, the focus against the best other method, and every data set."""
    focus, lines = result["focus"], ["# Comparison", ""]
    for about in (result.get("machine") or {}).get(
        "starts", []
    ):  # the first, and each by which the comparison was gone on with
        packages = ", ".join(
            f"{name} {number}" for name, number in about["versions"].items() if number
        )
        lines += [
            f"{about['date']}, {about['machine']}, {about['cores']} cores, Python {about['python']}, {packages}.",
            "",
            f"Command: `{' '.join(about['command'])}`",
            "",
        ]
    low = (
        f" (low data: {_count(result['low_data_seeds'])})"
        if result["low_data_seeds"] not in (0, result["seeds"])
        else ""
    )
    lines += [
        f"{_count(result['seeds'])}{low}; mean +- standard error over seeds. Accuracy and F1 in %, NLL in nats. Settings were chosen by validation NLL with {_seeds(result['tuning_seeds'])}, the same number of trials "
        "for every method; the test split was used once, at the end.",
        "",
    ]
    kinds = [kind for kind in GROUPS if kind in result["ranks"]]
    if len(result["made_by"]) > 1:
        lines += [
            "Not all of one version: "
            + "; ".join(f"{count} cells by {by}" for by, count in result["made_by"].items())
            + ".",
            "",
        ]
    lines += [
        "## Average rank over data sets",
        "",
        "| method | sets | "
        + " | ".join(f"{kind}: accuracy | {kind}: NLL" for kind in kinds)
        + " |",
        "|---|---|" + "---|---|" * len(kinds),
    ]
    for method in by_rank(result["ranks"]):
        cells, count = [], 0
        for kind in kinds:
            for metric in ("accuracy", "nll"):
                rows = result["ranks"][kind][metric]
                count = max(count, rows[method]["sets"] if method in rows else 0)
                cells.append(rank_text(rows, method, 2))
        lines.append(f"| {method} | {count} | " + " | ".join(cells) + " |")
    if result["ablations"]:
        kinds = [kind for kind in GROUPS if kind in result["ablations"]]
        lines += [
            "",
            f"## Ablations of {focus}",
            "",
            f"Each less {focus}, averaged over the data sets: accuracy in points (below 0: the piece helps) / NLL in nats (above 0: it helps).",
            "",
            "| | " + " | ".join(kinds) + " |",
            "|---|" + "---|" * len(kinds),
        ]
        for method in dict.fromkeys(
            method for kind in kinds for method in result["ablations"][kind]["nll"]
        ):
            rows = [
                [result["ablations"][kind][metric].get(method) for metric in ("accuracy", "nll")]
                for kind in kinds
            ]
            lines.append(
                f"| {method} | "
                + " | ".join(
                    f"{spread_text(accuracy, 100, sign='+')} / {spread_text(nll, 1, 3, sign='+')}"
                    for accuracy, nll in rows
                )
                + " |"
            )
    lines += [
        "",
        f"## {focus} against the best other method",
        "",
        "Paired bootstrap over seeds and test samples: difference, 95 % interval, p. Accuracy in points (more is better), NLL in nats (less is better).",
        "",
        "| data | condition | accuracy: against | difference | p | NLL: against | difference | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, by_kind in result["bootstrap"].items():
        for kind, found in by_kind.items():
            cells = []
            for metric, scale, digits in (("accuracy", 100, 1), ("nll", 1, 3)):
                row = found.get(metric)
                cells += (
                    ["-", "-", "-"]
                    if row is None
                    else [
                        row["against"],
                        f"{scale * row['difference']:+.{digits}f} [{scale * row['low']:+.{digits}f}, {scale * row['high']:+.{digits}f}]",
                        f"{row['p']:.3f}",
                    ]
                )
            lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
    lines += _heads_table(result)
    for name, methods in result["results"].items():
        samples, modalities = result["samples"][name], result["modalities"][name]
        lines += [
            "",
            f"## {name}",
            "",
            f"{samples['train']} / {samples['validation']} / {samples['test']} samples, {result['epochs'][name]} epochs.",
            "",
            "| method | accuracy | macro-F1 | NLL | ECE | "
            + " | ".join(f"{modality}: accuracy | utilisation" for modality in modalities)
            + " | ms a step |",
            "|---|---|---|---|---|" + "---|---|" * len(modalities) + "---|",
        ]
        for method, entry in methods.items():
            clean = entry["conditions"].get("clean")
            if clean is None:
                continue
            cells = [
                spread_text(clean["accuracy"], 100),
                spread_text(clean["macro_f1"], 100),
                spread_text(clean["nll"], 1, 3),
                spread_text(clean["ece"], 1, 3),
            ]
            for modality in modalities:
                head = entry["heads"].get(modality) or {}
                cells += [
                    spread_text(head.get("accuracy"), 100),
                    spread_text(head.get("utilisation"), 1, 3),
                ]
            lines.append(
                f"| {method} | "
                + " | ".join([*cells, spread_text(entry["seconds_a_step"], 1000)])
                + " |"
            )
        conditions = [
            condition
            for condition in next(iter(methods.values()))["conditions"]
            if condition != "clean"
        ]
        if conditions:
            lines += [
                "",
                "Accuracy / NLL:",
                "",
                "| method | " + " | ".join(conditions) + " |",
                "|---|" + "---|" * len(conditions),
            ]
            for method, entry in methods.items():
                rows = [entry["conditions"].get(condition) for condition in conditions]
                lines.append(
                    f"| {method} | "
                    + " | ".join(
                        "-"
                        if row is None
                        else f"{spread_text(row['accuracy'], 100)} / {spread_text(row['nll'], 1, 2)}"
                        for row in rows
                    )
                    + " |"
                )
    if result["failures"]:
        lines += [
            "",
            "## Failed",
            "",
            *(f"- {key}: {text}" for key, text in result["failures"].items()),
        ]
    lines += [
        "",
        "## Chosen settings",
        "",
        "| data | method | learning rate | weight decay | own | validation NLL: chosen, all |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["trials"]:
        rows = row["tried"]
        best = rows[best_trial(rows)]
        own = ", ".join(
            f"{key} = {value:g}"
            for key, value in best.items()
            if key
            not in (
                "learning_rate",
                "weight_decay",
                "validation_nll",
                "validation_accuracy",
                "seeds",
            )
        )
        lines.append(
            f"| {row['data']} | {row['method']} | {best['learning_rate']:.2g} | {best['weight_decay']:.2g} | {own or '-'} | {best['validation_nll']:.3f}; "
            + ", ".join(f"{tried['validation_nll']:.3f}" for tried in rows.values())
            + " |"
        )
    return "\n".join(lines) + "\n"


def _heads_table(result: Mapping) -> list[str]:
    """The focus's heads beside encoders trained alone, and how many of them are below."""
    rows = [
        (name, modality, row)
        for name, by_modality in result["heads"].items()
        for modality, row in by_modality.items()
    ]
    methods = list(dict.fromkeys(method for _, _, row in rows for method in row))
    if not methods:
        return []
    lines = [
        "",
        f"## {result['focus']}'s heads against encoders trained alone",
        "",
        "Accuracy of each modality's own prediction on clean input less that of the same encoder trained alone, "
        "in points, as each method that trains them so was tuned; paired by seed.",
        "",
        "| data | modality | " + " | ".join(methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    lines += [
        f"| {name} | {modality} | "
        + " | ".join(spread_text(row.get(method), 100, sign="+") for method in methods)
        + " |"
        for name, modality, row in rows
    ]
    counts = []
    for method in methods:
        found = [row[method] for _, _, row in rows if method in row]
        low = [row for row in found if row["mean"] < 0]
        far = sum(row["error"] is not None and row["mean"] < -2 * row["error"] for row in low)
        counts.append(f"{len(found) - len(low)} of {len(found)}, {far}")
    return [
        *lines,
        "| level or above; below by more than two standard errors | | " + " | ".join(counts) + " |",
    ]


def _count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _seeds(count: int) -> str:
    return "seed 0" if count == 1 else f"seeds 0 to {count - 1}"


def by_rank(table: Mapping) -> list[str]:
    """The methods of :func:`ranks`, the best over all kinds and both metrics first; those that lack one come last."""
    rows = [by_metric[metric] for by_metric in table.values() for metric in ("accuracy", "nll")]
    return sorted(
        dict.fromkeys(method for row in rows for method in row),
        key=lambda method: sum(row.get(method, {"rank": 99})["rank"] for row in rows),
    )


def rank_text(rows: Mapping, method: str, digits: int) -> str:
    """A method's average rank, as the tables have it: the best of ``rows`` in bold, - where there is none."""
    if method not in rows:
        return "-"
    text = f"{rows[method]['rank']:.{digits}f}"
    return (
        f"**{text}**" if rows[method]["rank"] == min(row["rank"] for row in rows.values()) else text
    )


def spread_text(spread: Mapping | None, scale: float, digits: int = 1, *, sign: str = "") -> str:
    """``scale`` times a mean and its standard error, as the tables have it; - where there is none."""
    if spread is None:
        return "-"
    error = "" if spread["error"] is None else f" +- {scale * spread['error']:.{digits}f}"
    return f"{scale * spread['mean']:{sign}.{digits}f}{error}"


def picture(result: Mapping) -> Figure:
    """One panel a kind of condition: every method's average rank in accuracy (across) and NLL (up); the best corner is at the lower left."""
    kinds = [kind for kind in GROUPS if kind in result["ranks"]]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(7.0, 0.55 + 2.6 * math.ceil(len(kinds) / 2)), layout="constrained")
        axes = figure.subplots(math.ceil(len(kinds) / 2), 2, squeeze=False).ravel()
        for axis in axes[len(kinds) :]:
            axis.remove()
        methods = sorted({method for kind in kinds for method in result["ranks"][kind]["accuracy"]})
        focus = result["focus"]
        for axis, kind in zip(axes, kinds):
            accuracy, nll = (result["ranks"][kind][metric] for metric in ("accuracy", "nll"))
            for number, method in enumerate(methods):
                if method not in accuracy:
                    continue
                ours = method == focus
                colour = PALETTE[1] if ours else PALETTE[0]
                axis.scatter(
                    accuracy[method]["rank"],
                    nll[method]["rank"],
                    s=40 if ours else 16,
                    color=colour,
                    marker=MARKERS[3] if ours else MARKERS[0],
                    zorder=3,
                )
                axis.annotate(
                    method,
                    (accuracy[method]["rank"], nll[method]["rank"]),
                    xytext=(3, 3 if number % 2 else -7),
                    textcoords="offset points",
                    fontsize=5.5,
                    color=INK if ours else GREY,
                )
            axis.set_title(kind, loc="left", fontsize=8)
            axis.set_xlabel("average rank in accuracy")
            axis.set_ylabel("average rank in NLL")
            axis.grid(True)
            axis.margins(0.14)
        figure.suptitle(
            f"Average ranks over {len(result['results'])} data sets, {result['seeds']} seeds (1 is best)",
            x=0.01,
            ha="left",
            fontsize=8.5,
        )
    return figure

"""What a comparison's results say: ranks, ablations, heads, and the paired bootstrap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from iibalance.comparison.cells import CLEAN, Cell, cell_files
from iibalance.comparison.results import GROUPS, LOW, METRICS, group_means, group_of, spread
from iibalance.config import CompareConfig
from iibalance.methods import METHODS, ablation_of, method_class

SIGNS = {"accuracy": -1, "nll": 1}  # the better value is the smaller one, times its sign
# Ablations that published tables hold, of pieces that the method has no more.
RETIRED = {"iibalance_no_prior": "iibalance", "iibalance_no_alignment": "iibalance"}
TIE = 1e-9  # means no further apart are equal: the same numbers, added in another order


def summary(results: Mapping, focus: str, methods: Sequence[str]) -> dict:
    """Ranks, ablations of the focus, and its heads beside encoders trained alone.

    ``methods`` are the names that were compared. Ablations of one of them take no rank.
    """
    parts = ablation_names(methods)
    whole = {
        name: {method: entry for method, entry in entries.items() if method not in parts}
        for name, entries in results.items()
    }
    own = [method for method, of in parts.items() if of == focus]
    kinds = [method_class(name) for name in methods if name not in RETIRED]
    separate = list(dict.fromkeys(kind.name for kind in kinds if not kind.joint))
    return {
        "ranks": ranks(whole),
        "ablations": ablations(results, focus, own),
        "heads": heads_over_alone(results, focus, separate),
    }


def best_trial(tried: Mapping) -> int | str:
    """The key of the trial that wins.

    It has the lowest mean validation NLL among those that most tuning seeds finished.
    """
    return min(tried, key=lambda trial: (-tried[trial]["seeds"], tried[trial]["validation_nll"]))


def ranks(results: Mapping) -> dict:
    """kind -> metric -> method -> {"rank": average over the data sets that have it, "sets"}.

    1 is best; ties share their mean rank.
    """
    table: dict = {}
    for methods in results.values():
        for metric, sign in SIGNS.items():
            means = {method: group_means(entry, metric) for method, entry in methods.items()}
            for kind in GROUPS:
                values = {
                    method: sign * sum(row[kind].values()) / len(row[kind])
                    for method, row in means.items()
                    if row.get(kind)
                }
                if not values:
                    continue
                rows = table.setdefault(kind, {}).setdefault(metric, {})
                places = rankdata(without_ties(list(values.values())))
                for method, place in zip(values, places):
                    rows.setdefault(method, []).append(float(place))
    return {
        kind: {
            metric: {
                method: {"rank": sum(places) / len(places), "sets": len(places)}
                for method, places in sorted(rows.items(), key=lambda row: np.mean(row[1]))
            }
            for metric, rows in by_metric.items()
        }
        for kind, by_metric in table.items()
    }


def without_ties(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values, those no further than ``TIE`` from the next smaller one made equal to it."""
    values = np.array(values)
    order = np.argsort(values, kind="stable")
    for before, after in zip(order, order[1:]):
        if values[after] - values[before] <= TIE:
            values[after] = values[before]
    return values


def ablations(results: Mapping, focus: str, names: Sequence[str]) -> dict:
    """kind -> metric -> ablation -> spread over seeds of (ablation - focus), over the data sets.

    Below 0 in accuracy and above 0 in NLL, the piece that the ablation lacks helps.
    """
    table: dict = {}
    for method in names:
        for metric in METRICS:
            differences: dict[str, dict[int, list[float]]] = {}
            for methods in results.values():
                if focus in methods and method in methods:
                    ours, theirs = (group_means(methods[name], metric) for name in (focus, method))
                    for kind in ours.keys() & theirs.keys():
                        for seed in ours[kind].keys() & theirs[kind].keys():
                            rows = differences.setdefault(kind, {}).setdefault(seed, [])
                            rows.append(theirs[kind][seed] - ours[kind][seed])
            for kind, found in differences.items():
                full = max(map(len, found.values()))  # seeds that have every set
                means = {s: sum(rows) / full for s, rows in found.items() if len(rows) == full}
                table.setdefault(kind, {}).setdefault(metric, {})[method] = spread(means)
    return table


def heads_over_alone(results: Mapping, focus: str, separate: Sequence[str]) -> dict:
    """data set -> modality -> method of encoders trained alone -> how far the focus is above it.

    That is the spread over seeds of the accuracy of the focus's head less that of the encoder
    alone, on clean input.
    """
    table: dict = {}
    for name, methods in results.items():
        for modality, ours in methods.get(focus, {}).get("heads", {}).items():
            for method in separate:
                theirs = methods.get(method, {}).get("heads", {}).get(modality)
                missing = theirs is None or theirs["accuracy"] is None or ours["accuracy"] is None
                if missing or method == focus:
                    continue
                reference = theirs["accuracy"]["values"]
                values = ours["accuracy"]["values"].items()
                found = spread({s: value - reference[s] for s, value in values if s in reference})
                if found is not None:
                    table.setdefault(name, {}).setdefault(modality, {})[method] = found
    return table


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int = 0
) -> dict[str, float]:
    """Mean difference of two methods' values [seeds, samples], with 95 % interval and two-sided p.

    Seeds and test samples are drawn with replacement, the same ones for both methods.

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


def bootstrap(folder: Path, config: CompareConfig, cells: Sequence[Cell], results: Mapping) -> dict:
    """data set -> kind -> metric -> the focus against the best other method of that set and kind.

    Best by mean accuracy, and by mean NLL. Ablations are no others.
    """
    parts = ablation_names(dict.fromkeys(cell.method for cell in cells))
    return {
        name: {
            kind: found
            for kind in GROUPS
            if (found := _against_best(folder, config, cells, results, name, kind, parts))
        }
        for name in results
    }


def _against_best(
    folder: Path,
    config: CompareConfig,
    cells: Sequence[Cell],
    results: Mapping,
    name: str,
    kind: str,
    parts: Mapping[str, str],
) -> dict:
    focus = focus_name(config)
    methods = {m: entry for m, entry in results[name].items() if m == focus or m not in parts}
    found = {}
    for metric, sign in SIGNS.items():
        means = {method: group_means(entry, metric).get(kind) for method, entry in methods.items()}
        means = {m: sign * sum(row.values()) / len(row) for m, row in means.items() if row}
        if focus not in means or len(means) < 2:
            continue
        best = min((method for method in means if method != focus), key=means.get)
        ours, theirs = (
            _samples(folder, cells, name, method, kind, metric) for method in (focus, best)
        )
        seeds = sorted(set(ours) & set(theirs))
        if seeds:
            pair = (np.stack([part[seed] for seed in seeds]) for part in (ours, theirs))
            result = paired_bootstrap(*pair, resamples=config.bootstrap)
            found[metric] = {"against": best, **result}
    return found


def focus_name(config: CompareConfig) -> str:
    """The focus as it is called in the results."""
    focus = config.focus_method()
    return method_class(focus).name if ":" in focus else focus


def ablation_names(methods: Iterable[str]) -> dict[str, str]:
    """Ablation -> the method that it lacks a piece of, for those whose whole is compared too.

    >>> ablation_names(["iibalance", "iibalance_no_gate", "ensemble", "ensemble_gated"])
    {'iibalance_no_gate': 'iibalance'}
    """
    methods = list(methods)
    kinds = [method_class(name) for name in methods if name not in RETIRED]
    names = {kind.name for kind in kinds}
    found = {kind.name: ablation_of(kind) for kind in kinds if ablation_of(kind) in names}
    return found | {name: RETIRED[name] for name in methods if RETIRED.get(name) in names}


def published_names(methods: Iterable[str]) -> list[str]:
    """Those of the names in a table that are methods of this package, or were.

    >>> published_names(["iibalance", "mine", "iibalance_no_prior"])
    ['iibalance', 'iibalance_no_prior']
    """
    return [name for name in methods if name in METHODS or name in RETIRED]


def _samples(
    folder: Path, cells: Sequence[Cell], name: str, method: str, kind: str, metric: str
) -> dict[int, np.ndarray]:
    """seed -> per-sample values [N], averaged over the conditions of a kind."""
    found = {}
    for cell in cells:
        same = cell.data == name and method_class(cell.method).name == method
        if not same or (cell.kind == "low") != (kind == LOW):
            continue
        numbers, path = cell_files(folder, cell)
        if not (numbers.exists() and path.exists()):
            continue
        with np.load(path, allow_pickle=False) as arrays:
            targets, names = arrays["targets"], [CLEAN]
            if kind not in (CLEAN, LOW):
                names = [key for key in arrays.files if group_of(key) == kind]
            values = []
            for key in names:
                log_p = arrays[key].astype(np.float64)
                if metric == "accuracy":
                    values.append(log_p.argmax(1) == targets)
                else:
                    values.append(-log_p[np.arange(len(targets)), targets])
        if values:
            found[cell.seed] = np.mean(values, axis=0)
    return found

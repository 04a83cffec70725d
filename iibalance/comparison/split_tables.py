"""The sections of a page that speak of all data sets and splits together (``blocks``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from iibalance.comparison.blocks import LEVEL
from iibalance.comparison.results import GROUPS
from iibalance.comparison.table_text import PAIR, table

_NAMES = {"accuracy": "accuracy", "nll": "NLL"}
_SCALES = {"accuracy": (100, 2), "nll": (1, 3)}  # points and nats, and their digits


def split_sections(result: Mapping) -> list[list[str]]:
    """Tests of ranks, the focus against every other method, and its heads; none without splits."""
    if not result.get("splits"):
        return []
    return [_tests(result), *_estimates(result), _utilisation(result)]


def origin(result: Mapping) -> list[list[str]]:
    """What a block is, how it was made, and what the figures are."""
    lines = []
    if "parts" in result:
        names = ", ".join(f"`{name}`" for name in result["parts"])
        lines.append([f"Joined from {len(result['parts'])} tables: {names}."])
    if "shares" in result:
        test, validation = (f"{100 * result['shares'][p]:g} %" for p in ("test", "validation"))
        low = result["low_data_seeds"]
        aside = "" if low in (0, result["splits"]) else f" (low data: {low} of them)"
        lines.append(
            [
                f"{result['splits']} resampled splits{aside} of all samples of each data set, test "
                f"{test} and validation {validation}, stratified by class and disjoint by group. "
                "Each has one training seed. Settings were chosen by validation NLL within each "
                "split, the same number of trials for every method; methods whose encoders are "
                "trained separately chose them for each modality by itself. Each split's test part "
                "was used once, at the end."
            ]
        )
    lines.append(
        [
            "Mean +- standard error over the splits (seeds, where a part has no splits). Accuracy "
            "and F1 in %, NLL in nats. Seconds are of processor time, of all trainings that one "
            "model needs: with its budget stage, without the search of settings."
        ]
    )
    return lines


def _tests(result: Mapping) -> list[str]:
    rows, absent, dropped = [], {}, {}
    for kind in (kind for kind in GROUPS if kind in result["tests"]):
        for metric in PAIR:
            test = result["tests"][kind].get(metric)
            if test is None:
                continue
            best, *others = test["ranks"].items()
            level = [name for name, rank in others if rank - best[1] <= test["distance"]]
            absent |= dict.fromkeys(test["absent"])
            dropped |= dict.fromkeys(test["dropped"])
            known = test["statistic"] is not None
            rows.append(
                [
                    f"{kind}: {_NAMES[metric]}",
                    str(test["blocks"]),
                    str(len(test["ranks"])),
                    f"{test['statistic']:.1f}" if known else "-",
                    f"{test['p']:.2g}" if known else "-",
                    f"{test['distance']:.2f}" if test["distance"] < float("inf") else "-",
                    f"{best[0]} ({best[1]:.2f})",
                    ", ".join(level) or "none",
                ]
            )
    header = ["", "blocks", "methods", "Friedman chi2", "p", "critical distance"]
    text = (
        "A block is one split of one data set. Friedman's test asks whether all methods rank "
        "alike; mean ranks further apart than Nemenyi's critical distance "
        f"({100 * LEVEL:g} %) are told apart. The splits of a set share samples, so blocks are not "
        "independent, and the test finds differences too easily. The estimates below draw whole "
        "data sets first, and do not count on that."
    )
    if absent:
        text += f" Left out, as not every data set has them: {', '.join(sorted(absent))}."
    if dropped:
        names = ", ".join(f"{data} {split}" for data, split in sorted(dropped))
        text += f" Left out blocks, which a method lacks: {names}."
    return [
        "## Are the ranks chance?",
        "",
        text,
        "",
        *table([*header, "best (rank)", "not told apart from it"], rows),
    ]


def _estimates(result: Mapping) -> list[list[str]]:
    points, nats = 100 * result["regions"]["accuracy"], result["regions"]["nll"]
    sections = [
        [
            f"## {result['focus']} against each other method",
            "",
            "Its mean difference over sets and splits, with the 95 % interval of a bootstrap of "
            "two levels (data sets, then splits of each), and how probably it is better, equal and "
            f"worse in practice: by more than {points:g} points of accuracy (more is better) or "
            f"{nats:g} nats (less is better), or by no more.",
        ]
    ]
    for kind in (kind for kind in GROUPS if kind in result["estimates"]):
        rows = []
        for method, found in result["estimates"][kind].items():
            cells = [method, str(max(row["sets"] for row in found.values()))]
            for metric in PAIR:
                cells += _estimate(found.get(metric), *_SCALES[metric])
            rows.append(cells)
        shares = "better / equal / worse"
        header = [kind, "sets", "accuracy, points", shares, "NLL, nats", shares]
        sections.append(table(header, rows))
    return sections


def _estimate(row: Mapping | None, scale: float, digits: int) -> list[str]:
    if row is None:
        return ["-", "-"]
    mean, low, high = (f"{scale * row[k]:+.{digits}f}" for k in ("difference", "low", "high"))
    shares = " / ".join(f"{row[key]:.2f}" for key in ("better", "equal", "worse"))
    return [f"{mean} [{low}, {high}]", shares]


def _utilisation(result: Mapping) -> list[str]:
    rows, low = [], 0
    for data, heads in result["utilisation"].items():
        for modality, row in heads.items():
            error = "" if row["error"] is None else f" +- {row['error']:.3f}"
            verdict = "-" if row["below"] is None else "yes" if row["below"] else "no"
            low += bool(row["below"])
            p = "-" if row["p"] is None else f"{row['p']:.3f}"
            rows.append(
                [data, modality, f"{row['mean']:.3f}{error}", str(row["splits"]), p, verdict]
            )
    if not rows:
        return []
    header = ["data", "modality", "utilisation", "splits", "p", "below 1"]
    return [
        f"## What {result['focus']} makes of each encoder",
        "",
        "Accuracy of each modality's own prediction on clean input over that of the same encoder "
        "tuned and trained alone (`unimodal`), split by split; a one-sided t-test over the splits, "
        f"at {100 * LEVEL:g} %, says whether the mean is below 1. {low} of {len(rows)} are.",
        "",
        *table(header, rows),
    ]


def split_settings(rows: Sequence[Mapping]) -> list[str]:
    """How often each setting was chosen, by data set, method and modality."""
    lines = []
    for row in rows:
        for modality, counts in row["wins"].items():
            lines.append([row["data"], row["method"], modality or "all", *map(str, counts)])
    trials = rows[0]["settings"] if rows else []
    names = [
        f"{trial + 1}: rate {one['learning_rate']:.2g}, decay {one['weight_decay']:.2g}"
        for trial, one in enumerate(trials)
    ]
    return [
        "## Chosen settings",
        "",
        "In how many splits each setting won; every method tries its own parameter's values in "
        "turn beside them.",
        "",
        *table(["data", "method", "modality", *names], lines),
    ]

"""Statistics over data sets and splits: a block is one split of one data set.

Methods are ranked in every block, and Friedman's test with Nemenyi's critical distance (Demsar
2006, "Statistical Comparisons of Classifiers over Multiple Data Sets") says which mean ranks
differ. What two methods differ by is estimated by a bootstrap of two levels, data sets and then
splits.

The splits of one set share samples, so blocks are not independent, and the test over them finds
differences too easily. The bootstrap draws whole sets first, which answers that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import friedmanchisquare, rankdata, studentized_range, ttest_1samp

from iibalance.comparison.results import GROUPS, group_means, spread
from iibalance.comparison.statistics import SIGNS, without_ties

LEVEL = 0.05  # of the tests


class Blocks(NamedTuple):
    """The blocks of one group of conditions and one metric, of the methods that have every set."""

    values: pd.DataFrame  #: [blocks, methods], indexed by (data, split)
    absent: list[str]  #: methods that lack a data set
    dropped: list[tuple[str, int]]  #: blocks that one of the methods lacks: a training failed


def blocks(results: Mapping, kind: str, metric: str) -> Blocks:
    """The values of every method in every block, of the sets that have the ``kind`` of condition.

    Args:
        results: what :func:`iibalance.comparison.results.by_method` returns, of the methods that
            are to be ranked.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for data in sorted(results):
        means = {m: group_means(entry, metric).get(kind) for m, entry in results[data].items()}
        means = {method: values for method, values in means.items() if values}
        if means:
            found[data] = means
    methods = dict.fromkeys(method for means in found.values() for method in means)
    complete = sorted(m for m in methods if all(m in means for means in found.values()))
    rows, dropped = {}, []
    for data, means in found.items():
        for split in sorted(set().union(*(means[method] for method in complete))):
            if all(split in means[method] for method in complete):
                rows[data, split] = [means[method][split] for method in complete]
            else:
                dropped.append((data, split))
    index = pd.MultiIndex.from_tuples(list(rows), names=["data", "split"]) if rows else None
    table = pd.DataFrame(list(rows.values()), index=index, columns=complete, dtype=float)
    return Blocks(table, [m for m in methods if m not in complete], dropped)


def block_ranks(values: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rank of each method in each block, 1 for the best; ties share their mean rank."""
    rows = [rankdata(without_ties(SIGNS[metric] * row)) for row in values.to_numpy()]
    table = pd.DataFrame(rows, index=values.index, columns=values.columns, dtype=float)
    return table[table.mean().sort_values(kind="stable").index]


def friedman(results: Mapping, kind: str, metric: str) -> dict | None:
    """Friedman's test over the blocks; None where no method has every data set.

    ``ranks`` are the mean ranks, best first; means further apart than ``distance`` are told apart
    by Nemenyi's test. ``p`` is None for fewer than three methods or two blocks.
    """
    found = blocks(results, kind, metric)
    if found.values.empty:
        return None
    ranked = block_ranks(found.values, metric)
    count, methods = ranked.shape
    statistic = p = None
    # The statistic is none where all methods are equal in every block.
    if methods > 2 and count > 1 and np.ptp(ranked.to_numpy(), axis=1).any():
        test = friedmanchisquare(*ranked.to_numpy().T)
        statistic, p = float(test.statistic), float(test.pvalue)
    return {
        "ranks": {name: float(mean) for name, mean in ranked.mean().items()},
        "blocks": count,
        "statistic": statistic,
        "p": p,
        "distance": critical_difference(methods, count),
        "absent": found.absent,
        "dropped": found.dropped,
    }


def critical_difference(methods: int, blocks: int) -> float:
    """What two mean ranks must differ by to be told apart, by Nemenyi's test at ``LEVEL``.

    Two methods or one block are too few for it: infinite.

    >>> round(critical_difference(5, 30), 3)  # Demsar 2006, table 5: 2.728 sqrt(5 6 / (6 30))
    1.114
    """
    if methods < 3 or blocks < 2:
        return float("inf")
    quantile = studentized_range.ppf(1 - LEVEL, methods, np.inf) / np.sqrt(2)
    return float(quantile * np.sqrt(methods * (methods + 1) / (6 * blocks)))


def two_level_bootstrap(
    differences: Sequence[Sequence[float]], *, resamples: int, seed: int = 0
) -> np.ndarray:
    """Means of resampled differences [resamples]: sets are drawn, then splits within each.

    Args:
        differences: of each data set, those of its splits. A set counts as much as any other.

    >>> two_level_bootstrap([[0.0, 0.0], [1.0]], resamples=1000).mean().round(1)
    np.float64(0.5)
    """
    generator, count = np.random.default_rng(seed), len(differences)
    sets = generator.integers(count, size=(resamples, count))
    means = np.empty((resamples, count))
    for number, values in enumerate(differences):
        rows = np.asarray(values, dtype=float)
        where = sets == number
        drawn = generator.integers(len(rows), size=(int(where.sum()), len(rows)))
        means[where] = rows[drawn].mean(axis=1)
    return means.mean(axis=1)


def estimate(
    differences: Mapping[str, Sequence[float]], *, metric: str, region: float, resamples: int
) -> dict:
    """How much better one method is than another, from their differences by data set and split.

    ``difference`` is the mean over sets of the mean over splits, ``low`` to ``high`` its 95 %
    interval; ``better``, ``equal`` and ``worse`` are the shares of the resampled means above,
    within and below the ``region`` of practical equivalence (for the NLL less is better).

    >>> estimate({"a": [0.02]}, metric="accuracy", region=0.005, resamples=10)["better"]
    1.0
    """
    rows = [differences[name] for name in sorted(differences)]  # parts may come in any order
    means = two_level_bootstrap(rows, resamples=resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    gain = -SIGNS[metric] * means
    return {
        "difference": float(np.mean([np.mean(row) for row in rows])),
        "low": float(low),
        "high": float(high),
        "better": float((gain > region).mean()),
        "equal": float((abs(gain) <= region).mean()),
        "worse": float((gain < -region).mean()),
        "sets": len(rows),
    }


def estimates(
    results: Mapping, focus: str, *, regions: Mapping[str, float], resamples: int
) -> dict:
    """group of conditions -> method -> metric -> :func:`estimate` of (focus - method).

    Of the sets and splits that both have. ``regions``: metric -> its region of equivalence.
    """
    means = {
        (data, method, metric): group_means(entry, metric)
        for data, entries in results.items()
        for method, entry in entries.items()
        for metric in SIGNS
    }
    methods = dict.fromkeys(method for entries in results.values() for method in entries)
    table: dict = {}
    for kind in GROUPS:
        for method in sorted(set(methods) - {focus}):
            for metric in SIGNS:
                differences = {}
                for data in results:
                    ours, theirs = (
                        means.get((data, name, metric), {}).get(kind, {})
                        for name in (focus, method)
                    )
                    both = sorted(ours.keys() & theirs.keys())
                    if both:
                        differences[data] = [ours[split] - theirs[split] for split in both]
                if differences:
                    found = estimate(
                        differences, metric=metric, region=regions[metric], resamples=resamples
                    )
                    table.setdefault(kind, {}).setdefault(method, {})[metric] = found
    return table


def utilisations(results: Mapping, focus: str) -> dict:
    """data set -> modality -> what the focus's head makes of its encoder, over the splits.

    ``mean`` is of the head's accuracy on clean input over that of the same encoder tuned alone,
    with its standard ``error``; ``p`` is that of a one-sided t-test over the splits that the mean
    is 1 or more, and ``below`` whether it is refused. Splits share samples, so the test finds too
    many heads below rather than too few. One split tells nothing: None.
    """
    table: dict = {}
    for data, entries in results.items():
        for modality, head in entries.get(focus, {}).get("heads", {}).items():
            found = head.get("utilisation")
            if found is None:
                continue
            values = list(found["values"].values())
            p = below = None
            if len(values) > 1:
                p = float(np.mean(values) >= 1)  # where all splits say the same
                if np.std(values) > 0:
                    p = float(ttest_1samp(values, 1.0, alternative="less").pvalue)
                below = p < LEVEL
            row = spread(found["values"]) or {}
            table.setdefault(data, {})[modality] = {
                "mean": row["mean"],
                "error": row["error"],
                "splits": len(values),
                "p": p,
                "below": below,
            }
    return table


def over_splits(
    results: Mapping, whole: Mapping, focus: str, *, regions: Mapping[str, float], resamples: int
) -> dict:
    """All that is said over sets and splits; ``whole`` are the results without ablations."""
    tests: dict = {}
    for kind in GROUPS:
        for metric in SIGNS:
            found = friedman(whole, kind, metric)
            if found is not None:
                tests.setdefault(kind, {})[metric] = found
    return {
        "tests": tests,
        "estimates": estimates(results, focus, regions=regions, resamples=resamples),
        "utilisation": utilisations(results, focus),
        "regions": dict(regions),
    }

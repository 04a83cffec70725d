"""Statistics over data sets and splits, against values from elsewhere or worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, t

from iibalance.comparison.blocks import (
    block_ranks,
    blocks,
    critical_difference,
    estimate,
    estimates,
    friedman,
    two_level_bootstrap,
    utilisations,
)
from iibalance.comparison.results import KEYS, METRICS, SECONDS, by_method

METHODS = ("unimodal", "sum", "concat", "ensemble", "iibalance")


def table_of(values, condition="clean"):
    """(data, method) -> accuracy by split, as a tidy table; the NLL is 2 (1 - accuracy)."""
    rows = [
        dict(zip(KEYS, (data, method, split, condition, "")))
        | {"accuracy": value, "macro_f1": value, "nll": 2 * (1 - value), "ece": 0.1}
        for (data, method), by_split in values.items()
        for split, value in by_split.items()
    ]
    return pd.DataFrame(rows, columns=[*KEYS, *METRICS, SECONDS])


def drawn(sets=3, splits=4, seed=0):
    generator = np.random.default_rng(seed)
    return {
        (f"set{data}", method): {
            split: float(generator.normal(0.5 + 0.02 * place, 0.05)) for split in range(splits)
        }
        for data in range(sets)
        for place, method in enumerate(METHODS)
    }


def matrix(values):
    """The same as [blocks, methods], by plain loops."""
    names = sorted({data for data, _ in values})
    return np.array(
        [
            [values[data, method][split] for method in METHODS]
            for data in names
            for split in sorted(values[data, METHODS[0]])
        ]
    )


# Ranks and their test


def test_friedman_by_its_formula_over_every_split_of_every_set():
    values = drawn()
    found = friedman(by_method(table_of(values)), "clean", "accuracy")
    ranks = np.array([rankdata(-row) for row in matrix(values)])
    count, k = ranks.shape
    assert (count, k) == (12, 5) and found["blocks"] == 12
    mean = ranks.mean(0)
    assert found["ranks"] == pytest.approx(dict(zip(METHODS, mean)))
    assert list(found["ranks"].values()) == sorted(mean)
    # Demsar 2006, equation (1)
    chi2 = 12 * count / (k * (k + 1)) * ((mean**2).sum() - k * (k + 1) ** 2 / 4)
    assert found["statistic"] == pytest.approx(chi2)
    # Demsar 2006, table 5: q = 2.728 for five methods
    assert found["distance"] == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 12)), rel=1e-3)
    other = friedman(by_method(table_of(values)), "clean", "nll")
    assert other["ranks"] == pytest.approx(found["ranks"])  # less is better there


def test_the_tests_agree_with_scikit_posthocs():
    posthocs = pytest.importorskip("scikit_posthocs")
    values = drawn(sets=4, splits=5, seed=3)
    found = friedman(by_method(table_of(values)), "clean", "accuracy")
    p = posthocs.posthoc_nemenyi_friedman(matrix(values)).to_numpy()
    means = [found["ranks"][method] for method in METHODS]
    far = [[abs(a - b) > found["distance"] for b in means] for a in means]
    assert (p < 0.05).tolist() == far and 0 < np.sum(far) < 20


def test_a_method_that_lacks_a_set_is_left_out_and_so_is_a_block_that_a_method_lacks():
    values = drawn()
    del values["set1", "sum"]
    del values["set2", "concat"][3]  # a training failed
    results = by_method(table_of(values))
    found = blocks(results, "clean", "accuracy")
    assert found.absent == ["sum"] and found.dropped == [("set2", 3)]
    assert sorted(found.values) == ["concat", "ensemble", "iibalance", "unimodal"]
    assert len(found.values) == 11 and ("set2", 3) not in found.values.index
    assert found.values.loc[("set1", 2), "concat"] == values["set1", "concat"][2]
    test = friedman(results, "clean", "accuracy")
    assert test["absent"] == ["sum"] and test["dropped"] == [("set2", 3)]
    assert test["blocks"] == 11 and set(test["ranks"]) == set(found.values)
    assert friedman(results, "mild", "accuracy") is None


def test_a_set_without_the_condition_takes_no_part():
    low = {key: row for key, row in drawn().items() if key[0] != "set0"}
    whole = pd.concat([table_of(drawn()), table_of(low, "low data")])
    assert friedman(by_method(whole), "low data", "nll")["blocks"] == 8


def test_ties_share_their_rank_and_all_equal_is_no_difference():
    same = {("a", method): {0: 0.5, 1: 0.25 + 0.25} for method in METHODS}
    test = friedman(by_method(table_of(same)), "clean", "accuracy")
    assert set(test["ranks"].values()) == {3.0} and test["p"] is None
    ranked = block_ranks(pd.DataFrame({"a": [0.3], "b": [0.1 + 0.2], "c": [0.9]}), "accuracy")
    assert ranked.iloc[0].to_dict() == {"c": 1.0, "a": 2.5, "b": 2.5}


def test_two_methods_are_ranked_and_not_tested():
    values = {key: row for key, row in drawn().items() if key[1] in ("sum", "concat")}
    test = friedman(by_method(table_of(values)), "clean", "accuracy")
    assert test["p"] is None and test["distance"] == float("inf") and len(test["ranks"]) == 2
    assert critical_difference(5, 1) == float("inf")


# Differences


def test_sets_are_drawn_first_and_then_splits():
    """Two sets without any spread: the mean is 0, 1/2 or 1, with chances 1/4, 1/2, 1/4."""
    means = two_level_bootstrap([[0.0] * 5, [1.0] * 3], resamples=20_000)
    assert set(means) == {0.0, 0.5, 1.0}
    shares = [(means == value).mean() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_with_one_set_the_interval_is_that_of_its_splits_mean():
    values = np.random.default_rng(0).normal(0.02, 0.01, 40)
    found = estimate({"a": values}, metric="accuracy", region=0.005, resamples=20_000)
    error = values.std() / np.sqrt(40)
    assert found["difference"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )
    assert found["better"] == 1.0 and found["sets"] == 1


def test_the_spread_of_sets_is_not_hidden_by_many_splits():
    """A set counts once however many splits it has, and its splits do not make it several."""
    few = {"a": [0.1] * 2, "b": [-0.1] * 2}
    many = {"a": [0.1] * 500, "b": [-0.1] * 2}
    options = dict(metric="accuracy", region=0.0, resamples=4000)
    for differences in (few, many):
        found = estimate(differences, **options)
        assert found["difference"] == pytest.approx(0.0)
        assert (found["low"], found["high"]) == pytest.approx((-0.1, 0.1))
        assert found["better"] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("metric", "difference", "expected"),
    [
        ("accuracy", 0.006, (1, 0, 0)),
        ("accuracy", 0.004, (0, 1, 0)),
        ("accuracy", -0.006, (0, 0, 1)),
        ("nll", 0.006, (0, 0, 1)),  # less is better
        ("nll", -0.006, (1, 0, 0)),
    ],
)
def test_practically_better_equal_and_worse(metric, difference, expected):
    row = estimate({"a": [difference] * 3}, metric=metric, region=0.005, resamples=50)
    assert (row["better"], row["equal"], row["worse"]) == expected
    assert row["low"] == pytest.approx(difference) and row["high"] == pytest.approx(difference)


def test_differences_are_paired_by_split_over_the_sets_that_both_have():
    values = drawn()
    del values["set1", "sum"]
    del values["set2", "sum"][0]
    results = by_method(table_of(values))
    regions = {"accuracy": 0.005, "nll": 0.01}
    found = estimates(results, "iibalance", regions=regions, resamples=100)["clean"]
    assert set(found) == set(METHODS) - {"iibalance"} and found["concat"]["nll"]["sets"] == 3
    pairs = {
        data: [
            values[data, "iibalance"][split] - values[data, "sum"][split]
            for split in values[data, "sum"]
        ]
        for data in ("set0", "set2")
    }
    mean = (sum(pairs["set0"]) / 4 + sum(pairs["set2"]) / 3) / 2
    assert found["sum"]["accuracy"]["difference"] == pytest.approx(mean)
    assert found["sum"]["accuracy"]["sets"] == 2
    assert found["sum"]["nll"]["difference"] == pytest.approx(-2 * mean)


# Heads


def test_utilisation_is_the_mean_over_splits_of_the_heads_ratio_and_is_tested():
    rows = []
    accuracies = {
        "iibalance": {"low": [0.40, 0.41, 0.39], "level": [0.5, 0.6, 0.4], "same": [0.2] * 3},
        "unimodal": {"low": [0.50, 0.50, 0.50], "level": [0.5, 0.5, 0.5], "same": [0.4] * 3},
    }
    for method, heads in accuracies.items():
        for modality, values in heads.items():
            for split, value in enumerate(values):
                key = dict(zip(KEYS, ("a", method, split, "clean", modality)))
                rows.append(key | {"accuracy": value})
    results = by_method(pd.DataFrame(rows, columns=[*KEYS, *METRICS, SECONDS]))
    found = utilisations(results, "iibalance")["a"]
    ratios = np.array([0.8, 0.82, 0.78])
    assert found["low"]["mean"] == pytest.approx(0.8)
    error = ratios.std(ddof=1) / np.sqrt(3)
    assert found["low"]["error"] == pytest.approx(error)
    assert found["low"]["p"] == pytest.approx(t.cdf((0.8 - 1) / error, 2))
    assert found["low"]["below"] and found["low"]["splits"] == 3
    assert found["level"]["mean"] == pytest.approx(1.0) and not found["level"]["below"]
    assert found["level"]["p"] == pytest.approx(0.5)
    assert found["same"]["below"] and found["same"]["p"] == 0.0  # half, in every split
    once = by_method(
        pd.DataFrame([row for row in rows if row["seed"] == 0]).reindex(
            columns=[*KEYS, *METRICS, SECONDS]
        )
    )
    assert utilisations(once, "iibalance")["a"]["low"]["below"] is None

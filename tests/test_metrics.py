"""The numbers against hand computation, scikit-learn, a loop, and the axioms of Shapley."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, log_loss

from iibalance.metrics import (
    classification_metrics,
    exact_shapley,
    fit_temperature,
    mean_and_stderr,
    own_temperatures,
    reliability_curve,
    scaled,
)


def predictions(samples, classes, seed=0, sharpness=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    right = torch.rand(samples, generator=generator) < 0.6
    targets = torch.where(
        right, logits.argmax(1), torch.randint(classes, (samples,), generator=generator)
    )
    return logits.log_softmax(1).to(dtype), targets


def ece_by_loop(log_probabilities, targets, bins):
    """Written for a reader, sharing nothing with the implementation (no ties in its inputs)."""
    probabilities = log_probabilities.double().exp().numpy()
    samples = sorted(
        (row.max(), row.argmax() == target)
        for row, target in zip(probabilities, targets.numpy(), strict=True)
    )
    bins = min(bins, len(samples))
    smaller, larger_bins = divmod(len(samples), bins)
    gap, start = 0.0, 0
    for index in range(bins):
        stop = start + smaller + (index < larger_bins)
        confidence = sum(c for c, _ in samples[start:stop]) / (stop - start)
        accuracy = sum(bool(right) for _, right in samples[start:stop]) / (stop - start)
        gap += (stop - start) / len(samples) * abs(confidence - accuracy)
        start = stop
    assert start == len(samples)
    return gap


def test_hand_computed():
    log_probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64
    ).log()
    metrics = classification_metrics(log_probabilities, torch.tensor([0, 1, 1, 0]), bins=2)
    assert list(metrics) == ["accuracy", "macro_f1", "nll", "ece", "brier"]
    assert metrics["accuracy"] == 0.5
    # Class 0: tp 1, fp 1, fn 1. Class 1: tp 1, fn 1. Class 2: predicted once, never right.
    assert metrics["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 3, abs=1e-15)
    assert metrics["nll"] == pytest.approx(-math.log(0.7 * 0.8 * 0.3 * 0.3) / 4, abs=1e-15)
    # confidences .4, .5 (both wrong) and .7, .8 (both right)
    assert metrics["ece"] == pytest.approx((2 * 0.45 + 2 * 0.25) / 4, abs=1e-15)
    squared = [0.09 + 0.04 + 0.01, 0.01 + 0.04 + 0.01, 0.25 + 0.49 + 0.04, 0.49 + 0.09 + 0.16]
    assert metrics["brier"] == pytest.approx(sum(squared) / 4, abs=1e-15)


@pytest.mark.parametrize(("samples", "classes"), [(400, 2), (300, 7), (40, 30), (1, 3)])
def test_against_scikit_learn(samples, classes):
    log_probabilities, targets = predictions(samples, classes)
    metrics = classification_metrics(log_probabilities, targets)
    probabilities, predicted = log_probabilities.exp().numpy(), log_probabilities.argmax(1).numpy()
    labels = list(range(classes))
    assert metrics["accuracy"] == accuracy_score(targets, predicted)
    assert metrics["macro_f1"] == pytest.approx(
        f1_score(targets, predicted, average="macro"), abs=1e-15
    )
    assert metrics["nll"] == pytest.approx(
        log_loss(targets, probabilities, labels=labels), abs=1e-12
    )
    brier = brier_score_loss(targets, probabilities, labels=labels, scale_by_half=False)
    assert metrics["brier"] == pytest.approx(brier, abs=1e-12)


def test_macro_f1_leaves_out_only_classes_that_occur_nowhere():
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 4).double().log()
    # class 0: 2 * 2 / (2 + 2); class 1: predicted twice, never present; classes 2 and 3: nowhere
    targets = torch.tensor([0, 0, 0, 0])
    assert classification_metrics(one_hot, targets)["macro_f1"] == pytest.approx(
        (2 * 2 / (2 + 4) + 0) / 2, abs=1e-15
    )
    assert classification_metrics(one_hot[:2], targets[:2])["macro_f1"] == 1.0


@pytest.mark.parametrize(
    ("samples", "bins"), [(500, 15), (97, 10), (15, 15), (16, 15), (7, 15), (1, 15), (50, 1)]
)
def test_equal_mass_ece_against_a_loop(samples, bins):
    log_probabilities, targets = predictions(samples, 5, seed=samples)
    ece = classification_metrics(log_probabilities, targets, bins=bins)["ece"]
    assert ece == pytest.approx(ece_by_loop(log_probabilities, targets, bins), abs=1e-14)
    confidence, accuracy, count = reliability_curve(log_probabilities, targets, bins)
    assert (
        count.sum() == samples
        and len(count) == min(bins, samples)
        and count.max() - count.min() <= 1
    )
    assert (confidence.diff() > 0).all()
    predicted = log_probabilities.argmax(1)
    assert (confidence * count).sum().item() == pytest.approx(
        log_probabilities.exp().amax(1).sum().item()
    )
    assert (accuracy * count).sum().item() == pytest.approx((predicted == targets).sum().item())


def test_ties_share_their_accuracy_whatever_the_order():
    """60 % confident and 60 % right is perfect calibration, even where the answers come sorted."""
    log_probabilities = torch.tensor([0.6, 0.4], dtype=torch.float64).log().expand(50, 2)
    targets = (torch.arange(50) >= 30).long()
    _, accuracy, count = reliability_curve(log_probabilities, targets, 15)
    assert accuracy.tolist() == pytest.approx([0.6] * 15) and count.tolist() == [4] * 5 + [3] * 10
    assert classification_metrics(log_probabilities, targets)["ece"] == pytest.approx(
        0.0, abs=1e-15
    )


def test_neither_order_nor_threads_matter():
    log_probabilities, targets = predictions(70_000, 4, dtype=torch.float32)
    log_probabilities[:30_000] = log_probabilities[0]  # a great tie
    first = classification_metrics(log_probabilities, targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert json.dumps(classification_metrics(log_probabilities, targets)) == json.dumps(first)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    assert classification_metrics(log_probabilities[order], targets[order]) == pytest.approx(
        first, abs=1e-13
    )


def test_float64_inside():
    """Equals the float64 evaluation of the same float32 numbers exactly.

    A mean in float32 would be off by about 1e-8.
    """
    log_probabilities, targets = predictions(3000, 6, dtype=torch.float32)
    assert classification_metrics(log_probabilities, targets) == classification_metrics(
        log_probabilities.double(), targets.int()
    )
    exact = math.fsum(-log_probabilities[i, t].item() for i, t in enumerate(targets)) / 3000
    assert classification_metrics(log_probabilities, targets)["nll"] == exact


def test_ignored_rows_and_edges():
    log_probabilities, targets = predictions(60, 3)
    masked = targets.clone()
    masked[::2] = -100
    log_probabilities[0] = float("nan")  # an ignored row may hold anything
    assert classification_metrics(log_probabilities, masked) == classification_metrics(
        log_probabilities[1::2], targets[1::2]
    )
    only = classification_metrics(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))
    assert only == {"accuracy": 1.0, "macro_f1": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0}
    rounded_up = classification_metrics(torch.full((4, 1), 1e-7), torch.zeros(4, dtype=torch.long))
    assert rounded_up["nll"] == 0.0
    wrong = classification_metrics(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([1]))
    assert wrong["nll"] == math.inf and wrong["brier"] == 2.0 and wrong["ece"] == 1.0


def test_inputs_are_left_alone():
    log_probabilities, targets = predictions(20, 3)
    copy = log_probabilities.clone()
    classification_metrics(log_probabilities, targets)
    assert torch.equal(log_probabilities, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probabilities": torch.randn(4, 3)}, "log_probabilities: .*sum to 1"),
        ({"log_probabilities": torch.full((4, 3), math.nan)}, "log_probabilities: .*NaN"),
        ({"log_probabilities": torch.zeros(4)}, r"log_probabilities: .*\[N, K\].*\[4\]"),
        ({"log_probabilities": torch.zeros(4, 1).long()}, "log_probabilities: .*int64"),
        ({"log_probabilities": [[0.0]]}, "log_probabilities: .*list"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, r"targets: holds 3, outside 0\.\.2"),
        ({"targets": torch.tensor([0, -1, 2, 1])}, "targets: holds -1"),
        ({"targets": torch.zeros(4)}, "targets: .*float32"),
        ({"targets": torch.zeros(3).long()}, r"targets: .*N = 4.*\[3\]"),
        ({"targets": torch.full((4,), -100)}, "targets: there is no sample"),
        ({"bins": 0}, "bins: 0"),
        ({"bins": 2.5}, "bins: 2.5"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "log_probabilities": torch.full((4, 3), 1 / 3).log(),
        "targets": torch.tensor([0, 1, 2, 0]),
        "bins": 15,
    } | change
    for function in (lambda a, b, bins: classification_metrics(a, b, bins=bins), reliability_curve):
        with pytest.raises(ValueError, match=f"^{message}"):
            function(*arguments.values())


# Shapley: its axioms determine it.
def game(worths):
    """A set function from a list of 2**M worths, counting how often each subset is asked for."""
    asked = []

    def value(present):
        asked.append(present)
        return worths[sum(bit << player for player, bit in enumerate(present))]

    return value, asked


@st.composite
def games(draw):
    players = draw(st.integers(1, 6))
    return players, draw(st.lists(st.floats(-10, 10), min_size=2**players, max_size=2**players))


@settings(max_examples=60, deadline=None)
@given(games())
def test_shapley_efficiency_and_each_subset_once(drawn):
    players, worths = drawn
    value, asked = game(worths)
    shares = exact_shapley(value, players)
    assert len(shares) == players and math.fsum(shares) == pytest.approx(
        worths[-1] - worths[0], abs=1e-12
    )
    assert len(asked) == len(set(asked)) == 2**players and (False,) * players in asked


@settings(max_examples=40, deadline=None)
@given(games(), st.integers(0, 5))
def test_shapley_is_the_mean_marginal_over_orders(drawn, seed):
    """Against the other definition: the mean over every order of joining of what a player adds."""
    from itertools import permutations

    players, worths = drawn
    players = min(players, 4)  # 24 orders
    orders = list(permutations(range(players)))
    expected = np.zeros(players)
    for order in orders:
        inside = 0
        for player in order:
            expected[player] += worths[inside | 1 << player] - worths[inside]
            inside |= 1 << player
    assert exact_shapley(game(worths)[0], players) == pytest.approx(
        list(expected / len(orders)), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(games(), st.data())
def test_shapley_dummy_and_symmetry(drawn, data):
    players, worths = drawn
    dummy = data.draw(st.integers(0, players - 1))
    shares = exact_shapley(
        lambda present: (
            worths[sum(bit << p for p, bit in enumerate(present) if p != dummy)]
            + 0.5 * present[dummy]
        ),
        players,
    )
    assert shares[dummy] == pytest.approx(0.5, abs=1e-12)
    first, second = data.draw(st.integers(0, players - 1)), data.draw(st.integers(0, players - 1))

    def symmetric(present):
        others = sum(bit << p for p, bit in enumerate(present) if p not in (first, second))
        return worths[others] + {0: 0.0, 1: 1.25, 2: -3.0}[present[first] + present[second]]

    shares = exact_shapley(symmetric, players)
    assert shares[first] == pytest.approx(shares[second], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(-5, 5))
def test_shapley_of_an_additive_game(gains, offset):
    shares = exact_shapley(
        lambda present: (
            offset + sum(gain for gain, here in zip(gains, present, strict=True) if here)
        ),
        len(gains),
    )
    assert shares == pytest.approx(gains, abs=1e-12)


def test_shapley_glove_game():
    """One left glove, two right gloves: 2/3, 1/6, 1/6 (a textbook case with unequal shares)."""
    shares = exact_shapley(lambda present: float(present[0] and (present[1] or present[2])), 3)
    assert shares == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=1e-15)


def test_shapley_errors():
    with pytest.raises(ValueError, match=r"num_players: 7 .*128 evaluations.*at most 6"):
        exact_shapley(lambda present: pytest.fail("must not be asked"), 7)
    with pytest.raises(ValueError, match="num_players: 0"):
        exact_shapley(lambda present: 0.0, 0)
    with pytest.raises(ValueError, match=r"value: returned nan for the subset \(False, False\)"):
        exact_shapley(lambda present: math.nan, 2)


def test_mean_and_stderr():
    values = [0.1, 0.4, 0.25, 0.9]
    assert mean_and_stderr(values) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1) / 2), abs=1e-15
    )
    assert mean_and_stderr(iter([2.0, 2.0])) == (2.0, 0.0)
    mean, error = mean_and_stderr([0.5])
    assert mean == 0.5 and math.isnan(error)
    with pytest.raises(ValueError, match="^values: there is none"):
        mean_and_stderr([])


# The temperature


@pytest.mark.parametrize("samples, scale", [(1, 1.0), (30, 0.3), (300, 5.0), (2000, 1.0)])
def test_the_temperature_minimises_the_penalised_nll(samples, scale):
    """Against scipy's minimiser of the same objective, written out."""
    log_probabilities, targets = predictions(samples, 4, seed=samples)
    logits = scale * log_probabilities

    def objective(log_t):
        nll = torch.nn.functional.cross_entropy(logits / math.exp(log_t), targets, reduction="sum")
        return nll.item() + log_t**2 / 2

    bounds = (math.log(0.05), math.log(20))
    expected = minimize_scalar(objective, bounds=bounds, options={"xatol": 1e-9}).x
    temperature = fit_temperature(logits, targets)
    assert math.log(temperature) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(scaled(logits, targets), logits / temperature)


def test_the_temperature_stays_in_its_bounds():
    logits = torch.tensor([[1.0, 0.0]]).expand(100_000, 2)
    classes = torch.zeros(100_000, dtype=torch.long)
    assert fit_temperature(0.1 * logits, classes) == pytest.approx(0.05)  # always right, shyly
    assert fit_temperature(1000 * logits, 1 - classes) == pytest.approx(20)  # wrong, and sure
    certain = torch.tensor([[0.0, -math.inf]]).expand(10, 2)
    assert math.isfinite(fit_temperature(certain, classes[:10]))


def test_own_temperatures_count_present_and_clean_rows_alone():
    log_probabilities, targets = predictions(200, 3)
    other = 4 * log_probabilities.flip(0)
    mask = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) < 0.7
    clean = torch.arange(200) % 3 > 0
    logits = [log_probabilities, other]
    for given_mask, given_clean in ((None, None), (mask, None), (None, clean), (mask, clean)):
        expected = []
        for index, values in enumerate(logits):
            rows = torch.ones(200, dtype=torch.bool)
            if given_mask is not None:
                rows &= given_mask[:, index]
            if given_clean is not None:
                rows &= given_clean
            expected.append(fit_temperature(values[rows], targets[rows]))
        found = own_temperatures(logits, targets, given_mask, given_clean)
        assert found.tolist() == expected and found.dtype == torch.float64
    assert own_temperatures(logits, targets, mask & False).tolist() == [1.0, 1.0]

"""Temperatures from labels, from a cross-entropy that is known, and from both."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from iibalance.metrics import entropy_temperature, fit_temperature, own_temperatures


def too_sure(count, times=3.0, seed=0, classes=5):
    """Logits that a temperature of ``times`` calibrates, and labels drawn from what they mean."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return times * logits, targets


def entropy(logits, temperature):
    p = (logits / temperature).softmax(1)
    return float(-(p * p.clamp_min(1e-300).log()).sum(1).mean())


@pytest.mark.parametrize("nats", [0.02, 0.4, 1.0, 1.5])
def test_the_temperature_of_an_entropy_is_that_of_a_search(nats):
    logits, _ = too_sure(200)
    grid = torch.linspace(math.log(0.05), math.log(20.0), 6001, dtype=torch.float64)
    gaps = [abs(entropy(logits, math.exp(value)) - nats) for value in grid]
    expected = math.exp(grid[gaps.index(min(gaps))])
    found = entropy_temperature(logits, nats)
    assert 0.06 < found < 19.9 and found == pytest.approx(expected, rel=2e-3)
    assert entropy(logits, found) == pytest.approx(nats, abs=1e-9)


def test_an_entropy_that_no_temperature_gives_ends_at_the_nearest():
    logits, _ = too_sure(200)
    assert entropy_temperature(logits, math.log(5)) == pytest.approx(20.0)
    assert entropy_temperature(logits, 0.0) == pytest.approx(0.05)
    ruled_out = logits.clone()
    ruled_out[:, 0] = -math.inf
    found = entropy_temperature(ruled_out, 1.0)
    assert entropy(ruled_out, found) == pytest.approx(1.0, abs=1e-9)


def test_a_calibrated_predictions_entropy_is_its_cross_entropy():
    """So what labels would find, their cross-entropy finds without them."""
    logits, targets = too_sure(20_000)
    nats = F.cross_entropy(logits / 3.0, targets).item()
    assert entropy_temperature(logits, nats) == pytest.approx(3.0, rel=0.03)
    assert fit_temperature(logits, targets) == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize(("weight", "around"), [(1.0, 1.0), (10.0, 4.0), (300.0, 0.5)])
def test_the_prior_of_a_temperature_is_around_what_it_is_told(weight, around):
    logits, targets = too_sure(60)

    def objective(log_t):
        loss = F.cross_entropy(logits / math.exp(log_t), targets, reduction="sum")
        return float(loss) + weight * (log_t - math.log(around)) ** 2 / 2

    best = minimize_scalar(objective, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    found = fit_temperature(logits, targets, weight=weight, around=around)
    assert found == pytest.approx(math.exp(best.x), rel=1e-5)


def test_few_labels_leave_the_known_cross_entropy_and_many_outweigh_it():
    logits, targets = too_sure(20_000, times=3.0)
    nats = torch.tensor([1.45])  # it says 7.3 where the labels say 3
    few, many = slice(0, 1), slice(None)  # rows
    for rows, near, far in ((few, "nats", "labels"), (many, "labels", "nats")):
        its = logits[rows]
        says = {
            "nats": entropy_temperature(its, 1.45),
            "labels": fit_temperature(its, targets[rows]),
        }
        (found,) = own_temperatures([its], targets[rows], nats=nats).tolist()
        assert abs(math.log(found / says[near])) < 0.1 < 0.5 < abs(math.log(found / says[far]))
        assert found == pytest.approx(
            fit_temperature(its, targets[rows], weight=10.0, around=says["nats"])
        )


def test_where_nothing_is_known_the_labels_alone_decide():
    logits, targets = too_sure(50)
    expected = fit_temperature(logits, targets)
    found = own_temperatures([logits, logits], targets, nats=torch.tensor([math.nan, 0.8]))
    assert found[0].item() == pytest.approx(expected) != found[1].item()


def test_only_clean_rows_that_have_the_modality_count():
    logits, targets = too_sure(300)
    mask = torch.rand(300, 1, generator=torch.Generator().manual_seed(1)) < 0.5
    clean, nats = torch.arange(300) < 200, torch.tensor([1.0])
    rows = clean & mask[:, 0]
    spoilt = logits.masked_fill(~rows[:, None], math.nan)
    for known in (None, nats):
        assert torch.equal(
            own_temperatures([spoilt], targets, mask, clean, nats=known),
            own_temperatures([logits[rows]], targets[rows], nats=known),
        )
    nobody = torch.zeros_like(mask)  # nothing whose entropy could be looked at
    assert own_temperatures([logits], targets, nobody, nats=nats).tolist() == [1.0]

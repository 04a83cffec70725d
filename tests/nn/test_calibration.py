"""The gate's calibration on held-out predictions: whose temperatures, whose surprise, whose budget.

What is collected is tested in ``tests/methods/test_methods.py``; the fit in ``test_gate_fit.py``.
"""

import math

import pytest
import torch
from gate_data import NAMES, bayes

from iibalance.budgets import budgets_from_logits, label_entropy
from iibalance.config import CalibrationConfig
from iibalance.metrics import entropy_temperature, fit_temperature
from iibalance.nn.calibration import HeldOut, calibrate
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.prototypes import surprise


def held_out(count, scales=(1.0, 1.0), seed=0, missing=0.2, far=8.0):
    """Predictions for clean samples, and for a copy of each with one modality spoilt.

    What is spoilt is another sample's and lies ``far`` away.
    """
    targets, logits = bayes(count, scales, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(count, 2, generator=generator) >= missing
    mask[~mask.any(1)] = True
    novelty = torch.randn(2 * count, 2, 2, generator=generator)
    spoilt = torch.randint(2, (count,), generator=generator)
    for m in (0, 1):
        copy = torch.where(spoilt[:, None] == m, logits[m].roll(1, 0), logits[m])
        logits[m] = torch.cat([logits[m], copy])
        novelty[count:, m] += torch.where(spoilt == m, far, 0.0)[:, None]
    weight = torch.ones(2 * count)
    weight[count:] = 0.5
    clean = torch.arange(2 * count) < count
    return HeldOut(logits, novelty, targets.repeat(2), mask.repeat(2, 1), weight, clean)


def calibrated(out_of_fold, validation, config=None, **options):
    head = IIBalanceHead(dict.fromkeys(NAMES, 3), 4)
    calibrate(head, out_of_fold, validation, config or CalibrationConfig(), **options)
    return head


def test_the_cross_entropies_are_those_of_the_budgets():
    """(1 - b) H(Y), of the same clean predictions."""
    found = held_out(500, scales=(3.0, 0.5))
    clean = found.select(found.clean)
    budgets = budgets_from_logits(dict(zip(NAMES, clean.logits)), clean.targets, mask=clean.mask)
    entropy = label_entropy(clean.targets)
    expected = [(1 - value) * entropy for value in budgets.values]
    assert found.cross_entropies().tolist() == pytest.approx(expected, abs=1e-9)
    assert 0.3 < expected[0] < expected[1] < entropy - 0.1


def test_a_modality_that_was_seen_to_know_nothing_has_no_cross_entropy():
    found = held_out(500)
    found.logits[1].copy_(torch.randn(1000, 4, generator=torch.Generator().manual_seed(5)))
    first, second = found.cross_entropies().tolist()
    assert first < label_entropy(found.targets) - 0.1 and math.isnan(second)
    found.mask[:, 1] = False
    assert math.isnan(found.cross_entropies()[1])


@pytest.mark.parametrize("count", [6, 400])
def test_own_temperatures_heed_the_budget_as_ten_samples_do(count):
    folds, validation = held_out(600, scales=(3.0, 0.5)), held_out(count, (2.0, 1.0), seed=4)
    head, expected = calibrated(folds, validation), []
    clean = folds.select(folds.clean)
    budgets = budgets_from_logits(dict(zip(NAMES, clean.logits)), clean.targets, mask=clean.mask)
    for m, value in enumerate(budgets.values):
        rows = validation.clean & validation.mask[:, m]
        logits, targets = validation.logits[m][rows], validation.targets[rows]
        nats = (1 - value) * label_entropy(clean.targets)
        around = entropy_temperature(logits, nats)
        expected.append(fit_temperature(logits, targets, weight=10.0, around=around))
        if count == 6:
            labels = fit_temperature(logits, targets)
            assert abs(math.log(expected[m] / around)) < abs(math.log(expected[m] / labels))
    assert head.gate.own_temperature.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(head.gate.own_temperature, head.gate.temperature)


def test_without_folds_the_labels_of_validation_decide():
    validation = held_out(200, scales=(3.0, 0.5))
    head = calibrated(None, validation)
    clean = validation.select(validation.clean)
    expected = [
        fit_temperature(values[clean.mask[:, m]], clean.targets[clean.mask[:, m]])
        for m, values in enumerate(clean.logits)
    ]
    assert head.gate.own_temperature.tolist() == pytest.approx(expected, rel=1e-5)


def test_folds_are_read_by_their_own_temperatures_and_their_own_idea_of_what_is_usual():
    """Surer models whose embeddings lie elsewhere make the same gate."""
    folds, validation = held_out(2000), held_out(300, seed=4)
    moved = folds._replace(
        logits=[4.0 * values for values in folds.logits], novelty=3.0 * folds.novelty + 7.0
    )
    one, other = calibrated(folds, validation), calibrated(moved, validation)
    for name in ("trust_offset", "surprise_weight", "log_scale", "own_temperature"):
        torch.testing.assert_close(
            getattr(other.gate, name), getattr(one.gate, name), atol=0.03, rtol=0.02
        )
    assert (one.gate.surprise_weight > 0.2).all()


def test_the_config_says_which_samples_the_gate_is_fitted_on():
    """Out of the folds' nothing is ever unusual, in validation it is."""
    folds, validation = held_out(600, far=0.0), held_out(600, seed=4)
    found = {
        source: calibrated(folds, validation, CalibrationConfig(source=source)).gate
        for source in ("out_of_fold", "validation", "both")
    }
    weights = {source: gate.surprise_weight.min() for source, gate in found.items()}
    assert weights["out_of_fold"] < 0.2 < weights["both"] and weights["validation"] > 0.2
    offsets = {source: gate.trust_offset for source, gate in found.items()}
    assert not torch.allclose(offsets["both"], offsets["validation"], atol=0.05)


def test_a_gate_that_is_told_of_no_surprise_has_no_weight_for_it():
    head = calibrated(held_out(600), held_out(300, seed=4), surprise_scale=0.0)
    assert not head.gate.surprise_weight.any() and head.gate.trust_offset.isfinite().all()


def test_tolerance_and_prior_come_from_the_config():
    folds, validation = held_out(600, far=0.0), held_out(300, seed=4)
    make = lambda **options: calibrated(folds, validation, CalibrationConfig(**options)).gate
    guarded, dear = make(tolerance=0.0).trust_offset, make(tolerance=None).trust_offset
    assert (dear < guarded - 0.5).all()
    narrow = make(tolerance=None, prior_scale=1e-4)
    torch.testing.assert_close(narrow.trust_offset, torch.full((2,), 4.0), atol=0.01, rtol=0)


def test_the_scale_is_that_of_the_joint_models_clean_predictions():
    """Its modalities say the same; those of the folds were independent, so the sum is too sure."""
    folds, validation = held_out(600), held_out(2000, seed=4, missing=0.0)
    validation.logits[1].copy_(validation.logits[0])
    head, clean = calibrated(folds, validation), validation.select(validation.clean)
    far = surprise(clean.novelty, head.prototypes.usual, head.prototypes.spread)
    fused = head.gate(clean.logits, far, clean.mask).logits
    assert fit_temperature(fused, clean.targets) == pytest.approx(1.0, abs=0.03)
    assert head.gate.log_scale.exp() < 0.85

"""What the gate means, whatever its formula.

Neutral before calibration, better after it, and never in the hands of what is missing or corrupted.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from iibalance.metrics import fit_temperature
from iibalance.nn.gate import Gate

NAMES = ["audio", "visual"]
LOG_PRIOR = torch.tensor([0.7, 0.3]).log()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # a new gate network's hidden layer is random


def bayes(count=4000, scales=(1.0, 1.0), seed=0, classes=4):
    """Targets, and per modality the true log-likelihoods of an observation times a scale.

    Temperatures equal to the scales make the sum Bayes' rule.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    logits = []
    for scale, sharpness in zip(scales, (1.2, 0.9)):
        # log p(x | k) = sharpness x_k + constant
        x = sharpness * F.one_hot(targets, classes) + torch.randn(
            count, classes, generator=generator
        )
        logits.append(scale * sharpness * x)
    return targets, logits


def corrupted(count=1500, seed=0):
    """A third is clean; in the others the first or the second modality is another sample's.

    It is as sure as ever, and far from everything seen.
    """
    targets, logits = bayes(count, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    surprise = 0.3 * torch.rand(count, 2, generator=generator)
    kind = torch.arange(count) % 3  # 0 = clean, 1, 2 = corrupted modality + 1
    for m in (0, 1):
        rows = kind == m + 1
        logits[m][rows] = 2 * logits[m][rows].roll(1, 0)
        surprise[rows, m] += 4.0
    return targets, logits, surprise, kind


def nll(gate, targets, logits, *more):
    return F.cross_entropy(gate(logits, *more).logits, targets).item()


def all_values(gate):
    return torch.cat([value.flatten() for value in gate.state_dict().values()])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_neutral_is_the_sum_of_the_available_logits(count):
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(20, 5, generator=generator) for _ in range(count)]
    mask = torch.rand(20, count, generator=generator) < 0.6
    mask[~mask.any(1), 0] = True
    gate = Gate([f"m{index}" for index in range(count)])
    surprise, log_prior = (
        torch.rand(20, count, generator=generator),
        torch.rand(count, generator=generator).log(),
    )
    for given, there in ((None, torch.ones(20, count, dtype=torch.bool)), (mask, mask)):
        out = gate(logits, log_prior, surprise, given)
        expected = sum(values * there[:, m, None] for m, values in enumerate(logits))
        torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.weights, there / there.sum(1, keepdim=True))


def test_a_masked_modality_has_no_say():
    targets, logits, surprise, _ = corrupted(300)
    gate = Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise, log_prior=LOG_PRIOR)
    mask = torch.ones(300, 2, dtype=torch.bool)
    mask[:100, 0], mask[100:200, 1] = False, False
    out = gate(logits, LOG_PRIOR, surprise, mask)
    assert not out.weights[~mask].any() and (out.weights[mask] > 0).all()
    torch.testing.assert_close(out.weights.sum(1), torch.ones(300))
    dirty = [
        values.masked_fill(~mask[:, m, None], fill)
        for m, (values, fill) in enumerate(zip(logits, (math.nan, 1e30)))
    ]
    other = gate(dirty, LOG_PRIOR, surprise.masked_fill(~mask, math.nan), mask)
    assert torch.equal(other.logits, out.logits) and torch.equal(other.weights, out.weights)


def test_one_modality_left_is_that_modality_at_its_temperature():
    """Whoever is left decides alone, neither more nor less surely for the others' absence."""
    _, logits = bayes(50)
    gate = Gate(NAMES)
    gate.log_temperature.copy_(torch.tensor([0.5, -0.2]))
    gate.uncertainty_weight.fill_(2.0)
    out = gate(logits, mask=torch.tensor([[True, False]] * 50))
    torch.testing.assert_close(out.logits, logits[0] / math.exp(0.5), atol=1e-5, rtol=1e-5)


def test_no_modality_is_an_error():
    _, logits = bayes(3)
    with pytest.raises(ValueError, match="mask"):
        Gate(NAMES)(logits, mask=torch.tensor([[True, True], [False, False], [True, False]]))


def test_logits_by_name_or_in_order():
    _, logits = bayes(10)
    gate = Gate(NAMES)
    gate.log_temperature.copy_(torch.tensor([1.0, -1.0]))
    by_name = gate({"visual": logits[1], "audio": logits[0]})
    assert torch.equal(by_name.logits, gate(logits).logits)
    with pytest.raises(ValueError, match="logits: expected the modalities audio, visual"):
        gate({"audio": logits[0], "text": logits[1]})


def test_uncertainty_and_surprise_take_weight_away():
    logits = [torch.tensor([[4.0, 0.0, 0.0], [0.5, 0.0, 0.0]]), torch.tensor([[2.0, 0.0, 0.0]] * 2)]
    gate = Gate(NAMES)
    gate.uncertainty_weight.fill_(3.0)
    weights = gate(logits).weights
    assert weights[0, 0] > 0.5 > weights[1, 0]
    gate.reset()
    gate.surprise_weight.fill_(5.0)
    weights = gate(logits, None, torch.tensor([[0.0, 0.0], [0.6, 0.0]])).weights
    assert weights[0].tolist() == pytest.approx([0.5, 0.5]) and weights[1, 0] < 0.1


def test_the_prior_acts_with_its_strength():
    _, logits = bayes(5)
    gate = Gate(NAMES)
    assert gate(logits, LOG_PRIOR).weights.flatten().tolist() == pytest.approx([0.5] * 10)
    gate.prior_strength.fill_(1.0)
    assert gate(logits, LOG_PRIOR).weights[:, 0].tolist() == pytest.approx([0.7] * 5)


# -- calibration


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 0.5), (0.4, 2.5)])
def test_fit_recovers_the_temperatures_of_scaled_logits(scales):
    targets, logits = bayes(scales=scales)
    gate = Gate(NAMES)
    gate.fit(logits, targets, fit_gating=False)
    assert (gate.temperature[0] / gate.temperature[1]).item() == pytest.approx(
        scales[0] / scales[1], rel=0.15
    )
    test, held = bayes(seed=9, scales=scales)
    oracle = F.cross_entropy(held[0] / scales[0] + held[1] / scales[1], test).item()
    assert nll(gate, test, held) == pytest.approx(oracle, abs=0.005)
    if scales != (1.0, 1.0):
        assert nll(Gate(NAMES), test, held) > oracle + 0.03


def test_fit_lowers_the_nll_of_new_samples_and_says_which_it_reached():
    targets, logits, surprise, _ = corrupted()
    gate = Gate(NAMES)
    before = nll(gate, targets, logits, LOG_PRIOR, surprise)
    final = gate.fit(logits, targets, log_prior=LOG_PRIOR, surprise=surprise)
    assert (
        final == pytest.approx(nll(gate, targets, logits, LOG_PRIOR, surprise), abs=1e-4)
        and final < before - 0.1
    )
    test, held, far, _ = corrupted(seed=5)
    assert nll(gate, test, held, LOG_PRIOR, far) < nll(Gate(NAMES), test, held) - 0.1


def test_a_corrupted_modality_loses_its_weight_to_surprise():
    targets, logits, surprise, kind = corrupted()
    gate, blind = Gate(NAMES), Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise)
    blind.fit(logits, targets)  # uncertainty alone cannot tell
    test, held, far, kind = corrupted(seed=5)
    weights = gate(held, None, far).weights
    for m in (0, 1):
        assert (
            weights[kind == m + 1, m].mean() < 0.5 * weights[kind == 0, m].mean()
            and weights[kind == m + 1, m].mean() < 0.25
        )
    right = lambda fused: (fused.logits.argmax(1) == test)[kind > 0].float().mean().item()
    assert right(gate(held, None, far)) > max(right(Gate(NAMES)(held)), right(blind(held))) + 0.05


def test_fit_is_deterministic_and_starts_over():
    targets, logits, surprise, _ = corrupted(300)
    torch.manual_seed(0)
    one = Gate(NAMES)
    two = Gate(NAMES)
    two.load_state_dict(one.state_dict())
    one.fit(logits, targets, surprise=surprise)
    two.fit([values.flip(0) for values in logits], targets)  # whatever an earlier fit left
    two.fit(logits, targets, surprise=surprise)
    assert torch.equal(all_values(one), all_values(two)) and all_values(one).isfinite().all()


def test_five_samples_leave_the_gate_close_to_neutral():
    """Where a fit without the prior goes astray."""
    test, held = bayes(1000, seed=99)
    typical, neutral = torch.full((1000, 2), 0.15), nll(Gate(NAMES), test, held)
    excess = {1.0: [], 1e3: []}
    for seed in range(10):
        targets, logits, surprise, _ = corrupted(5, seed=seed)
        for prior_scale, values in excess.items():
            gate = Gate(NAMES)
            try:
                gate.fit(
                    logits, targets, log_prior=LOG_PRIOR, surprise=surprise, prior_scale=prior_scale
                )
                values.append(nll(gate, test, held, LOG_PRIOR, typical) - neutral)
            except ValueError:
                values.append(math.inf)
    assert sum(excess[1.0]) / 10 < 0.4 and max(excess[1.0]) < 0.8, excess[1.0]
    assert sorted(excess[1e3])[7] > 1.0, excess[1e3]


def test_a_single_sample_predicted_right_does_not_send_the_temperature_to_zero():
    gate = Gate(["only"])
    gate.fit([torch.tensor([[3.0, 0.0]])], torch.tensor([0]))
    assert 0.7 < gate.temperature.item() <= 1.0


def test_a_narrow_prior_stays_neutral_but_for_the_temperatures():
    targets, logits, surprise, _ = corrupted(500)
    wide, narrow = Gate(NAMES), Gate(NAMES)
    wide.fit(logits, targets, surprise=surprise)
    narrow.fit(logits, targets, surprise=surprise, prior_scale=1e-4)
    assert narrow.surprise_weight.abs().max() < 0.01 < 0.3 < wide.surprise_weight.abs().max()
    assert (
        torch.equal(narrow.log_temperature, wide.log_temperature) and narrow.log_temperature.any()
    )


def test_temperatures_calibrate_each_modality_by_itself_on_clean_rows():
    targets, logits, surprise, kind = corrupted(900)
    gate = Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise, clean=kind == 0)
    rows = kind == 0
    assert gate.temperature.tolist() == pytest.approx(
        [fit_temperature(values[rows], targets[rows]) for values in logits], rel=1e-5
    )
    kept = torch.tensor([0.5, 2.0])
    gate.fit(logits, targets, surprise=surprise, temperature=kept)
    torch.testing.assert_close(gate.temperature, kept)


def test_the_scale_moves_towards_new_samples_by_as_much_as_they_weigh():
    targets, logits = bayes(400)
    before, much, little = Gate(NAMES), Gate(NAMES), Gate(NAMES)
    for gate, weight in ((much, 1.0), (little, 1e6)):
        gate.log_temperature.fill_(-1.0)  # far too sure
        gate.fit_scale(logits, targets, weight=weight)
    before.log_temperature.fill_(-1.0)
    assert abs(little.log_scale) < 0.01 and much.log_scale == pytest.approx(-1.0, abs=0.1)
    assert nll(much, targets, logits) < nll(before, targets, logits) - 0.1


def test_a_kept_prior_strength_is_kept():
    targets, logits, surprise, _ = corrupted(300)
    gate = Gate(NAMES)
    gate.fit(
        logits,
        targets,
        surprise=surprise,
        log_prior=LOG_PRIOR,
        fit_gating=False,
        prior_strength=1.0,
    )
    assert gate.prior_strength == 1.0 and not gate.surprise_weight.any()
    torch.testing.assert_close(
        gate(logits, LOG_PRIOR, surprise).weights[0], torch.tensor([0.7, 0.3])
    )


def test_a_weight_counts_like_copies():
    targets, logits, surprise, _ = corrupted(200)
    weighted, copied = Gate(NAMES), Gate(NAMES)
    weight = torch.where(torch.arange(200) < 50, 3.0, 1.0)
    rows = torch.arange(200).repeat_interleave(weight.long())
    ones = torch.ones(2)
    weighted.fit(logits, targets, surprise=surprise, sample_weight=weight, temperature=ones)
    copied.fit(
        [values[rows] for values in logits],
        targets[rows],
        surprise=surprise[rows],
        temperature=ones,
    )
    torch.testing.assert_close(all_values(weighted), all_values(copied), atol=2e-3, rtol=1e-2)
    plain = Gate(NAMES)
    plain.fit(logits, targets, surprise=surprise, temperature=ones)
    assert (all_values(plain) - all_values(weighted)).abs().max() > 0.01


def test_only_temperatures_and_scale_without_gating():
    targets, logits, surprise, _ = corrupted(300)
    gate = Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise, log_prior=LOG_PRIOR, fit_gating=False)
    assert (
        not gate.uncertainty_weight.any()
        and not gate.surprise_weight.any()
        and not gate.prior_strength.any()
        and gate.log_temperature.any()
    )


def test_a_fit_that_fails_changes_nothing():
    targets, logits = bayes(100)
    gate = Gate(NAMES)
    gate.fit(logits, targets)
    before = all_values(gate)
    logits[0][3, 2] = math.nan
    with pytest.raises(ValueError, match="logits: the calibration did not converge"):
        gate.fit(logits, targets)
    assert torch.equal(all_values(gate), before)


def test_half_precision_logits_are_fitted_in_float64():
    targets, logits = bayes(500, scales=(3.0, 0.5))
    whole, half = Gate(NAMES), Gate(NAMES)
    rounded = [values.half() for values in logits]
    whole.fit([values.float() for values in rounded], targets)
    half.fit(rounded, targets)
    assert torch.equal(all_values(whole), all_values(half))


def test_saved_and_loaded():
    targets, logits, surprise, _ = corrupted(300)
    gate, other = Gate(NAMES), Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise, log_prior=LOG_PRIOR)
    other.load_state_dict(gate.state_dict())
    expected, got = gate(logits, LOG_PRIOR, surprise), other(logits, LOG_PRIOR, surprise)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.weights, expected.weights)
    assert not torch.allclose(Gate(NAMES)(logits).logits, expected.logits, atol=0.1)


def test_reset_is_neutral_again():
    targets, logits, surprise, _ = corrupted(300)
    gate = Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise, log_prior=LOG_PRIOR)
    gate.reset()
    torch.testing.assert_close(gate(logits, LOG_PRIOR, surprise).logits, logits[0] + logits[1])


def test_nothing_in_the_gate_is_trained_by_an_optimiser():
    assert not any(p.requires_grad for p in Gate(NAMES).parameters())

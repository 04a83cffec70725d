"""The calibration of the gate by MAP: what it minimises, what it gains, and what it may cost."""

import math

import pytest
import torch
from gate_data import NAMES, accuracy, all_values, bayes, corrupted, nll, with_liars
from torch.nn import functional as F

from iibalance.metrics import fit_temperature
from iibalance.nn.gate import HEDGES, OFFSET, WHOLE, WIDTHS, Gate


def fused_by_hand(values, logits, surprise, temperature):
    """f [N, K] float64 of the packed parameters (a, xi, log scale)."""
    offset, weight, log_scale = values[:2], values[2:4], values[4]
    trust = torch.sigmoid(offset - weight.clamp_min(0) * surprise)
    said = [
        torch.log(
            trust[:, m, None] * (rows / temperature[m]).softmax(1) + (1 - trust[:, m, None]) / 4
        )
        for m, rows in enumerate(logits)
    ]
    return log_scale.exp() * (said[0] + said[1])


def objective_by_hand(values, logits, targets, surprise, temperature, weight, prior_scale=1.0):
    """Mean NLL of the weighted rows with the Gaussian prior, which counts as one row."""
    losses = F.cross_entropy(
        fused_by_hand(values, logits, surprise, temperature), targets, reduction="none"
    )
    centre = torch.tensor([OFFSET, OFFSET, 0.0, 0.0, 0.0], dtype=torch.float64)
    width = [WIDTHS[name] for name in ("trust_offset", "surprise_weight", "log_scale")]
    width = torch.tensor([width[0], width[0], width[1], width[1], width[2]], dtype=torch.float64)
    penalty = (((values - centre) / (width * prior_scale)) ** 2).sum() / 2
    return ((weight * losses).sum() + penalty) / weight.sum()


def best_by_hand(*data, prior_scale=1.0):
    """What minimises it, by plain gradient descent from several starts (Adam, then halving)."""
    found = []
    for offset, weight in ((OFFSET, 0.5), (1.0, 2.0)):
        start = torch.tensor([offset, offset, weight, weight, 0.0], dtype=torch.float64)
        values = start.requires_grad_(True)
        optimizer = torch.optim.Adam([values], lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
        for _ in range(600):
            optimizer.zero_grad()
            loss = objective_by_hand(values, *data, prior_scale=prior_scale)
            loss.backward()
            optimizer.step()
            schedule.step()
        found.append((float(loss.detach()), values.detach()))
    return min(found, key=lambda pair: pair[0])


def packed(gate):
    return (
        torch.cat([gate.trust_offset, gate.surprise_weight, gate.log_scale[None]]).detach().double()
    )


@pytest.mark.parametrize("prior_scale", [1.0, 0.3])
def test_what_is_minimised_is_the_objective_written_by_hand(prior_scale):
    targets, logits, surprise, _ = corrupted(300)
    weight = 0.5 + torch.arange(300) % 3
    temperature = torch.tensor([0.8, 1.3])
    gate = Gate(NAMES)
    gate.fit(
        logits,
        targets,
        surprise=surprise,
        sample_weight=weight,
        temperature=temperature,
        prior_scale=prior_scale,
    )
    data = (
        [values.double() for values in logits],
        targets,
        surprise.double(),
        temperature.double(),
        weight.double(),
    )
    least, values = best_by_hand(*data, prior_scale=prior_scale)
    reached = float(objective_by_hand(packed(gate), *data, prior_scale=prior_scale))
    assert reached == pytest.approx(least, abs=1e-6)
    torch.testing.assert_close(packed(gate), values, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(gate.temperature, temperature)


def hedged(targets, logits, clean, hedge):
    """A gate fitted by hand with so much of the corrupted rows, and its clean NLL."""
    gate = Gate(NAMES)
    rows = clean if hedge == 0 else slice(None)
    weight = torch.where(clean, 1.0, hedge)[rows]
    temperature = [fit_temperature(values[clean], targets[clean]) for values in logits]
    gate.fit(
        [values[rows] for values in logits],
        targets[rows],
        sample_weight=weight,
        temperature=torch.tensor(temperature),
    )
    return gate, nll(gate, targets[clean], [values[clean] for values in logits])


def test_the_hedge_is_the_largest_that_costs_no_more_than_allowed():
    """Every hedge is the answer to some tolerance, and none that is too dear is taken."""
    targets, logits = bayes(300, sharpness=(3.0, 1.0))
    logits, targets, clean = with_liars(targets, logits)
    hands = [hedged(targets, logits, clean, hedge) for hedge in HEDGES]
    costs = [cost for _, cost in hands]
    assert HEDGES == (1.0, 0.3, 0.1, 0.0) and costs == sorted(costs, reverse=True)
    assert min(a - b for a, b in zip(costs, costs[1:])) > 0.001
    for index, cost in enumerate(costs):
        over = (cost - costs[-1]) / (costs[-1] + 1 / 6)  # the tolerance at which it is just allowed
        tolerances = [over + 1e-3] if index else [over + 1e-3, 10.0, None]
        for tolerance in tolerances:
            gate = Gate(NAMES)
            gate.fit(logits, targets, clean=clean, tolerance=tolerance)
            torch.testing.assert_close(packed(gate), packed(hands[index][0]), atol=2e-3, rtol=2e-3)
        if index < len(costs) - 1:  # a little less, and the next is taken
            gate = Gate(NAMES)
            gate.fit(logits, targets, clean=clean, tolerance=over - 1e-3)
            torch.testing.assert_close(
                packed(gate), packed(hands[index + 1][0]), atol=2e-3, rtol=2e-3
            )


def test_the_final_nll_is_that_of_all_rows_by_their_whole_weight():
    targets, logits = bayes(200, sharpness=(3.0, 1.0))
    logits, targets, clean = with_liars(targets, logits)
    weight, gate = torch.where(clean, 1.0, 0.5), Gate(NAMES)
    final = gate.fit(logits, targets, clean=clean, sample_weight=weight, tolerance=0.0)
    losses = F.cross_entropy(gate(logits).logits, targets, reduction="none")
    assert final == pytest.approx(float((weight * losses).sum() / weight.sum()), abs=1e-5)
    assert final > float(losses[clean].mean()) + 0.1


@pytest.mark.parametrize("sharpness", [(5.0, 1.0), (4.0, 0.7)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_one_modality_is_nearly_always_right_the_guard_costs_next_to_nothing(sharpness, seed):
    """At most 0.01 nats and 0.1 points of clean input, which it would cost without tolerance."""
    data = {"classes": 10, "sharpness": sharpness}
    targets, logits = bayes(600, seed=seed, **data)
    test, held = bayes(4000, seed=seed + 1000, **data)
    logits, targets, clean = with_liars(targets, logits, seed + 100)
    plain, gate, dear = Gate(NAMES), Gate(NAMES), Gate(NAMES)
    assert accuracy(plain, test, [held[0], 0 * held[1]]) > 0.98  # of the strong one alone
    gate.fit(logits, targets, clean=clean, tolerance=0.03)
    dear.fit(logits, targets, clean=clean, tolerance=None)
    # Bayes' rule is the plain sum here: nothing does better but by chance.
    least = nll(plain, test, held)
    assert nll(gate, test, held) < least + 0.01 < least + 0.1 < nll(dear, test, held)
    assert accuracy(gate, test, held) > accuracy(plain, test, held) - 0.001


# -- what is gained


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
    before = nll(gate, targets, logits, surprise)
    final = gate.fit(logits, targets, surprise=surprise)
    assert final == pytest.approx(nll(gate, targets, logits, surprise), abs=1e-4)
    assert final < before - 0.1
    test, held, far, _ = corrupted(seed=5)
    assert nll(gate, test, held, far) < nll(Gate(NAMES), test, held) - 0.1


def test_a_corrupted_modality_loses_its_trust_to_surprise():
    targets, logits, surprise, kind = corrupted()
    gate, blind = Gate(NAMES), Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise)
    blind.fit(logits, targets)
    test, held, far, kind = corrupted(seed=5)
    trust = gate(held, far).trust
    for m in (0, 1):
        assert trust[kind == 0, m].mean() > 0.75 and trust[kind == m + 1, m].mean() < 0.2
        assert trust[kind == 2 - m, m].mean() > 0.7  # beside the corrupted one
    dirty = kind > 0
    right = lambda fused: (fused.logits.argmax(1) == test)[dirty].double().mean().item()
    assert right(gate(held, far)) > max(right(Gate(NAMES)(held)), right(blind(held))) + 0.05


@pytest.mark.parametrize(("tolerance", "drop"), [(0.03, 0.05), (None, 0.2)])
def test_a_liar_that_looks_as_usual_loses_trust_by_contradicting(tolerance, drop):
    """No surprise tells of it: the trust is that after all predictions are known."""
    gate, nothing = Gate(NAMES), torch.zeros(2000, 2)
    targets, logits = bayes(600, sharpness=(2.5, 2.0))
    logits, targets, clean = with_liars(targets, logits)
    gate.fit(logits, targets, surprise=torch.zeros(1200, 2), clean=clean, tolerance=tolerance)
    test, held = bayes(2000, seed=7, sharpness=(2.5, 2.0))
    usual, lies = gate(held, nothing).trust, test != test.roll(1)
    for m in (0, 1):
        swapped = [values.roll(1, 0) if index == m else values for index, values in enumerate(held)]
        trust = gate(swapped, nothing).trust[:, m]
        assert trust.mean() < trust[~lies].mean() - drop / 2
        assert trust[lies].mean() < usual[:, m].mean() - drop
        # Another sample of the same class tells the truth, and is believed.
        assert trust[~lies].mean().item() == pytest.approx(usual[:, m].mean().item(), abs=0.01)


# -- how it is fitted


def test_fit_is_deterministic_and_starts_over():
    targets, logits, surprise, _ = corrupted(300)
    one, two = Gate(NAMES), Gate(NAMES)
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
                gate.fit(logits, targets, surprise=surprise, prior_scale=prior_scale)
                values.append(nll(gate, test, held, typical) - neutral)
            except ValueError:
                values.append(math.inf)
    assert sum(excess[1.0]) / 10 < 0.4 and max(excess[1.0]) < 0.8, excess[1.0]
    assert sorted(excess[1e3])[7] > 1.0, excess[1e3]


def test_a_single_sample_predicted_right_does_not_send_the_temperature_to_zero():
    gate = Gate(["only"])
    gate.fit([torch.tensor([[3.0, 0.0]])], torch.tensor([0]))
    assert 0.7 < gate.temperature.item() <= 1.0


def test_a_modality_by_itself_is_trusted_wholly():
    targets, (logits, _) = bayes(300)
    gate = Gate(["only"])
    gate.fit([logits], targets, surprise=9 * torch.rand(300, 1))
    assert gate.trust_offset.item() == WHOLE and not gate.surprise_weight.any()
    torch.testing.assert_close(
        gate([logits]).logits.softmax(1), (logits / gate.temperature).softmax(1)
    )


def test_a_narrow_prior_stays_at_its_mean_but_for_the_temperatures():
    targets, logits, surprise, _ = corrupted(500)
    wide, narrow = Gate(NAMES), Gate(NAMES)
    wide.fit(logits, targets, surprise=surprise)
    narrow.fit(logits, targets, surprise=surprise, prior_scale=1e-4)
    assert narrow.surprise_weight.abs().max() < 0.01 < 0.3 < wide.surprise_weight.abs().max()
    assert (narrow.trust_offset - OFFSET).abs().max() < 0.01 and narrow.log_scale.abs() < 0.01
    trust = torch.sigmoid(narrow.trust_offset)
    assert trust.tolist() == pytest.approx([0.982, 0.982], abs=1e-3)
    assert torch.equal(narrow.log_temperature, wide.log_temperature)
    assert narrow.log_temperature.any()


def test_temperatures_calibrate_each_modality_by_itself_on_clean_rows():
    targets, logits, surprise, kind = corrupted(900)
    gate, rows = Gate(NAMES), kind == 0
    gate.fit(logits, targets, surprise=surprise, clean=rows)
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


def test_a_weight_counts_like_copies():
    targets, logits, surprise, _ = corrupted(200)
    weighted, copied = Gate(NAMES), Gate(NAMES)
    weight = torch.where(torch.arange(200) < 50, 3.0, 1.0)
    rows, ones = torch.arange(200).repeat_interleave(weight.long()), torch.ones(2)
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
    gate.fit(logits, targets, surprise=surprise, fit_gating=False, tolerance=0.03)
    assert (gate.trust_offset == WHOLE).all() and not gate.surprise_weight.any()
    assert gate.log_temperature.all() and gate.log_scale != 0
    torch.testing.assert_close(gate(logits, surprise).trust, torch.ones(300, 2))


def test_masked_rows_of_a_fit_may_hold_anything():
    targets, logits, surprise, _ = corrupted(300)
    mask = torch.ones(300, 2, dtype=torch.bool)
    mask[::5, 0] = mask[1::5, 1] = False
    clean, dirty = Gate(NAMES), Gate(NAMES)
    clean.fit(logits, targets, surprise=surprise, mask=mask)
    spoilt = [values.masked_fill(~mask[:, m, None], math.nan) for m, values in enumerate(logits)]
    dirty.fit(spoilt, targets, surprise=surprise.masked_fill(~mask, math.nan), mask=mask)
    assert torch.equal(all_values(clean), all_values(dirty))


def test_a_fit_that_fails_changes_nothing():
    targets, logits = bayes(100)
    gate = Gate(NAMES)
    gate.fit(logits, targets)
    before = all_values(gate)
    logits[0][3, 2] = math.nan
    for tolerance in (None, 0.03):
        with pytest.raises(ValueError, match="logits: the calibration did not converge"):
            gate.fit(logits, targets, clean=torch.arange(100) < 50, tolerance=tolerance)
        assert torch.equal(all_values(gate), before)


def test_half_precision_logits_are_fitted_in_float64():
    targets, logits = bayes(500, scales=(3.0, 0.5))
    whole, half = Gate(NAMES), Gate(NAMES)
    rounded = [values.half() for values in logits]
    whole.fit([values.float() for values in rounded], targets)
    half.fit(rounded, targets)
    assert torch.equal(all_values(whole), all_values(half))


def test_reset_is_neutral_again():
    targets, logits, surprise, _ = corrupted(300)
    gate = Gate(NAMES)
    gate.fit(logits, targets, surprise=surprise)
    gate.reset()
    out = gate(logits, surprise)
    torch.testing.assert_close(out.logits.softmax(1), (logits[0] + logits[1]).softmax(1))
    torch.testing.assert_close(out.trust, torch.ones(300, 2))

"""What each modality adds to the log-odds of the prediction: exact, and 0 for what is missing."""

import itertools
import math

import pytest
import torch

from iibalance.errors import InputError
from iibalance.nn.contributions import contributions, log_odds
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import MultimodalClassifier

DIMS = {"a": 4, "b": 3, "c": 5}
RATE = torch.tensor([0.1, 0.2, 0.3, 0.4])


@pytest.fixture(scope="module")
def case():
    """A head with a gate that is anything but neutral, embeddings, and a mask."""
    torch.manual_seed(0)
    head = IIBalanceHead(DIMS, 4)
    draw = lambda count: [2 * torch.randn(count, size) for size in DIMS.values()]
    head(draw(60), torch.arange(60) % 4)  # prototypes
    head.prototypes.set_usual(head.prototypes.novelty(draw(60)).detach())
    head.gate.log_temperature.copy_(torch.tensor([0.3, -0.4, 0.1]))
    head.gate.trust_offset.copy_(torch.tensor([1.0, 2.0, 3.0]))
    head.gate.surprise_weight.copy_(torch.tensor([1.0, 0.5, 2.0]))
    head.gate.log_scale.fill_(-0.2)
    mask = torch.rand(40, 3) < 0.7
    mask[~mask.any(1), 0] = True
    return head.eval(), draw(40), mask


def odds(p):
    return p.log() - (1 - p).log()


def test_a_row_sums_to_the_log_odds_gained_over_the_base_rate(case):
    head, embeddings, mask = case
    found = contributions(head, embeddings, mask, RATE)
    assert found.dtype == torch.float64 and found.shape == (40, 3)
    p, best = head.fuse(embeddings, mask).logits.double().softmax(1).max(1)
    gained = odds(p) - odds(RATE.double())[best]
    torch.testing.assert_close(found.sum(1), gained.detach(), atol=1e-6, rtol=1e-6)
    assert gained.min() < gained.max() - 1 and best.unique().numel() == 4


def test_they_are_shapley_values_over_all_orders(case):
    """The mean over all orders of what a modality adds when it comes."""
    head, embeddings, mask = case
    best = head.fuse(embeddings, mask).logits.argmax(1)

    def value(row, names):
        there = torch.tensor([[m in names and bool(mask[row, m]) for m in range(3)]])
        if not there.any():
            return float(odds(RATE.double())[best[row]])
        logits = head.fuse([values[row : row + 1] for values in embeddings], there).logits
        return float(odds(logits.detach().double().softmax(1)[0, best[row]]))

    found = contributions(head, embeddings, mask, RATE)
    for row in range(8):
        expected = [0.0, 0.0, 0.0]
        for order in itertools.permutations(range(3)):
            for place, m in enumerate(order):
                before, after = order[:place], order[: place + 1]
                expected[m] += (value(row, after) - value(row, before)) / 6
        assert found[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_what_is_missing_adds_nothing_and_may_hold_anything(case):
    head, embeddings, mask = case
    found = contributions(head, embeddings, mask, RATE)
    assert (found[~mask] == 0).all() and (found[mask] != 0).all() and (~mask).sum() > 20
    whole = contributions(head, embeddings, torch.ones_like(mask), RATE)
    assert (found - whole).abs()[~mask].mean() > 0.1
    spoilt = [
        values.masked_fill(~mask[:, m, None], math.nan) for m, values in enumerate(embeddings)
    ]
    assert torch.equal(contributions(head, spoilt, mask, RATE), found)


def test_what_speaks_against_the_prediction_takes_from_it():
    head = IIBalanceHead({"a": 3, "b": 3}, 3).eval()
    for classifier in head.classifiers:
        torch.nn.init.eye_(classifier.weight)
        torch.nn.init.zeros_(classifier.bias)
    embeddings = [torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])]
    equal = torch.full((3,), 1 / 3)
    for_it, against = contributions(head, embeddings, torch.ones(1, 2) > 0, equal)[0].tolist()
    # By hand: log-odds of class 0 of each by itself, and of both
    alone, other = 4 - math.log(2), -math.log(math.e + 1)
    both = 4 - math.log(math.e + 1)
    empty = -math.log(2)
    assert for_it == pytest.approx(((alone - empty) + (both - other)) / 2, abs=1e-6)
    assert against == pytest.approx(((other - empty) + (both - alone)) / 2, abs=1e-6)
    assert against < -0.1 < 3 < for_it


def test_log_odds_are_finite_where_a_class_is_certain_or_ruled_out():
    logits = torch.tensor([[0.0, -math.inf], [500.0, 0.0], [1.0, 0.5]])
    found = [log_odds(logits, torch.tensor([[k]] * 3)).tolist() for k in (0, 1)]
    assert found == [[100.0, 100.0, 0.5], [-100.0, -100.0, -0.5]]
    head = IIBalanceHead({"a": 2, "b": 2}, 2).eval()
    embeddings = [torch.randn(6, 2), torch.randn(6, 2)]
    never = torch.tensor([1.0, 0.0])  # a class that training does not have
    assert contributions(head, embeddings, torch.ones(6, 2) > 0, never).isfinite().all()


def test_seven_modalities_are_too_many_and_a_prediction_goes_without():
    names = [f"m{index}" for index in range(7)]
    head = IIBalanceHead(dict.fromkeys(names, 2), 2).eval()
    embeddings = [torch.randn(3, 2)] * 7
    with pytest.raises(InputError, match="X: 7 modalities have 128 subsets; .* at most 6"):
        contributions(head, embeddings, torch.ones(3, 7) > 0, torch.tensor([0.5, 0.5]))
    model = MultimodalClassifier({name: torch.nn.Linear(2, 2) for name in names}, 2)
    found = model.predict({name: torch.randn(3, 2) for name in names})
    assert found.contributions is None and found.trust.shape == (3, 7)


def test_a_model_compares_with_the_base_rate_that_it_keeps(tmp_path):
    torch.manual_seed(0)
    make = lambda rate: MultimodalClassifier({"a": torch.nn.Linear(3, 4)}, 4, base_rate=rate)
    model, batch = make(RATE), {"a": torch.randn(9, 3)}
    other = make(None)
    assert other.base_rate.tolist() == [0.25] * 4
    other.load_state_dict(model.state_dict())
    for kept in (model, other):
        p, best = kept.predict(batch).probabilities.double().max(1)
        torch.testing.assert_close(
            kept.predict(batch).contributions[:, 0],
            odds(p) - odds(RATE.double())[best],
            atol=1e-5,
            rtol=1e-5,
        )

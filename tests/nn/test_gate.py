"""What the gate means: neutral before calibration, and a trust that bounds what each can say."""

import copy
import json
import math
import pickle

import pytest
import torch
from gate_data import NAMES, bayes, corrupted

from iibalance.files import read_model, write_model
from iibalance.nn.contributions import contributions
from iibalance.nn.gate import OFFSET, WHOLE, Gate
from iibalance.nn.head import IIBalanceHead


def set_gate(temperature=(0.5, 2.0), offset=(1.0, 3.0), weight=(2.0, 0.5), log_scale=0.2):
    gate = Gate(NAMES)
    gate.log_temperature.copy_(torch.tensor(temperature).log())
    gate.trust_offset.copy_(torch.tensor(offset))
    gate.surprise_weight.copy_(torch.tensor(weight))
    gate.log_scale.fill_(log_scale)
    return gate


def by_hand(gate, logits, surprise, mask):
    """f and the trust, a sample, class and modality at a time, in plain numbers."""
    count, classes = logits[0].shape
    fused = [[0.0] * classes for _ in range(count)]
    trust = [[0.0] * len(logits) for _ in range(count)]
    for i in range(count):
        shares = {}
        for m, values in enumerate(logits):
            if not mask[i, m]:
                continue
            scores = [float(v) / float(gate.temperature[m]) for v in values[i]]
            total = sum(math.exp(score) for score in scores)
            slope = max(float(gate.surprise_weight[m]), 0.0)
            v = float(gate.trust_offset[m]) - slope * float(surprise[i, m])
            r = 1 / (1 + math.exp(-v))
            for k, score in enumerate(scores):
                told = r * math.exp(score) / total
                fused[i][k] += math.exp(float(gate.log_scale)) * math.log(told + (1 - r) / classes)
                shares[m, k] = told / (told + (1 - r) / classes)
        belief = [math.exp(f) for f in fused[i]]
        for (m, k), share in shares.items():
            trust[i][m] += belief[k] / sum(belief) * share
    return torch.tensor(fused), torch.tensor(trust)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_neutral_is_the_softmax_of_the_summed_logits_of_what_is_there(count):
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(20, 5, generator=generator) for _ in range(count)]
    mask = torch.rand(20, count, generator=generator) < 0.6
    mask[~mask.any(1), 0] = True
    gate = Gate([f"m{index}" for index in range(count)])
    surprise = 9 * torch.rand(20, count, generator=generator)
    for given, there in ((None, torch.ones(20, count, dtype=torch.bool)), (mask, mask)):
        out = gate(logits, surprise, given)
        total = sum(values * there[:, m, None] for m, values in enumerate(logits))
        torch.testing.assert_close(out.logits.softmax(1), total.softmax(1))
        torch.testing.assert_close(out.trust, there.float())
        assert not out.trust[~there].any()


def test_the_formula_by_hand():
    generator = torch.Generator().manual_seed(3)
    logits = [2 * torch.randn(12, 4, generator=generator) for _ in range(2)]
    surprise, mask = 2 * torch.rand(12, 2, generator=generator), torch.ones(12, 2) > 0
    mask[:3, 0] = mask[3:6, 1] = False
    for weight in ((2.0, 0.5), (2.0, -1.5)):  # surprise never earns trust
        gate = set_gate(weight=weight)
        out = gate(logits, surprise, mask)
        fused, trust = by_hand(gate, logits, surprise, mask)
        torch.testing.assert_close(out.logits, fused, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.trust, trust, atol=1e-5, rtol=1e-5)


def test_what_is_masked_has_no_trust_and_may_hold_anything():
    _, logits, surprise, _ = corrupted(300)
    gate, mask = set_gate(), torch.ones(300, 2, dtype=torch.bool)
    mask[:100, 0], mask[100:200, 1] = False, False
    out = gate(logits, surprise, mask)
    assert not out.trust[~mask].any() and (out.trust[mask] > 0).all()
    for fill in (math.nan, math.inf, 1e30):
        dirty = [values.masked_fill(~mask[:, m, None], fill) for m, values in enumerate(logits)]
        other = gate(dirty, surprise.masked_fill(~mask, fill), mask)
        assert torch.equal(other.logits, out.logits) and torch.equal(other.trust, out.trust)


def test_one_modality_left_is_its_own_prediction_as_far_as_it_is_trusted():
    """Neither more nor less sure for the others' absence, and never surer than its trust."""
    _, logits = bayes(50)
    gate, mask = set_gate(log_scale=0.0), torch.tensor([[True, False]] * 50)
    surprise = torch.linspace(0, 3, 50)[:, None].expand(50, 2)
    found = gate([100 * logits[0], logits[1]], surprise, mask).logits.softmax(1)
    trust = (1.0 - 2.0 * surprise[:, 0]).sigmoid()
    own = (100 * logits[0] / 0.5).softmax(1)
    torch.testing.assert_close(found, trust[:, None] * own + (1 - trust[:, None]) / 4)
    bound = trust + (1 - trust) / 4
    assert (found.amax(1) <= bound + 1e-6).all()
    assert (found.amax(1)[own.amax(1) > 0.999] - bound[own.amax(1) > 0.999]).abs().max() < 1e-3


def test_the_sure_and_wrong_one_is_outvoted_where_it_is_not_trusted():
    logits = [torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])]
    assert Gate(NAMES)(logits).logits.argmax() == 0
    gate = set_gate(temperature=(1.0, 1.0), offset=(4.0, 4.0), weight=(1.0, 1.0))
    assert gate(logits, torch.zeros(1, 2)).logits.argmax() == 0
    assert gate(logits, torch.tensor([[4.0, 0.0]])).logits.argmax() == 1


def test_trust_falls_with_surprise_and_with_contradiction():
    logits = [torch.tensor([[3.0, 0.0, 0.0]] * 4), torch.tensor([[3.0, 0.0, 0.0]] * 4)]
    surprise = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    gate = set_gate(temperature=(1.0, 1.0), weight=(1.0, 1.0))
    trust = gate(logits, surprise).trust
    assert (trust[1:, 0] < trust[:-1, 0] - 0.05).all()
    other = [logits[0], torch.tensor([[0.0, 3.0, 0.0]] * 4)]
    assert (gate(other, surprise).trust[:, 0] < trust[:, 0] - 0.05).all()


def test_what_tells_nothing_keeps_the_trust_that_it_came_with():
    logits = [torch.zeros(1, 3), torch.tensor([[3.0, 0.0, 0.0]])]
    trust = set_gate(offset=(1.0, 3.0), log_scale=0.0)(logits).trust
    assert trust[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-6)


@pytest.mark.parametrize("offset", [-4.0, 0.0, OFFSET, WHOLE])
def test_a_useless_modality_adds_nothing_whatever_its_trust(offset):
    """Logits that do not depend on the class: the same prediction, and contributions of 0."""
    torch.manual_seed(0)
    head = IIBalanceHead({"audio": 5, "visual": 5}, 4).eval()
    torch.nn.init.zeros_(head.classifiers[1].weight)
    head.classifiers[1].bias.data.fill_(0.7)
    head.gate.trust_offset.copy_(torch.tensor([OFFSET, offset]))
    embeddings, mask = [3 * torch.randn(40, 5), torch.randn(40, 5)], torch.ones(40, 2) > 0
    alone = head.fuse(embeddings, torch.tensor([[True, False]] * 40)).logits.softmax(1)
    torch.testing.assert_close(head.fuse(embeddings, mask).logits.softmax(1), alone)
    found = contributions(head, embeddings, mask, torch.full((4,), 0.25))
    assert found[:, 1].abs().max() < 1e-5 and found[:, 0].abs().mean() > 1.0


def test_own_predictions_take_their_own_temperatures():
    gate, logits = set_gate(), [torch.ones(2, 3), torch.ones(2, 3)]
    gate.own_temperature.copy_(torch.tensor([4.0, 0.5]))
    first, second = gate.own(logits)
    assert first.unique().tolist() == [0.25] and second.unique().tolist() == [2.0]


def test_no_modality_is_an_error():
    _, logits = bayes(3)
    with pytest.raises(ValueError, match="mask"):
        Gate(NAMES)(logits, mask=torch.tensor([[True, True], [False, False], [True, False]]))


def test_logits_by_name_or_in_order():
    _, logits = bayes(10)
    gate = set_gate()
    by_name = gate({"visual": logits[1], "audio": logits[0]})
    assert torch.equal(by_name.logits, gate(logits).logits)
    with pytest.raises(ValueError, match="logits: expected the modalities audio, visual"):
        gate({"audio": logits[0], "text": logits[1]})


def test_nothing_in_the_gate_is_trained_by_an_optimiser():
    assert not any(p.requires_grad for p in Gate(NAMES).parameters())


# -- saved and loaded


def through_a_file(gate, folder):
    write_model(folder / "gate.safetensors", gate.state_dict(), {"modalities": json.dumps(NAMES)})
    values, about = read_model(folder / "gate.safetensors")
    other = Gate(json.loads(about["modalities"]))
    other.trust_offset.zero_()
    other.load_state_dict(values)
    return other


SAVED = {
    "safetensors": through_a_file,
    "pickle": lambda gate, _: pickle.loads(pickle.dumps(gate)),
    "deepcopy": lambda gate, _: copy.deepcopy(gate),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_gate_that_was_saved_is_the_same_gate(how, tmp_path):
    _, logits, surprise, _ = corrupted(60)
    for gate in (Gate(NAMES), set_gate()):
        other = SAVED[how](gate, tmp_path)
        assert torch.equal(other.trust_offset, gate.trust_offset)
        expected, got = gate(logits, surprise), other(logits, surprise)
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.trust, expected.trust)
    neutral = Gate(NAMES)(logits, surprise).logits.softmax(1)
    torch.testing.assert_close(neutral, (logits[0] + logits[1]).softmax(1))
    assert not torch.allclose(set_gate()(logits, surprise).logits.softmax(1), neutral, atol=0.1)

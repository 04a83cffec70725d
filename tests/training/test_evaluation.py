"""What is reported of a model, on models whose behaviour is known by construction."""

import math

import pytest
import torch
from torch import nn

from iibalance.data.dataset import Split
from iibalance.errors import InputError
from iibalance.methods.concat import ConcatHead
from iibalance.metrics import classification_metrics
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import MultimodalClassifier
from iibalance.training.evaluation import degrade, evaluate


def one_hot_model(names, classes=4, sharpness=6.0, base_rate=None):
    """Reads each modality's input as one-hot votes, with equal say."""
    head = IIBalanceHead(dict.fromkeys(names, classes), classes)
    for classifier in head.classifiers:
        nn.init.eye_(classifier.weight).data.mul_(sharpness)
        nn.init.zeros_(classifier.bias)
    encoders = {name: nn.Identity() for name in names}
    return MultimodalClassifier(encoders, head=head, base_rate=base_rate)


def votes(said, classes=4):
    return nn.functional.one_hot(said, classes).float()


def split_of(inputs, targets, mask=None):
    return Split(
        inputs,
        targets,
        torch.ones(len(targets), len(inputs), dtype=torch.bool) if mask is None else mask,
    )


class TestEvaluate:
    targets = torch.arange(400) % 4

    def test_a_useless_modality_has_no_shapley_value_and_a_good_one_has_it_all(self):
        split = split_of({"good": votes(self.targets), "mute": torch.zeros(400, 4)}, self.targets)
        # "mute" votes for nothing; by itself argmax of zeros is class 0, as is the prediction for
        # the empty set
        metrics, *_ = evaluate(one_hot_model(["good", "mute"]), split)
        assert metrics["accuracy"] == 1.0
        assert metrics["shapley"] == pytest.approx({"good": 0.75, "mute": 0.0}, abs=1e-12)

    def test_shapley_of_noise_is_about_zero(self):
        noise = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0))
        model = one_hot_model(["good", "noise"])
        model.head.classifiers[1].weight.data.mul_(0.1)  # a whisper: it never outvotes the other
        metrics, *_ = evaluate(
            model,
            split_of({"good": votes(self.targets), "noise": votes(noise)}, self.targets),
        )
        assert abs(metrics["shapley"]["noise"]) < 0.03 and metrics["shapley"]["good"] > 0.7

    def test_shapley_by_hand_for_two_modalities(self):
        # a is right in 240 samples, b in 200
        a = torch.where(torch.arange(400) < 240, self.targets, (self.targets + 1) % 4)
        b = torch.where(torch.arange(400) >= 200, self.targets, (self.targets + 2) % 4)
        model = one_hot_model(["a", "b"])
        model.head.classifiers[1].weight.data.mul_(1.5)  # b wins where they differ
        metrics, *_ = evaluate(model, split_of({"a": votes(a), "b": votes(b)}, self.targets))
        empty, only_a, only_b, both = 0.25, 0.6, 0.5, 0.5
        assert metrics["accuracy"] == both
        assert metrics["shapley"]["a"] == pytest.approx(((only_a - empty) + (both - only_b)) / 2)
        assert metrics["shapley"]["b"] == pytest.approx(((only_b - empty) + (both - only_a)) / 2)

    @pytest.mark.parametrize(("base_rate", "empty"), [((0.2, 0.1, 0.6, 0.1), 0.75), (None, 0.25)])
    def test_from_nothing_the_most_frequent_class_of_the_training_is_predicted(
        self, base_rate, empty
    ):
        targets = torch.where(torch.arange(400) % 4 > 0, 2, 0)
        base_rate = None if base_rate is None else torch.tensor(base_rate)
        model = one_hot_model(["a", "b"], base_rate=base_rate)
        metrics, *_ = evaluate(model, split_of(dict.fromkeys("ab", votes(targets)), targets))
        assert sum(metrics["shapley"].values()) == pytest.approx(1.0 - empty)

    def test_every_number_of_the_fused_and_of_each_modalitys_prediction(self):
        generator = torch.Generator().manual_seed(0)
        inputs = {
            name: votes(self.targets) + torch.randn(400, 4, generator=generator)
            for name in ("a", "b")
        }
        model = one_hot_model(["a", "b"], sharpness=1.0)
        model.head.gate.log_temperature.copy_(torch.tensor([0.2, -0.3]))
        model.head.gate.own_temperature.copy_(torch.tensor([1.5, 0.5]))
        metrics, reliability, _ = evaluate(model, split_of(inputs, self.targets), alone={"a": 0.9})
        fused = inputs["a"] / math.exp(0.2) + inputs["b"] / math.exp(-0.3)
        expected = classification_metrics(fused.double().log_softmax(-1), self.targets)
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)
        for name, temperature in (("a", 1.5), ("b", 0.5)):
            expected = classification_metrics(
                (inputs[name].double() / temperature).log_softmax(-1), self.targets
            )
            assert {key: metrics["modalities"][name][key] for key in expected} == pytest.approx(
                expected, abs=1e-6
            )
        assert set(reliability) == {"fused", "a", "b"}
        assert metrics["modalities"]["a"]["utilisation"] == pytest.approx(
            metrics["modalities"]["a"]["accuracy"] / 0.9
        )
        assert metrics["modalities"]["a"]["alone_accuracy"] == 0.9
        assert (
            metrics["modalities"]["b"]["utilisation"] is None
            and metrics["modalities"]["b"]["alone_accuracy"] is None
        )

    def test_trust_is_the_mean_over_the_samples_that_have_the_modality(self):
        mask = torch.ones(400, 3, dtype=torch.bool)
        mask[:100, 1], mask[:, 2] = False, False
        model = one_hot_model(["a", "b", "c"], sharpness=1.0)
        model.head.gate.trust_offset.copy_(torch.tensor([2.0, -1.0, 3.0]))
        wrong = torch.where(torch.arange(400) % 2 > 0, self.targets, (self.targets + 1) % 4)
        inputs = {"a": votes(self.targets), "b": votes(wrong), "c": votes(wrong)}
        metrics, *_ = evaluate(model, split_of(inputs, self.targets, mask))
        trust = model.head.fuse(list(inputs.values()), mask).trust.detach().double()
        assert metrics["trust"] == pytest.approx(
            {"a": trust[:, 0].mean().item(), "b": trust[100:, 1].mean().item(), "c": None}
        )
        assert 0.1 < metrics["trust"]["b"] < 0.3 < 0.8 < metrics["trust"]["a"] < 0.95

    def test_contributions_are_the_mean_over_the_samples_that_have_the_modality(self):
        mask = torch.ones(400, 3, dtype=torch.bool)
        mask[:100, 1], mask[:, 2] = False, False
        base_rate = torch.tensor([0.1, 0.2, 0.3, 0.4])
        model = one_hot_model(["a", "b", "c"], sharpness=2.0, base_rate=base_rate)
        model.head.classifiers[1].weight.data.mul_(0.0)  # says nothing
        inputs = dict.fromkeys("abc", votes(self.targets))
        metrics, *_ = evaluate(model, split_of(inputs, self.targets, mask))
        # Of a alone: log-odds of its vote of 2 against three others, less those of the base rate.
        # Beside it b, by itself, sets the odds to those of equal shares: half of that is its.
        odds, equal = 2.0 - math.log(3.0), -math.log(3.0)
        base = (base_rate / (1 - base_rate)).log().double()
        alone = (odds - base).mean().item()
        shared = ((odds - base) / 2 + (odds - equal) / 2).mean().item()
        expected = {"a": 0.25 * alone + 0.75 * shared, "b": (equal - base).mean().item() / 2}
        assert metrics["contributions"] == pytest.approx(expected | {"c": None}, abs=1e-6)
        without, *_ = evaluate(model, split_of(inputs, self.targets, mask), shapley=False)
        assert without["contributions"] is None and without["shapley"] is None
        assert without["trust"] == metrics["trust"]

    def test_a_modality_is_judged_where_it_is_present(self):
        mask = torch.ones(400, 3, dtype=torch.bool)
        mask[200:, 1] = False
        mask[:, 2] = False
        wrong = torch.where(torch.arange(400) < 200, self.targets, (self.targets + 1) % 4)
        inputs = {"a": votes(self.targets), "b": votes(wrong), "c": torch.zeros(400, 4)}
        metrics, reliability, _ = evaluate(
            one_hot_model(list(inputs)), split_of(inputs, self.targets, mask)
        )
        assert metrics["modalities"]["b"]["accuracy"] == 1.0  # its wrong half is masked
        assert metrics["modalities"]["c"] is None and "c" not in reliability
        assert metrics["accuracy"] == 1.0 and metrics["shapley"]["c"] == 0.0

    def test_where_a_subset_leaves_nothing_the_majority_is_predicted(self):
        mask = torch.ones(400, 2, dtype=torch.bool)
        mask[:200, 1] = False
        metrics, *_ = evaluate(
            one_hot_model(["a", "b"]),
            split_of({"a": votes(self.targets), "b": votes(self.targets)}, self.targets, mask),
        )
        empty, only_a, only_b, both = 0.25, 1.0, (50 + 200) / 400, 1.0
        assert metrics["shapley"]["b"] == pytest.approx(((only_b - empty) + (both - only_a)) / 2)

    def test_more_than_six_modalities_have_neither_shapley_nor_contributions(self):
        names = [f"m{index}" for index in range(7)]
        metrics, *_ = evaluate(
            one_hot_model(names),
            split_of({name: votes(self.targets) for name in names}, self.targets),
        )
        assert metrics["shapley"] is None and metrics["contributions"] is None
        assert metrics["accuracy"] == 1.0 and metrics["trust"] == dict.fromkeys(names, 1.0)

    def test_a_head_without_a_gate_has_contributions_and_no_trust(self):
        model = MultimodalClassifier(
            {"a": nn.Identity(), "b": nn.Identity()}, head=ConcatHead({"a": 4, "b": 4}, 4)
        )
        nn.init.zeros_(model.head.classifier.bias)
        model.head.classifier.weight.data.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)], 1))
        metrics, *_ = evaluate(
            model,
            split_of({"a": votes(self.targets), "b": votes(self.targets)}, self.targets),
        )
        assert metrics["trust"] is None and metrics["accuracy"] == 1.0
        expected = 1.0 - math.log(3) - math.log(1 / 3)  # of logits of 1 and three of 0
        assert metrics["contributions"] == pytest.approx({"a": expected, "b": 0.0}, abs=1e-6)
        assert metrics["shapley"]["a"] > 0.7 and abs(metrics["shapley"]["b"]) < 0.1

    def test_in_evaluation_mode_and_back(self):
        torch.manual_seed(0)
        model = MultimodalClassifier(
            {"a": nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))}, 4
        ).train()
        split = split_of({"a": votes(self.targets)}, self.targets)
        assert evaluate(model, split)[0] == evaluate(model, split)[0]
        assert model.training


def real(count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, 2, dtype=torch.bool)
    mask[:20, 0] = False
    inputs = {
        "a": torch.randn(count, 3, generator=generator),
        "b": torch.randn(count, 2, 2, generator=generator),
    }
    inputs["a"][:20] = 0
    return Split(inputs, torch.arange(count) % 4, mask, torch.arange(count))


@pytest.mark.parametrize("kind", ["noise", "missing", "shuffled"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_degrade_touches_its_modality_in_its_share_of_the_samples(kind, fraction):
    split = real()
    before = {name: values.clone() for name, values in split.inputs.items()}
    got = degrade(split, "a", kind, fraction=fraction, seed=3)
    again, other = (
        degrade(split, "a", kind, fraction=fraction, seed=3),
        degrade(split, "a", kind, fraction=fraction, seed=4),
    )
    changed = (got.inputs["a"] != split.inputs["a"]).any(1)
    # Of those that have it
    assert changed.sum() == round(fraction * 180) and not changed[:20].any()
    assert (
        torch.equal(got.inputs["b"], split.inputs["b"])
        and torch.equal(got.targets, split.targets)
        and torch.equal(got.groups, split.groups)
    )
    expected = split.mask.clone()
    if kind == "missing":
        expected[changed, 0] = False
    assert torch.equal(got.mask, expected)
    assert torch.equal(got.inputs["a"], again.inputs["a"]) and torch.equal(got.mask, again.mask)
    assert (
        fraction == 0
        or not torch.equal(got.inputs["a"], other.inputs["a"])
        or kind == "missing"
        and fraction == 1
    )
    # The original stays
    assert all(torch.equal(split.inputs[name], values) for name, values in before.items())


def test_degrade_means_the_same_rows_whatever_the_kind_and_noise_of_its_strength():
    split = real(5000)
    rows = [
        (degrade(split, "a", kind, seed=1).inputs["a"] != split.inputs["a"]).any(1)
        for kind in ("noise", "missing", "shuffled")
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    added = (degrade(split, "a", "noise", strength=2.5, seed=1).inputs["a"] - split.inputs["a"])[
        rows[0]
    ]
    assert added.std().item() == pytest.approx(2.5, rel=0.05) and abs(added.mean()) < 0.1


@pytest.mark.parametrize(
    ("modality", "kind", "message"),
    [
        ("c", "noise", "no modality 'c'; there are a, b"),
        ("a", "fog", "'fog' is none of noise, missing"),
    ],
)
def test_degrade_knows_its_words(modality, kind, message):
    with pytest.raises(InputError, match=message):
        degrade(real(), modality, kind)

"""``iibalance_drawn``: the published figure's formulas, one by one and together.

Computed by hand: plain loops, and no helper of the class under test.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import iibalance
from iibalance import InputError, RunConfig
from iibalance.budgets import Budgets, smooth_budgets
from iibalance.config import (
    BudgetConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainingConfig,
)
from iibalance.data import load_data
from iibalance.data.dataset import Split
from iibalance.methods import METHODS, make_method, search_of
from iibalance.methods.iibalance_drawn import entropy_budgets
from iibalance.metrics import fit_temperature
from iibalance.training import loop
from iibalance.training.budget_stage import folds_of, probe_logits
from iibalance.training.run import estimate_run_budgets, train

CLASSES = 4
INPUTS = {"audio": 5, "video": 7, "text": 4}
#: Embeddings' sizes: as they are, each has a projection to 6; of equal size none has.
SIZES = {"audio": 4, "video": 6, "text": 3}
BUDGETS = {"audio": 0.7, "video": 0.8, "text": 0.6}  # the anchor is the second
TAU_B, TAU = 0.7, 0.3


def ready(count=2, same=False, seed=0):
    """(method, model) of the first ``count`` modalities, with every parameter away from 0."""
    torch.manual_seed(seed)
    config = RunConfig(objective=ObjectiveConfig(temperature=TAU, momentum=0.8))
    method = make_method("iibalance_drawn", config, tau_b=TAU_B)
    names = list(INPUTS)[:count]
    encoders = {m: nn.Linear(INPUTS[m], 5 if same else SIZES[m]) for m in names}
    model = method.build(encoders, CLASSES)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    method.set_budgets(model, Budgets.given({m: BUDGETS[m] for m in names}))
    return method, model


def draw(count=2, size=16, seed=0, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {m: torch.randn(size, INPUTS[m], generator=generator) for m in list(INPUTS)[:count]}
    mask = torch.rand(size, count, generator=generator) >= missing
    mask[~mask.any(1), 0] = True
    return Split(inputs, torch.arange(size) % CLASSES, mask)


def with_prototypes(model, classes=CLASSES):
    """Prototypes of the first ``classes`` classes, on both sides of the origin."""
    bank = model.head.prototypes
    table, counts = bank.table(0)
    generator = torch.Generator().manual_seed(5)
    table[:classes] = F.normalize(torch.randn(classes, table.shape[1], generator=generator))
    counts[:classes] = 3
    return table.clone()


# ----- The figure by hand, a sample and a modality at a time


def softmax(values):
    parts = [(value - max(v.detach() for v in values)).exp() for value in values]
    return [part / sum(parts) for part in parts]


def linear(layer, row):
    return [
        sum(w * x for w, x in zip(weights, row)) + b for weights, b in zip(layer.weight, layer.bias)
    ]


def unit(row):
    length = sum(x * x for x in row) ** 0.5
    return [x / length for x in row]


def entropy_of(logits):
    return -sum(p * p.log() for p in softmax(logits)) / math.log(len(logits))


def cross_entropy(logits, y):
    return -softmax(logits)[y].log()


def features_of(model, split):
    """h[i][m], a list of numbers; None where missing."""
    embeddings = [encoder(x) for encoder, x in zip(model.encoders, split.inputs.values())]
    same = len({z.shape[1] for z in embeddings}) == 1
    return [
        [
            (list(z[i]) if same else linear(model.head.projections[m], z[i]))
            if split.mask[i, m]
            else None
            for m, z in enumerate(embeddings)
        ]
        for i in range(len(split))
    ]


def evidence(h, table, seen):
    """q_m(i, .) over the seen classes by class, from the squared distance at unit length."""
    scores = {}
    for k in range(CLASSES):
        if seen[k]:
            distance = sum((x - c) ** 2 for x, c in zip(unit(h), unit(table[k])))
            scores[k] = -distance / TAU
    return dict(zip(scores, softmax(list(scores.values()))))


def weights_of(head, logits, budgets):
    """w_m of one sample; ``logits`` and ``budgets`` by modality, of those that are there."""
    prior = {m: math.exp(b / TAU_B) for m, b in enumerate(budgets)}
    beta = {m: value / sum(prior.values()) for m, value in prior.items()}
    factor = {}
    for m, l in logits.items():
        slope = (1 + head.gate_slope[m].exp()).log()
        factor[m] = beta[m] / (1 + (-(head.gate_bias[m] - slope * entropy_of(l))).exp())
    return {m: value / sum(factor.values()) for m, value in factor.items()}


def by_hand(model, split, progress, table, seen):
    """The loss, its parts, and the rows whose switch is on [(i, m)]."""
    head, names = model.head, list(split.inputs)
    budgets = [BUDGETS[m] for m in names]
    anchor = max(range(len(names)), key=budgets.__getitem__)
    features = features_of(model, split)
    own, pra, fused, branches, on = {}, {}, [], {}, []
    for i, row in enumerate(features):
        y = int(split.targets[i])
        if y == -100:
            continue
        there = [m for m, h in enumerate(row) if h is not None]
        logits = {m: linear(head.classifiers[m], row[m]) for m in there}
        w = weights_of(head, logits, budgets)
        mixed = [sum(w[m] * row[m][d] for m in there) for d in range(len(row[there[0]]))]
        fused.append(cross_entropy(linear(head.fused_classifier, mixed), y))
        q = {m: evidence(row[m], table, seen) for m in there} if any(seen) else {}
        for m in there:
            own.setdefault(m, []).append(cross_entropy(logits[m], y))
            weighted = [w[m] * x for x in row[m]]
            branches.setdefault(m, []).append(
                cross_entropy(linear(head.classifiers[m], weighted), y)
            )
            if m != anchor and seen[y]:
                opened = anchor in q and bool(
                    q[m][y] < budgets[m] / budgets[anchor] * q[anchor][y].detach()
                )
                on += [(i, m)] if opened else []
                pra.setdefault(m, []).append(-q[m][y].log() if opened else 0.0 * row[m][0])
    mean = lambda values: sum(values) / len(values)
    total = lambda parts: torch.as_tensor(sum(mean(values) for values in parts.values()))
    parts = total(own), total(pra), mean(fused), total(branches)
    loss = (1 - progress) * (parts[0] + parts[1]) + progress * (parts[2] + parts[3])
    return loss, parts, on


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("same", [True, False], ids=["one width", "projections"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_and_all_its_gradients_are_those_of_the_figure(count, same, missing):
    """In training mode, so that backward runs after the prototypes have moved."""
    method, model = ready(count, same)
    split = draw(count, size=32, missing=missing)
    split.targets[3] = -100
    seen = [True, True, False, True]
    table, counts = model.head.prototypes.table(0)
    with_prototypes(model)
    counts[2], table[2] = 0, torch.nan  # not seen: what stands there has no effect
    before, progress = table.clone(), 0.3
    twin = copy.deepcopy(model).double()
    doubled = Split({m: x.double() for m, x in split.inputs.items()}, split.targets, split.mask)
    loss, parts, on = by_hand(twin, doubled, progress, before.double(), seen)
    if count > 1:
        possible = sum(int(split.mask[i, m]) for i in range(32) for m in range(count) if m != 1)
        assert 2 < len(on) < possible - 2, "the switch should be on for some and off for some"
    mask = split.mask if missing else None
    out = model.train()(split.inputs, split.targets, mask=mask, progress=progress)
    assert method.loss(out, model, split.batch(), progress) is out.loss
    found = out.parts.unimodal.sum(), out.parts.pra.sum(), out.parts.fused, out.parts.branches.sum()
    for actual, right in zip((out.loss, *found), (loss, *parts)):
        assert actual.item() == pytest.approx(right.item(), rel=2e-5)
    out.loss.backward()
    loss.backward()
    assert not torch.equal(table, before)  # they had moved
    expected = dict(twin.named_parameters())
    for key, value in model.named_parameters():
        if count == 1 and key.startswith("head.gate"):
            assert not value.grad.any()  # a single weight is 1 whatever the gate
            continue
        assert value.grad.any(), key
        torch.testing.assert_close(
            value.grad.double(), expected[key].grad, rtol=1e-4, atol=1e-6, msg=key
        )


def test_the_prediction_is_the_classified_sum_over_its_temperature():
    method, model = ready(3)
    split = draw(3, missing=0.4)
    model.head.cool(2.5)
    model.head.own_temperature.copy_(torch.tensor([1.0, 2.0, 4.0]))
    with torch.no_grad():
        out = model.eval()(split.inputs, mask=split.mask)
        features = features_of(model, split)
        for i, row in enumerate(features):
            logits = {
                m: linear(model.head.classifiers[m], h) for m, h in enumerate(row) if h is not None
            }
            w = weights_of(model.head, logits, list(BUDGETS.values()))
            for m in range(3):
                assert float(out.weights[i, m]) == pytest.approx(float(w.get(m, 0)), abs=1e-6)
                if m in w:
                    assert float(out.uncertainty[i, m]) == pytest.approx(
                        float(entropy_of(logits[m])), abs=1e-5
                    )
                    own = torch.stack(logits[m]) / 2.0**m
                else:
                    own = torch.zeros(CLASSES)
                torch.testing.assert_close(out.modality_logits[m][i], own, rtol=1e-4, atol=1e-5)
            mixed = [sum(w[m] * row[m][d] for m in w) for d in range(6)]
            expected = torch.stack(linear(model.head.fused_classifier, mixed)) / 2.5
            torch.testing.assert_close(out.logits[i], expected, rtol=1e-4, atol=1e-5)


# ----- Budgets


def test_budgets_are_one_minus_the_mean_entropy_of_the_rows_that_have_the_modality():
    generator = torch.Generator().manual_seed(0)
    logits = {m: 2 * torch.randn(9, CLASSES, generator=generator) for m in INPUTS}
    mask = torch.rand(9, 3, generator=generator) > 0.3
    budgets = entropy_budgets(logits, mask, source="probe", tau_b=TAU_B)
    values = []
    for m, name in enumerate(INPUTS):
        sure = [
            1 - float(entropy_of(list(logits[name][i].double()))) for i in range(9) if mask[i, m]
        ]
        values.append(sum(sure) / len(sure))
        spread = math.sqrt(sum((s - values[-1]) ** 2 for s in sure) / (len(sure) - 1))
        assert budgets.values[m] == pytest.approx(values[-1], rel=1e-9)
        assert budgets.standard_errors[m] == pytest.approx(spread / math.sqrt(len(sure)), rel=1e-9)
        logits[name][~mask[:, m]] = torch.nan
    assert entropy_budgets(logits, mask, source="probe", tau_b=TAU_B) == budgets
    scores = [math.exp(value / TAU_B) for value in values]
    assert budgets.prior == pytest.approx([score / sum(scores) for score in scores])
    assert budgets.source == "probe" and budgets.label_entropy is None
    with pytest.raises(InputError, match="^mask: video is missing in every sample; leave it out$"):
        entropy_budgets(logits, mask & torch.tensor([True, False, True]))


def test_no_label_enters_the_budgets():
    """Sure and wrong counts as sure: what sets these apart from those of cross-entropy."""
    targets = torch.arange(60) % 3
    wrong = 9.0 * F.one_hot((targets + 1) % 3, 3)
    options = {"mask": torch.ones(60, 1) > 0, "entropy": math.log(3), "source": "unimodal"}
    drawn, ours = (
        make_method(name).measure_budgets({"a": wrong}, targets, **options).values[0]
        for name in ("iibalance_drawn", "iibalance")
    )
    assert drawn > 0.99 and ours == 0


def test_a_softmax_prior_is_written_read_and_smoothed_and_others_are_as_they_were(tmp_path):
    drawn = Budgets(("a", "b"), (0.9, 0.3), (0.1, 0.1), prior_softmax=0.5)
    expected = [1 / (1 + math.exp(-1.2)), 1 / (1 + math.exp(1.2))]
    drawn.save(tmp_path / "drawn.json")
    again = Budgets.load(tmp_path / "drawn.json")
    assert again == drawn and again.prior == pytest.approx(expected)
    written = json.loads((tmp_path / "drawn.json").read_text())
    assert written["prior"] == pytest.approx(expected) and written["prior_softmax"] == 0.5
    assert smooth_budgets(drawn, drawn).prior == pytest.approx(expected)
    plain = Budgets.given({"a": 0.9, "b": 0.3})
    assert "prior_softmax" not in plain.to_dict() and plain.prior == pytest.approx([0.75, 0.25])
    with pytest.raises(InputError, match="prior_softmax is 0, .*leave it out for a prior propor"):
        Budgets(("a",), (0.9,), (0.1,), prior_softmax=0)


def test_beta_and_the_anchor_are_set_by_name():
    method, model = ready(3)
    method.set_budgets(model, Budgets.given({"text": 0.9, "audio": 0.1, "video": 0.4}))
    scores = [math.exp(b / TAU_B) for b in (0.1, 0.4, 0.9)]
    assert model.head.log_prior.exp().tolist() == pytest.approx([s / sum(scores) for s in scores])
    assert model.head.budgets.tolist() == pytest.approx([0.1, 0.4, 0.9])
    assert int(model.head.budgets.argmax()) == 2


# ----- Prototypes and the switch


def test_prototypes_are_a_moving_average_of_the_anchors_features_alone():
    _, model = ready(2, same=True)
    table, counts = model.head.prototypes.table(0)
    kept, number = torch.zeros(CLASSES, 5).double(), [0] * CLASSES
    for seed in (1, 2):
        split = draw(2, size=10, seed=seed, missing=0.4)
        split.targets = torch.randint(3, (10,), generator=torch.Generator().manual_seed(seed))
        split.targets[0] = -100
        split.inputs["audio"] = split.inputs["audio"] * 100 * seed  # no anchor: not looked at
        features = model.encoders[1](split.inputs["video"]).detach().double()
        for k in range(CLASSES):
            rows = [
                features[i] / features[i].norm()
                for i in range(10)
                if split.targets[i] == k and split.mask[i, 1]
            ]
            if rows:
                mean = sum(rows) / len(rows)
                moved = 0.8 * kept[k] + 0.2 * mean if number[k] else mean
                kept[k], number[k] = moved / moved.norm(), number[k] + len(rows)
        model.eval()(split.inputs, split.targets, mask=split.mask)
        model.train()(split.inputs, split.targets, mask=split.mask)
        torch.testing.assert_close(table.double(), kept, rtol=1e-5, atol=1e-6)
        assert counts.tolist() == number
    assert number[3] == 0 and min(number[:3]) > 1


def test_the_switch_opens_below_the_budgeted_share_of_the_anchors_evidence():
    """Angles of a plane: the anchor stands on its prototype, rho is 1/2."""
    method = make_method("iibalance_drawn")
    head = method.head({"weak": 2, "strong": 2}, 2)
    head.set_budgets({"weak": 0.3, "strong": 0.6})
    table, counts = head.prototypes.table(0)
    table.copy_(torch.eye(2))
    counts.fill_(1)
    q = lambda angle: 1 / (1 + math.exp(-2 * (math.cos(angle) - math.sin(angle)) / 0.2))
    # q_weak = q_strong / 2 there
    low, high = math.pi / 8, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if q(middle) > q(0) / 2 else (low, middle)
    at = lambda angle: torch.tensor([[3 * math.cos(angle), 3 * math.sin(angle)]])
    for angle, anchor, mask, on in (
        (low + 0.01, 0.0, None, True),
        (low - 0.01, 0.0, None, False),
        (low + 0.01, math.pi / 3, None, False),  # an anchor that is wrong draws nobody
        (low + 0.01, 0.0, torch.tensor([[True, False]]), False),  # nor one that is missing
    ):
        weak = at(angle).requires_grad_()
        strong = at(anchor).requires_grad_()
        found = head.pra([weak, strong], torch.tensor([0]), mask)
        expected = -math.log(q(angle)) if on else 0.0
        assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-4)
        found.sum().backward()
        assert bool(weak.grad.any()) == on and not strong.grad.any()


# ----- Schedule and gate


def test_the_first_stage_fades_into_the_second():
    gradients = {}
    for progress in (0.0, 0.25, 1.0):
        _, model = ready(2)
        with_prototypes(model)
        split = draw(2)
        out = model.train()(split.inputs, split.targets, progress=progress)
        first = out.parts.unimodal.sum() + out.parts.pra.sum()
        second = out.parts.fused + out.parts.branches.sum()
        expected = (1 - progress) * first.item() + progress * second.item()
        assert out.loss.item() == pytest.approx(expected, rel=1e-6) and out.parts.pra[0] > 0.05
        out.loss.backward()
        gradients[progress] = {
            key: value.grad.clone() for key, value in model.head.named_parameters()
        }
    second_alone = ("fused_classifier.weight", "gate_bias", "gate_slope")
    for key in second_alone:
        assert not gradients[0.0][key].any() and gradients[1.0][key].any()
    for key, at_quarter in gradients[0.25].items():
        mixed = 0.75 * gradients[0.0][key] + 0.25 * gradients[1.0][key]
        torch.testing.assert_close(at_quarter, mixed, rtol=1e-4, atol=1e-7)


def test_the_surer_modality_never_has_the_smaller_factor():
    """c >= 0, however far training pushes its parameter; it starts at a = 0 and c = 1."""
    head = make_method("iibalance_drawn").head({"a": 3, "b": 3}, 3)
    assert F.softplus(head.gate_slope).tolist() == pytest.approx([1.0, 1.0])
    assert not head.gate_bias.any()
    with torch.no_grad():
        for layer in head.classifiers:
            layer.weight.copy_(torch.eye(3))
            layer.bias.zero_()
        sure, unsure = torch.tensor([[6.0, 0, 0]]), torch.tensor([[0.1, 0, 0]])
        for slope, order in ((1.0, "above"), (-50.0, "equal")):
            head.gate_slope.fill_(slope)
            first, second = head.fuse([sure, unsure]).weights[0].tolist()
            assert first > second + 0.05 if order == "above" else first == pytest.approx(second)


# ----- The method


def test_registered_beside_the_method_it_is_compared_with():
    names = list(METHODS)
    assert names.index("iibalance_drawn") == names.index("iibalance") + 1
    method = make_method("iibalance_drawn")
    values = search_of(type(method))["tau_b"]
    assert values[0] == method.options.tau_b and min(values) < 1 < max(values)
    for value in (0, 0.0):
        with pytest.raises(InputError, match="^method_options: tau_b is 0.*; give a number above"):
            make_method("iibalance_drawn", tau_b=value)
    assert make_method("iibalance_drawn", tau_b=1e-3).options.tau_b == 1e-3


def test_trainings_that_differ_have_other_keys():
    keys = [
        json.dumps(make_method("iibalance_drawn", config, **options).training_key())
        for config, options in (
            (RunConfig(), {}),
            (RunConfig(), {"tau_b": 0.3}),
            (RunConfig(objective=ObjectiveConfig(temperature=0.1)), {}),
            (RunConfig(objective=ObjectiveConfig(momentum=0.5)), {}),
        )
    ]
    assert len(set(keys)) == 4


def test_calibration_is_one_temperature_of_the_prediction_and_one_of_each_own():
    method, model = ready(2)
    validation, before = draw(2, size=80, seed=3, missing=0.3), {}
    for key, value in model.state_dict().items():
        before[key] = value.clone()
    with torch.no_grad():
        raw = model.eval()(validation.inputs, mask=validation.mask)
    method.calibrate(model, validation, validation, None, 0)
    with torch.no_grad():
        out = model(validation.inputs, mask=validation.mask)
    temperature = fit_temperature(raw.logits, validation.targets)
    torch.testing.assert_close(out.logits, raw.logits / temperature, rtol=1e-4, atol=1e-5)
    assert temperature != pytest.approx(1, abs=0.05)
    for m in range(2):
        rows = validation.mask[:, m]
        own = fit_temperature(raw.modality_logits[m][rows], validation.targets[rows])
        torch.testing.assert_close(
            out.modality_logits[m], raw.modality_logits[m] / own, rtol=1e-4, atol=1e-5
        )
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == {"head.log_temperature", "head.own_temperature"}


# ----- Runs


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    generator = np.random.default_rng(0)
    y = np.arange(150) % 3
    path, signal = tmp_path_factory.mktemp("drawn") / "two.npz", np.eye(3)[y]
    mask = np.ones(150, bool)
    mask[::11] = False
    np.savez(
        path,
        x_a=signal @ generator.normal(size=(3, 6)) + generator.normal(size=(150, 6)),
        mask_a=mask,
        x_b=2 * signal @ generator.normal(size=(3, 5)) + generator.normal(size=(150, 5)),
        y=y,
    )
    return str(path)


def config(npz, output, budgets=None, tau_b=0.4):
    return RunConfig(
        data=DataConfig(name="npz", path=npz),
        method="iibalance_drawn",
        method_options={"tau_b": tau_b},
        output=str(output),
        epochs=4,
        model=ModelConfig(width=4, embedding_dim=8),
        budgets=budgets or BudgetConfig(source="probe"),
        training=TrainingConfig(
            progress=False, alone=False, checkpoint_seconds=0.0, learning_rate=0.02
        ),
    )


def prior_by_hand(values, tau_b=0.4):
    scores = [math.exp(value / tau_b) for value in values]
    return [score / sum(scores) for score in scores]


@pytest.mark.usefixtures("no_pictures")
def test_a_runs_budgets_are_entropies_of_its_out_of_fold_predictions(npz, tmp_path):
    options = config(npz, tmp_path / "run")
    result = train(options)
    split = load_data(options.data).train
    folds = folds_of(split, options.budgets.folds, options.seed)
    logits = probe_logits(split.inputs, split.targets, folds, split.mask)
    for m, l in enumerate(logits.values()):
        rows = [i for i in range(len(split)) if split.mask[i, m]]
        expected = 1 - sum(float(entropy_of(list(l[i].double()))) for i in rows) / len(rows)
        assert result.budgets.values[m] == pytest.approx(expected, rel=1e-6)
    written = json.loads((tmp_path / "run" / "budgets.json").read_text())
    expected = prior_by_hand(result.budgets.values)
    assert written["prior"] == pytest.approx(expected) and written["anchor"] == "b"
    assert result.model.head.log_prior.exp().tolist() == pytest.approx(expected, rel=1e-5)
    assert estimate_run_budgets(options) == result.budgets
    loaded = iibalance.load(tmp_path / "run").state_dict()
    assert all(value.equal(loaded[key]) for key, value in result.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["given", "online", "unimodal"])
def test_the_prior_that_is_told_is_the_one_that_is_used(kind, npz, tmp_path):
    (tmp_path / "own.json").write_text('{"a": 0.2, "b": 0.7}')
    budgets = {
        "given": BudgetConfig(path=str(tmp_path / "own.json")),
        "online": BudgetConfig(source="online"),
        "unimodal": BudgetConfig(epochs=2),
    }[kind]
    result = train(config(npz, tmp_path / "run", budgets))
    expected = prior_by_hand(result.budgets.values)
    if kind == "given":
        assert result.budgets.values == (0.2, 0.7)
    assert result.budgets.prior == pytest.approx(expected)
    assert result.model.head.log_prior.exp().tolist() == pytest.approx(expected, rel=1e-4)
    written = json.loads((tmp_path / "run" / "budgets.json").read_text())
    assert written["prior"] == pytest.approx(expected)


@pytest.mark.usefixtures("no_pictures")
def test_online_budgets_are_entropies_of_the_validation_predictions(npz, tmp_path):
    options = config(npz, tmp_path / "run", BudgetConfig(source="online"))
    options.epochs = 1  # so that the model is the one that they are of
    result, split = train(options), load_data(options.data).validation
    with torch.no_grad():
        logits = result.model.head.heads(result.model.embed(split.inputs), split.mask)
    for m, l in enumerate(logits):
        rows = [i for i in range(len(split)) if split.mask[i, m]]
        expected = 1 - sum(float(entropy_of(list(l[i].double()))) for i in rows) / len(rows)
        assert result.budgets.values[m] == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "source", ["probe", "online", pytest.param("unimodal", marks=pytest.mark.slow)]
)
def test_stopped_in_the_middle_it_ends_with_the_same_bits(source, npz, tmp_path, monkeypatch):
    budgets = BudgetConfig(source=source, epochs=2)
    whole = train(config(npz, tmp_path / "whole", budgets))
    original, calls = loop._Loop.epoch, []
    last = 3 if source != "unimodal" else 3 * 2 * 2 + 3  # in the joint training

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop._Loop, "epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config(npz, tmp_path / "stopped", budgets))
    monkeypatch.setattr(loop._Loop, "epoch", original)
    resumed = train(config(npz, tmp_path / "stopped", budgets), resume=True)
    assert resumed.metrics == whole.metrics and resumed.budgets == whole.budgets
    state = resumed.model.state_dict()
    assert all(value.equal(state[key]) for key, value in whole.model.state_dict().items())
    assert whole.model.head.prototypes.counts.min() > 0

"""Each method's fusion and calibration on a toy problem where the right answer is known.

Their trainings are in ``test_method_runs.py``.
"""

import copy
import math
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from iibalance.budgets import Budgets
from iibalance.config import RunConfig
from iibalance.data.corruption import corrupt
from iibalance.data.dataset import Split
from iibalance.errors import InputError
from iibalance.methods import METHODS, Method, make_method
from iibalance.methods.heads import ConcatHead
from iibalance.metrics import fit_temperature
from iibalance.nn.calibration import collect
from iibalance.nn.model import MultimodalClassifier
from iibalance.training.loop import _kept_by

DIMS = {"weak": 5, "strong": 5}


def draw(count=600, seed=0, classes=4, missing=0.0):
    """Two views of a label; the second is the better one."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    sharpness = {"weak": 1.0, "strong": 2.0}
    inputs = {
        name: s * F.one_hot(targets, 5).float() + torch.randn(count, 5, generator=generator)
        for name, s in sharpness.items()
    }
    mask = torch.rand(count, 2, generator=generator) >= missing
    mask[~mask.any(1), 0] = True
    return Split(
        {name: values * mask[:, m, None] for m, (name, values) in enumerate(inputs.items())},
        targets,
        mask,
    )


def classifier_for(sharpness, scale, classes=4):
    """The Bayes classifier of :func:`draw`, made ``scale`` times too sure."""
    layer = nn.Linear(5, classes)
    nn.init.zeros_(layer.bias)
    layer.weight.data.copy_(scale * sharpness * torch.eye(5)[:classes])
    return layer


def ready(name, scales=(3.0, 0.5)):
    """A model of method ``name`` whose encoders pass their input on.

    Its heads are right but for their temperatures.
    """
    method = make_method(name, RunConfig())
    model = MultimodalClassifier({m: nn.Linear(5, 5) for m in DIMS}, head=method.head(DIMS, 4))
    alone = {}
    for index, (m, sharpness) in enumerate(zip(DIMS, (1.0, 2.0))):
        alone[m] = MultimodalClassifier({m: nn.Linear(5, 5)}, 4)
        nn.init.eye_(alone[m].encoders[0].weight)
        nn.init.zeros_(alone[m].encoders[0].bias)
        alone[m].head.classifiers[0].load_state_dict(
            classifier_for(sharpness, scales[index]).state_dict()
        )
        if method.joint:
            model.encoders[index].load_state_dict(alone[m].encoders[0].state_dict())
            if hasattr(model.head, "classifiers"):
                model.head.classifiers[index].load_state_dict(
                    alone[m].head.classifiers[0].state_dict()
                )
    method.assemble(model, alone)
    return method, model, alone


@torch.no_grad()
def fused(model, split):
    return model.eval().head.fuse(model.embed(split.inputs), split.mask)


def nll(logits, split):
    return F.cross_entropy(logits, split.targets).item()


def assert_same_prediction(logits, expected):
    """Up to a number a row, which no softmax sees."""
    torch.testing.assert_close(logits.log_softmax(1), expected.log_softmax(1), atol=1e-5, rtol=1e-4)


def test_the_registry():
    assert set(METHODS) >= {"iibalance", "concat", "sum", "unimodal", "ensemble"}
    for name, method in METHODS.items():
        assert make_method(name, RunConfig()).name == name == method.name
    with pytest.raises(InputError, match="method: 'magic' is none of unimodal, concat, sum"):
        make_method("magic", RunConfig())
    with pytest.raises(TypeError, match="Method.head"):
        Method(RunConfig()).head(DIMS, 4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_joint_method_learns_and_every_head_fuses(name):
    torch.manual_seed(0)
    method = make_method(name, RunConfig())
    model = MultimodalClassifier(
        {m: nn.Linear(5, 8) for m in DIMS}, head=method.head(dict.fromkeys(DIMS, 8), 4)
    )
    split = draw(missing=0.2)
    if method.joint:
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.03), []
        for step in range(40):
            method.before_epoch(model, split, step / 40)
            out = method.step(
                model, optimizer, split.__getitems__(range(len(split))), progress=step / 40
            )
            # Not the loss: its prototype terms come in with time
            losses.append(nll(out.logits, split))
        assert losses[-1] < 0.7 * losses[0]
        assert (
            fused(model, draw(seed=5)).logits.argmax(1) == draw(seed=5).targets
        ).float().mean() > 0.75
    assert fused(model, split).logits.shape == (600, 4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_calibration_lowers_the_nll_of_new_samples_and_leaves_encoders_and_classifiers_alone(name):
    method, model, _ = ready(name, (8.0, 8.0) if name in ("greedy", "qmf", "pdf") else (3.0, 0.5))
    if hasattr(model.head, "classifier"):
        model.head.classifier.weight.data.copy_(
            3.0 * torch.cat([torch.eye(5)[:4], 2 * torch.eye(5)[:4]], 1)
        )
        nn.init.zeros_(model.head.classifier.bias)
    if hasattr(model.head, "fused_classifier"):  # of the weighted mean of the features
        model.head.fused_classifier.load_state_dict(classifier_for(2.0, 4.0).state_dict())
    weights = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.startswith("encoders") or ".classifier" in key
    }
    train, validation, test = draw(seed=1), draw(300, seed=2, missing=0.2), draw(seed=3)
    before = nll(fused(model, test).logits, test)
    method.calibrate(model, train, validation, None, 0)
    assert nll(fused(model, test).logits, test) < before - 0.02
    assert weights and all(
        torch.equal(model.state_dict()[key], value) for key, value in weights.items()
    )


# -- sum


def test_sum_trains_the_summed_logits_alone_and_has_one_temperature():
    method, model, _ = ready("sum")
    split, validation, test = draw(missing=0.3), draw(seed=2), draw(seed=3)
    model.train()
    out = model(split.inputs, split.targets, mask=split.mask)
    total = sum(
        c(split.inputs[m]).masked_fill(~split.mask[:, i, None], 0)
        for i, (m, c) in enumerate(zip(DIMS, model.head.classifiers))
    )
    assert method.loss(out, model, split.batch(), 1.0).item() == pytest.approx(
        nll(total, split), rel=1e-5
    )
    before = fused(model, test).logits
    assert_same_prediction(
        before, sum(c(test.inputs[m]) for m, c in zip(DIMS, model.head.classifiers))
    )
    temperature = fit_temperature(fused(model, validation).logits, validation.targets)
    method.calibrate(model, split, validation, None, 0)
    assert_same_prediction(fused(model, test).logits, before / temperature)
    assert abs(math.log(temperature)) > 0.1


# -- ensemble and unimodal


def test_ensemble_is_the_sum_of_separately_calibrated_models():
    method, model, alone = ready("ensemble")
    assert not method.joint
    validation, test = draw(seed=2), draw(seed=3)
    method.calibrate(model, draw(seed=1), validation, None, 0)
    expected = 0
    for m, part in alone.items():
        temperature = fit_temperature(
            part.eval()({m: validation.inputs[m]}).logits.detach(), validation.targets
        )
        expected = expected + part({m: test.inputs[m]}).logits / temperature
    assert_same_prediction(fused(model, test).logits, expected)
    # What they had been made too sure by
    assert model.head.gate.temperature.tolist() == pytest.approx([3.0, 0.5], rel=0.2)


def test_ensemble_calibrates_each_modality_where_it_is_present():
    validation = draw(seed=2, missing=0.3)
    first, second = ready("ensemble"), ready("ensemble")
    first[0].calibrate(first[1], validation, validation, None, 0)
    noisy = copy.deepcopy(validation)
    for m, name in enumerate(DIMS):
        noisy.inputs[name][~validation.mask[:, m]] = 99.0
    second[0].calibrate(second[1], noisy, noisy, None, 0)
    assert torch.equal(first[1].head.gate.log_temperature, second[1].head.gate.log_temperature)
    never = Split(validation.inputs, validation.targets, torch.tensor([[True, False]] * 600))
    first[0].calibrate(first[1], never, never, None, 0)
    assert first[1].head.gate.log_temperature.isfinite().all()


@pytest.mark.parametrize("scales", [(3.0, 0.5), (1.0, 1.0)])
def test_unimodal_predicts_what_its_best_modality_predicts(scales):
    """The best by calibrated NLL: with scales (3, 0.5) the better modality is the timid one."""
    method, model, alone = ready("unimodal", scales)
    validation, test = draw(seed=2), draw(seed=3)
    method.calibrate(model, draw(seed=1), validation, None, 0)
    out = fused(model, test)
    strong = alone["strong"].eval()({"strong": test.inputs["strong"]}).logits
    temperature = fit_temperature(
        alone["strong"]({"strong": validation.inputs["strong"]}).logits.detach(), validation.targets
    )
    assert_same_prediction(out.logits, strong / temperature)
    assert out.trust.tolist() == [[0.0, 1.0]] * 600
    assert torch.equal(out.logits.argmax(1), strong.argmax(1))


def test_unimodal_falls_back_where_its_best_modality_is_missing():
    method, model, alone = ready("unimodal")
    validation, test = draw(seed=2), draw(seed=3)
    method.calibrate(model, draw(seed=1), validation, None, 0)
    test.mask[:100, 1] = False
    out = fused(model, test)
    weak = alone["weak"].eval()({"weak": test.inputs["weak"]}).logits
    temperature = fit_temperature(
        alone["weak"]({"weak": validation.inputs["weak"]}).logits.detach(), validation.targets
    )
    assert_same_prediction(out.logits[:100], (weak / temperature)[:100])
    assert out.trust.tolist() == [[1.0, 0.0]] * 100 + [[0.0, 1.0]] * 500


def test_unimodal_ranks_three():
    method = make_method("unimodal", RunConfig())
    names = ["noise", "weak", "strong"]
    base, validation = draw(seed=3), draw(seed=2)
    more = lambda split, seed: Split(
        {
            "noise": torch.randn(600, 5, generator=torch.Generator().manual_seed(seed)),
            **split.inputs,
        },
        split.targets,
        torch.ones(600, 3, dtype=torch.bool),
    )
    test, validation = more(base, 8), more(validation, 9)
    model = MultimodalClassifier(
        {m: nn.Linear(5, 5) for m in names}, head=method.head(dict.fromkeys(names, 5), 4)
    )
    for index, sharpness in enumerate((1.0, 1.0, 2.0)):
        nn.init.eye_(model.encoders[index].weight)
        nn.init.zeros_(model.encoders[index].bias)
        model.head.classifiers[index].load_state_dict(classifier_for(sharpness, 1.0).state_dict())
    method.calibrate(model, test, validation, None, 0)
    for missing, chosen in (([], 2), ([2], 1), ([1, 2], 0), ([0], 2)):
        test.mask[:] = True
        test.mask[:, missing] = False
        out = fused(model, test)
        assert (out.trust == F.one_hot(torch.tensor(chosen), 3)).all()
        torch.testing.assert_close(out.logits, out.modality_logits[chosen])


# -- concat


def test_concat_is_one_linear_layer_on_what_is_there():
    torch.manual_seed(0)
    head, split = ConcatHead(DIMS, 4), draw(50, missing=0.4)
    z = [values + 1 for values in split.inputs.values()]
    out = head(z, split.targets, mask=split.mask)
    rows = torch.cat([values * split.mask[:, m, None] for m, values in enumerate(z)], 1)
    expected = rows @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(out.logits, expected)
    assert out.loss.item() == pytest.approx(nll(expected, split), rel=1e-6)
    assert not split.mask.all() and head.fuse(z, split.mask).trust is None


@pytest.mark.parametrize(
    ("classes", "kept"), [(4, [0, 1, 2, 3]), (2, [0, 1]), (4, [0, 2, 3]), (4, [1, 3])]
)
def test_probes_are_scikit_learns_logistic_regression(classes, kept):
    """Also where one modality never shows some classes in training.

    And with two classes, for which scikit-learn keeps one row.
    """
    split = draw(500, classes=classes)
    split.mask[:, 0] = torch.isin(split.targets, torch.tensor(kept))
    z = [3 + 10 * values for values in split.inputs.values()]
    head = ConcatHead(DIMS, classes)
    head.fit_probes(z, split.targets, split.mask)
    test = [3 + 10 * values for values in draw(200, seed=4, classes=classes).inputs.values()]
    for m, probe in enumerate(head.fuse(test).modality_logits):
        rows = split.mask[:, m]
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(
            z[m][rows].numpy(), split.targets[rows].numpy()
        )
        expected = np.full((200, classes), 0.0)
        expected[:, reference.classes_] = reference.predict_proba(test[m].numpy())
        np.testing.assert_allclose(probe.softmax(-1).detach().numpy(), expected, atol=2e-3)
        assert (probe.argmax(1).numpy() == reference.predict(test[m].numpy())).mean() > 0.99
    assert not any(p.requires_grad for p in head.probes.parameters())


def test_concat_calibrates_one_temperature_and_fits_its_probes():
    method, model, _ = ready("concat")
    train, validation, test = draw(seed=1), draw(seed=2), draw(seed=3)
    before, held = fused(model, test).logits, fused(model, validation).logits
    method.calibrate(model, train, validation, None, 0)
    torch.testing.assert_close(
        fused(model, test).logits,
        before / fit_temperature(held, validation.targets),
        atol=1e-5,
        rtol=1e-4,
    )
    accuracies = [
        (out.argmax(1) == test.targets).float().mean() for out in fused(model, test).modality_logits
    ]
    assert 0.4 < accuracies[0] < accuracies[1] and accuracies[1] > 0.75


# -- iibalance


def test_iibalance_takes_its_options_from_the_configuration():
    config = RunConfig()
    o = config.objective
    o.alpha, o.beta, o.momentum, o.temperature = 0.3, 0.7, 0.5, 0.4
    o.fused_weight, o.warmup, o.ramp = 0.25, 0.2, 0.1
    head = make_method("iibalance", config).head(DIMS, 4)
    o = head.objective
    assert (o.alpha, o.beta, o.temperature, o.fused_weight, o.warmup, o.ramp) == (
        0.3,
        0.7,
        0.4,
        0.25,
        0.2,
        0.1,
    )
    assert head.prototypes.momentum == 0.5


def test_iibalance_passes_budgets_on():
    method, model, _ = ready("iibalance")
    assert method.needs_budgets and method.joint
    method.set_budgets(model, Budgets.given({"weak": 0.2, "strong": 0.6}))
    assert model.head.budgets.tolist() == pytest.approx([0.2, 0.6])


def trained_and_new(name="iibalance", **options):
    """A method, models "trained" alone by modality, a new model and a copy of its weights.

    Their encoders have batch statistics.
    """

    def model(*names):
        encoders = {m: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)) for m in names}
        return MultimodalClassifier(encoders, head=method.head(dict.fromkeys(names, 6), 4))

    method = make_method(name, RunConfig(method_options=options))
    torch.manual_seed(0)
    alone, new = {m: model(m) for m in DIMS}, model(*DIMS)
    for m, part in alone.items():
        part.train()
        part({m: draw(100).inputs[m]}, draw(100).targets)  # prototypes and batch statistics
        with torch.no_grad():
            for value in part.parameters():
                value.add_(torch.randn_like(value))
    return method, alone, new, {key: value.clone() for key, value in new.state_dict().items()}


def values_alone(alone):
    """By their names in the joint model."""
    found = {}
    for index, part in enumerate(alone.values()):
        for key, value in part.state_dict().items():
            for prefix in ("encoders", "head.classifiers"):
                if key.startswith(f"{prefix}.0."):
                    key = key.replace(f"{prefix}.0.", f"{prefix}.{index}.")
            if key.endswith(("prototypes_0", "counts_0")):
                key = f"{key[:-1]}{index}"
            found[key] = value
    return found


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("iibalance", {}, 1.0),
        ("iibalance", {"warm_start": 0.5}, 0.5),
        ("iibalance", {"warm_start": 0.25}, 0.25),
    ],
)
def test_the_warm_start_is_between_the_weights_trained_alone_and_new_ones(name, options, share):
    method, alone, model, new = trained_and_new(name, **options)
    method.set_budgets(model, Budgets.given({"weak": 0.2, "strong": 0.6}))
    assert method.starts_alone
    method.initialise(model, alone)
    now, trained = model.state_dict(), values_alone(alone)
    blended = [f"encoders.{m}.0.weight" for m in range(2)] + [
        f"head.classifiers.{m}.weight" for m in range(2)
    ]
    for key in blended:
        torch.testing.assert_close(now[key], share * trained[key] + (1 - share) * new[key])
    taken = [
        f"encoders.{m}.{part}"
        for m in range(2)
        for part in (
            "0.bias",
            "1.weight",
            "1.bias",
            "1.running_mean",
            "1.running_var",
            "1.num_batches_tracked",
        )
    ]
    taken += [
        f"head.{part}"
        for m in range(2)
        for part in (
            f"classifiers.{m}.bias",
            f"prototypes.prototypes_{m}",
            f"prototypes.counts_{m}",
        )
    ]
    for key in taken:
        assert torch.equal(now[key], trained[key]) and (
            share == 1 or not torch.equal(now[key], new[key])
        ), key
    assert model.head.budgets.tolist() == pytest.approx([0.2, 0.6])  # not theirs
    rest = set(now) - {*blended, *taken, "head.budgets", "base_rate"}
    assert all(torch.equal(now[key], new[key]) for key in rest) and all(
        key.startswith(("head.gate", "head.prototypes.usual", "head.prototypes.spread"))
        for key in rest
    )


def test_without_warm_start_all_weights_are_new():
    for name, options in (
        ("iibalance_no_warm_start", {}),
        ("iibalance", {"warm_start": 0}),
        ("ensemble", {}),
    ):
        assert not make_method(name, RunConfig(method_options=options)).starts_alone
    method, alone, model, new = trained_and_new("ensemble")
    method.initialise(model, alone)
    assert all(torch.equal(value, new[key]) for key, value in model.state_dict().items())


def test_a_warm_start_is_a_share():
    for value in (1.5, -0.1):
        with pytest.raises(InputError, match=f"method_options: .*warm_start is {value!r}"):
            make_method("iibalance", RunConfig(method_options={"warm_start": value}))
    with pytest.raises(InputError, match="method_options: .*warm_start is 'half'"):
        make_method("iibalance", warm_start="half")


def test_no_prototypes_means_none_in_the_budget_stage_either():
    config = RunConfig()
    config.objective.alpha = 0.7
    assert (
        make_method("iibalance", config).budget_alpha
        == make_method("iibalance_with_alignment", config).budget_alpha
        == 0.7
    )
    assert (
        make_method("iibalance_no_prototypes", config).budget_alpha
        == make_method("ensemble_gated", config).budget_alpha
        == 0
    )


def test_the_warm_start_blends_what_is_learned_once_and_takes_the_rest():
    """Tied weights, frozen weights, buffers, and a head of another kind."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = nn.Linear(5, 5)
            self.second.weight = self.first.weight
            self.frozen = nn.Parameter(torch.randn(5, 6), requires_grad=False)
            self.register_buffer("frequencies", torch.randn(3, 2))

        def forward(self, values):
            return self.second(self.first(values)) @ self.frozen

    class Deep(METHODS["iibalance"]):
        def head(self, embedding_dims, num_classes):
            head = super().head(embedding_dims, num_classes)
            head.classifiers = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 7), nn.Linear(7, num_classes)) for _ in embedding_dims
            )
            return head

    for kind in (METHODS["iibalance"], Deep):
        plain, method = make_method("iibalance"), kind(RunConfig(), warm_start=0.5)
        sizes = dict.fromkeys(DIMS, 6)
        alone = {m: MultimodalClassifier({m: Tied()}, head=plain.head({m: 6}, 4)) for m in DIMS}
        model = MultimodalClassifier({m: Tied() for m in DIMS}, head=method.head(sizes, 4))
        new = {key: value.clone() for key, value in model.state_dict().items()}
        method.initialise(model, alone)
        encoder, trained = model.encoders[1], alone["strong"].encoders[0]
        torch.testing.assert_close(
            encoder.first.weight, (trained.first.weight + new["encoders.1.first.weight"]) / 2
        )
        assert encoder.second.weight is encoder.first.weight
        assert torch.equal(encoder.frozen, trained.frozen) and torch.equal(
            encoder.frequencies, trained.frequencies
        )
        if kind is Deep:
            assert all(
                torch.equal(model.state_dict()[key], new[key])
                for key in new
                if ".classifiers." in key
            )


def test_each_modality_keeps_its_own_epoch():
    names = [f"m{index}" for index in range(12)]  # index 1 is not index 11
    method = make_method("iibalance", RunConfig())
    model = MultimodalClassifier(
        {name: nn.Linear(2, 3) for name in names}, head=method.head(dict.fromkeys(names, 3), 2)
    )
    kept = _kept_by(model, method)
    for key in model.state_dict():
        owners = [column for column, keys in kept.items() if key in keys]
        index = re.search(r"encoders\.(\d+)\.|classifiers\.(\d+)\.|prototypes\.\w+_(\d+)$", key)
        expected = (
            [] if index is None else [f"validation.nll.m{next(filter(None, index.groups()))}"]
        )
        assert owners == expected, key
    assert _kept_by(model, make_method("qmf", RunConfig())) == {"validation.nll": set()}


# -- the ablations


def terms(model, split):
    """The terms of the objective by the formulas: method page, section 3.

    Sum of the heads' cross-entropies, cross-entropy of their sum, contrastive and alignment terms.
    """
    z = model.embed(split.inputs)
    logits = [classifier(values) for classifier, values in zip(model.head.classifiers, z)]
    budgets, temperature = model.head.budgets, model.head.objective.temperature
    log_q = [
        (-(1 - F.normalize(values, dim=1) @ F.normalize(p, dim=1).T) * 2 / temperature).log_softmax(
            1
        )
        for values, p in zip(z, model.head.prototypes.prototypes)
    ]
    anchor = int(budgets.argmax())
    right = [values.gather(1, split.targets[:, None]).exp().squeeze(1) for values in log_q]
    align = sum(
        (
            (budgets[m] / budgets[anchor] * right[anchor] - right[m]).clamp_min(0).detach()
            * (log_q[anchor].detach().exp() * (log_q[anchor].detach() - log_q[m])).sum(1)
        ).mean()
        for m in range(len(z))
        if m != anchor
    )
    return (
        sum(nll(values, split) for values in logits),
        nll(sum(logits), split),
        sum(nll(values, split) for values in log_q),
        align.item(),
    )


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [
        ("iibalance", 0.7, 1.5),
        ("iibalance_with_alignment", 0.7, 1.0),
        ("iibalance_no_prototypes", 0.0, 0.0),
        ("iibalance_no_gate", 0.7, 1.5),
    ],
)
def test_the_loss_of_the_whole_and_of_what_is_left_of_it(name, alpha, beta):
    config = RunConfig()
    config.objective.alpha, config.objective.beta, config.objective.fused_weight = 0.7, 1.5, 0.4
    torch.manual_seed(0)
    method = make_method(name, config)
    model = MultimodalClassifier(
        {m: nn.Linear(5, 6) for m in DIMS}, head=method.head(dict.fromkeys(DIMS, 6), 4)
    )
    method.set_budgets(model, Budgets.given({"weak": 0.3, "strong": 0.6}))
    split = draw(40)
    model.train()
    model(split.inputs, split.targets)  # prototypes
    unimodal, fused_loss, contrastive, alignment = terms(model, split)
    out = model(split.inputs, split.targets, progress=1.0)
    assert method.loss(out, model, split.batch(), 1.0).item() == pytest.approx(
        unimodal + 0.4 * fused_loss + alpha * contrastive + beta * alignment, rel=1e-4
    )
    assert contrastive > 0.1 and alignment > 1e-3


@pytest.fixture(scope="module")
def gates():
    """Each gate's fusion of noisy samples with modalities missing, fitted on the same model."""
    train, validation, test = draw(seed=1), draw(400, seed=2), draw(500, seed=3, missing=0.2)
    noisy = Split(
        *corrupt(
            test.batch(),
            "strong",
            "noise",
            fraction=0.5,
            strength=4.0,
            generator=torch.Generator().manual_seed(0),
        )
    )
    found = {}
    for name in (
        "iibalance",
        "iibalance_no_prototypes",
        "iibalance_no_gate",
        "iibalance_fixed_gate",
    ):
        method, model, _ = ready(name)
        model.train()
        model(train.inputs, train.targets)
        method.set_budgets(model, Budgets.given({"weak": 0.2, "strong": 0.6}))
        method.calibrate(model, train, validation, None, 0)
        found[name] = model, fused(model, noisy)
    return noisy, found


def test_no_gate_trusts_all_that_is_present_wholly(gates):
    noisy, found = gates
    model, out = found["iibalance_no_gate"]
    torch.testing.assert_close(out.trust, noisy.mask.float())
    # What the heads had been made too sure by
    assert model.head.gate.temperature.tolist() == pytest.approx([3.0, 0.5], rel=0.25)


def test_a_fixed_gate_trusts_a_modality_alike_in_all_samples(gates):
    noisy, found = gates
    model, out = found["iibalance_fixed_gate"]
    assert not model.head.gate.surprise_weight.any()
    trust = model.head.gate.trust_offset.sigmoid()
    assert (trust > 0.5).all() and (trust < 1).all()
    gate, said = model.head.gate, 0.0
    for m, logits in enumerate(model.head.heads(model.embed(noisy.inputs), noisy.mask)):
        p = (logits / gate.temperature[m]).softmax(1)
        mixed = (trust[m] * p + (1 - trust[m]) / 4).log()
        said = said + noisy.mask[:, m, None] * mixed
    torch.testing.assert_close(out.logits, gate.log_scale.exp() * said, atol=1e-4, rtol=1e-4)


def moved(gates, name, change):
    """How far the trust of a fitted gate moves where ``change(head)`` is made."""
    noisy, found = gates
    model, out = found[name]
    other = copy.deepcopy(model)
    change(other.head)
    return (fused(other, noisy).trust - out.trust).abs().max()


def test_budgets_do_not_enter_the_fusion(gates):
    for name in gates[1]:
        assert moved(gates, name, lambda head: head.set_budgets({"weak": 0.6, "strong": 0.2})) == 0


@pytest.mark.parametrize("name", ["iibalance_no_prototypes", "iibalance_fixed_gate"])
def test_a_gate_without_surprise_does_not_look_at_prototypes(gates, name):
    noisy, found = gates

    def others(head):
        for values in head.prototypes.prototypes:
            values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
        head.prototypes.usual.sub_(3.0)  # everything is unusual

    for which in ("iibalance", name):  # each sample has a trust of its own: modalities contradict
        assert (found[which][1].trust[noisy.mask.all(1)].std(0) > 0.01).all()
    assert moved(gates, name, others) == 0 and moved(gates, "iibalance", others) > 0.1


def test_after_calibration_a_noisy_modality_loses_its_say():
    method, model, _ = ready("iibalance")
    train, validation, test = draw(seed=1), draw(400, seed=2), draw(2000, seed=3)
    model.train()
    model(train.inputs, train.targets)  # prototypes
    before = copy.deepcopy(model)
    method.set_budgets(model, Budgets.given({"weak": 0.3, "strong": 0.6}))
    method.calibrate(model, train, validation, None, 0)
    generator = torch.Generator().manual_seed(0)
    noisy = Split(
        *corrupt(test.batch(), "strong", "noise", fraction=1.0, strength=4.0, generator=generator)
    )
    clean, degraded = fused(model, test), fused(model, noisy)
    assert nll(degraded.logits, noisy) < nll(fused(before, noisy).logits, noisy) - 0.1
    assert nll(clean.logits, test) < nll(fused(before, test).logits, test)
    own = [
        fit_temperature(logits.detach(), validation.targets)
        for logits in model.head.heads(model.embed(validation.inputs))
    ]
    assert model.head.gate.own_temperature.tolist() == pytest.approx(own, rel=1e-4)


def test_what_the_gate_is_calibrated_on():
    _, model, _ = ready("iibalance")
    split, config = draw(100, missing=0.2), RunConfig().calibration
    model.train()
    held = collect(model, split, config, seed=5)
    assert model.training
    again = collect(model, split, config, seed=5, batch_size=7)
    for a, b in zip(held[1:], again[1:]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert len(held.targets) == 100 * (1 + config.copies) and held.clean.sum() == 100
    model.eval()
    for m, logits in enumerate(model.head.heads(model.embed(split.inputs), split.mask)):
        torch.testing.assert_close(held.logits[m][held.clean], logits)
        assert not held.logits[m][~held.mask[:, m]].any()
    assert torch.equal(held.mask[held.clean], split.mask) and held.mask.any(1).all()
    assert held.weight[held.clean].sum().item() == 100 and held.weight[
        ~held.clean
    ].sum().item() == pytest.approx(100 * config.corrupted_weight)
    copies = held.logits[1][~held.clean].view(config.copies, 100, 4)
    # Some samples are corrupted in this modality
    assert ((copies - held.logits[1][held.clean]).abs().amax(2) > 1e-4).float().mean() > 0.2
    assert not torch.equal(collect(model, split, config, seed=6).mask, held.mask)


# -- the step


def test_gradients_are_clipped_group_by_group():
    from iibalance.methods.gradients import clip_gradients

    def parameters():
        generator = torch.Generator().manual_seed(0)
        values = [
            nn.Parameter(torch.zeros(3, 4)),
            nn.Parameter(torch.zeros(5)),
            nn.Parameter(torch.zeros(2, 2)),
            nn.Parameter(torch.zeros(7)),
        ]
        for value, scale in zip(values, (10.0, 0.1, 0.01, 1.0)):
            value.grad = scale * torch.randn(value.shape, generator=generator)
        values[3].grad = None
        return values

    ours, theirs = parameters(), parameters()
    clip_gradients([ours[:2], ours[2:3], ours[3:]], 1.0)
    for group in (theirs[:2], theirs[2:3]):
        nn.utils.clip_grad_norm_(group, 1.0)
    for one, other in zip(ours[:3], theirs):
        torch.testing.assert_close(one.grad, other.grad)
    assert (
        ours[3].grad is None
        and ours[0].grad.norm() < 1.0001
        and torch.equal(ours[2].grad, parameters()[2].grad)
    )


@pytest.mark.parametrize("limit, moved", [(0.0, 20.0), (1.0, 1.0), (100.0, 20.0)])
def test_a_step_of_ones_own_loop_clips_where_it_is_asked_to(limit, moved):
    class Steep(Method):
        """The loss 20 times one weight: its gradient is as long as that."""

        name = "steep"

        def loss(self, output, model, batch, progress):
            return 20.0 * model.encoders[0].weight[0, 0]

    model = MultimodalClassifier({m: nn.Linear(5, 5) for m in DIMS}, 4)
    before = model.encoders[0].weight[0, 0].item()
    split = draw(count=8)
    Steep(RunConfig()).step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        split.__getitems__(range(8)),
        max_gradient_norm=limit,
    )
    assert before - model.encoders[0].weight[0, 0].item() == pytest.approx(moved, rel=1e-5)


def test_a_whole_start_copies_whatever_it_is_given():
    """A part that aliases its trained self, and values that no product with 0 would keep."""
    method, alone, model, _ = trained_and_new("iibalance")
    first = next(iter(model.encoders[0].parameters()))
    with torch.no_grad():
        first[0, 0] = -torch.inf  # times 0 it would be NaN
    name = model.modalities[0]
    alone[name].encoders[0] = model.encoders[0]
    kept = first.clone()
    method.initialise(model, alone)
    assert torch.equal(first, kept)

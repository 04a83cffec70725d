"""Budgets: values where the answer is known, honest standard errors, disjoint folds, files."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from iibalance.budgets import (
    Budgets,
    budgets_from_logits,
    label_entropy,
    smooth_budgets,
)
from iibalance.config import TrainingConfig
from iibalance.data.samples import Samples
from iibalance.data.splits import make_folds
from iibalance.errors import InputError
from iibalance.nn.encoders import build_encoder
from iibalance.training.budget_stage import estimate_budgets, probe_logits


def known_data(count=600, classes=4, seed=0):
    """A copy of the label, half of its information, and noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, 6, generator=generator)
    half = F.one_hot(targets // 2, classes // 2).float() + 0.05 * torch.randn(
        count, classes // 2, generator=generator
    )
    return {"noise": noise, "copy": F.one_hot(targets, classes).float(), "half": half}, targets


# -- what the numbers mean


def test_probe_budgets_of_known_data():
    inputs, targets = known_data()
    budgets = estimate_budgets(inputs, targets, source="probe")
    value, error = (
        dict(zip(budgets.modalities, budgets.values)),
        dict(zip(budgets.modalities, budgets.standard_errors)),
    )
    assert value["copy"] > 0.95 and value["copy"] > value["half"] > value["noise"]
    assert value["half"] == pytest.approx(0.5, abs=0.05)  # one of two bits
    assert value["noise"] <= 2 * error["noise"] and budgets.uninformative == ["noise"]
    assert budgets.anchor == "copy" and budgets.source == "probe"
    assert budgets.label_entropy == pytest.approx(label_entropy(targets))


@pytest.mark.slow
def test_unimodal_budgets_of_known_data():
    inputs, targets = known_data(240)
    encoders = {
        name: (
            lambda shape=tuple(x.shape[1:]): build_encoder(
                shape, embedding_dim=16, width=8, dropout=0.0
            )
        )
        for name, x in inputs.items()
    }
    budgets = estimate_budgets(
        inputs,
        targets,
        encoders=encoders,
        epochs=12,
        folds=2,
        training=TrainingConfig(learning_rate=1e-2, progress=False),
    )
    value = dict(zip(budgets.modalities, budgets.values))
    assert (
        value["copy"] > 0.95
        and budgets.uninformative == ["noise"]
        and value["half"] == pytest.approx(0.5, abs=0.08)
    )
    assert budgets.source == "unimodal"


def test_noise_is_found_uninformative_draw_after_draw():
    """Two standard errors leave a few per cent to chance.

    A biased estimate, whose temperature or folds had seen the samples, would fail many of 20 draws.
    """
    false_alarms = 0
    for seed in range(20):
        inputs, targets = known_data(300, seed=seed)
        false_alarms += estimate_budgets(
            {"noise": inputs["noise"]}, targets, source="probe", seed=seed
        ).uninformative != ["noise"]
    assert false_alarms <= 1


def test_the_six_views_of_handwritten_digits_are_ranked_by_what_they_can_tell(data_folder):
    with np.load(data_folder / "handwritten6" / "handwritten6.npz") as file:
        train, test = file["split"] < 2, file["split"] == 2
        names = [f"view{index}" for index in range(1, 7)]
        inputs, y = {name: file[f"x_{name}"] for name in names}, file["y"].astype(np.int64)
    budgets = estimate_budgets(
        {name: x[train] for name, x in inputs.items()}, y[train], source="probe"
    )
    accuracies = []
    for x in inputs.values():
        whole = probe_logits(
            {"view": torch.from_numpy(x).float()}, torch.from_numpy(y), [np.flatnonzero(test)]
        )["view"]
        accuracies.append(
            float((whole[torch.from_numpy(test)].argmax(1).numpy() == y[test]).mean())
        )
    assert spearmanr(budgets.values, accuracies).statistic > 0.8, (budgets.values, accuracies)
    assert not budgets.uninformative and all(0.3 < value < 1 for value in budgets.values)
    # and by the order of what they got right on the very samples whose loss the budget is
    folds = make_folds(torch.from_numpy(y[train]), 3)
    held_out = probe_logits(
        {name: torch.from_numpy(x[train]).float() for name, x in inputs.items()},
        torch.from_numpy(y[train]),
        folds,
    )
    accuracies = [
        float((logits.argmax(1).numpy() == y[train]).mean()) for logits in held_out.values()
    ]
    assert spearmanr(budgets.values, accuracies).statistic > 0.9, (budgets.values, accuracies)


def test_features_may_have_any_shape_for_the_probe():
    inputs, targets = known_data(200)
    flat = estimate_budgets({"copy": inputs["copy"]}, targets, source="probe")
    image = estimate_budgets(
        {"copy": inputs["copy"].view(200, 2, 2).numpy()}, targets.numpy(), source="probe"
    )
    assert flat.values == image.values


def test_budgets_are_seeded():
    inputs, targets = known_data(200)
    first, again, other = (
        estimate_budgets(inputs, targets, source="probe", seed=seed) for seed in (1, 1, 2)
    )
    assert first == again and first.values != other.values


# -- from logits


def test_value_and_standard_error_are_the_analytic_ones():
    """Logits that are calibrated: right with probability 0.8, else one of the other three."""
    generator = torch.Generator().manual_seed(0)
    count, targets = 20_000, torch.arange(20_000) % 4
    said = torch.where(
        torch.rand(count, generator=generator) < 0.8,
        targets,
        (targets + torch.randint(1, 4, (count,), generator=generator)) % 4,
    )
    p = torch.where(F.one_hot(said, 4).bool(), 0.8, 0.2 / 3).double()
    budgets = budgets_from_logits({"a": p.log()}, targets)
    wrong, right = -math.log(0.2 / 3), -math.log(0.8)
    assert budgets.values[0] == pytest.approx(
        1 - (0.8 * right + 0.2 * wrong) / math.log(4), abs=0.01
    )
    spread = math.sqrt(0.8 * 0.2) * (wrong - right)  # of a loss that takes two values
    assert budgets.standard_errors[0] == pytest.approx(
        spread / math.sqrt(count) / math.log(4), rel=0.02
    )


def test_standard_errors_shrink_with_the_square_root_of_the_samples():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (6400,), generator=generator)
    logits = 1.5 * F.one_hot(targets, 3) + torch.randn(6400, 3, generator=generator)
    errors = [
        budgets_from_logits(
            {"a": logits[:count]}, targets[:count], entropy=math.log(3)
        ).standard_errors[0]
        for count in (100, 1600, 6400)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25) and errors[1] / errors[
        2
    ] == pytest.approx(2, rel=0.1)


def test_the_standard_error_covers_what_repeated_draws_do():
    generator, values, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        targets = torch.randint(3, (150,), generator=generator)
        logits = 1.5 * F.one_hot(targets, 3) + torch.randn(150, 3, generator=generator)
        budgets = budgets_from_logits({"a": logits}, targets, entropy=math.log(3))
        values.append(budgets.values[0])
        errors.append(budgets.standard_errors[0])
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_overconfident_or_timid_logits_have_the_same_budget(scale):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (500,), generator=generator)
    logits = F.one_hot(targets, 3) + torch.randn(500, 3, generator=generator)
    plain, scaled = (
        budgets_from_logits({"a": factor * logits}, targets).values[0] for factor in (1.0, scale)
    )
    assert scaled == pytest.approx(plain, abs=2e-3) and plain > 0.1


def test_worse_than_chance_is_no_information_and_never_below_zero():
    targets = torch.arange(300) % 3
    budgets = budgets_from_logits(
        {"liar": 5.0 * F.one_hot((targets + 1) % 3, 3), "still": torch.zeros(300, 3)}, targets
    )
    assert budgets.values == pytest.approx((0.0, 0.0), abs=0.05) and min(budgets.values) >= 0
    assert budgets.values[1] == 0.0


def test_rows_where_a_modality_is_missing_do_not_count():
    targets, generator = torch.arange(300) % 3, torch.Generator().manual_seed(0)
    logits = {
        name: F.one_hot(targets, 3) + torch.randn(300, 3, generator=generator)
        for name in ("a", "b")
    }
    mask = torch.ones(300, 2, dtype=torch.bool)
    mask[100:, 1] = False
    got = budgets_from_logits(
        {**logits, "b": logits["b"].masked_fill(~mask[:, 1:], math.nan)}, targets, mask=mask
    )
    b = budgets_from_logits({"b": logits["b"][:100]}, targets[:100], entropy=label_entropy(targets))
    a = budgets_from_logits({"a": logits["a"]}, targets)
    assert (
        got.values == a.values + b.values
        and got.standard_errors == a.standard_errors + b.standard_errors
    )
    with pytest.raises(InputError, match="mask: b is missing in every sample"):
        budgets_from_logits(logits, targets, mask=torch.tensor([[True, False]] * 300))


def test_label_entropy():
    assert label_entropy(torch.arange(8)) == pytest.approx(math.log(8))
    assert label_entropy(torch.tensor([0, 0, 0, 1]), 5) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )
    with pytest.raises(InputError, match="targets: hold a single class"):
        label_entropy(torch.zeros(5, dtype=torch.long), 3)


def test_online_budgets_move_by_their_momentum():
    generator, targets = torch.Generator().manual_seed(0), torch.arange(200) % 4
    epochs = [
        {
            name: skill * F.one_hot(targets, 4) + torch.randn(200, 4, generator=generator)
            for name, skill in (("a", 2.0 + e), ("b", 1.0))
        }
        for e in range(3)
    ]
    each = [budgets_from_logits(logits, targets) for logits in epochs]
    budgets = None
    for logits in epochs:
        budgets = estimate_budgets(logits, targets, source="online", previous=budgets, momentum=0.8)
    expected = [
        0.8 * (0.8 * each[0].values[m] + 0.2 * each[1].values[m]) + 0.2 * each[2].values[m]
        for m in (0, 1)
    ]
    assert budgets.values == pytest.approx(expected, abs=1e-6) and budgets.source == "online"
    assert estimate_budgets(epochs[0], targets, source="online").values == pytest.approx(
        each[0].values, abs=1e-6
    )


def test_smoothing_needs_the_same_modalities():
    with pytest.raises(InputError, match="previous: .*b, a"):
        smooth_budgets(Budgets.given({"b": 0.9, "a": 0.1}), Budgets.given({"a": 0.1, "b": 0.9}))


# -- folds


def test_folds_hold_every_row_once_and_every_class_alike():
    targets = torch.tensor([0] * 30 + [1] * 60 + [2] * 9)
    folds = make_folds(targets, 3, seed=1)
    assert sorted(np.concatenate(folds).tolist()) == list(range(99))
    for fold in folds:
        assert np.bincount(targets[fold]).tolist() == [10, 20, 3]
    assert [f.tolist() for f in folds] == [f.tolist() for f in make_folds(targets, 3, seed=1)]
    assert folds[0].tolist() != make_folds(targets, 3, seed=2)[0].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(0, 6), st.integers(2, 4))
def test_no_group_stands_on_both_sides(seed, folds, more, classes):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(folds + more, (80,), generator=generator) * 7
    groups[: folds + more] = torch.arange(folds + more) * 7
    targets = torch.randint(classes, (80,), generator=generator)
    held = make_folds(targets, folds, groups=groups, seed=seed)
    assert sorted(np.concatenate(held).tolist()) == list(range(80)) and len(held) == folds
    for rows in held:
        rest = np.setdiff1d(np.arange(80), rows)
        assert len(rows) and not set(groups[rows].tolist()) & set(groups[rest].tolist())


def test_groups_of_any_kind_keep_a_memorisable_modality_from_looking_informative():
    """The label belongs to the speaker, and the modality tells nothing but the speaker.

    Held-out speakers show that, held-out samples do not.
    """
    generator = torch.Generator().manual_seed(0)
    speakers = torch.arange(240) % 24
    label = torch.randint(2, (24,), generator=generator)[speakers]
    voice = torch.randn(24, 30, generator=generator)[speakers] + 0.1 * torch.randn(
        240, 30, generator=generator
    )
    leaky = estimate_budgets({"voice": voice}, label, source="probe")
    names = np.array([f"speaker {chr(97 + s)}" for s in speakers])
    honest = estimate_budgets({"voice": voice}, label, source="probe", groups=names)
    assert leaky.values[0] > 0.8 and honest.uninformative == ["voice"]


def test_classes_without_a_sample_do_not_stand_in_the_way():
    assert [len(fold) for fold in make_folds(torch.tensor([0, 2] * 6), 3)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("folds", "groups", "message"),
    [
        (1, None, "budgets.folds: 1; at least 2"),
        (4, None, "budgets.folds: 4 folds need as many samples of every class, class 1 has 3"),
        (3, [0, 1] * 6, "budgets.folds: 3 folds need as many groups, there are 2"),
    ],
)
def test_folds_that_cannot_be_made(folds, groups, message):
    targets = torch.tensor([0] * 9 + [1] * 3)
    with pytest.raises(InputError, match=message):
        make_folds(targets, folds, groups=None if groups is None else torch.tensor(groups))


def test_a_probe_sees_nothing_of_its_fold():
    """Features that are the row's number in one-hot form can be fitted, never predicted."""
    targets = torch.arange(90) % 3
    logits = probe_logits({"row": torch.eye(90)}, targets, make_folds(targets, 3))["row"]
    assert budgets_from_logits({"row": logits}, targets).uninformative == ["row"]


def test_what_rounding_leaves_is_no_information():
    """A predictor that says the classes' frequencies on every row has budget 0.

    Also where a CPU's rounding makes 4e-16 of it.
    """
    targets = torch.arange(90) % 3
    budgets = budgets_from_logits(
        {"row": torch.zeros(90, 3), "same": torch.zeros(90, 3)},
        targets,
        entropy=math.log(3) * (1 + 4e-16),
    )
    assert (
        budgets.values == (0.0, 0.0)
        and budgets.uninformative == ["row", "same"]
        and budgets.prior == [0.5, 0.5]
    )


def test_a_class_that_a_probe_has_never_met_gets_no_probability():
    targets = torch.tensor([0, 1] * 10 + [2] * 4)
    held = [np.arange(20, 24), np.arange(20)]
    targets[:2] = torch.tensor([0, 1])
    logits = probe_logits({"a": F.one_hot(targets, 3).float()}, targets, [held[0]])["a"]
    assert (logits[20:, 2] == -30).all() and torch.allclose(
        logits[20:, :2].exp().sum(1), torch.ones(4, dtype=torch.float64)
    )
    with pytest.raises(
        InputError, match="outside one fold a is present for fewer than two classes"
    ):
        probe_logits({"a": torch.randn(24, 2)}, targets, [held[1]])


# -- estimate_budgets' arguments


@pytest.mark.parametrize("source", ["probe", pytest.param("unimodal", marks=pytest.mark.slow)])
def test_missing_rows_may_hold_anything(source):
    inputs, targets = known_data(120)
    mask = torch.ones(120, 2, dtype=torch.bool)
    mask[::3, 0] = False
    results = []
    for fill in (0.0, math.nan):
        copy = inputs["copy"].masked_fill(~mask[:, :1], fill)
        encoders = {
            name: (lambda size=size: nn.Linear(size, 8))
            for name, size in (("copy", 4), ("noise", 6))
        }
        results.append(
            estimate_budgets(
                {"copy": copy, "noise": inputs["noise"]},
                targets,
                source=source,
                mask=mask.numpy(),
                encoders=encoders,
                epochs=8,
                folds=2,
                training=TrainingConfig(learning_rate=0.03, progress=False),
            )
        )
    assert results[0] == results[1] and results[0].values[0] > 0.3


def test_a_missing_modality_is_judged_where_it_is():
    inputs, targets = known_data(300)
    mask = torch.ones(300, 1, dtype=torch.bool)
    mask[::2] = False
    garbage = inputs["copy"].clone()
    # What stands in missing rows would mislead a probe
    garbage[::2] = inputs["copy"][::2].roll(1, 1)
    assert estimate_budgets({"copy": garbage}, targets, source="probe", mask=mask).values[0] > 0.9
    assert estimate_budgets({"copy": garbage}, targets, source="probe").values[0] < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source="guess"), "source: 'guess' is none of unimodal, probe, online"),
        (dict(targets=torch.zeros(60, dtype=torch.long)), "targets: hold a single class"),
        (dict(targets=torch.zeros(60)), "targets: hold a single class"),
        (dict(targets=torch.rand(60)), "targets: row 0 holds .* regression is not supported"),
        (dict(targets=torch.zeros(60, 2, dtype=torch.long)), "targets: .*several targets a sample"),
        (dict(targets=["yes", None] * 30), "targets: row 1 holds None; give every sample a class"),
        (
            dict(targets=torch.arange(59) % 2),
            r"targets: has shape \(59,\); give one class",
        ),
        (dict(inputs={}), "modalities: at least one"),
        (dict(inputs={"a.b": torch.zeros(60, 2)}), "'a.b' cannot name a modality"),
        (dict(folds=1), "budgets.folds: 1"),
        (
            dict(folds=31),
            "budgets.folds: 31 folds need as many samples of every class, class '0' has 30 in the "
            "training split; lower budgets.folds to 30",
        ),
        (dict(groups=np.arange(60) % 2), "budgets.folds: 3 folds need as many groups, there are 2"),
        (dict(groups=np.arange(59)), "groups: .*59"),
        (dict(mask=torch.ones(60, 2)), r"mask: has shape \(60, 2\), expected \(60, 1\)"),
        (
            dict(mask=torch.zeros(60, 1)),
            "a is present for fewer than two classes|a is missing in every sample",
        ),
    ],
)
def test_input_that_cannot_be_used(change, message):
    options = (
        dict(inputs={"a": torch.randn(60, 3)}, targets=torch.arange(60) % 2, source="probe")
        | change
    )
    with pytest.raises(InputError, match=message):
        estimate_budgets(options.pop("inputs"), options.pop("targets"), **options)


# -- the object and its file


def test_given_budgets_anchor_and_prior():
    budgets = Budgets.given({"a": 0.2, "b": 0.6, "c": 0.6, "d": 0.0})
    assert budgets.anchor == "b" and budgets.relative == pytest.approx([1 / 3, 1, 1, 0])
    floored = [0.2 / 1.4, 0.6 / 1.4, 0.6 / 1.4, 1e-3]
    assert budgets.prior == pytest.approx([value / sum(floored) for value in floored])
    assert budgets.standard_errors == (0.0,) * 4 and budgets.uninformative == ["d"]


def test_prior_is_proportional_down_to_its_floor():
    assert Budgets.given({"a": 0.2, "b": 0.6}).prior == pytest.approx([0.25, 0.75])
    extreme = Budgets.given({"a": 1e-5, "b": 0.9}).prior
    assert extreme[0] == pytest.approx(1e-3, rel=0.01) and sum(extreme) == pytest.approx(1)


def test_nothing_known_is_a_uniform_prior():
    budgets = Budgets.given({"a": 0.0, "b": 0.0})
    assert (
        budgets.prior == [0.5, 0.5]
        and budgets.relative == [1.0, 1.0]
        and budgets.anchor == "a"
        and budgets.uninformative == ["a", "b"]
    )


def test_save_and_load(tmp_path):
    budgets = Budgets(("audio", "lip video"), (0.812345678901234, 0.3), (0.01, 0.2), 1.3, "probe")
    budgets.save(tmp_path / "budgets.json")
    assert Budgets.load(tmp_path / "budgets.json") == budgets
    written = json.loads((tmp_path / "budgets.json").read_text())
    assert (
        written["anchor"] == "audio"
        and written["uninformative"] == ["lip video"]
        and written["prior"] == pytest.approx(budgets.prior)
    )


def test_bring_your_own_file(tmp_path):
    (tmp_path / "own.json").write_text('{"audio": 1, "visual": 0.25}')
    assert Budgets.load(tmp_path / "own.json") == Budgets.given({"audio": 1.0, "visual": 0.25})


_ONE = '{"modalities": ["a"], "values": [0.5], "standard_errors": [0.1]'  # the object goes on


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a whole JSON file"),
        ('{"a": 0.5', "is not a whole JSON file"),
        ('{"a": NaN}', "is not a whole JSON file"),
        ("[0.5, 0.5]", "expected an object with budgets by modality"),
        ("0.5", "expected an object with budgets by modality"),
        ("{}", "modalities: at least one is needed"),
        ('{"a": 1.5}', "a is 1.5, expected a number in"),
        ('{"a": -0.1}', "a is -0.1, expected a number in"),
        ('{"a": "much"}', "much"),
        ('{"a": null}', "budgets.json"),
        ('{"a": [0.5]}', "budgets.json"),
        ('{"a.b": 0.5}', "'a.b' cannot name a modality"),
        ('{"modalities": ["a"]}', "values"),
        (
            '{"modalities": ["a", "b"], "values": [0.5], "standard_errors": [0.1]}',
            "2 modalities, 1 values and 1 standard errors",
        ),
        (
            '{"modalities": ["a"], "values": [0.5, 0.2], "standard_errors": [0.1]}',
            "1 modalities, 2 values and 1 standard errors",
        ),
        (
            '{"modalities": ["a", "a"], "values": [0.5, 0.5], "standard_errors": [0.1, 0.1]}',
            "holds a name twice",
        ),
        (
            '{"modalities": ["a"], "values": ["0.5"], "standard_errors": [0.1]}',
            "a is '0.5', expected a number",
        ),
        (
            '{"modalities": ["a"], "values": [0.5], "standard_errors": [-0.1]}',
            "the standard error of a is -0.1",
        ),
        ('{"modalities": ["a"], "values": 0.5, "standard_errors": [0.1]}', "budgets.json"),
        ('{"modalities": "ab", "values": [0.5, 0.1], "standard_errors": [0.1, 0.1]}', "modalities"),
        (
            _ONE + ', "prior_temperature": 0}',
            "prior_temperature is 0",
        ),
        (
            _ONE + ', "prior_temperature": "hot"}',
            "budgets.json",
        ),
        (
            _ONE + ', "label_entropy": "much"}',
            "label_entropy",
        ),
    ],
)
def test_malformed_files(tmp_path, content, message):
    path = tmp_path / "budgets.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Budgets.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="absent.json"):
        Budgets.load(tmp_path / "absent.json")


def test_table():
    budgets = Budgets(("audio", "noise"), (0.8, 0.01), (0.02, 0.01), 1.0, "probe")
    head, audio, noise = budgets.table().splitlines()
    assert audio.split() == ["audio", "0.800", "0.020", "0.988", "anchor"]
    assert noise.split()[:4] == ["noise", "0.010", "0.010", "0.012"] and noise.endswith(
        "no measurable information (kept)"
    )


def test_class_weights_go_by_the_labels():
    """Of labels 1, 2, 3 the weight of "3" is that of the last class."""
    inputs, targets = known_data(90)
    labels = targets % 3 + 1
    options = dict(epochs=1, folds=2, encoders={"copy": lambda: torch.nn.Linear(4, 4)})
    training = TrainingConfig(class_weight={"3": 9.0}, progress=False)
    found = estimate_budgets({"copy": inputs["copy"]}, labels, training=training, **options)
    plain = TrainingConfig(progress=False)
    assert found != estimate_budgets({"copy": inputs["copy"]}, labels, training=plain, **options)
    wrong = TrainingConfig(class_weight={"0": 9.0}, progress=False)
    with pytest.raises(InputError, match="class_weight: '0' is none of the classes .1, 2, 3."):
        estimate_budgets({"copy": inputs["copy"]}, labels, training=wrong, **options)


def test_a_mask_beside_samples_counts():
    inputs, targets = known_data(300)
    mask = torch.ones(300, 2, dtype=torch.bool)
    mask[::2, 0] = False
    garbage = inputs["copy"].clone()
    garbage[::2] = inputs["copy"][::2].roll(1, 1)
    samples = Samples({"copy": garbage, "noise": torch.randn(300, 2)}, targets)
    assert estimate_budgets(samples, source="probe", mask=mask).values[0] > 0.9
    assert estimate_budgets(samples, source="probe").values[0] < 0.6

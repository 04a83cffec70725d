"""The moving average of weights: by hand, in the loop, through a stop, and what it leaves alone."""

import json

import pytest
import torch
from torch import nn

import iibalance
from iibalance.averaging import WeightAverage
from iibalance.config import RunConfig, TrainingConfig
from iibalance.data.dataset import Split
from iibalance.errors import InputError
from iibalance.methods import METHODS, Method, make_method
from iibalance.nn.model import MultimodalClassifier
from iibalance.training import loop
from iibalance.training import trainer as stages
from iibalance.training.loop import fit
from iibalance.training.trainer import make_accelerator


def splits(count=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    inputs = {
        name: nn.functional.one_hot(targets, 4).float() + torch.randn(count, 4, generator=generator)
        for name in "ab"
    }
    return Split(inputs, targets, torch.ones(count, 2, dtype=torch.bool))


def build():
    torch.manual_seed(0)
    return MultimodalClassifier(
        {name: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)) for name in "ab"},
        3,
        embedding_dims={"a": 6, "b": 6},
        gate_hidden=0,
    )


class Averaged(Method):
    name, averaging = "averaged", 0.5


def trained(model, method, validation=None, **options):
    training = TrainingConfig(batch_size=30, progress=False)
    return fit(
        model,
        splits(),
        validation,
        epochs=4,
        training=training,
        seed=0,
        accelerator=make_accelerator(training),
        method=method,
        **options,
    )


def watch(method):
    """The first weights after every step of the method's training, in a list that fills."""
    seen = []
    method.after_step = lambda model, batch, output: seen.append(
        model.encoders[0][0].weight.detach().clone()
    )
    return seen


def by_hand(start, values, horizon):
    """The average after each step."""
    found = []
    for step, value in enumerate(values, 1):
        if step % 2 == 0:  # every second step, for two steps each
            keep = min(1 - 1 / horizon, (1 + step) / (10 + step)) ** 2
            start = keep * start + (1 - keep) * value
        found.append(start)
    return found


def test_the_average_is_the_one_computed_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(5.0)
    average, values = WeightAverage(model, horizon=4), [float(step % 7) for step in range(1, 41)]
    for value, expected in zip(values, by_hand(5.0, values, 4)):
        model.weight.data.fill_(value)
        average.update()
        with average.used():
            assert model.weight.item() == pytest.approx(expected, rel=1e-5)
        assert model.weight.item() == value
    average.apply()
    assert model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_horizon_of_one_step_is_the_weights_as_they_are():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, horizon=0.3)
    for _ in range(2):
        model.weight.data.normal_()
        average.update()
    assert torch.equal(average.values["weight"], model.weight)


def test_what_is_averaged_and_what_is_not():
    model = build()
    model.encoders[1].register_buffer(
        "causal", torch.full((2, 2), -torch.inf).triu(1)
    )  # a user's own: averaged it would be NaN
    model.encoders[0][0].bias.requires_grad_(False)
    average = WeightAverage(model, horizon=10)
    encoders = [
        f"encoders.{m}.{part}"
        for m in range(2)
        for part in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    ]
    heads = [f"head.classifiers.{m}.{part}" for m in range(2) for part in ("weight", "bias")]
    assert set(average.values) == {*encoders, *heads} - {"encoders.0.0.bias"}
    model(splits().inputs, splits().targets)
    average.update(), average.update()
    average.apply()
    assert torch.equal(model.encoders[1].causal, torch.full((2, 2), -torch.inf).triu(1))
    assert all(
        torch.equal(model.state_dict()[name], value) for name, value in average.values.items()
    )


def test_an_error_while_the_average_is_used_leaves_the_weights_of_the_training():
    model = nn.Linear(2, 2)
    average, before = WeightAverage(model, horizon=10), model.weight.detach().clone().add_(1)
    model.weight.data.copy_(before)
    with pytest.raises(KeyboardInterrupt), average.used():
        assert not torch.equal(model.weight, before)
        raise KeyboardInterrupt
    assert torch.equal(model.weight, before)


def test_state_goes_on_where_it_was():
    def steps(model, average, first, last):
        for step in range(first, last):
            model.weight.data.fill_(float(step))
            average.update()

    whole_model, model = nn.Linear(1, 1), nn.Linear(1, 1)
    model.load_state_dict(whole_model.state_dict())
    whole, half = WeightAverage(whole_model, 5), WeightAverage(model, 5)
    steps(whole_model, whole, 0, 11)
    steps(model, half, 0, 5)
    other = WeightAverage(model, 5)
    other.load_state_dict(half.state_dict())
    steps(model, other, 5, 11)
    assert other.steps == 11 and torch.equal(other.values["weight"], whole.values["weight"])


def test_training_judges_and_keeps_the_average():
    """What is validated is the average at the end of each epoch, and what is kept is that of the best one; the training itself goes on from its own weights."""
    kept, method, plain = [], Averaged(), Method()
    raw, own = watch(method), watch(plain)
    judged = lambda row, model, outputs, before: kept.append(
        model.encoders[0][0].weight.detach().clone()
    )
    model = build()
    history = trained(model, method, splits(seed=1), on_epoch=judged)
    trained(build(), plain, splits(seed=1))
    assert len(raw) == 12 and all(
        torch.equal(a, b) for a, b in zip(raw, own)
    )  # the steps are those of a training without an average
    averages = by_hand(build().encoders[0][0].weight.detach(), raw, 6)  # half of the 12 steps
    for found, expected in zip(kept, averages[2::3], strict=True):
        torch.testing.assert_close(found, expected)
    best = min(range(4), key=lambda epoch: history[epoch]["validation.nll"])
    assert torch.equal(model.encoders[0][0].weight, kept[best]) and not torch.equal(
        kept[best], raw[3 * best + 2]
    )


def test_without_validation_the_last_average_is_kept():
    method, model = Averaged(), build()
    raw = watch(method)
    trained(model, method)
    expected = by_hand(build().encoders[0][0].weight.detach(), raw, 6)[-1]
    torch.testing.assert_close(model.encoders[0][0].weight.detach(), expected)


def test_rate_multiplies_the_learning_rate():
    rows = trained(build(), Method(), rate=3.0), trained(build(), Method())
    assert [row["learning_rate"] for row in rows[0]] == pytest.approx(
        [3 * row["learning_rate"] for row in rows[1]]
    )


@pytest.mark.parametrize(
    ("name", "options", "rate", "averaging"),
    [
        ("iibalance", {"averaging": 0.1, "rate": 3.0}, 3.0, 0.1),
        ("iibalance_no_alignment", {"averaging": 0.2}, 1.0, 0.2),
        ("iibalance", {}, 1.0, 0.0),
        ("ensemble_gated", {}, 1.0, 0.0),
    ],
)
def test_which_trainings_have_the_larger_rate_and_the_average(
    name, options, rate, averaging, tmp_path, monkeypatch
):
    """The joint training and, for the rate, the budget stage of the method; never encoders that are trained alone."""
    seen = {}

    def note(model, train, validation, **options):
        seen[options["name"]] = (
            options.get("rate", 1.0),
            getattr(options.get("method"), "averaging", 0.0),
        )
        return original(model, train, validation, **options)

    original = loop.fit
    monkeypatch.setattr(stages, "fit", note)
    config = RunConfig(method=name, method_options=options, epochs=1, output=str(tmp_path / "run"))
    config.training.progress = False
    iibalance.train(config)
    folds = {key for key in seen if key.startswith("fold-")}
    assert len(folds) == 9 and all(seen[key] == (rate, 0.0) for key in folds)
    assert {seen[key] for key in seen if key.startswith("alone-")} == {(1.0, 0.0)}
    assert (
        seen.get("joint", (rate, averaging)) == (rate, averaging)
        and ("joint" in seen) == METHODS[name].joint
    )


def test_average_and_rate_that_mean_nothing_are_refused():
    for options, message in (
        ({"averaging": 1.5}, "averaging is 1.5; give a share of the training"),
        ({"averaging": -1.0}, "averaging is -1.0"),
        ({"rate": 0}, "rate is 0"),
    ):
        with pytest.raises(InputError, match=f"method_options: {message}"):
            make_method("iibalance", RunConfig(method_options=options))


def test_a_stopped_training_goes_on_with_its_average(tmp_path, monkeypatch):
    def run(output, resume=False):
        config = RunConfig(
            epochs=4, output=str(tmp_path / output), method_options={"averaging": 0.5}
        )
        (
            config.training.progress,
            config.training.checkpoint_seconds,
            config.training.alone,
            config.budgets.epochs,
        ) = False, 0.0, False, 1
        return iibalance.train(config, resume=resume)

    whole, original, calls = run("whole"), loop._train_epoch, []

    def stopping(*arguments):
        calls.append(1)
        if (
            len(calls) == 9 + 3
        ):  # nine trainings of the budget stage, one epoch each, then the third epoch of the joint training
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "_train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(loop, "_train_epoch", original)
    checkpoints = sorted((tmp_path / "stopped" / "checkpoints").iterdir())
    assert (
        "average.safetensors"
        in json.loads((checkpoints[-1] / "manifest.json").read_text())["files"]
    )
    assert run("stopped", resume=True) == whole

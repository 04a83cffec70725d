"""Every method through the whole of a run.

Trained, stopped in the middle and gone on with, loaded, and asked about samples that lack
a modality.
"""

import numpy as np
import pytest
import torch

import iibalance
from iibalance import InputError, RunConfig
from iibalance.config import BudgetConfig, DataConfig, ModelConfig, TrainingConfig
from iibalance.methods import METHODS
from iibalance.training import loop, stages
from iibalance.training.run import train

# These have more to remember than model and optimiser
STATEFUL = (
    "agm",
    "pmr",
    "qmf",
    "greedy",
    "mslr",
    "g_blend",
    "d_and_r",
    "reconboost",
    "lfm",
    "inforeg",
)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    generator = np.random.default_rng(0)
    y = np.arange(150) % 3
    path = tmp_path_factory.mktemp("runs") / "two.npz"
    signal = np.eye(3)[y]
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


def config(npz, output, method, **options):
    return RunConfig(
        data=DataConfig(name="npz", path=npz),
        method=method,
        output=str(output),
        epochs=4,
        model=ModelConfig(width=4, embedding_dim=8),
        training=TrainingConfig(
            progress=False, alone=False, checkpoint_seconds=0.0, learning_rate=0.02
        ),
        **options,
    )


def _needs_many_trainings(name):
    """Budgets take a training a fold and modality, ensembles one a modality, g_blend two more."""
    return METHODS[name].needs_budgets or not METHODS[name].joint or name == "g_blend"


def by_method(names):
    """Parametrizes a test by a method's name; those of many trainings are slow."""
    slow = lambda name: [pytest.mark.slow] if _needs_many_trainings(name) else []
    return pytest.mark.parametrize("name", [pytest.param(name, marks=slow(name)) for name in names])


@by_method(METHODS)
def test_trained_loaded_and_asked(npz, tmp_path, name):
    metrics = train(config(npz, tmp_path / "run", name)).metrics
    model = iibalance.load(tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    both = model.predict({"a": a, "b": b})
    only = model.predict({"b": b})
    masked = model.predict(
        {"a": torch.full((4, 6), torch.nan), "b": b}, mask=torch.tensor([[False, True]] * 4)
    )
    torch.testing.assert_close(only.probabilities, masked.probabilities)
    assert (
        torch.allclose(both.probabilities.sum(1), torch.ones(4), atol=1e-5)
        and both.probabilities.isfinite().all()
    )
    if name != "unimodal":
        assert not torch.equal(both.probabilities, only.probabilities)
    if both.trust is not None:
        assert (only.trust[:, 0] == 0).all() and (both.trust <= 1).all()
    rate = model.base_rate.double()
    best = both.probabilities.double().max(1)
    gained = best.values.logit() - rate[best.indices].logit()
    told = best.values < 0.999  # beyond it float32 rounds 1 - p
    added = both.contributions.sum(1)
    torch.testing.assert_close(added[told], gained[told], atol=1e-3, rtol=1e-3)
    assert not only.contributions[:, 0].any() and only.contributions[:, 1].abs().min() > 0
    assert metrics["test"]["nll"] < 1.3 and metrics["test"]["modalities"]["b"]["accuracy"] > 0.4


@pytest.mark.usefixtures("no_pictures")
@by_method(STATEFUL)
def test_stopped_in_the_middle_it_ends_with_the_same_numbers(npz, tmp_path, name, monkeypatch):
    whole = train(config(npz, tmp_path / "whole", name)).metrics
    original, calls = loop._Loop.epoch, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop._Loop, "epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config(npz, tmp_path / "stopped", name))
    monkeypatch.setattr(loop._Loop, "epoch", original)
    assert train(config(npz, tmp_path / "stopped", name), resume=True).metrics == whole


@pytest.mark.slow
def test_training_starts_from_the_encoders_trained_alone(npz, tmp_path, monkeypatch):
    """Whatever the budgets come from, and again after a stop; not where the start is new."""
    seen = []
    original = METHODS["iibalance"].initialise
    monkeypatch.setattr(
        METHODS["iibalance"],
        "initialise",
        lambda self, model, alone: (seen.append(alone), original(self, model, alone))[1],
    )

    def run(name, resume=False, source="unimodal", warm_start=1.0):
        options = config(
            npz,
            tmp_path / name,
            "iibalance",
            method_options={"warm_start": warm_start},
            budgets=BudgetConfig(source=source, epochs=2),
        )
        # what it starts from is what it ends with
        options.epochs, options.training.learning_rate = 1, 1e-30
        train(options, resume=resume)
        return iibalance.load(tmp_path / name)

    model = run("whole")
    (alone,) = seen
    assert list(alone) == ["a", "b"] and alone["b"].modalities == ("b",)
    for m, part in enumerate(alone.values()):
        for ours, its in zip(model.encoders[m].parameters(), part.encoders[0].parameters()):
            torch.testing.assert_close(ours, its)
    run("probe", source="probe")
    assert len(seen) == 2
    new = run("new", warm_start=0)
    assert len(seen) == 2
    assert not torch.equal(next(new.encoders[0].parameters()), next(model.encoders[0].parameters()))
    monkeypatch.setattr(
        stages.Run, "train_joint", lambda self, *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.undo()
    resumed = run("stopped", resume=True)
    assert all(
        torch.equal(value, other)
        for value, other in zip(model.state_dict().values(), resumed.state_dict().values())
    )


@pytest.mark.usefixtures("no_pictures")
def test_method_options_reach_the_method_and_wrong_ones_are_refused(npz, tmp_path):
    weak, strong = (
        train(config(npz, tmp_path / str(alpha), "agm", method_options={"alpha": alpha})).metrics[
            "test"
        ]["nll"]
        for alpha in (0.0, 3.0)
    )
    assert weak != strong
    for options, message in (
        ({"beta": 1.0}, "agm has no parameter 'beta'; it has alpha"),
        ({"alpha": -1.0}, "alpha is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            train(config(npz, tmp_path / "wrong", "agm", method_options=options))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_step_of_several_micro_batches_is_modulated_once(npz, tmp_path, monkeypatch):
    """On the whole gradient.

    What is changed after the first micro-batch would be changed again after the second.
    """
    kind, before = METHODS["ogm_ge"], []
    # The encoders' gradients become 0
    monkeypatch.setattr(kind, "coefficients", staticmethod(lambda scores, alpha: torch.zeros(2)))
    original = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (
            before.append([v.grad.abs().max() for g in self.param_groups for v in g["params"]]),
            original(self, *a, **k),
        )[1],
    )
    calls = []
    after = kind.after_backward
    monkeypatch.setattr(kind, "after_backward", lambda *a: (calls.append(1), after(*a))[1])
    options = config(npz, tmp_path / "run", "ogm_ge", method_options={"noise": 0.0})
    options.epochs, options.training.gradient_accumulation = 1, 2
    train(options)
    assert len(calls) == len(before) > 1
    # First an encoder's gradient, last the head's
    assert all(gradients[0] == 0 and gradients[-1] > 0 for gradients in before)


@pytest.mark.slow
def test_encoders_whose_size_no_linear_layer_tells(npz, tmp_path):
    encoders = {
        "a": lambda: torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, 6)), torch.nn.Conv1d(1, 2, 3), torch.nn.Flatten()
        ),
        "b": torch.nn.Identity,
    }
    options = config(npz, tmp_path / "run", "iibalance")
    options.training.alone = True
    metrics = train(options, encoders=encoders).metrics
    assert metrics["test"]["modalities"]["b"]["accuracy"] > 0.5 and iibalance.load(
        tmp_path / "run", encoders=encoders
    ).head.embedding_dims == {"a": 8, "b": 5}


def test_two_modalities_are_two(tmp_path):
    for name in ("ogm_ge", "pmr", "greedy"):
        with pytest.raises(InputError, match=f"{name} is defined for 2 modalities, the data has 3"):
            train(RunConfig(method=name, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_step_takes_each_groups_rate_in_a_loop_of_ones_own():
    from iibalance.data.dataset import Batch

    method = iibalance.make_method("mslr", window=1)
    model = method.build({"x": torch.nn.Linear(4, 6), "y": torch.nn.Linear(3, 5)}, num_classes=3)
    optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.1)
    method.after_epoch(
        {"epoch": 1, "validation.accuracy.x": 0.4, "validation.accuracy.y": 0.4}, optimizer
    )
    optimizer.param_groups[0]["scale"] = (
        0.25  # as after_epoch leaves it for a modality that falls behind
    )
    batch = Batch({"x": torch.randn(8, 4), "y": torch.randn(8, 3)}, torch.arange(8) % 3, None)
    before = [next(encoder.parameters()).detach().clone() for encoder in model.encoders]
    model(batch.inputs, batch.targets).loss.backward()
    gradients = [next(encoder.parameters()).grad.clone() for encoder in model.encoders]
    optimizer.zero_grad()
    method.step(model, optimizer, batch)
    for encoder, old, gradient, rate in zip(model.encoders, before, gradients, (0.025, 0.1)):
        torch.testing.assert_close(next(encoder.parameters()).detach(), old - rate * gradient)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_own_loop_with_hooks_called_one_by_one_equals_step():
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        method = iibalance.make_method("mmpareto")
        model = method.build(
            {"x": torch.nn.Linear(4, 6), "y": torch.nn.Linear(3, 5), "z": torch.nn.Linear(2, 4)},
            num_classes=3,
        )
        optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.1)
        from iibalance.data.dataset import Batch

        batch = Batch(
            {"x": torch.randn(8, 4), "y": torch.randn(8, 3), "z": torch.randn(8, 2)},
            torch.arange(8) % 3,
            None,
        )
        for _ in range(3):
            if by_hand:
                output = model(batch.inputs, batch.targets, progress=0.5)
                method.backward(method.loss(output, model, batch, 0.5), model, batch, output)
                method.after_backward(model, batch, output)
                optimizer.step()
                optimizer.zero_grad()
                method.after_step(model, batch, output)
            else:
                method.step(model, optimizer, batch, progress=0.5)
        results.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    assert torch.equal(*results)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_a_users_own_method_loads_from_any_directory(npz, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.py").write_text(
        "from iibalance.methods.sum import Sum\n\nclass Mine(Sum):\n    name = 'mine'\n"
    )
    monkeypatch.chdir(own)
    metrics = train(config(npz, tmp_path / "run", "mine.py:Mine")).metrics
    assert metrics["method"] == "mine"
    here = iibalance.load(tmp_path / "run").state_dict()
    monkeypatch.chdir(tmp_path)
    there = iibalance.load("run").state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(value, here[key]) for key, value in there.items())

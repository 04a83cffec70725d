"""Every method through the whole of a run: trained, stopped in the middle and gone on with, loaded, and asked about samples that lack a modality."""
import numpy as np
import pytest
import torch

import iibalance
from iibalance import InputError, RunConfig, loop, training
from iibalance.config import BudgetConfig, DataConfig, ModelConfig, TrainingConfig
from iibalance.methods import METHODS
from iibalance.training import train

STATEFUL = ("agm", "pmr", "qmf", "greedy", "mslr", "g_blend")  # have more to remember than model and optimiser


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    generator = np.random.default_rng(0)
    y = np.arange(150) % 3
    path = tmp_path_factory.mktemp("runs") / "two.npz"
    signal = np.eye(3)[y]
    mask = np.ones(150, bool)
    mask[::11] = False
    np.savez(path, x_a=signal @ generator.normal(size=(3, 6)) + generator.normal(size=(150, 6)), mask_a=mask,
             x_b=2 * signal @ generator.normal(size=(3, 5)) + generator.normal(size=(150, 5)), y=y)
    return str(path)


def config(npz, output, method, **options):
    return RunConfig(data=DataConfig(name="npz", path=npz), method=method, output=str(output), epochs=4, model=ModelConfig(width=4, embedding_dim=8),
                     training=TrainingConfig(progress=False, alone=False, checkpoint_seconds=0.0, learning_rate=0.02), **options)


@pytest.mark.parametrize("name", METHODS)
def test_trained_loaded_and_asked(npz, tmp_path, name):
    metrics = train(config(npz, tmp_path / "run", name))
    model = iibalance.load(tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    both = model.predict({"a": a, "b": b})
    only = model.predict({"b": b})
    masked = model.predict({"a": torch.full((4, 6), torch.nan), "b": b}, mask=torch.tensor([[False, True]] * 4))
    torch.testing.assert_close(only.probabilities, masked.probabilities)
    assert torch.allclose(both.probabilities.sum(1), torch.ones(4), atol=1e-5) and both.probabilities.isfinite().all()
    if name != "unimodal":
        assert not torch.equal(both.probabilities, only.probabilities)
    if both.weights is not None:
        assert (only.weights[:, 0] == 0).all()
    assert metrics["test"]["nll"] < 1.3 and metrics["test"]["modalities"]["b"]["accuracy"] > 0.4


@pytest.mark.parametrize("name", STATEFUL)
def test_stopped_in_the_middle_it_ends_with_the_same_numbers(npz, tmp_path, name, monkeypatch):
    whole = train(config(npz, tmp_path / "whole", name))
    original, calls = loop._train_epoch, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "_train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config(npz, tmp_path / "stopped", name))
    monkeypatch.setattr(loop, "_train_epoch", original)
    assert train(config(npz, tmp_path / "stopped", name), resume=True) == whole


def test_training_starts_from_the_models_of_the_budget_stage(npz, tmp_path, monkeypatch):
    """From that stage's own first model, only where it trained one, and again after a stop."""
    seen = []
    original = METHODS["iibalance"].initialise
    monkeypatch.setattr(METHODS["iibalance"], "initialise", lambda self, model, folds: (seen.append((model, folds)), original(self, model, folds))[1])
    still = dict(budgets=BudgetConfig(epochs=2))

    def run(name, resume=False, **more):
        options = config(npz, tmp_path / name, "iibalance", method_options={"warm_start": 1.0}, **{**still, **more})
        options.epochs, options.training.learning_rate = 1, 1e-30  # what it starts from is what it ends with
        train(options, resume=resume)
        return iibalance.load(tmp_path / name)

    model = run("whole")
    (_, folds), = seen
    assert len(folds) == 3 and folds[0].modalities == ("a", "b")
    for one, other in ((0, 0), (1, 1)):
        assert torch.equal(next(model.encoders[one].parameters()), next(folds[0].encoders[other].parameters()))
        assert not torch.equal(next(model.encoders[one].parameters()), next(folds[1].encoders[other].parameters()))
    run("probe", budgets=BudgetConfig(source="probe"))
    assert len(seen) == 1
    monkeypatch.setattr(training.Run, "train_joint", lambda self, budgets: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.undo()
    resumed = run("stopped", resume=True)
    assert all(torch.equal(value, other) for value, other in zip(model.state_dict().values(), resumed.state_dict().values()))


def test_method_options_reach_the_method_and_wrong_ones_are_refused(npz, tmp_path):
    weak, strong = (train(config(npz, tmp_path / str(alpha), "agm", method_options={"alpha": alpha}))["test"]["nll"] for alpha in (0.0, 3.0))
    assert weak != strong
    for options, message in (({"beta": 1.0}, "agm has no parameter 'beta'; it has alpha"), ({"alpha": -1.0}, "alpha is -1.0"), ({"alpha": "x"}, "alpha is 'x'")):
        with pytest.raises(InputError, match=message):
            train(config(npz, tmp_path / "wrong", "agm", method_options=options))
    assert not (tmp_path / "wrong").exists()


def test_two_modalities_are_two(tmp_path):
    for name in ("ogm_ge", "pmr", "greedy"):
        with pytest.raises(InputError, match=f"{name} is defined for 2 modalities, the data has 3"):
            train(RunConfig(method=name, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_own_loop_with_hooks_called_one_by_one_equals_step():
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        method = iibalance.make_method("mmpareto")
        model = method.build({"x": torch.nn.Linear(4, 6), "y": torch.nn.Linear(3, 5), "z": torch.nn.Linear(2, 4)}, num_classes=3)
        optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.1)
        from iibalance.data.base import Batch

        batch = Batch({"x": torch.randn(8, 4), "y": torch.randn(8, 3), "z": torch.randn(8, 2)}, torch.arange(8) % 3, None)
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

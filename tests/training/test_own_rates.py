"""Learning rates and weight decays of single modalities."""

import pytest
import torch
from torch import nn

import iibalance
from iibalance.config import TrainingConfig
from iibalance.errors import InputError
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.own_encoders import with_own_groups, with_own_rates


def model_of():
    torch.manual_seed(0)
    return MultimodalClassifier({"a": nn.Linear(3, 4), "b": nn.Linear(5, 4)}, num_classes=2)


def by_parameter(groups):
    return {
        id(value): (group.get("scale", 1.0), group.get("weight_decay"))
        for group in groups
        for value in group["params"]
    }


def test_a_named_modality_has_its_own_rate_and_decay_and_the_rest_has_not():
    model = model_of()
    training = TrainingConfig(
        learning_rate=1e-2, learning_rates={"b": 2e-3}, weight_decays={"b": 0.5}
    )
    groups = [{"params": list(model.parameters()), "scale": 1.0}]
    found = by_parameter(with_own_rates(groups, model, training))
    own = [*model.encoders[1].parameters(), *model.head.classifiers[1].parameters()]
    assert [found[id(value)] for value in own] == [(pytest.approx(0.2), 0.5)] * 4
    others = [*model.encoders[0].parameters(), *model.head.classifiers[0].parameters()]
    assert [found[id(value)] for value in others] == [(1.0, None)] * 4
    # A user's own groups of the encoder multiply what is there.
    both = with_own_groups(
        with_own_rates(groups, model, training),
        model,
        {"b": lambda encoder: [{"params": encoder.weight, "scale": 0.1}]},
    )
    assert by_parameter(both)[id(model.encoders[1].weight)] == (pytest.approx(0.02), 0.5)


def test_an_encoder_alone_is_trained_as_by_its_rate_in_learning_rate():
    """So a rate by name gives the weights that the same rate for all gives."""
    runs = {}
    for name, training in {
        "for all": {"learning_rate": 1e-3, "weight_decay": 0.3},
        "by name": {
            "learning_rate": 9e-3,
            "learning_rates": dict.fromkeys(("left", "right", "third"), 1e-3),
            "weight_decays": dict.fromkeys(("left", "right", "third"), 0.3),
        },
    }.items():
        samples = iibalance.Samples(
            {
                m: torch.randn(40, 3, generator=torch.Generator().manual_seed(i))
                for i, m in enumerate(("left", "right", "third"))
            },
            ["a", "b"] * 20,
        )
        config = iibalance.RunConfig(
            method="ensemble", epochs=2, training=TrainingConfig(progress=False, **training)
        )
        from iibalance.methods import make_method
        from iibalance.training.run import prepare
        from iibalance.training.stages import Run
        from iibalance.training.trainer import make_accelerator

        data, _ = prepare(config, samples, None)
        run = Run(
            config, data, make_method("ensemble", config), None, make_accelerator(config.training)
        )
        runs[name] = run.train_alone()[0]
    for modality, model in runs["for all"].items():
        for key, value in model.state_dict().items():
            assert torch.allclose(value, runs["by name"][modality].state_dict()[key], atol=1e-6), (
                key
            )


def test_a_modality_that_the_data_has_not_is_refused(tmp_path):
    for option in ("learning_rates", "weight_decays"):
        training = TrainingConfig(progress=False, **{option: {"smell": 1e-3}})
        config = iibalance.RunConfig(training=training, output=str(tmp_path / "run"), epochs=1)
        with pytest.raises(InputError, match=f"training.{option}: 'smell' is none of the data's"):
            iibalance.train(config)
    assert not (tmp_path / "run").exists()


def test_a_rate_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="training.learning_rates: a: 0.0 cannot be used"):
        TrainingConfig(learning_rates={"a": 0.0})
    with pytest.raises(InputError, match="training.weight_decays: a: -1.0 cannot be used"):
        TrainingConfig(weight_decays={"a": -1.0})

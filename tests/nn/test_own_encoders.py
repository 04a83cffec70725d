"""Encoders and parameter groups of a user's own: what they may be, and what becomes of them."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import nn

from iibalance import InputError, MultimodalClassifier
from iibalance.nn.encoding import encode, encoder_size, train_mode
from iibalance.nn.own_encoders import as_factories, with_own_groups


def _make() -> nn.Module:
    return nn.Linear(2, 3)


def test_copies_of_a_module_start_from_its_weights_and_share_none():
    layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    layer[0].weight.requires_grad_(False)
    layer[1].running_mean.fill_(7)
    make = as_factories({"audio": layer}, ["audio"])["audio"]
    one, other = make(), make()
    for part in (one, other):
        for name, value in layer.state_dict().items():
            assert torch.equal(part.state_dict()[name], value)
            assert part.state_dict()[name].data_ptr() != value.data_ptr()
        assert not part[0].weight.requires_grad and part[0].bias.requires_grad
    one[0].bias.data.fill_(9)
    assert not other[0].bias.eq(9).any() and not layer[0].bias.eq(9).any()


@pytest.mark.parametrize("encoder", [_make, partial(nn.Linear, 2, 3), lambda: nn.Linear(2, 3)])
def test_a_function_draws_new_weights_each_time(encoder):
    make = as_factories({"audio": encoder}, ["audio"])["audio"]
    one, other = make(), make()
    assert type(one) is nn.Linear and not torch.equal(one.weight, other.weight)


def test_factories_can_be_pickled():
    factories = as_factories({"a": nn.Linear(2, 3), "b": _make}, ["a", "b"])
    again = pickle.loads(pickle.dumps(factories))
    assert torch.equal(again["a"]().weight, factories["a"]().weight)
    assert again["b"]().out_features == 3
    assert as_factories(None, ["a"]) == {}


class _NeedsArguments(nn.Module):
    def __init__(self, width):
        super().__init__()


def _breaks():
    return nn.Linear(2, "three")


@pytest.mark.parametrize(
    "encoders, message",
    [
        ([_make], "encoders: is a list; give a dict of modules .or functions that make them."),
        (nn.Linear(2, 3), "encoders: is a Linear; give a dict of modules"),
        ({"video": _make}, "encoders: 'video' is none of the data's modalities .audio."),
        ({"audio": None}, "encoders: audio is a NoneType; give a torch.nn.Module, or a function"),
        ({"audio": "resnet18"}, "encoders: audio is a str; give a torch.nn.Module, or a function"),
        ({"audio": torch.ones(2)}, "encoders: audio is a Tensor; give a torch.nn.Module"),
        ({"audio": _NeedsArguments}, "audio: calling it without arguments failed .*'width'"),
        ({"audio": _breaks}, "audio: calling it without arguments failed"),
        ({"audio": lambda: None}, "audio: the function made a NoneType; it must make a torch.nn"),
        ({"audio": lambda: nn.Linear}, "audio: the function made a type; it must make a torch.nn"),
    ],
)
def test_what_makes_no_encoder_is_refused_in_one_line(encoders, message):
    with pytest.raises(InputError, match=message) as caught:
        as_factories(encoders, ["audio"])["audio"]()
    assert "\n" not in str(caught.value)


class _Output:
    pooler_output = torch.ones(2, 6)
    last_hidden_state = torch.ones(2, 4, 6)


class _Hugging(nn.Module):
    def forward(self, input_ids, attention_mask):
        return _Output()


def test_the_size_is_told_from_a_batch_and_the_pooled_output_is_taken():
    assert encoder_size(nn.Linear(2, 3), torch.ones(2, 2)) == 3
    fields = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    assert encoder_size(_Hugging(), fields) == 6
    with pytest.raises(
        InputError, match="a: Linear cannot take a batch of shape .2, 5. .RuntimeErr"
    ):
        encoder_size(nn.Linear(2, 3), torch.ones(2, 5), "a")
    with pytest.raises(
        InputError, match="Identity returned .2, 3, 4. for a batch of 2; an encoder"
    ):
        encoder_size(nn.Identity(), torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="Linear cannot take .*'input_ids': .2, 4.*TypeError"):
        encoder_size(nn.Linear(2, 3), fields)


def test_trying_an_encoder_leaves_its_statistics_and_mode():
    encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout())
    encoder[2].eval()
    assert encoder_size(encoder, torch.ones(2, 2)) == 3
    assert encoder[1].num_batches_tracked == 0 and not encoder[1].running_mean.any()
    assert encoder[1].training and not encoder[2].training


def test_frozen_parts_stay_in_evaluation_mode_and_others_train():
    frozen = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    frozen.requires_grad_(False)
    encoder = nn.Sequential(frozen, nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = MultimodalClassifier({"a": encoder, "b": nn.Linear(2, 4)}, 3).eval()
    train_mode(model)
    assert [part.training for part in frozen] == [False, False, False]
    assert encoder[2].training and encoder[3].training and model.head.training
    before = frozen[1].running_mean.clone()
    model({"a": torch.randn(8, 2), "b": torch.randn(8, 2)}, torch.arange(8) % 3).loss.backward()
    assert torch.equal(frozen[1].running_mean, before) and encoder[2].running_mean.any()
    assert frozen[0].weight.grad is None and encoder[1].weight.grad.any()


class _Strict(nn.Module):
    """0 / 0 for a row of zeros: what must not reach it shows in the gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, ids):
        values = ids.float()
        return (values / values.sum(1, keepdim=True)) @ self.weight


@pytest.mark.parametrize("there", [[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_a_missing_row_never_reaches_an_encoder_of_ids(there):
    present = torch.tensor(there, dtype=torch.bool)
    ids = torch.arange(1, 17).view(4, 4) * present[:, None]
    encoders = {"ids": _Strict(), "other": nn.Linear(2, 3)}
    model = MultimodalClassifier(encoders, 2, embedding_dims={"ids": 3, "other": 3})
    mask = torch.stack([present, torch.ones(4, dtype=torch.bool)], 1)
    inputs = {"ids": ids, "other": torch.randn(4, 2)}
    embedded = model.embed(inputs, mask)[0]
    assert embedded.shape == (4, 3) and not embedded[~present].any()
    if present.any():
        torch.testing.assert_close(embedded[present], torch.ones(int(present.sum()), 3))
    model(inputs, torch.tensor([0, 1, 0, 1]), mask=mask).loss.backward()
    for value in model.parameters():
        assert value.grad is None or bool(value.grad.isfinite().all())
    # As if only those rows were there: each is counted once.
    encoder = _Strict()
    encode(encoder, ids, present).sum().backward() if present.any() else None
    if present.any():
        wanted = (ids[present] / ids[present].sum(1, keepdim=True)).sum(0)[:, None].expand(4, 3)
        torch.testing.assert_close(encoder.weight.grad, wanted)


def _model() -> MultimodalClassifier:
    encoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    return MultimodalClassifier({"a": encoder, "b": nn.Linear(2, 4)}, 3)


def test_groups_are_taken_out_of_the_methods_and_nothing_is_lost():
    model = _model()
    encoder = model.encoders[0]
    mine, rest = list(encoder.parameters()), list(model.encoders[1].parameters())
    groups = [{"params": mine, "scale": 0.5, "modality": "a"}, {"params": rest, "scale": 1.0}]
    encoder[0].bias.requires_grad_(False)
    made = with_own_groups(
        groups,
        model,
        {
            "a": lambda encoder: [
                {"params": encoder[0].parameters(), "scale": 0.1, "weight_decay": 0.0},
                {"params": encoder[1].bias, "scale": 2},
            ]
        },
    )
    found = [([id(value) for value in group["params"]], group) for group in made]
    ids = lambda *values: [id(value) for value in values]
    assert found[0][0] == ids(encoder[0].bias, encoder[1].weight)  # frozen ones are left alone
    assert found[1][0] == ids(*rest)
    assert found[2][0] == ids(encoder[0].weight) and found[3][0] == ids(encoder[1].bias)
    assert found[2][1]["scale"] == 0.05 and found[2][1]["weight_decay"] == 0.0
    assert found[3][1]["scale"] == 1.0 and "weight_decay" not in found[3][1]
    assert found[2][1]["modality"] == "a" and made[1]["scale"] == 1.0
    assert len(groups) == 2 and groups[0]["params"] is mine  # the method's own are as they were


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda e: [{"params": [nn.Parameter(torch.ones(1))]}],
            "holds a parameter that is not thi",
        ),
        (
            lambda e: [e[0].weight],
            "a: .*is no group; give dicts of params and any of scale, weight",
        ),
        (
            lambda e: {"params": e.parameters()},
            r"a: made \['params'\]; give a list of dicts of params",
        ),
        (
            lambda e: [{"lr": 1e-3, "params": e.parameters()}],
            r"\['lr', 'params'\] is no group; give",
        ),
        (lambda e: [{"scale": 0.1}], r"\['scale'\] is no group; give dicts of params"),
        (lambda e: None, "parameter_groups: a: made a NoneType; give a list of dicts"),
        (
            lambda e: [{"params": e.parameters(), "scale": -1}],
            "scale: -1 cannot be used; give a numb",
        ),
        (lambda e: [{"params": e.parameters(), "scale": "x"}], "scale: 'x' cannot be used; give"),
        (
            lambda e: [{"params": e.parameters(), "weight_decay": float("nan")}],
            "weight_decay: nan cannot be used; give a number >= 0",
        ),
        (
            lambda e: [{"params": e[0].parameters()}, {"params": e.parameters()}],
            "a: a parameter is in two groups; give each to one",
        ),
        (lambda e: [{"params": 3}], "a: params are a int; give parameters of the encoder"),
        (lambda e: [{"params": ["w"]}], "holds a parameter that is not this encoder's"),
    ],
)
def test_what_is_no_group_is_refused_in_one_line(make, message):
    model = _model()
    groups = [{"params": list(model.parameters()), "scale": 1.0}]
    with pytest.raises(InputError, match=message) as caught:
        with_own_groups(groups, model, {"a": make})
    assert "\n" not in str(caught.value)

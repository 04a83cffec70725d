"""``lfm``: the contrastive loss, the learnt weight and its gradient; by hand in plain loops."""

import math

import numpy as np
import pytest
import torch
from test_formulas import CLASSES, arrays, draw, mean_nll, ready, run, slices, softmax
from torch import nn

from iibalance.data.dataset import Batch
from iibalance.methods import lfm, make_method
from iibalance.methods.lfm import LFM


def matching_by_hand(embeddings, mask, temperature):
    """L_MM of projected embeddings, arrays [B, D]."""
    losses = []
    for j in range(len(embeddings)):
        for k in range(j + 1, len(embeddings)):
            rows = [i for i in range(len(mask)) if mask[i][j] and mask[i][k]]
            unit = [
                [z[i] / math.sqrt(sum(v * v for v in z[i])) for i in rows]
                for z in (embeddings[j], embeddings[k])
            ]
            total = 0.0
            for a in range(len(rows)):
                across = [unit[0][a] @ other / temperature for other in unit[1]]
                back = [unit[1][a] @ other / temperature for other in unit[0]]
                total += math.log(softmax(across)[a]) + math.log(softmax(back)[a])
            losses.append(-total / (2 * len(rows)))
    return sum(losses) / len(losses)


def projected(model, inputs):
    return arrays(
        layer(encoder(values))
        for layer, encoder, values in zip(model.head.projections, model.encoders, inputs.values())
    )


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("count", [2, 3])
def test_the_contrastive_loss(count, missing):
    method, model = ready("lfm", count, temperature=0.3)
    split = draw(count, missing=missing)
    batch = split.batch() if missing else split.batch()._replace(mask=None)
    out = run(model, batch)
    expected = matching_by_hand(projected(model, split.inputs), split.mask.tolist(), 0.3)
    _, found = method.losses(out, model, batch.mask)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert [layer.out_features for layer in model.head.projections] == count * [
        4 if count == 2 else 3
    ]


def test_embeddings_of_one_size_are_compared_as_they_are():
    head = make_method("lfm").head({"a": 4, "b": 4}, CLASSES)
    assert all(isinstance(layer, nn.Identity) for layer in head.projections)
    z = [torch.randn(5, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    expected = matching_by_hand(arrays(z), [[True, True]] * 5, 0.7)
    assert head.matching(z, None, 0.7).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_to_compare_costs_nothing():
    head = make_method("lfm").head({"a": 4, "b": 3}, CLASSES)
    z = [torch.randn(2, 4), torch.full((2, 3), torch.nan)]
    mask = torch.tensor([[True, False]] * 2)
    loss = head.matching(z, mask, 0.4)
    loss.backward()
    assert loss.item() == 0 and not head.projections[0].weight.grad.any()


def test_the_loss_weighs_both():
    method, model = ready("lfm", start=0.7)
    batch = draw().batch()
    out = run(model, batch)
    z = arrays(encoder(x) for encoder, x in zip(model.encoders, batch.inputs.values()))
    (bias,) = arrays([model.head.classifier.bias])
    logits = sum(rows @ w.T for rows, w in zip(z, arrays(slices(model.head)))) + bias
    classification = mean_nll(logits, batch.targets.tolist())
    matching = matching_by_hand(projected(model, batch.inputs), batch.mask.tolist(), 0.4)
    loss = method.loss(out, model, batch, 0.5)
    assert loss.item() == pytest.approx(0.3 * classification + 0.7 * matching, rel=1e-5)


# -- conjugate gradients


def test_conjugate_gradients_solve():
    generator = np.random.default_rng(0)
    root = generator.normal(size=(6, 6))
    hessian, vector = root @ root.T + 3 * np.eye(6), generator.normal(size=6)
    product = lambda v: torch.from_numpy(hessian) @ v
    whole = LFM.solve(product, torch.from_numpy(vector), 6)
    np.testing.assert_allclose(whole, np.linalg.solve(hessian, vector), rtol=1e-8)
    for steps in (1, 2, 3):  # the best of the space of v, H v, ...: x^T H x / 2 - v^T x is least
        space = np.stack([np.linalg.matrix_power(hessian, k) @ vector for k in range(steps)], 1)
        best = space @ np.linalg.solve(space.T @ hessian @ space, space.T @ vector)
        found = LFM.solve(product, torch.from_numpy(vector), steps)
        np.testing.assert_allclose(found, best, rtol=1e-6)


def test_conjugate_gradients_stop_where_the_curvature_is_not_positive():
    vector = torch.tensor([1.0, 1.0], dtype=torch.float64)
    falling = lambda v: torch.tensor([-1.0, 0.5], dtype=torch.float64) * v
    assert torch.equal(LFM.solve(falling, vector, 5), vector)
    saddle = lambda v: torch.tensor([3.0, -1.0], dtype=torch.float64) * v
    # the first step: 2 / (3 - 1) times v; the next direction curves down
    assert torch.equal(LFM.solve(saddle, vector, 5), vector)
    valley = lambda v: torch.tensor([3.0, 0.001], dtype=torch.float64) * v
    assert LFM.solve(valley, vector, 5).tolist() == pytest.approx(2 * [2 / 3.001])  # no 1000
    assert torch.equal(LFM.solve(saddle, 0 * vector, 5), 0 * vector)


# -- the weight's gradient


def small(seed=0):
    """A method and a model in float64 of few parameters.

    Embeddings are long: cosines curve less than the cross-entropy then, and that curves up.
    """
    torch.manual_seed(seed)
    method = make_method("lfm", start=0.05)
    encoders = {"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}
    model = method.build(encoders, CLASSES).double()
    for encoder in model.encoders:
        encoder.weight.data.mul_(6)
    inputs = {"a": torch.randn(8, 3).double(), "b": torch.randn(8, 2).double()}
    return method, model, Batch(inputs, torch.arange(8) % CLASSES, torch.ones(8, 2).bool())


def by_parameters(method, model, batch):
    """Functions of all parameters as one vector: CE and L_MM, in float64."""
    keys = [key for key, value in model.named_parameters() if value.requires_grad]
    shapes = [model.get_parameter(key).shape for key in keys]

    def losses(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        named = {key: part.view(shape) for key, part, shape in zip(keys, parts, shapes)}
        z = [x @ named[f"encoders.{m}.weight"].T for m, x in enumerate(batch.inputs.values())]
        logits = torch.cat(z, 1) @ named["head.classifier.weight"].T
        logits = logits + named["head.classifier.bias"]
        rows = torch.arange(8)
        classification = -logits.log_softmax(1)[rows, batch.targets].mean()
        unit = [v / v.norm(dim=1, keepdim=True) for v in z]
        similarity = unit[0] @ unit[1].T / 0.4
        both = similarity.log_softmax(1)[rows, rows] + similarity.log_softmax(0)[rows, rows]
        return classification, -both.mean() / 2

    vector = torch.cat([model.get_parameter(key).detach().flatten() for key in keys])
    return losses, vector


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_of_the_weight(steps, monkeypatch):
    """With the Hessian written out, and the same steps in the space it spans."""
    monkeypatch.setattr(lfm, "STEPS", steps)
    method, model, batch = small(seed=13)
    losses, vector = by_parameters(method, model, batch)
    total = lambda v: 0.95 * losses(v)[0] + 0.05 * losses(v)[1]
    hessian = torch.autograd.functional.hessian(total, vector).numpy()
    slope = [
        torch.autograd.functional.jacobian(lambda v, n=n: losses(v)[n], vector).numpy()
        for n in range(2)
    ]
    space = np.stack([np.linalg.matrix_power(hessian, k) @ slope[0] for k in range(steps)], 1)
    curved = space.T @ hessian @ space
    assert np.linalg.eigvalsh(curved).min() > 0  # no step is cut short here
    solved = space @ np.linalg.solve(curved, space.T @ slope[0])
    expected = -(slope[1] - slope[0]) @ solved
    before = [value.clone() for value in model.parameters()]
    found = method.hypergradient(model, batch)
    assert found.item() == pytest.approx(expected, rel=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))  # put back
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("slope", "rate", "expected"),
    [
        (0.5, 1.0, [0.95, 0.85, 0.65]),  # a fifth of the training, then two fifths
        (40.0, 1.0, [0.95, 0.75, 0.35]),  # clipped to 1
        (-40.0, 2.0, [0.95, 1.0, 1.0]),  # and no more than the whole
        (40.0, 9.0, [0.95, 0.0, 0.0]),
        (math.nan, 1.0, [0.95, 0.95, 0.95]),
    ],
)
def test_the_weight_goes_down_its_gradient(slope, rate, expected, monkeypatch):
    method, model = ready("lfm", rate=rate)
    monkeypatch.setattr(LFM, "hypergradient", lambda *_: torch.tensor(slope))
    found = []
    for progress in (0.0, 0.2, 0.6):
        method.before_epoch(model, draw(), progress)
        found.append(method.alpha)
    assert found == pytest.approx(expected)


def test_the_weight_is_learnt_with_the_model_as_it_predicts_and_changes_nothing_of_it():
    """Running statistics, modes and parameters are as they were, and dropout is off."""
    torch.manual_seed(0)
    method = make_method("lfm")
    encoders = {
        m: nn.Sequential(nn.Linear(size, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 4))
        for m, size in (("audio", 5), ("video", 7))
    }
    model = method.build(encoders, CLASSES)
    model.train()
    split = draw(size=30)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    slopes = [method.hypergradient(model.eval(), split.batch()).item() for _ in range(2)]
    assert slopes[0] == slopes[1] != 0
    model.train()
    method.before_epoch(model, split, 0.0)
    method.before_epoch(model, split, 0.5)
    assert method.alpha != pytest.approx(0.95) and model.encoders[0][2].training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

"""The late-fusion transformer against attention written out in loops."""

import math

import numpy as np
import pytest
import torch
from test_formulas import CLASSES, SIZES, arrays, by_encoder, close, draw, mean_nll, ready, run

from iibalance.errors import InputError
from iibalance.methods import make_method
from iibalance.metrics import fit_temperature


def normed(row, norm):
    weight, bias = arrays(norm.parameters())
    return (row - row.mean()) / math.sqrt(row.var() + norm.eps) * weight + bias


def linear(row, weight, bias):
    weight, bias = arrays([weight, bias])
    return weight @ row + bias


def attended(rows, attention):
    """Each row's attention over all of them, head by head."""
    width, count = rows[0].size, attention.num_heads
    size, out = width // count, [np.zeros(rows[0].size) for _ in rows]
    packed = [linear(row, attention.in_proj_weight, attention.in_proj_bias) for row in rows]
    for head in range(count):
        own = slice(head * size, (head + 1) * size)
        q, k, v = ([row[part * width :][own] for row in packed] for part in range(3))
        for i in range(len(rows)):
            scores = np.array([q[i] @ k[j] / math.sqrt(size) for j in range(len(rows))])
            weights = np.exp(scores - scores.max())
            for j, weight in enumerate(weights / weights.sum()):
                out[i][own] += weight * v[j]
    projection = attention.out_proj
    return [linear(row, projection.weight, projection.bias) for row in out]


def logits_of(model, z, there):
    """[K] of one sample with the modalities ``there``, as if there were no others."""
    head = model.head
    (cls_token,) = arrays([head.cls_token])
    tokens = [cls_token]
    for m in there:
        tokens.append(linear(z[m], head.projections[m].weight, head.projections[m].bias))
    for layer in head.layers:
        told = attended([normed(row, layer.norm1) for row in tokens], layer.self_attn)
        tokens = [row + more for row, more in zip(tokens, told)]
        for i, row in enumerate(tokens):
            hidden = linear(normed(row, layer.norm2), layer.linear1.weight, layer.linear1.bias)
            hidden = np.maximum(hidden, 0)
            tokens[i] = row + linear(hidden, layer.linear2.weight, layer.linear2.bias)
    return linear(normed(tokens[0], head.norm), head.output.weight, head.output.bias)


def moved(model):
    """Norms that are not the identity, and tokens that weigh something."""
    with torch.no_grad():
        for key, value in model.head.named_parameters():
            if "norm" in key or key == "cls_token":
                value.add_(0.3 * torch.randn_like(value))
            elif value.dim() == 2:
                value.mul_(1.5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_a_sample_is_what_a_transformer_makes_of_the_modalities_it_has(count, missing):
    method, model = ready("transformer", count, layers=2, width=8, heads=2, dropout=0.3)
    moved(model)
    split = draw(count, missing=missing)
    model.eval()
    batch = split.batch()
    out = run(model, batch)
    z = arrays(model.embed(split.inputs))
    expected = []
    for i in range(len(split)):
        there = [m for m in range(count) if split.mask[i, m]]
        expected.append(logits_of(model, [values[i] for values in z], there))
    np.testing.assert_allclose(out.logits.detach(), np.stack(expected), atol=1e-4)
    assert method.loss(out, model, batch, 0.5).item() == pytest.approx(
        mean_nll(np.stack(expected), split.targets.tolist()), rel=1e-4
    )
    assert np.stack(expected).std(0).min() > 0.02
    model.head.cool(1.7)
    with torch.no_grad():  # PyTorch takes another path where nothing is differentiated
        fused = model.head.fuse(model.embed(split.inputs), split.mask)
    np.testing.assert_allclose(fused.logits, np.stack(expected) / 1.7, atol=1e-4)


def test_what_stands_for_a_missing_modality_reaches_nothing():
    _, model = ready("transformer", 3, dropout=0.0)
    split = draw(3, missing=0.5)
    z = model.embed(split.inputs)
    noisy = [torch.where(split.mask[:, m, None], values, torch.nan) for m, values in enumerate(z)]
    close(model.head.fuse(noisy, split.mask).logits, model.head.fuse(z, split.mask).logits, 1e-6)
    with torch.no_grad():
        model.head.projections[2].bias[0].add_(5)
    other = model.head.fuse(z, split.mask).logits
    with torch.no_grad():
        model.head.projections[2].bias[0].sub_(5)
    far = (other - model.head.fuse(z, split.mask).logits).abs().amax(1)
    assert (far[~split.mask[:, 2]] < 1e-6).all() and (far[split.mask[:, 2]] > 1e-2).all()


def test_the_modalities_act_together_through_attention():
    """The sum of logits could not do this: audio's effect depends on video."""
    _, model = ready("transformer", dropout=0.0)
    moved(model)
    z = [torch.randn(6, size) for size in (SIZES["audio"], SIZES["video"])]
    other = [torch.randn_like(values) for values in z]
    value = lambda a, b: model.head.fuse([a, b]).logits
    interaction = value(z[0], z[1]) - value(other[0], z[1]) - value(z[0], other[1]) + value(*other)
    assert interaction.abs().max() > 0.05
    batch = draw().batch()
    assert all(vector.any() for vector in by_encoder(model, run(model, batch).loss))


def test_dropout_and_layers_are_as_asked_for():
    _, model = ready("transformer", layers=3, width=12, heads=3, dropout=0.25)
    head = model.head
    assert len(head.layers) == 3 and head.output.in_features == 12
    assert {layer.self_attn.num_heads for layer in head.layers} == {3}
    assert {layer.linear1.out_features for layer in head.layers} == {24}
    rates = {part.p for part in head.modules() if isinstance(part, torch.nn.Dropout)}
    assert rates == {0.25} and {layer.self_attn.dropout for layer in head.layers} == {0.25}
    starts = [layer.linear1.weight for layer in head.layers]
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    batch = draw().batch()
    assert not torch.equal(run(model, batch).logits, run(model, batch).logits)
    model.eval()
    assert torch.equal(run(model, batch).logits, run(model, batch).logits)


def test_one_temperature_and_a_probe_for_each_branch():
    method, model = ready("transformer", dropout=0.0)
    train, validation, test = (draw(size=60, seed=seed, missing=0.2) for seed in (1, 2, 3))
    fuse = lambda split: model.eval().head.fuse(model.embed(split.inputs), split.mask)
    with torch.no_grad():
        before, held = fuse(test), fuse(validation)
        assert before.modality_logits == () and before.weights is None
        method.calibrate(model, train, validation, None, 0)
        after = fuse(test)
    temperature = fit_temperature(held.logits, validation.targets)
    torch.testing.assert_close(after.logits, before.logits / temperature, atol=1e-5, rtol=1e-5)
    for m, own in enumerate(after.modality_logits):
        assert own.shape == (60, CLASSES) and not own[~test.mask[:, m]].any()
        probe = model.head.probes[m]
        close(own[test.mask[:, m]], probe(model.embed(test.inputs)[m])[test.mask[:, m]], 1e-5)
        assert probe.weight.abs().max() > 0.01
    assert not any(value.requires_grad for value in model.head.probes.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0; give a whole number >= 1"),
        ({"layers": 2.5}, "layers is 2.5; give a whole number >= 1"),
        ({"heads": 0}, "heads is 0; give a whole number >= 1"),
        ({"width": 0.5}, "width is 0.5; give a whole number >= 1"),
        ({"width": 30}, "width is 30; give a multiple of heads, which is 4"),
        ({"dropout": 1.0}, "dropout is 1.0; give a share below 1"),
        ({"depth": 2}, "transformer has no parameter 'depth'; it has layers, width, heads"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(InputError, match=f"method_options: {message}"):
        make_method("transformer", **options)
    make_method("transformer", width=32, heads=8, layers=1, dropout=0.0)

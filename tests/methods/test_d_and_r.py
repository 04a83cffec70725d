"""``d_and_r``: purities, how far encoders go back, and when; by hand in plain loops."""

import logging
import math

import numpy as np
import pytest
import torch
from test_formulas import arrays, draw, ready

from iibalance.methods.d_and_r import DAndR


def separable(known, size=60, seed=0, missing=False):
    """A split of two modalities; ``known[m]`` is how far apart its three classes are."""
    split = draw(2, size=size, seed=seed)
    corners = 8.0 * torch.eye(3)
    for values, strength in zip(split.inputs.values(), known):
        values[:, :3] += strength * corners[split.targets]
    if missing:
        split.mask[::4, 1] = False
    return split


def purity_by_hand(targets, clusters):
    right = 0
    for cluster in set(clusters):
        inside = [t for t, c in zip(targets, clusters) if c == cluster]
        right += max(inside.count(t) for t in set(inside))
    return right / len(targets)


def test_purity_counts_the_commonest_class_of_each_cluster():
    generator = torch.Generator().manual_seed(3)
    for classes in (2, 5):
        targets = torch.randint(classes, (40,), generator=generator)
        clusters = torch.randint(7, (40,), generator=generator)
        expected = purity_by_hand(targets.tolist(), clusters.tolist())
        assert DAndR.purity(targets, clusters) == pytest.approx(expected, abs=1e-12)
    assert DAndR.purity(targets, targets) == 1.0


def test_clusters_do_not_depend_on_a_features_scale():
    """Features are scaled to [-1, 1]: else the noise, 1e6 times as large, would decide."""
    targets = torch.arange(60) % 3
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.eye(3)[targets] * 5, 1e6 * torch.rand(60, 1, generator=generator)], 1)
    values = torch.cat([values, torch.ones(60, 1)], 1)  # a feature that does not move
    assert DAndR.purity(targets, DAndR.clusters(values, 3)) == 1.0
    assert len(DAndR.clusters(values[:2], 3).unique()) == 2  # fewer samples than classes


@pytest.mark.parametrize("missing", [False, True])
def test_a_purity_is_of_the_samples_that_have_the_modality(missing):
    method, model = ready("d_and_r")
    split = separable((1.0, 0.1), missing=missing)
    split.targets[5] = -100
    found = method.purities(model, split)
    with torch.no_grad():
        embeddings = model.eval().embed(split.inputs)
    for m, z in enumerate(embeddings):
        rows = [i for i in range(60) if split.mask[i, m] and split.targets[i] != -100]
        clusters = DAndR.clusters(z[rows], 3).tolist()
        expected = purity_by_hand(split.targets[rows].tolist(), clusters)
        assert found[m] == pytest.approx(expected, abs=1e-12)
    split.mask[:, 1] = False
    assert math.isnan(method.purities(model, split)[1])


def test_each_encoder_goes_back_by_its_own_gap():
    method, model = ready("d_and_r", strength=2.0, every=0.25, times=1)
    train, validation = separable((1.0, 0.2)), separable((0.1, 0.2), seed=5)
    method.validation = validation
    method.before_epoch(model, train, 0.0)
    first = [arrays(encoder.parameters()) for encoder in model.encoders]
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.5 * torch.randn_like(value))
    head = arrays(model.head.parameters())
    current = [arrays(encoder.parameters()) for encoder in model.encoders]
    gaps = [
        abs(a - b)
        for a, b in zip(method.purities(model, train), method.purities(model, validation))
    ]
    assert gaps[0] > 0.1 and gaps[0] != gaps[1]  # the two are told apart
    method.before_epoch(model, train, 0.24)  # not yet
    for encoder, values in zip(model.encoders, current):
        assert all(np.array_equal(a, b) for a, b in zip(arrays(encoder.parameters()), values))
    method.before_epoch(model, train, 0.25)
    for encoder, start, now, gap in zip(model.encoders, first, current, gaps):
        back = math.tanh(2.0 * gap)
        for value, a, b in zip(arrays(encoder.parameters()), start, now):
            np.testing.assert_allclose(value, (1 - back) * b + back * a, atol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(model.head.parameters()), head))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.3, 0.5, 0.7]),  # from 0.22, 0.44 and 0.66 on, in epochs of a tenth
        ({"every": 0.4, "times": 5}, [0.4, 0.8]),
        ({"times": 0}, []),
    ],
)
def test_when_encoders_go_back(options, expected, monkeypatch):
    method, model = ready("d_and_r", **options)
    method.validation, when = separable((0.1, 0.2), seed=5), []
    monkeypatch.setattr(
        type(method), "purities", lambda self, model, split: (when.append(progress), [1.0, 0.5])[1]
    )
    train = separable((1.0, 0.2))
    for epoch in range(10):
        progress = epoch / 10
        method.before_epoch(model, train, progress)
    assert when == [at for at in expected for _ in range(2)]  # of either split


def test_a_modality_that_a_split_has_not_stays(monkeypatch):
    method, model = ready("d_and_r", every=0.5)
    train, validation = separable((1.0, 1.0)), separable((0.1, 0.1), seed=5)
    validation.mask[:, 1] = False
    method.validation = validation
    method.before_epoch(model, train, 0.0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.5)
    before = [arrays(encoder.parameters()) for encoder in model.encoders]
    method.before_epoch(model, train, 0.5)
    same = [
        all(np.array_equal(a, b) for a, b in zip(arrays(encoder.parameters()), values))
        for encoder, values in zip(model.encoders, before)
    ]
    assert same == [False, True]


def test_without_validation_nothing_is_learnt_anew_and_it_is_said(caplog):
    method, model = ready("d_and_r")
    split = separable((1.0, 1.0))
    method.before_epoch(model, split, 0.0)
    with torch.no_grad():
        model.encoders[0][0].weight.add_(1.0)
    before = arrays(model.parameters())
    with caplog.at_level(logging.WARNING):
        method.before_epoch(model, split, 0.9)
    assert "no validation split" in caplog.text and "method.validation" in caplog.text
    assert all(np.array_equal(a, b) for a, b in zip(arrays(model.parameters()), before))

"""What every function of iib_kernels promises beside its values.

No host copies, harmless garbage, derivatives of any order, named errors.
"""

import math

import numpy as np
import pytest
import torch

from iib_kernels import (
    alignment_loss,
    class_sums,
    fusion_cross_entropy,
    gated_fusion,
    nearest_prototype,
    reference,
    update_prototypes,
)


def case(seed=0, rows=6, classes=5):
    g = torch.Generator().manual_seed(seed)
    features, prototypes = (
        [torch.randn(n, d, generator=g, dtype=torch.float64) for d in (3, 4)]
        for n in (rows, classes)
    )
    return features, prototypes, torch.arange(rows) % (classes - 1), [0.9, 0.6]


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("known", [True, False])
def test_the_prototype_of_an_unseen_class_may_hold_anything(metric, garbage, known):
    """Values and gradients.

    With ``known=False`` no class has been seen at all, and an uninitialised table must still not
    spoil the features' gradient.
    """
    features, prototypes, targets, budgets = case()
    seen = torch.tensor([known] * 4 + [False])
    results = []
    for value in (1.0, garbage):
        tables = [torch.where(seen[:, None], table, value) for table in prototypes]
        leaves = [rows.clone().requires_grad_() for rows in features]
        out = alignment_loss(leaves, tables, targets, budgets, metric=metric, seen=seen)
        near = nearest_prototype(leaves, tables, metric=metric, seen=seen)
        gradients = torch.autograd.grad(
            out.contrastive.sum() + out.alignment.sum() + near.distance.sum(), leaves
        )
        results.append([*out, *near, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results)) and all(
        torch.isfinite(value).all() for value in results[0]
    )
    assert bool(results[0][-1].any()) == known


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_third_derivatives_are_right(metric):
    """A second derivative computed on detached values drops terms of the third in silence."""
    features, prototypes, targets, budgets = case(1)
    found = []
    for function, extra in (
        (alignment_loss, {"reduction": "none"}),
        (reference.alignment_loss, {}),
    ):
        leaves = [rows.clone().requires_grad_() for rows in features]
        given = budgets if extra else torch.tensor(budgets, dtype=torch.float64)
        out = function(leaves, prototypes, targets, given, temperature=1.0, metric=metric, **extra)
        value = out[0].sum() + out[1].square().sum()
        for _ in range(2):
            value = sum(
                gradient.square().sum()
                for gradient in torch.autograd.grad(value, leaves, create_graph=True)
            )
        found.append(torch.autograd.grad(value, leaves))
    for mine, autograd in zip(*found):
        torch.testing.assert_close(mine, autograd, rtol=1e-8, atol=1e-8)


def test_numbers_reach_the_device_without_a_copy_from_the_host(monkeypatch):
    """torch.tensor(0.5, device="cuda") copies from pageable memory.

    It synchronises, and a CUDA graph cannot capture it.
    """

    def refuse(*_, **__):
        raise AssertionError("a number was copied from the host")

    features, prototypes, targets, budgets = case()
    logits = [torch.randn(6, 5) for _ in "ab"]
    for name in ("tensor", "as_tensor", "asarray", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(torch.Tensor, "new_tensor", refuse)
    gated_fusion(logits, temperature=0.5, uncertainty_weight=2, scale=2.0)
    fusion_cross_entropy(logits, targets)
    alignment_loss(features, prototypes, targets, budgets)
    nearest_prototype(features, prototypes)
    update_prototypes(prototypes[0], torch.zeros(5, dtype=torch.int64), features[0], targets)


def test_a_gate_of_a_missing_modality_has_no_say_in_gradients_either():
    mask = torch.tensor([[False, True], [True, True]])
    logits = [
        torch.randn(2, 3, generator=torch.Generator().manual_seed(m), requires_grad=True)
        for m in range(2)
    ]
    results = []
    for value in (0.0, math.nan):
        gate = torch.tensor([[value, 0.0], [1.0, 0.0]], requires_grad=True)
        fused = gated_fusion(logits, gate_logits=gate, mask=mask).logits
        results.append(
            [fused.detach(), *torch.autograd.grad(fused.square().sum(), [*logits, gate])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


Z, P, Y, COUNTS = (
    [torch.zeros(2, 3)],
    [torch.zeros(5, 3)],
    torch.tensor([0, 1]),
    torch.zeros(5, dtype=torch.int64),
)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda: alignment_loss(Z, P, Y, [1.0], temperature="warm"),
            TypeError,
            "temperature: expected a number, got str",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0], temperature=None),
            TypeError,
            "temperature: expected a number, got NoneType",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0], temperature=math.inf),
            ValueError,
            "temperature: expected a number above 0 and finite, got inf",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0], temperature=math.nan),
            ValueError,
            "temperature: expected a number above 0 and finite, got nan",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [math.nan]),
            ValueError,
            r"budgets\[0\]: expected a share .* got nan",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [-0.1]),
            ValueError,
            r"budgets\[0\]: expected a share .* got -0.1",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0], ignore_index="none"),
            TypeError,
            "ignore_index: expected an integer, got str",
        ),
        (
            lambda: fusion_cross_entropy(Z, Y, ignore_index=1.5),
            TypeError,
            "ignore_index: expected an integer, got float",
        ),
        (
            lambda: class_sums(Z[0], Y, 5.0),
            TypeError,
            "num_classes: expected an integer, got float",
        ),
        (lambda: class_sums(Z[0], Y, "5"), TypeError, "num_classes: expected an integer, got str"),
        (
            lambda: update_prototypes(P[0], COUNTS, Z[0], Y, momentum="0.9"),
            TypeError,
            "momentum: expected a number, got str",
        ),
        (
            lambda: update_prototypes(P[0], COUNTS, Z[0], Y, momentum=torch.tensor(0.9)),
            TypeError,
            "momentum: expected a number, got float32",
        ),
    ],
)
def test_wrong_numbers_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_numpy_numbers_are_numbers():
    sums, counts = class_sums(Z[0], Y, np.int64(5))
    assert sums.shape == (5, 3) and counts.tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(
        alignment_loss(Z, P, Y, [1.0], temperature=np.float32(0.5)).contrastive,
        alignment_loss(Z, P, Y, [1.0], temperature=0.5).contrastive,
    )


def test_a_modality_that_its_prior_shuts_out_rules_out_no_class():
    ruling, other = torch.tensor([[-math.inf, 0.0, 1.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    assert torch.equal(gated_fusion([ruling, other], torch.tensor([-math.inf, 0.0])).logits, other)
    assert (
        gated_fusion([ruling, other], torch.tensor([-50.0, 0.0])).logits[0, 0] == -math.inf
    )  # any weight above 0 is a say


def test_the_weights_pass_a_gradient_through_the_uncertainty():
    logits = [
        torch.tensor([[2.0, 0.0, 0.1]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[0.3, 0.0, 0.2]], dtype=torch.float64),
    ]
    function = lambda values: gated_fusion([values, logits[1]], uncertainty_weight=3.0).weights
    assert (
        torch.autograd.gradcheck(function, logits[:1])
        and torch.autograd.grad(function(logits[0])[0, 0], logits[0])[0].abs().max() > 1e-3
    )


@pytest.mark.parametrize("garbage", [-math.inf, 1e4])
def test_an_ignored_row_of_logits_contributes_nothing(garbage):
    """Its gradient is 0, and that of temperature, prior and gate is not spoiled."""
    targets, results = torch.tensor([0, -100, 2]), []
    for value in (0.0, garbage):
        logits = [torch.randn(3, 4, generator=torch.Generator().manual_seed(m)) for m in range(2)]
        logits[0][1] = value
        leaves = [
            *(values.requires_grad_() for values in logits),
            torch.ones(2, requires_grad=True),
            torch.zeros(2, requires_grad=True),
        ]
        out = fusion_cross_entropy(leaves[:2], targets, leaves[3], temperature=leaves[2])
        results.append(
            [out.fused, out.unimodal, *torch.autograd.grad(out.fused + out.unimodal.sum(), leaves)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results)) and all(
        torch.isfinite(value).all() for value in results[0]
    )


def test_one_float64_modality_makes_all_of_it_float64():
    features, prototypes, targets, budgets = case()
    out = alignment_loss([features[0].float(), features[1]], prototypes, targets, budgets)
    assert {value.dtype for value in out} == {torch.float64}
    assert (
        gated_fusion([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)]).weights.dtype
        == torch.float64
    )

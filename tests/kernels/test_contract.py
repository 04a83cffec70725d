"""What every function of iib_kernels promises beside its values.

No host copies, harmless garbage, derivatives of any order, named errors.
"""

import math

import numpy as np
import pytest
import torch

import iib_kernels
from iib_kernels import (
    _chunks,
    _runtime,
    alignment_loss,
    class_sums,
    fusion_cross_entropy,
    gated_fusion,
    nearest_prototype,
    reference,
    trusted_fusion,
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


@pytest.mark.parametrize("chunk", [1, _chunks.CHUNK_BYTES])
def test_jacobians_of_the_alignment_of_many_rows(monkeypatch, chunk):
    """jacrev asks for all rows of a Jacobian at once; autograd can be asked for one by one."""
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", chunk)
    (rows, other), prototypes, targets, budgets = case(2)

    def losses(rows):
        out = alignment_loss(
            [other, rows], prototypes[::-1], targets, budgets, reduction="none", impl="reference"
        )
        return torch.stack(out[:2])

    found = torch.func.jacrev(losses)(rows)
    expected = torch.autograd.functional.jacobian(losses, rows)
    assert expected.abs().amax() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


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
    trusted_fusion(logits, torch.zeros(2), temperature=0.5, scale=2.0)
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


class Settings:
    """PyTorch's settings of float32 products, each as it stands in a process that set it."""

    old = staticmethod(torch.set_float32_matmul_precision)
    new = staticmethod(lambda value: torch._C._set_fp32_precision_setter("cuda", "matmul", value))
    cuda = staticmethod(lambda value: torch._C._set_fp32_precision_setter("cuda", "all", value))
    every = staticmethod(lambda value: torch._C._set_fp32_precision_setter("generic", "all", value))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ([], "ieee"),
        ([("old", "high")], "tf32"),
        ([("old", "medium")], "tf32"),
        ([("new", "tf32")], "tf32"),
        ([("new", "ieee")], "ieee"),
        ([("old", "high"), ("new", "ieee")], "ieee"),
        ([("new", "tf32"), ("old", "highest")], "ieee"),
        ([("every", "tf32")], "tf32"),
        ([("every", "tf32"), ("new", "ieee")], "ieee"),
        ([("every", "ieee"), ("new", "tf32")], "tf32"),
        ([("every", "ieee"), ("cuda", "tf32")], "tf32"),
    ],
    ids=str,
)
def test_products_follow_either_setting_of_their_precision(settings, expected, monkeypatch):
    """The older getter raises in most of these: the newer settings must be read."""
    monkeypatch.setattr(_runtime, "hip", lambda: False)
    try:
        for name, value in settings:
            getattr(Settings, name)(value)
        assert _runtime.dot_options()["PRECISION"] == expected
        assert _runtime.slope_precision(torch.zeros(1)) == expected
    finally:
        Settings.old("highest")
        for name in ("new", "cuda", "every"):
            getattr(Settings, name)("none")


def test_a_torch_without_the_newer_setting_has_the_older_one(monkeypatch):
    monkeypatch.setattr(_runtime, "hip", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    found = []
    for value in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda value=value: value)
        found.append(_runtime.dot_options()["PRECISION"])
    assert found == ["ieee", "tf32"]


# ----- Tensors over several processes


@pytest.fixture(scope="module")
def sharded():
    """Makes a DTensor of a tensor, over a mesh of this process alone."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda value: distribute_tensor(value, mesh, [Replicate()])
    distributed.destroy_process_group()


def arguments_by_name():
    """Every public function, with all of its tensors by name."""
    logits, features = ([torch.randn(2, 3) for _ in "ab"] for _ in "ab")
    targets, table, counts = torch.tensor([0, 2]), torch.randn(3, 3), torch.zeros(3).long()
    gate = {
        "log_prior": torch.zeros(2),
        "gate_logits": torch.zeros(2, 2),
        "temperature": torch.ones(2),
        "uncertainty_weight": torch.ones(2),
        "scale": torch.tensor(1.0),
        "mask": torch.ones(2, 2, dtype=torch.bool),
    }
    doubted = {name: gate[name] for name in ("temperature", "scale", "mask")}
    labels = {"targets": targets, "weight": torch.ones(3)}
    rows = {"features": features, "prototypes": [table, table.clone()]}
    seen = [torch.ones(3, dtype=torch.bool)] * 2
    losses = {**rows, "targets": targets, "budgets": torch.ones(2), "seen": seen}
    moved = {"prototypes": table, "counts": counts, "features": features[0], "targets": targets}
    tallies = {"counts": [counts, counts.clone()]}
    return {
        "gated_fusion": {"logits": logits, **gate, "values": features},
        "trusted_fusion": {"logits": logits, "trust_logits": torch.zeros(2, 2), **doubted},
        "fusion_cross_entropy": {"logits": logits, **gate, **labels},
        "multimodal_objective": {"logits": logits, **gate, **labels, **losses},
        "alignment_loss": {**losses, "mask": gate["mask"]},
        "nearest_prototype": {**rows, "seen": seen},
        "prototype_distance": {"features": features[0], "prototypes": table},
        "update_prototypes": moved,
        "update_prototypes_": {**rows, **tallies, "targets": targets, "mask": gate["mask"]},
        "class_sums": {"features": features[0], "targets": targets},
        "snapshot": {"prototypes": table},
    }


@pytest.mark.parametrize("name", arguments_by_name())
@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_a_tensor_over_several_processes_is_refused_by_name(name, impl, sharded):
    function, tensors = getattr(iib_kernels, name), arguments_by_name()[name]
    options = {} if name == "snapshot" else {"impl": impl}
    if name == "class_sums":
        options["num_classes"] = 3
    for argument, value in tensors.items():
        word, given = argument, None
        if isinstance(value, list):
            word, given = f"{argument}[1]", [value[0], sharded(value[1])]
        elif value.is_floating_point() and argument in ("features", "prototypes"):
            given = torch.nn.Parameter(sharded(value))  # as a module's parameters are
        else:
            given = sharded(value)
        with pytest.raises(TypeError) as error:
            function(**{**tensors, argument: given}, **options)
        text = str(error.value)
        assert text.startswith(f"{word}: is a DTensor") and f"{word}.full_tensor()" in text, text


def test_one_float64_modality_makes_all_of_it_float64():
    features, prototypes, targets, budgets = case()
    out = alignment_loss([features[0].float(), features[1]], prototypes, targets, budgets)
    assert {value.dtype for value in out} == {torch.float64}
    assert (
        gated_fusion([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)]).weights.dtype
        == torch.float64
    )

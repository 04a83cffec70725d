"""The alignment loss and prototype operations where they are easiest to get wrong.

Chunks, second derivatives, empty and zero rows, no host reads.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iib_kernels import (
    _checks,
    _chunks,
    alignment_loss,
    class_sums,
    ema_from_sums,
    nearest_prototype,
    prototype_distance,
    reference,
    update,
    update_prototypes,
)


def case(M, B, K, seed):
    """float64 features, prototypes, targets, budgets, seen and mask.

    With ignored targets, unseen classes and missing modalities.
    """
    g = torch.Generator().manual_seed(seed)
    features, prototypes = (
        [torch.randn(n, 1 + (2 * m + seed) % 5, generator=g, dtype=torch.float64) for m in range(M)]
        for n in (B, K)
    )
    targets = torch.randint(0, K, (B,), generator=g).masked_fill(
        torch.rand(B, generator=g) < 0.2, -100
    )
    seen, mask = (
        [torch.rand(K, generator=g) < 0.8 for _ in range(M)],
        torch.rand(B, M, generator=g) < 0.8,
    )
    return (
        features,
        prototypes,
        targets,
        torch.rand(M, generator=g, dtype=torch.float64),
        seen,
        mask,
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([1, 2, 5, 13]),
    st.sampled_from([1, 2, 7, 197]),
    st.integers(0, 10**6),
    st.sampled_from(["cosine", "sqeuclidean"]),
)
def test_gradient_written_out_is_that_of_autograd_through_the_reference(M, B, K, seed, metric):
    features, prototypes, targets, budgets, seen, mask = case(M, B, K, seed)
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(
        2, B, M, generator=g, dtype=torch.float64
    )  # a different one for each row and modality
    gradients = []
    for function in (alignment_loss, reference.alignment_loss):
        leaves = [values.clone().requires_grad_() for values in features]
        extra = {"reduction": "none"} if function is alignment_loss else {}
        out = function(
            leaves,
            prototypes,
            targets,
            budgets,
            temperature=0.5,
            metric=metric,
            seen=seen,
            mask=mask,
            **extra,
        )
        gradients.append(
            torch.autograd.grad((weights[0] * out[0] + weights[1] * out[1]).sum(), leaves)
        )
    for mine, autograd in zip(*gradients):
        torch.testing.assert_close(mine, autograd, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_second_derivative_in_chunks(monkeypatch, metric):
    """Of the contrastive and of the alignment, whose deviation and anchor are constants.

    Against autograd, which is told so by the reference's detach.
    """
    features, prototypes, targets, budgets, seen, mask = case(3, 7, 4, 8)
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 1)  # one row a chunk
    found = []
    for function in (alignment_loss, reference.alignment_loss):
        leaves = [values.clone().requires_grad_() for values in features]
        extra = {"reduction": "none"} if function is alignment_loss else {}
        out = function(
            leaves,
            prototypes,
            targets,
            budgets,
            temperature=0.7,
            metric=metric,
            seen=seen,
            mask=mask,
            **extra,
        )
        first = torch.autograd.grad((out[0] + 3 * out[1].square()).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(value.square().sum() for value in first), leaves))
    for mine, autograd in zip(*found):
        torch.testing.assert_close(mine, autograd, rtol=1e-9, atol=1e-9)


def test_a_row_computed_by_hand():
    """Two classes, unit vectors: d2 to the own prototype 0, to the other 2 - 2 cos.

    The anchor stands at 0 degrees, the weak modality at 45.
    """
    tau, right = 0.5, torch.tensor([0])
    anchor, weak = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]])
    q_a = 1 / (1 + math.exp(-2 / tau))  # distances 0 and 2
    kl = q_a * math.log(q_a / 0.5) + (1 - q_a) * math.log(
        (1 - q_a) / 0.5
    )  # the weak one is undecided: q = 1/2
    out = alignment_loss([weak, anchor], [torch.eye(2)] * 2, right, [0.6, 0.8], temperature=tau)
    torch.testing.assert_close(out.contrastive, torch.tensor([math.log(2), -math.log(q_a)]))
    torch.testing.assert_close(out.alignment, torch.tensor([(0.75 * q_a - 0.5) * kl, 0.0]))
    torch.testing.assert_close(out.confidence, torch.tensor([0.5, q_a]))


def test_mean_is_over_the_rows_that_count_for_each_modality():
    z, p = [torch.eye(2)[[0, 0, 1, 1]], torch.eye(2)[[1, 0, 0, 1]]], [torch.eye(2)] * 2
    mask = torch.tensor([[True, False], [True, True], [False, False], [True, False]])
    options = {"mask": mask, "seen": [torch.tensor([True, True]), torch.tensor([True, False])]}
    targets = torch.tensor([0, 0, 1, -100])
    rows, mean, total = (
        alignment_loss(z, p, targets, [1.0, 1.0], reduction=r, **options)
        for r in ("none", "mean", "sum")
    )
    for each, average, added in zip(rows, mean, total):
        torch.testing.assert_close(average, each.sum(0) / torch.tensor([2.0, 1.0]))
        torch.testing.assert_close(added, each.sum(0))
    nothing = alignment_loss(z, p, torch.full((4,), -100), [1.0, 1.0], **options)
    assert all(torch.equal(value, torch.zeros(2)) for value in nothing)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("cpu", [True, False])
def test_an_ignored_row_may_hold_anything(monkeypatch, garbage, cpu):
    monkeypatch.setattr(update, "eager_on_cpu", lambda tensor: cpu)
    features, prototypes, _, budgets, _, _ = case(2, 4, 3, 0)
    targets, grads = torch.tensor([0, -100, 2, 1]), []
    for fill in (1.0, garbage):
        leaves = [
            torch.where((targets < 0)[:, None], fill, values).requires_grad_()
            for values in features
        ]
        out = alignment_loss(leaves, prototypes, targets, budgets)
        grads.append(
            [
                *out,
                *torch.autograd.grad(out.contrastive.sum() + out.alignment.sum(), leaves),
                *class_sums(leaves[0], targets, 3),
            ]
        )
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*grads))


def test_zero_rows_have_no_direction_and_get_no_gradient():
    z, p = (
        torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    )
    distance = prototype_distance(z, p)
    torch.testing.assert_close(distance, torch.tensor([[1.0, 0.0], [2 - 2**0.5, 1.0]]))
    loss = distance.sum() + alignment_loss([z], [p], torch.tensor([0, 0]), [1.0]).contrastive.sum()
    (gradient,) = torch.autograd.grad(loss, z)
    assert (
        torch.equal(gradient[0], torch.zeros(2))
        and gradient[1].abs().sum() > 0
        and gradient.abs().max() < 100
    )
    assert torch.isnan(
        prototype_distance(torch.full((1, 2), float("nan")), p)[:, 0]
    ).all()  # but NaN is not taken for zero


def test_near_duplicates_have_distances_that_are_not_negative():
    z = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 100
    for metric in ("cosine", "sqeuclidean"):
        distance = prototype_distance(z, z * (1 + 1e-7), metric=metric)
        assert (distance >= 0).all() and (distance.argmin(1) == torch.arange(50)).all()
        assert (nearest_prototype([z], [z], metric=metric).distance >= 0).all()


class NoHostReads(TorchDispatchMode):
    """Fails where a value is read on the host or a shape depends on values.

    That is what synchronises a GPU and breaks graph capture.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), function
        assert "masked_select" not in str(function) and "unique" not in str(function)
        return function(*args, **kwargs or {})


def test_nothing_is_read_on_the_host(monkeypatch):
    for module in (_checks, update):
        monkeypatch.setattr(
            module, "eager_on_cpu", lambda tensor: False
        )  # as for a tensor on a GPU
    features, prototypes, targets, budgets, seen, mask = case(3, 6, 4, 2)
    leaves = [values.requires_grad_() for values in features]
    with NoHostReads():
        for given in (budgets, [0.3, 0.9, 0.1]):
            out = alignment_loss(leaves, prototypes, targets, given, seen=seen, mask=mask)
            near = nearest_prototype(leaves, prototypes, seen=seen)
            (out.contrastive.sum() + out.alignment.sum() + near.distance.sum()).backward()
        update_prototypes(prototypes[0], torch.zeros(4, dtype=torch.int64), features[0], targets)


def test_targets_out_of_range_are_ignored_where_values_cannot_be_looked_at(monkeypatch):
    for module in (_checks, update):
        monkeypatch.setattr(module, "eager_on_cpu", lambda tensor: False)
    features, prototypes, _, budgets, _, _ = case(2, 4, 3, 1)
    wild, tame = torch.tensor([0, 3, -7, 2]), torch.tensor([0, -100, -100, 2])
    for a, b in zip(
        alignment_loss(features, prototypes, wild, budgets),
        alignment_loss(features, prototypes, tame, budgets),
    ):
        assert torch.equal(a, b)
    assert all(
        torch.equal(a, b)
        for a, b in zip(class_sums(features[0], wild, 3), class_sums(features[0], tame, 3))
    )


def test_class_sums_by_matrix_product_in_chunks_are_those_by_addition(monkeypatch):
    features, targets = (
        torch.randn(9, 4, dtype=torch.float64),
        torch.tensor([0, 6, 6, -100, 3, 0, 1, 6, 2]),
    )
    added = class_sums(features, targets, 7)
    monkeypatch.setattr(update, "eager_on_cpu", lambda tensor: False)
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 2 * 9 * 8 * 2)  # two classes at a time
    multiplied = class_sums(features, targets, 7)
    torch.testing.assert_close(multiplied[0], added[0])
    assert torch.equal(multiplied[1], added[1]) and added[1].tolist() == [2, 1, 1, 1, 0, 0, 3]


def test_an_empty_batch_changes_nothing():
    p, counts = torch.randn(3, 2), torch.tensor([1, 0, 4])
    none, nobody = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    moved = update_prototypes(p, counts, none, nobody)
    assert torch.equal(moved[0], p) and torch.equal(moved[1], counts)
    out = alignment_loss([none], [p], nobody, [1.0])
    assert [value.tolist() for value in out] == [[0.0]] * 3
    assert torch.autograd.grad(out.contrastive.sum(), none)[0].shape == (0, 2)


def test_classes_absent_from_the_batch_keep_their_prototype_bit_for_bit():
    p = torch.randn(3, 4).half()
    moved, counts = ema_from_sums(
        p, torch.tensor([2, 2, 0]), torch.ones(3, 4), torch.tensor([0, 4, 0])
    )
    assert (
        torch.equal(moved[[0, 2]], p[[0, 2]])
        and not torch.equal(moved[1], p[1])
        and moved.dtype == torch.half
        and counts.tolist() == [2, 6, 0]
    )


def test_backward_inside_autocast_computes_in_full_precision():
    features, prototypes, targets, budgets, _, _ = case(2, 6, 5, 3)
    leaves, prototypes = (
        [values.float().requires_grad_() for values in features],
        [values.float() for values in prototypes],
    )
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = alignment_loss(leaves, prototypes, targets, budgets)
            gradients.append(
                torch.autograd.grad(out.contrastive.sum() + out.alignment.sum(), leaves)
            )
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_inputs_are_left_as_they_are_whatever_their_strides():
    features, prototypes, targets, budgets, seen, mask = case(2, 8, 5, 6)
    wide = torch.randn(8, 2 * features[0].shape[1], dtype=torch.float64)
    features = [wide[:, ::2], features[1][:1].expand(8, -1)]
    arguments = [*features, *prototypes, targets, budgets, *seen, mask]
    before = [value.clone() for value in arguments]
    out = alignment_loss(features, prototypes, targets, budgets, seen=seen, mask=mask)
    plain = alignment_loss(
        [values.contiguous() for values in features],
        prototypes,
        targets,
        budgets,
        seen=seen,
        mask=mask,
    )
    nearest_prototype(features, prototypes, seen=seen)
    update_prototypes(prototypes[0], torch.zeros(5, dtype=torch.int64), features[0], targets)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments))
    for a, b in zip(out, plain):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_in_several_chunks(monkeypatch):
    monkeypatch.setattr(
        _chunks, "CHUNK_BYTES", 2 * 10 * 8 * 8
    )  # two rows of the alignment's work arrays
    features, prototypes, targets, budgets, seen, mask = case(2, 6, 5, 4)
    leaves = [values.requires_grad_() for values in features]

    def step(*values):
        out = alignment_loss(values, prototypes, targets, budgets, seen=seen, mask=mask)
        return (
            out.contrastive.sum()
            + out.alignment.sum()
            + nearest_prototype(values, prototypes, seen=seen).distance.sum()
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves)
    ):
        torch.testing.assert_close(a, b)


Z, P, Y = [torch.zeros(2, 3)], [torch.zeros(5, 3)], torch.tensor([0, 1])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda: alignment_loss(Z, P, Y, [1.0], temperature=torch.tensor(0.2)),
            TypeError,
            "temperature: expected a number, got float32",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [torch.tensor(1.0)]),
            TypeError,
            r"budgets\[0\]: expected a number",
        ),
        (lambda: alignment_loss(Z, P, Y, 1.0), TypeError, "budgets: expected a tensor"),
        (lambda: alignment_loss(Z, P, Y, []), ValueError, r"budgets: expected shape \[M\] = \[1\]"),
        (
            lambda: alignment_loss(Z, P, Y, [1.0], seen=True),
            TypeError,
            "seen: expected a bool tensor",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0], reduction="average"),
            ValueError,
            "reduction: 'average' is none of",
        ),
        (lambda: alignment_loss(Z, P, Y.float(), [1.0]), TypeError, "targets: expected int64"),
        (
            lambda: nearest_prototype(Z, [torch.zeros(0, 3)]),
            ValueError,
            r"prototypes\[0\]: expected at least one class",
        ),
        (lambda: class_sums(Z[0], Y, 0), ValueError, "num_classes: expected at least 1"),
        (lambda: class_sums(Z[0], Y, 1), ValueError, "targets: row 1 holds 1, outside 0..0"),
    ],
)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()

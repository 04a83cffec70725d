"""The prototype operations and the alignment loss against loops.

Also gradcheck, bounded memory, half types, compile and wrong input.
"""

import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iib_kernels
from iib_kernels import (
    _chunks,
    alignment_loss,
    class_sums,
    ema_from_sums,
    nearest_prototype,
    prototype_distance,
    update_prototypes,
)

METRIC = st.sampled_from(["cosine", "sqeuclidean"])
SHAPES = st.tuples(
    st.integers(1, 4), st.sampled_from([0, 1, 2, 7, 13]), st.sampled_from([1, 2, 5, 31])
)


def case(M, B, K, seed, *, partial=False):
    """Features and prototypes of differing sizes.

    With ``partial`` masks, unseen classes, ignored targets and near-duplicates.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = [1 + (3 * m + seed) % 7 for m in range(M)]
    features = [torch.randn(B, d, generator=g, dtype=torch.float64) for d in sizes]
    prototypes = [torch.randn(K, d, generator=g, dtype=torch.float64) for d in sizes]
    targets = torch.randint(0, K, (B,), generator=g)
    budgets = torch.rand(M, generator=g, dtype=torch.float64)
    seen = mask = None
    if partial:
        if B:
            features[0][0] = prototypes[0][targets[0]] * (1 + 1e-9)
        targets = targets.masked_fill(torch.rand(B, generator=g) < 0.2, -100)
        seen = [torch.rand(K, generator=g) < 0.7 for _ in range(M)]
        mask = torch.rand(B, M, generator=g) < 0.7
    return features, prototypes, targets, budgets, seen, mask


@settings(max_examples=80, deadline=None)
@given(
    SHAPES, st.integers(0, 10**6), METRIC, st.booleans(), st.sampled_from(["none", "mean", "sum"])
)
def test_alignment_is_what_loops_compute(shape, seed, metric, partial, reduction):
    features, prototypes, targets, budgets, seen, mask = case(*shape, seed, partial=partial)
    out = alignment_loss(
        features,
        prototypes,
        targets,
        budgets,
        temperature=0.3,
        metric=metric,
        seen=seen,
        mask=mask,
        reduction=reduction,
    )
    lists = [
        [v.tolist() for v in values] if values is not None else None
        for values in (features, prototypes, seen)
    ]
    C, A, q, counts = oracle.alignment(
        *lists[:2],
        targets.tolist(),
        budgets.tolist(),
        0.3,
        metric,
        lists[2],
        None if mask is None else mask.tolist(),
    )
    expected = [C, A, q]
    if reduction != "none":
        expected = [value.sum(0) for value in expected]
    if reduction == "mean":
        expected = [value / np.maximum(counts.sum(0), 1) for value in expected]
    for found, value in zip(out, expected):
        np.testing.assert_allclose(found, value, rtol=1e-8, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 10**6), METRIC)
def test_distances_and_nearest_are_what_loops_compute(shape, seed, metric):
    features, prototypes, _, _, _, _ = case(*shape, seed)
    g = torch.Generator().manual_seed(seed)
    seen = [torch.rand(shape[2], generator=g) < 0.6 for _ in features]
    expected = [
        np.array(
            [[oracle.distance(z, p, metric) for p in table.tolist()] for z in rows.tolist()]
        ).reshape(len(rows), len(table))
        for rows, table in zip(features, prototypes)
    ]
    near = nearest_prototype(features, prototypes, metric=metric, seen=seen)
    for m, (rows, table) in enumerate(zip(features, prototypes)):
        np.testing.assert_allclose(
            prototype_distance(rows, table, metric=metric), expected[m], rtol=1e-9, atol=1e-9
        )
        if not seen[m].any():
            assert (near.distance[:, m] == 0).all() and (near.index[:, m] == -1).all()
            continue
        allowed = np.where(seen[m].numpy(), expected[m], np.inf)
        np.testing.assert_allclose(near.distance[:, m], allowed.min(1), rtol=1e-9, atol=1e-9)
        chosen = np.take_along_axis(allowed, near.index[:, m, None].numpy(), 1)[:, 0]
        np.testing.assert_allclose(chosen, allowed.min(1), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_gradients(metric):
    features, prototypes, targets, budgets, seen, mask = case(3, 5, 4, 3, partial=True)
    features = [torch.randn(5, 3, dtype=torch.float64).requires_grad_() for _ in features]
    prototypes = [torch.randn(4, 3, dtype=torch.float64) for _ in features]

    def losses(*values):
        out = alignment_loss(
            values,
            prototypes,
            targets,
            budgets,
            metric=metric,
            temperature=1.0,
            seen=seen,
            mask=mask,
        )
        return out.contrastive

    def near(*values):
        return nearest_prototype(values, prototypes, metric=metric).distance

    assert torch.autograd.gradcheck(losses, features) and torch.autograd.gradgradcheck(
        losses, features
    )
    assert torch.autograd.gradcheck(near, features)
    assert torch.autograd.gradcheck(
        lambda z, p: prototype_distance(z, p, metric=metric),
        (features[0], prototypes[0].clone().requires_grad_()),
    )


def test_gradient_of_the_alignment_is_that_of_the_divergence_alone():
    """delta and q_a are constants: dA/dz_m = delta dKL/dz_m, and the anchor gets nothing."""
    features, prototypes, targets, _, _, _ = case(2, 6, 4, 5)
    budgets = torch.tensor([0.9, 0.8], dtype=torch.float64)
    leaves = [values.requires_grad_() for values in features]
    out = alignment_loss(leaves, prototypes, targets, budgets, reduction="none")
    anchor, weak = torch.autograd.grad(out.alignment.sum(), leaves, allow_unused=True)
    assert anchor is None or (anchor == 0).all()
    log_q = [(-prototype_distance(z, p) / 0.2).log_softmax(-1) for z, p in zip(leaves, prototypes)]
    true = [values.gather(1, targets[:, None])[:, 0].exp().detach() for values in log_q]
    delta = (8 / 9 * true[0] - true[1]).clamp_min(0)
    kl = torch.nn.functional.kl_div(
        log_q[1], log_q[0].detach(), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(weak, torch.autograd.grad((delta * kl).sum(), leaves[1])[0])
    assert (delta > 0).any() and (
        delta == 0
    ).any()  # both sides of the budgeted potential are in this case


def test_corrected_only_below_the_budgeted_share_and_never_towards_a_wrong_anchor():
    prototypes = [torch.eye(2), torch.eye(2)]
    right, unsure, wrong = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[1.0, 0.8]]),
        torch.tensor([[0.0, 1.0]]),
    )
    A = lambda anchor, weak, share: float(
        alignment_loss([anchor, weak], prototypes, torch.tensor([0]), [1.0, share]).alignment[1]
    )
    assert A(right, unsure, 1.0) > 0  # evidence below the whole of the anchor's
    assert A(right, unsure, 0.3) == 0  # but above the share that a small budget promises
    assert A(wrong, unsure, 1.0) == 0  # the anchor is wrong about this sample
    assert (
        float(
            alignment_loss([right, unsure], prototypes, torch.tensor([0]), [0.0, 0.0]).alignment[1]
        )
        > 0
    )  # no budget at all: equal shares


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_chunks_do_not_show(monkeypatch, metric):
    features, prototypes, targets, budgets, seen, mask = case(3, 13, 5, 11, partial=True)

    def run():
        leaves = [values.clone().requires_grad_() for values in features]
        out = alignment_loss(
            leaves, prototypes, targets, budgets, metric=metric, seen=seen, mask=mask
        )
        near = nearest_prototype(leaves, prototypes, metric=metric, seen=seen)
        (out.contrastive.sum() + 5 * out.alignment.sum() + near.distance.sum()).backward()
        return [*out, *near, *(leaf.grad for leaf in leaves)]

    whole = run()
    monkeypatch.setattr(
        _chunks, "CHUNK_BYTES", 2 * 15 * 8 * 12
    )  # two rows of the alignment's work arrays
    for a, b in zip(whole, run()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_memory_stays_below_a_gigabyte():
    """B = 4096, K = 32768, M = 2, D = 64, forward and backward; one [B, K] array is 512 MiB."""
    script = """
import resource, torch, iib_kernels
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
B, K, D = 4096, 32768, 64
p = [torch.randn(K, D) for _ in range(2)]
def run(rows):
    z = [torch.randn(rows, D, requires_grad=True) for _ in range(2)]
    out = iib_kernels.alignment_loss(z, p, torch.randint(0, K, (rows,)), [0.9, 0.4])
    (out.contrastive.sum() + 5 * out.alignment.sum()).backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0 for x in z)
run(2)
before = peak()
run(B)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1024


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_a_missing_modality_has_no_say(garbage):
    features, prototypes, targets, budgets, _, _ = case(3, 8, 5, 21)
    mask = torch.rand(8, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    results = []
    for version in (
        features,
        [torch.where(mask[:, m, None], values, garbage) for m, values in enumerate(features)],
    ):
        leaves = [values.clone().requires_grad_() for values in version]
        out = alignment_loss(leaves, prototypes, targets, budgets, mask=mask)
        (out.contrastive.sum() + out.alignment.sum()).backward()
        results.append([*out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_no_worse_than_the_same_dtype_in_eager(dtype, tolerance):
    g = torch.Generator().manual_seed(4)
    features, prototypes = (
        [torch.randn(n, 16, generator=g).to(dtype) for _ in range(2)] for n in (24, 9)
    )
    targets, budgets = torch.arange(24) % 9, torch.tensor([0.9, 0.6])

    def run(kind, z, p):
        leaves = [value.clone().requires_grad_() for value in z]
        if kind == "ours":
            C, A = alignment_loss(leaves, p, targets, budgets, reduction="none")[:2]
        else:
            C, A = iib_kernels.reference.alignment_loss(
                leaves, p, targets, budgets.to(leaves[0].dtype)
            )[:2]
        (C.mean() + A.mean()).backward()
        return [C.detach(), A.detach(), *(leaf.grad for leaf in leaves)]

    truth = run("ours", [z.double() for z in features], [p.double() for p in prototypes])
    for mine, eager, exact in zip(
        run("ours", features, prototypes), run("eager", features, prototypes), truth
    ):
        assert ((mine.double() - exact).abs() <= (eager.double() - exact).abs() + tolerance).all()
    assert run("ours", features, prototypes)[2].dtype == dtype
    assert prototype_distance(features[0], prototypes[0]).dtype == dtype
    assert nearest_prototype(features, prototypes).distance.dtype == torch.float32


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_update_is_the_moving_average_written_out(metric):
    g = torch.Generator().manual_seed(0)
    K, D, momentum = 5, 3, 0.7
    expected, counts = np.zeros((K, D)), np.zeros(K, dtype=int)
    prototypes, total = torch.zeros(K, D, dtype=torch.float64), torch.zeros(K, dtype=torch.int64)
    for step in range(4):
        features = torch.randn(11, D, generator=g, dtype=torch.float64)
        targets = torch.randint(0, 4, (11,), generator=g)  # class 4 never appears
        targets[step] = -100
        before = prototypes.clone(), total.clone()
        new = update_prototypes(
            prototypes, total, features, targets, momentum=momentum, metric=metric
        )
        again = update_prototypes(
            prototypes, total, features, targets, momentum=momentum, metric=metric
        )
        assert all(torch.equal(a, b) for a, b in zip(new, again)) and all(
            torch.equal(a, b) for a, b in zip(before, (prototypes, total))
        )
        for k in range(K):
            rows = [
                oracle.unit(z) if metric == "cosine" else z
                for z, y in zip(features.tolist(), targets.tolist())
                if y == k
            ]
            if rows:
                mean = np.mean(rows, 0)
                moved = mean if counts[k] == 0 else momentum * expected[k] + (1 - momentum) * mean
                expected[k] = oracle.unit(moved) if metric == "cosine" else moved
                counts[k] += len(rows)
        prototypes, total = new
        np.testing.assert_allclose(prototypes, expected, atol=1e-12)
        assert total.tolist() == counts.tolist()
    assert (prototypes[4] == 0).all() and total[4] == 0


def test_halves_of_a_batch_sum_to_the_whole():
    features, targets = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    whole = class_sums(features, targets, 3)
    halves = [class_sums(features[rows], targets[rows], 3) for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0])
    assert torch.equal(halves[0][1] + halves[1][1], whole[1])
    torch.testing.assert_close(
        iib_kernels.reference.class_sums(features, targets, 3)[0], whole[0]
    )  # the matrix product that a GPU takes
    moved = ema_from_sums(
        torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), *whole
    )
    assert torch.equal(
        moved[0],
        update_prototypes(
            torch.zeros(3, 4, dtype=torch.float64),
            torch.zeros(3, dtype=torch.int64),
            features,
            targets,
        )[0],
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    prototypes, budgets = [torch.randn(5, 4), torch.randn(5, 4)], torch.tensor([0.9, 0.5])

    def step(a, b, targets):
        out = alignment_loss([a, b], prototypes, targets, budgets)
        return (
            out.contrastive.sum()
            + out.alignment.sum()
            + nearest_prototype([a, b], prototypes).distance.sum()
            + prototype_distance(a, prototypes[0]).sum()
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        leaves = [torch.randn(rows, 4, requires_grad=True) for _ in range(2)]
        targets = torch.arange(rows) % 5
        for a, b in zip(
            torch.autograd.grad(compiled(*leaves, targets), leaves),
            torch.autograd.grad(step(*leaves, targets), leaves),
        ):
            torch.testing.assert_close(a, b)


def test_autocast_and_strides_change_nothing():
    features, prototypes, targets, budgets, _, _ = case(2, 6, 5, 9)
    features, prototypes = ([values.float() for values in part] for part in (features, prototypes))
    plain = alignment_loss(features, prototypes, targets, budgets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = alignment_loss(features, prototypes, targets, budgets)
        assert prototype_distance(features[0], prototypes[0]).dtype == torch.float32
    strided = alignment_loss(
        [values.T.contiguous().T for values in features], prototypes, targets, budgets
    )
    for a, b, c in zip(plain, cast, strided):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


Z, P, Y = (
    [torch.zeros(2, 3), torch.zeros(2, 4)],
    [torch.zeros(5, 3), torch.zeros(5, 4)],
    torch.tensor([0, 1]),
)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda: alignment_loss(Z[0], P, Y, [1.0, 0.5]),
            TypeError,
            "features: expected a sequence with one tensor a modality",
        ),
        (
            lambda: alignment_loss(Z, P[:1], Y, [1.0, 0.5]),
            ValueError,
            "prototypes: expected 2 tensors, one a modality, got 1",
        ),
        (
            lambda: alignment_loss(Z, [P[1], P[0]], Y, [1.0, 0.5]),
            ValueError,
            r"features\[0\]: expected shape \[B, D_0\] = \[2, 4\], got float32 \[2, 3\]",
        ),
        (
            lambda: alignment_loss(Z, [P[0], torch.zeros(6, 4)], Y, [1.0, 0.5]),
            ValueError,
            r"prototypes\[1\]: expected shape \[K, D_1\] = \[5, any\]",
        ),
        (
            lambda: alignment_loss(Z, P, torch.tensor([0, 9]), [1.0, 0.5]),
            ValueError,
            r"targets: row 1 holds 9, outside 0..4",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0]),
            ValueError,
            r"budgets: expected shape \[M\] = \[2\]",
        ),
        (
            lambda: alignment_loss(Z, P, Y, torch.ones(2, requires_grad=True)),
            ValueError,
            "budgets: requires grad",
        ),
        (
            lambda: alignment_loss(Z, [p.clone().requires_grad_() for p in P], Y, [1.0, 0.5]),
            ValueError,
            "prototypes: requires grad",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0, 0.5], temperature=0.0),
            ValueError,
            "temperature: expected a number above 0",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0, 0.5], metric="dot"),
            ValueError,
            "metric: 'dot' is none of cosine, sqeuclidean",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0, 0.5], seen=torch.ones(5)),
            TypeError,
            r"seen\[0\]: expected a bool tensor \[K\]",
        ),
        (
            lambda: alignment_loss(Z, P, Y, [1.0, 0.5], mask=torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            r"mask: expected shape \[2, 2\]",
        ),
        (
            lambda: nearest_prototype(Z, [p.clone().requires_grad_() for p in P]),
            ValueError,
            "prototypes: requires grad",
        ),
        (
            lambda: prototype_distance(torch.zeros(2, 3), torch.zeros(5, 4)),
            ValueError,
            r"features: expected shape \[..., D\] with D = 4",
        ),
        (
            lambda: prototype_distance(torch.zeros(2, 3).int(), P[0]),
            TypeError,
            "features: expected float16",
        ),
        (
            lambda: update_prototypes(P[0], torch.zeros(5), Z[0], Y),
            TypeError,
            "counts: expected an int64 tensor",
        ),
        (
            lambda: update_prototypes(P[0], torch.zeros(5).long(), Z[0], Y, momentum=1.0),
            ValueError,
            r"momentum: expected a number in \[0, 1\)",
        ),
    ],
)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()

"""gated_fusion and fusion_cross_entropy against loops.

Also gradcheck, half types, compile and wrong input.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iib_kernels
from iib_kernels import fusion_cross_entropy, gated_fusion

SHAPES = st.tuples(
    st.integers(1, 6), st.sampled_from([0, 1, 2, 3, 7, 13]), st.sampled_from([1, 2, 3, 5, 17, 97])
)


def case(M, N, K, seed, *, masked=False, extreme=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(N, K, generator=g, dtype=torch.float64) for _ in range(M)]
    if extreme and N and K > 1:
        logits[0][0] = 1e4 * torch.randn(K, generator=g, dtype=torch.float64)
        logits[-1][-1, 0] = -math.inf
    mask = None
    if masked:
        mask = torch.rand(N, M, generator=g) < 0.6
        mask[torch.arange(N), torch.randint(0, M, (N,), generator=g)] = True
    options = dict(
        log_prior=torch.randn(M, generator=g, dtype=torch.float64),
        gate_logits=torch.randn(N, M, generator=g, dtype=torch.float64),
        temperature=0.5 + torch.rand(M, generator=g, dtype=torch.float64),
        uncertainty_weight=torch.randn(M, generator=g, dtype=torch.float64),
        scale=1.7,
        mask=mask,
    )
    options |= {
        key: value.to(dtype)
        for key, value in options.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return [values.to(dtype) for values in logits], options


def loops(logits, options):
    numbers = {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }
    return oracle.fusion(
        torch.stack(logits).numpy(),
        numbers["log_prior"],
        numbers["gate_logits"],
        numbers["temperature"],
        numbers["uncertainty_weight"],
        numbers["scale"],
        numbers["mask"],
    )


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.booleans(), st.booleans())
def test_fusion_is_what_loops_compute(shape, seed, masked, extreme):
    logits, options = case(*shape, seed, masked=masked, extreme=extreme)
    out = gated_fusion(logits, **options)
    fused, weights, uncertainty, _ = loops(logits, options)
    np.testing.assert_allclose(out.weights, weights, atol=1e-12)
    np.testing.assert_allclose(out.logits, fused, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(out.uncertainty, uncertainty, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.booleans(), st.sampled_from(["mean", "sum", "none"]))
def test_cross_entropies_are_what_loops_compute(shape, seed, masked, reduction):
    M, N, K = shape
    logits, options = case(*shape, seed, masked=masked)
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, K, (N,), generator=g).masked_fill(
        torch.rand(N, generator=g) < 0.2, -100
    )
    out = fusion_cross_entropy(logits, targets, reduction=reduction, **options)
    fused, weights, _, scaled = loops(logits, options)
    there = np.array(
        [
            [
                targets[i] != -100 and (options["mask"] is None or bool(options["mask"][i, m]))
                for m in range(M)
            ]
            for i in range(N)
        ]
    ).reshape(N, M)
    valid = (targets != -100).numpy()
    expected = np.array(
        [oracle.cross_entropy(fused[i], targets[i]) if valid[i] else 0.0 for i in range(N)]
    )
    own = np.array(
        [
            [
                oracle.cross_entropy(scaled[i, m], targets[i]) if there[i, m] else 0.0
                for m in range(M)
            ]
            for i in range(N)
        ]
    ).reshape(N, M)
    if reduction != "none":
        expected, own = expected.sum(), own.sum(0)
    if reduction == "mean":
        expected, own = expected / max(valid.sum(), 1), own / np.maximum(there.sum(0), 1)
    np.testing.assert_allclose(out.fused, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(out.unimodal, own, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(out.weights, weights, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    logits, options = case(3, 4, 5, 1, masked=masked)
    targets = torch.tensor([0, 4, -100, 2])
    names = ["log_prior", "gate_logits", "temperature", "uncertainty_weight"]
    inputs = [
        values.requires_grad_()
        for values in (
            *logits,
            *(options[name] for name in names),
            torch.tensor(1.7, dtype=torch.float64),
        )
    ]

    def fused(*values):
        out = gated_fusion(
            values[:3], scale=values[-1], mask=options["mask"], **dict(zip(names, values[3:-1]))
        )
        return out.logits, out.weights, out.uncertainty

    def losses(*values):
        return fusion_cross_entropy(
            values[:3],
            targets,
            scale=values[-1],
            mask=options["mask"],
            **dict(zip(names, values[3:-1])),
        )

    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(losses, inputs)


def test_gradients_stay_finite_beside_ruled_out_classes():
    logits, options = case(2, 3, 4, 5, extreme=True)
    leaves = [values.requires_grad_() for values in logits]
    fusion_cross_entropy(leaves, torch.tensor([1, 2, 3]), **options).fused.backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_a_missing_modality_has_no_say(garbage):
    logits, options = case(3, 6, 5, 2, masked=True)
    spoiled = [
        torch.where(options["mask"][:, m, None], values, garbage) for m, values in enumerate(logits)
    ]
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    results = []
    for version in (logits, spoiled):
        leaves = [values.clone().requires_grad_() for values in version]
        out, loss = (
            gated_fusion(leaves, **options),
            fusion_cross_entropy(leaves, targets, **options),
        )
        (out.logits.square().sum() + loss.fused + loss.unimodal.sum()).backward()
        results.append(
            [
                out.logits,
                out.weights,
                out.uncertainty,
                loss.fused,
                loss.unimodal,
                *(leaf.grad for leaf in leaves),
            ]
        )
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    assert (out.weights[~options["mask"]] == 0).all()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_no_worse_than_the_same_dtype_in_eager(dtype, tolerance):
    logits, options = case(3, 16, 40, 3, dtype=dtype)
    targets = torch.arange(16)
    wide = lambda value: (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )

    def run(function, values, extra):
        leaves = [value.clone().requires_grad_() for value in values]
        out = function(leaves, extra)
        torch.nn.functional.cross_entropy(out, targets).backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    ours = run(lambda l, o: gated_fusion(l, **o).logits, logits, options)
    naive = run(lambda l, o: iib_kernels.reference.gated_fusion(l, **o)[0], logits, options)
    truth = run(
        lambda l, o: gated_fusion(l, **o).logits,
        [wide(v) for v in logits],
        {k: wide(v) for k, v in options.items()},
    )
    for mine, eager, exact in zip(ours, naive, truth):
        assert mine.dtype == dtype
        assert ((mine.double() - exact).abs() <= (eager.double() - exact).abs() + tolerance).all()


def test_dtypes_of_the_outputs():
    half = [torch.randn(2, 3).half(), torch.randn(2, 3).bfloat16()]
    out = gated_fusion(half)
    assert (out.logits.dtype, out.weights.dtype, out.uncertainty.dtype) == (
        torch.float32,
        torch.float32,
        torch.float32,
    )  # fp16 and bf16 promote to fp32
    assert gated_fusion(half[:1]).logits.dtype == torch.float16
    assert fusion_cross_entropy(half, torch.tensor([0, 1])).fused.dtype == torch.float32


def test_leading_dimensions_and_strides_do_not_matter():
    logits, options = case(3, 24, 5, 7, masked=True)
    flat = gated_fusion(logits, **options)
    fold = lambda value: (
        value.reshape(2, 3, 4, -1)
        if isinstance(value, torch.Tensor) and value.dim() == 2
        else value
    )
    deep = gated_fusion(
        [fold(values) for values in logits], **{key: fold(value) for key, value in options.items()}
    )
    assert torch.equal(deep.logits.reshape(24, -1), flat.logits) and torch.equal(
        deep.weights.reshape(24, -1), flat.weights
    )
    stacked = gated_fusion(torch.stack(logits), **options)
    strided = gated_fusion([values.T.contiguous().T for values in logits], **options)
    for other in (stacked, strided):
        torch.testing.assert_close(other.logits, flat.logits, atol=1e-14, rtol=1e-14)
    one = gated_fusion(
        [values[0] for values in logits],
        **{**options, "gate_logits": options["gate_logits"][0], "mask": options["mask"][0]},
    )
    torch.testing.assert_close(one.logits, flat.logits[0])
    row = torch.randn(1, 5).expand(4, 5)
    torch.testing.assert_close(gated_fusion([row, row]).logits, row)


def test_inputs_are_untouched_and_results_repeat_bit_for_bit():
    logits, options = case(3, 6, 5, 8, masked=True)
    before = [values.clone() for values in logits]
    first, second = gated_fusion(logits, **options), gated_fusion(logits, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and all(
        torch.equal(a, b) for a, b in zip(before, logits)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def step(a, b, targets):
        out = gated_fusion([a, b], uncertainty_weight=0.7, scale=2.0)
        return out.logits.sum() + fusion_cross_entropy([a, b], targets).unimodal.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 6):
        g = torch.Generator().manual_seed(rows)
        leaves = [torch.randn(rows, 5, generator=g, requires_grad=True) for _ in range(2)]
        targets = torch.arange(rows) % 5
        expected = torch.autograd.grad(step(*leaves, targets), leaves)
        found = torch.autograd.grad(compiled(*leaves, targets), leaves)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)


def test_autocast_changes_nothing():
    logits, options = case(2, 4, 5, 9, dtype=torch.float32)
    plain = gated_fusion(logits, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_fusion(logits, **options).logits, plain.logits)


def test_runs_on_fake_tensors_without_looking_at_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits, mask = [torch.randn(4, 5) for _ in range(2)], torch.ones(4, 2, dtype=torch.bool)
        assert fusion_cross_entropy(
            logits, torch.zeros(4, dtype=torch.int64), mask=mask
        ).unimodal.shape == (2,)


L = [torch.zeros(2, 3), torch.zeros(2, 3)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_smoothing_are_those_of_torch(reduction, smoothing, weighted):
    torch.manual_seed(0)
    logits, targets = (
        [torch.randn(5, 4).double() for _ in range(2)],
        torch.tensor([0, 3, -100, 1, 2]),
    )
    weight = torch.rand(4).double() + 0.1 if weighted else None
    options = dict(reduction=reduction, weight=weight, label_smoothing=smoothing)
    out = fusion_cross_entropy(logits, targets, scale=1.7, **options)
    fused = gated_fusion(logits, scale=1.7).logits
    expected = torch.nn.functional.cross_entropy(fused, targets, **options)
    torch.testing.assert_close(out.fused, expected)
    for m, rows in enumerate(logits):
        expected = torch.nn.functional.cross_entropy(rows, targets, **options)
        torch.testing.assert_close(out.unimodal[..., m], expected)


def test_smoothing_leaves_out_the_classes_that_are_ruled_out():
    logits = torch.tensor([[1.0, -math.inf, 2.0, 0.5]])
    out = fusion_cross_entropy([logits], torch.tensor([0]), label_smoothing=0.3)
    left = torch.nn.functional.cross_entropy(
        logits[:, [0, 2, 3]], torch.tensor([0]), label_smoothing=0.3
    )
    torch.testing.assert_close(out.fused, left)
    torch.testing.assert_close(out.unimodal[0], left)


def test_no_row_that_counts_gives_zero_with_weights_too():
    logits, weight = torch.randn(2, 3), torch.rand(3)
    out = fusion_cross_entropy([logits], torch.tensor([-100, -100]), weight=weight)
    assert out.fused == 0 and out.unimodal.tolist() == [0.0]


def test_values_are_fused_by_the_weights_of_the_logits():
    torch.manual_seed(0)
    logits, mask = [torch.randn(2, 3, 4) for _ in range(2)], torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 0, 1] = False
    values = [torch.randn(2, 3, 7).half(), torch.randn(2, 3, 7)]
    values[1][0, 0] = math.nan
    out = gated_fusion(logits, mask=mask, scale=1.5, values=values)
    weights = gated_fusion(logits, mask=mask).weights
    rows = torch.stack(values, -1).nan_to_num() * weights[..., None, :]
    torch.testing.assert_close(out.logits, 1.5 * rows.sum(-1))
    torch.testing.assert_close(out.weights, weights)
    assert out.logits.dtype == torch.float32


def test_scalar_tensors_of_the_cpu_are_numbers_beside_a_device():
    """Beside logits of the meta device, which stands for a GPU here."""
    from iib_kernels.fusion import beside

    elsewhere = torch.empty(2, 3, device="meta")
    assert beside(torch.tensor(2.0), elsewhere) == 2.0
    leaf = torch.tensor(2.0, requires_grad=True)
    assert beside(leaf, elsewhere).device.type == "meta"  # or it would lose its gradient
    vector = torch.ones(2)
    assert beside(vector, elsewhere) is vector and beside(1.5, elsewhere) == 1.5


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: gated_fusion([]), ValueError, "logits: expected at least one tensor"),
        (lambda: gated_fusion([[1.0]]), TypeError, r"logits\[0\]: expected a tensor, got list"),
        (
            lambda: gated_fusion([torch.zeros(2, 3, dtype=torch.int64)]),
            TypeError,
            r"logits\[0\]: expected float16.*int64 \[2, 3\]",
        ),
        (
            lambda: gated_fusion([torch.zeros(2, 3), torch.zeros(2, 4)]),
            ValueError,
            r"logits\[1\]: expected shape \[2, 3\] as logits\[0\], got float32 \[2, 4\]",
        ),
        (
            lambda: gated_fusion(torch.zeros(3)),
            ValueError,
            r"logits: expected one tensor \[M, ..., K\]",
        ),
        (
            lambda: gated_fusion(L, torch.zeros(3)),
            ValueError,
            r"log_prior: expected shape \[M\] = \[2\], got float32 \[3\]",
        ),
        (
            lambda: gated_fusion(L, gate_logits=torch.zeros(2, 3)),
            ValueError,
            r"gate_logits: expected shape \[..., M\] = \[2, 2\]",
        ),
        (
            lambda: gated_fusion(L, temperature=0.0),
            ValueError,
            "temperature: expected a number above 0, got 0.0",
        ),
        (
            lambda: gated_fusion(L, temperature=torch.ones(3)),
            ValueError,
            r"temperature: expected a number or a tensor \[\] or \[M\], M = 2",
        ),
        (
            lambda: gated_fusion(L, scale="big"),
            ValueError,
            r"scale: expected a number, a tensor \[\] or 'present', got 'big'",
        ),
        (lambda: gated_fusion(L, mask=torch.ones(2, 2)), TypeError, "mask: expected a bool tensor"),
        (
            lambda: gated_fusion(L, mask=torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            r"mask: expected shape \[2, 2\]",
        ),
        (
            lambda: gated_fusion(L, mask=torch.tensor([[True, False], [False, False]])),
            ValueError,
            "mask: row 1 has no modality present",
        ),
        (
            lambda: gated_fusion(L, impl="cuda"),
            ValueError,
            "impl: 'cuda' is none of auto, triton, reference",
        ),
        (
            lambda: fusion_cross_entropy(L, torch.tensor([0, 3])),
            ValueError,
            r"targets: row 1 holds 3, outside 0..2",
        ),
        (
            lambda: fusion_cross_entropy(L, torch.tensor([0.0, 1.0])),
            TypeError,
            "targets: expected int64 class indices, got float32",
        ),
        (
            lambda: fusion_cross_entropy(L, torch.tensor([0])),
            ValueError,
            r"targets: expected shape \[2\]",
        ),
        (
            lambda: gated_fusion(L, values=[torch.zeros(2, 5)]),
            ValueError,
            "values: expected 2 tensors",
        ),
        (
            lambda: gated_fusion(L, values=[torch.zeros(2, 5), torch.zeros(2, 4)]),
            ValueError,
            r"values\[1\]: expected shape \[..., D\] = \[2, 5\] as values\[0\]",
        ),
        (
            lambda: gated_fusion(L, values=[torch.zeros(3, 5)] * 2),
            ValueError,
            r"values\[0\]: expected shape \[..., D\] = \[2, D\] with D >= 1, with the leading",
        ),
        (
            lambda: gated_fusion(L, values=[torch.zeros(2, 5), torch.zeros(2, 5).long()]),
            TypeError,
            r"values\[1\]: expected float16, bfloat16, float32 or float64, got int64",
        ),
        (
            lambda: fusion_cross_entropy(L, torch.tensor([0, 1]), weight=torch.ones(2)),
            ValueError,
            r"weight: expected shape \[K\]",
        ),
        (
            lambda: fusion_cross_entropy(
                L, torch.tensor([0, 1]), weight=torch.ones(3, requires_grad=True)
            ),
            ValueError,
            "weight: requires grad",
        ),
        (
            lambda: fusion_cross_entropy(L, torch.tensor([0, 1]), label_smoothing=1.5),
            ValueError,
            r"label_smoothing: expected a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: fusion_cross_entropy(L, torch.tensor([0, 1]), reduction="avg"),
            ValueError,
            "reduction: 'avg' is none of mean, sum, none",
        ),
    ],
)
def test_wrong_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()

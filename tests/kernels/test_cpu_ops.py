"""The CPU's operations against the reference: values and gradients, in whole and in chunks.

Each case is drawn with missing modalities, ignored rows, ruled-out or unseen classes. What
stands in rows that do not count is NaN.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import iib_kernels
from iib_kernels import _chunks, alignment_loss, fusion_cross_entropy, gated_fusion, reference
from iib_kernels.cpu import alignment, fusion, objective, shared

NAN, INF = float("nan"), float("inf")
WEIGHTS = (0.6, 1.3, 0.7, 2.0)


@pytest.fixture(params=["whole", "rows", "kept rows"], autouse=True)
def chunking(request, monkeypatch):
    """A batch in one chunk; a row a chunk, gone through again by backward, or kept for it."""
    if request.param != "whole":
        monkeypatch.setattr(shared, "WORK_ELEMENTS", 1)
        monkeypatch.setattr(alignment, "WORK_ELEMENTS", 1)
        monkeypatch.setattr(alignment, "LEAST_ROWS", 1)
    if request.param == "rows":
        monkeypatch.setattr(shared, "KEPT_ELEMENTS", 0)
        monkeypatch.setattr(_chunks, "CHUNK_BYTES", 1)


def drawer(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def masks(batch, count, seed=0):
    """[B, M] with at least one True in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, count, generator=generator) < 0.6
    mask[torch.arange(batch), torch.randint(count, (batch,), generator=generator)] = True
    return mask


def fusion_case(
    count,
    batch,
    classes,
    *,
    parameters="number",
    masked=False,
    ruled=False,
    seed=0,
    dtype=torch.float64,
):
    """Logits, options by name, targets (the second ignored)."""
    draw = drawer(seed, dtype)
    logits = [2 * draw(batch, classes) for _ in range(count)]
    if ruled and batch > 2 and classes > 2:
        logits[0][0, 0] = logits[-1][0, 1] = logits[-1][2, 0] = -INF
    options = {"log_prior": draw(count), "gate_logits": draw(batch, count)}
    if parameters == "number":
        options |= {"temperature": 1.3, "uncertainty_weight": 0.7, "scale": 1.7}
    else:
        shape = () if parameters == "scalar" else (count,)
        options |= {"temperature": draw(*shape).exp(), "uncertainty_weight": draw(*shape)}
        options["scale"] = draw() + 3
    if masked:
        options["mask"] = masks(batch, count, seed)
        logits = [
            torch.where(options["mask"][:, m, None], values, NAN) for m, values in enumerate(logits)
        ]
    targets = torch.arange(batch) * 5 % max(classes, 1)
    targets[1:2] = -100
    return logits, options, targets


def leaves_of(logits, options):
    """The same arguments, all that can asking for a gradient; and these alone."""
    logits = [values.clone().requires_grad_() for values in logits]
    options = {
        name: value.clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in options.items()
    }
    leaves = [value for value in options.values() if getattr(value, "requires_grad", False)]
    return logits, options, [*logits, *leaves]


def gradients(outputs, leaves, seed=1):
    """Of a random combination of the finite outputs."""
    draw, total = drawer(seed), 0.0
    for output in outputs:
        kept = torch.where(output.detach().isfinite(), output, 0.0)
        total = total + (kept * draw(*output.shape).to(output.dtype)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(a) if b is None else b for a, b in zip(leaves, found)]


def compare(function, logits, options, **tolerance):
    """impl="auto" against "reference", by values and by gradients of everything."""
    logits, options, leaves = leaves_of(logits, options)
    pairs = []
    for impl in ("auto", "reference"):
        outputs = function(logits, options, impl)
        pairs.append([*outputs, *gradients(outputs, leaves)])
    for found, expected in zip(*pairs):
        torch.testing.assert_close(found, expected, **tolerance)


FUSIONS = [
    (3, 7, 5, {"parameters": "vector", "masked": True}),
    (2, 6, 130, {"parameters": "scalar", "ruled": True}),
    (3, 5, 4, {"masked": True, "ruled": True}),
    (1, 4, 3, {"parameters": "vector"}),
    (2, 3, 1, {"parameters": "vector"}),
    (2, 0, 5, {"parameters": "scalar"}),
]


@pytest.mark.parametrize("count, batch, classes, how", FUSIONS)
def test_fusion_is_the_references(count, batch, classes, how):
    logits, options, _ = fusion_case(count, batch, classes, **how)
    call = lambda logits, options, impl: gated_fusion(logits, impl=impl, **options)
    compare(call, logits, options, rtol=1e-9, atol=1e-10)
    logits, options, _ = fusion_case(count, batch, classes, **how, dtype=torch.float32)
    compare(call, logits, options, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count, batch, classes, how", FUSIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropies_are_the_references(count, batch, classes, how, reduction):
    logits, options, targets = fusion_case(count, batch, classes, **how)
    each = drawer(5)(classes).exp()
    for weight, smoothing in itertools.product((None, each), (0.0, 0.2)):
        labels = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        compare(
            lambda logits, options, impl: fusion_cross_entropy(
                logits, targets, impl=impl, **labels, **options
            ),
            logits,
            options,
            rtol=1e-6 if smoothing else 1e-9,  # the reference's share of a class is float32
            atol=1e-7 if smoothing else 1e-10,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_and_weights_are_those_of_pytorch(reduction, weighted):
    logits, options, targets = fusion_case(2, 6, 5)
    logits = [values.requires_grad_() for values in logits]
    how = {"weight": drawer(4)(5).exp() if weighted else None, "label_smoothing": 0.3}
    out = fusion_cross_entropy(logits, targets, reduction=reduction, **how, **options)
    fused = gated_fusion(logits, impl="reference", **options).logits
    expected = [
        F.cross_entropy(scores, targets, reduction=reduction, **how)
        for scores in (fused, *(values / 1.3 for values in logits))
    ]
    torch.testing.assert_close(out.fused, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.unimodal, torch.stack(expected[1:], -1), rtol=1e-12, atol=1e-12)
    for found, right in zip(
        gradients((out.fused, *out.unimodal.unbind(-1)), logits), gradients(expected, logits)
    ):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def alignment_case(metric="cosine", *, partial=True, masked=True, ignored=True, classes=6):
    """Features (a zero row), prototypes (one zero, NaN if not seen) and the other arguments."""
    draw, batch = drawer(7), 7
    features = [draw(batch, 3 + m) for m in range(3)]
    prototypes = [draw(classes, 3 + m) for m in range(3)]
    targets = torch.arange(batch) % classes
    features[1][3], prototypes[0][1] = 0.0, 0.0
    budgets = torch.tensor([0.6, 0.9, 0.8], dtype=torch.float64)
    options = {"temperature": 0.5, "metric": metric}
    if partial:
        seen = [torch.arange(classes) != k for k in (2, 4)] + [torch.zeros(classes).bool()]
        seen[2][:2] = True
        options["seen"] = seen
        prototypes = [torch.where(s[:, None], p, NAN) for s, p in zip(seen, prototypes)]
    if ignored:
        targets[2] = -100
        features = [torch.where(targets[:, None] < 0, NAN, values) for values in features]
    if masked:
        mask = options["mask"] = masks(batch, 3)
        features = [torch.where(mask[:, m, None], f, NAN) for m, f in enumerate(features)]
    return features, prototypes, targets, budgets, options


ALIGNMENTS = [
    ("cosine", {}),
    ("sqeuclidean", {}),
    ("cosine", {"partial": False, "masked": False, "ignored": False}),
    ("sqeuclidean", {"partial": False, "classes": 130}),
    ("cosine", {"classes": 130, "masked": False}),
]


@pytest.mark.parametrize("metric, how", ALIGNMENTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_alignment_is_the_references(metric, how, reduction):
    features, *rest, options = alignment_case(metric, **how)
    compare(
        lambda features, options, impl: alignment_loss(
            features, *rest, impl=impl, reduction=reduction, **options
        ),
        features,
        options,
        rtol=1e-9,
        atol=1e-10,
    )
    compare(
        lambda features, options, impl: alignment_loss(
            features, *rest, impl=impl, reduction=reduction, **options
        ),
        [values.float() for values in features],
        options,
        rtol=1e-4,
        atol=1e-4,
    )


def objective_reference(logits, targets, features, prototypes, budgets, options):
    """The objective from its parts, by impl="reference"."""
    own = {"temperature", "metric", "seen"}
    entropies = fusion_cross_entropy(
        logits, targets, impl="reference", **{k: v for k, v in options.items() if k not in SHORT}
    )
    loss = WEIGHTS[0] * entropies.fused + WEIGHTS[1] * entropies.unimodal.sum()
    contrastive = aligned = torch.zeros_like(entropies.unimodal)
    if features is not None:
        how = {SHORT[k]: v for k, v in options.items() if k in SHORT and SHORT[k] in own}
        contrastive, aligned, _ = alignment_loss(
            features,
            prototypes,
            targets,
            budgets,
            mask=options.get("mask"),
            impl="reference",
            **how,
        )
        loss = loss + WEIGHTS[2] * contrastive.sum() + WEIGHTS[3] * aligned.sum()
    return loss, entropies.fused, entropies.unimodal, contrastive, aligned, entropies.weights


SHORT = {"prototype_temperature": "temperature", "metric": "metric", "seen": "seen"}


def objective_case(metric="cosine", how=None, labels=None, **given):
    features, prototypes, targets, budgets, options = alignment_case(metric, **how or {})
    classes = len(prototypes[0])
    logits, parameters, _ = fusion_case(3, 7, classes, **given)
    options = {k: v for k, v in options.items() if k != "temperature"}
    options = {"prototype_temperature": 0.5, **parameters, **options, **(labels or {})}
    return logits, targets, features, prototypes, budgets, options


@pytest.mark.parametrize("metric, how", ALIGNMENTS)
@pytest.mark.parametrize("parameters", ["number", "scalar", "vector"])
def test_objective_is_the_references(metric, how, parameters):
    logits, *rest, options = objective_case(metric, how, parameters=parameters, ruled=True)
    targets, features, *others = rest
    for given in (features, None):
        fused, chosen, leaves = leaves_of(logits, options)
        rows = None if given is None else [values.clone().requires_grad_() for values in given]
        leaves += rows or []
        arguments = fused, targets, rows, *others
        out = objective.multimodal_objective(*arguments, WEIGHTS, **chosen)
        expected = objective_reference(*arguments, chosen)
        assert out[0].requires_grad and not any(value.requires_grad for value in out[1:])
        for found, right in zip(
            (*out, *gradients(out[:1], leaves)), (*expected, *gradients(expected[:1], leaves))
        ):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)


def test_objective_with_smoothing_and_weights():
    labels = {"label_smoothing": 0.3, "weight": drawer(4)(6).exp()}
    logits, *rest, options = objective_case(how={"masked": False}, labels=labels)
    logits = [values.requires_grad_() for values in logits]
    out = objective.multimodal_objective(logits, *rest, WEIGHTS, **options)
    fused = gated_fusion(
        logits, impl="reference", **{k: v for k, v in options.items() if k in FUSION}
    ).logits
    each = [
        F.cross_entropy(scores, rest[0], **labels)
        for scores in (fused, *(values / 1.3 for values in logits))
    ]
    torch.testing.assert_close(out[1], each[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[2], torch.stack(each[1:]), rtol=1e-12, atol=1e-12)
    total = WEIGHTS[0] * each[0] + WEIGHTS[1] * sum(each[1:])
    for found, right in zip(gradients(out[:1], logits), gradients([total], logits)):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


FUSION = ("log_prior", "gate_logits", "temperature", "uncertainty_weight", "scale", "mask")


def test_gradients_are_the_derivatives():
    logits, options, targets = fusion_case(2, 3, 4, parameters="vector")
    names = [name for name in options if name != "mask"]
    inputs = [value.clone().requires_grad_() for value in (*logits, *options.values())]
    pack = lambda values: dict(zip(names, values))
    assert torch.autograd.gradcheck(lambda *v: gated_fusion(v[:2], **pack(v[2:])), inputs)
    labels = {"label_smoothing": 0.1, "weight": drawer(4)(4).exp()}
    assert torch.autograd.gradcheck(
        lambda *v: fusion_cross_entropy(v[:2], targets, **labels, **pack(v[2:])), inputs
    )
    rows = [drawer(m)(3, 3).requires_grad_() for m in range(2)]
    fixed = [drawer(m + 5)(4, 3) for m in range(2)], torch.tensor([0.9, 0.0])
    # The weaker modality's budget is 0: its alignment, whose factor is a constant, is 0
    assert torch.autograd.gradcheck(
        lambda *v: objective.multimodal_objective(
            v[2:4], targets, v[:2], *fixed, (1.0, 0.5, 0.7, 1.0), **pack(v[4:])
        )[0],
        [*rows, *inputs],
    )


def test_rows_that_do_not_count_may_hold_anything():
    """NaN in an ignored row reaches no loss and no gradient, of a parameter either."""
    logits, options, targets = fusion_case(2, 4, 5, parameters="vector")
    results = []
    for fill in (0.5, NAN, INF):
        rows = [torch.where(targets[:, None] < 0, fill, values) for values in logits]
        rows, chosen, leaves = leaves_of(rows, options)
        out = fusion_cross_entropy(rows, targets, **chosen)
        results.append([*out[:2], *gradients(out[:2], leaves)])
    for clean, *dirty in zip(*results):
        for other in dirty:
            torch.testing.assert_close(clean, other, rtol=1e-12, atol=1e-12)


def test_nothing_counts():
    logits, options, targets = fusion_case(2, 3, 4)
    features = [drawer(m)(3, 2).requires_grad_() for m in range(2)]
    logits = [values.requires_grad_() for values in logits]
    prototypes, budgets = [drawer(m)(4, 2) for m in range(2)], torch.ones(2).double()
    out = objective.multimodal_objective(
        logits, torch.full_like(targets, -100), features, prototypes, budgets, **options
    )
    found = torch.autograd.grad(out[0], [*logits, *features])
    assert not any(value.any() for value in (*out[:5], *found))


@pytest.mark.parametrize("upstream", [float("inf"), float("-inf"), float("nan")])
def test_no_factor_from_above_reaches_what_does_not_count(upstream):
    """Such as an infinite one, where a GradScaler overflows."""
    logits = [drawer(m)(5, 4).requires_grad_() for m in range(2)]
    features = [drawer(m)(5, 3).requires_grad_() for m in range(2)]
    prototypes, budgets = [drawer(m)(4, 3) for m in range(2)], torch.ones(2).double()
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[2, 1] = False
    out = objective.multimodal_objective(
        logits, torch.tensor([0, -100, 1, 2, 3]), features, prototypes, budgets, mask=mask
    )
    factor = torch.tensor(upstream).double()
    for m, gradient in enumerate(torch.autograd.grad(out[0], [*logits, *features], factor)):
        nothing = [1] if m % 2 == 0 else [1, 2]
        counted = [row for row in range(5) if row not in nothing]
        assert not gradient[nothing].any() and not gradient[counted].isfinite().any()


@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_backward_twice_gives_the_same(upstream):
    logits, *rest, options = objective_case()
    logits = [values.requires_grad_() for values in logits]
    losses = [
        objective.multimodal_objective(logits, *rest, **options)[0],
        gated_fusion(logits, **{k: v for k, v in options.items() if k in FUSION}).logits.sum(),
        fusion_cross_entropy(logits, rest[0]).fused,
    ]
    for loss in losses:
        given = torch.tensor(upstream, dtype=loss.dtype)
        first = torch.autograd.grad(loss, logits, given, retain_graph=True)
        kept = [value.clone() for value in first]
        for value in first:
            value.zero_()  # as an optimiser may, with a gradient that it was given
        for a, b in zip(torch.autograd.grad(loss, logits, given), kept):
            assert torch.equal(a, b)


def test_results_repeat_bit_for_bit_and_inputs_are_untouched():
    logits, *rest, options = objective_case(ruled=True)
    features = rest[1]
    logits = [torch.stack([values, values], 2)[:, :, 0] for values in logits]  # strided
    logits[0] = logits[0][:1].expand(7, -1)
    before = [value.clone() for value in (*logits, *features)]
    runs = []
    for _ in range(2):
        leaves = [value.detach().requires_grad_() for value in (*logits, *features)]
        out = objective.multimodal_objective(leaves[:3], rest[0], leaves[3:], *rest[2:], **options)
        runs.append([*out, *torch.autograd.grad(out[0], leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    for a, b in zip((*logits, *features), before):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def test_no_gradient_is_computed_where_none_is_asked_for(monkeypatch):
    from iib_kernels.cpu import alignment_rows, fusion_rows

    def never(*_):
        raise AssertionError("differentiated")

    for module, name in ((fusion_rows, "differentiate_losses"), (alignment_rows, "differentiate")):
        monkeypatch.setattr(module, name, never)
    logits, *rest, options = objective_case()
    plain = objective.multimodal_objective(logits, *rest, **options)[0]
    with torch.no_grad():
        leaves = [values.requires_grad_() for values in logits]
        assert torch.equal(objective.multimodal_objective(leaves, *rest, **options)[0], plain)
    with pytest.raises(AssertionError, match="differentiated"):
        objective.multimodal_objective(leaves, *rest, **options)


def test_second_derivatives_are_right_or_refused():
    logits, options, targets = fusion_case(2, 3, 4, parameters="vector", masked=True)
    features, prototypes, classes, budgets, how = alignment_case(partial=False)
    losses = {
        "fusion": lambda leaves, o, impl: gated_fusion(leaves, impl=impl, **o).logits,
        "entropies": lambda leaves, o, impl: (
            fusion_cross_entropy(leaves, targets, impl=impl, **o).unimodal
        ),
        "alignment": lambda leaves, o, impl: (
            alignment_loss(leaves, prototypes, classes, budgets, impl=impl, **o).contrastive
        ),
    }
    for name, loss in losses.items():
        given, chosen = (features, how) if name == "alignment" else (logits, options)
        found = []
        for impl in ("auto", "reference"):
            rows, parameters, leaves = leaves_of(given, chosen)
            total = loss(rows, parameters, impl).square().sum()
            first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
            second = sum(value.square().sum() for value in first if value is not None)
            found.append(torch.autograd.grad(second, leaves, allow_unused=True))
        for leaf, *pair in zip(leaves, *found):
            a, b = (torch.zeros_like(leaf) if value is None else value for value in pair)
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    logits = [values.nan_to_num().requires_grad_() for values in logits]
    loss = objective.multimodal_objective(logits, targets)[0]
    with pytest.raises(RuntimeError, match='multimodal_objective.*impl="reference"'):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_second_derivatives_of_a_tensor_that_comes_twice():
    found = []
    for impl in ("auto", "reference"):
        leaf = drawer()(3, 4).requires_grad_()
        loss = fusion_cross_entropy([leaf, leaf], torch.arange(3), impl=impl).fused
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), leaf)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Mode(TorchDispatchMode):
    """Sees operations, as tracers and fake tensors do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def test_what_needs_plain_operations_takes_the_reference(monkeypatch):
    taken = []
    for module in (fusion, alignment):
        for name in ("gated_fusion", "fusion_cross_entropy", "alignment_loss"):
            if hasattr(module, name):
                original = getattr(module, name)
                spy = lambda *a, original=original, **k: taken.append(1) or original(*a, **k)
                monkeypatch.setattr(module, name, spy)
    a, b, targets = drawer()(4, 3), drawer(1)(4, 3), torch.arange(4) % 3
    table, budgets = [torch.eye(3).double()] * 2, torch.ones(2).double()

    def total(a, b=b, impl="auto"):
        out = fusion_cross_entropy([a, b], targets, impl=impl)
        prototype = alignment_loss([a, b], table, targets, budgets, impl=impl)
        fused = gated_fusion([a, b], impl=impl).logits
        return out.fused + prototype.contrastive.sum() + fused.sum()

    expected = total(a)
    assert len(taken) == 3
    taken.clear()
    total(a, impl="reference")
    with Mode():
        torch.testing.assert_close(total(a), expected)
    torch.func.grad(total)(a)
    torch.func.vmap(lambda a: gated_fusion([a, a]).logits)(a)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
        fused = torch.autograd.forward_ad.unpack_dual(gated_fusion([dual, b]).logits)
        assert fused.tangent is not None
    torch.compile(lambda a: gated_fusion([a, b]).logits, backend="eager", fullgraph=True)(a)
    assert not taken


def test_autocast_changes_nothing():
    logits, *rest, options = objective_case()
    runs = []
    for enabled in (False, True):
        leaves = [values.float().requires_grad_() for values in logits]
        features = [values.float().requires_grad_() for values in rest[1]]
        chosen = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in options.items()
        }
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = objective.multimodal_objective(leaves, rest[0], features, *rest[2:], **chosen)
            runs.append([*out, *torch.autograd.grad(out[0], [*leaves, *features])])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_row_may_have_a_scale_of_its_own():
    """As a scale by the number of modalities that are there needs it."""
    logits, options, targets = fusion_case(3, 5, 4, masked=True)
    logits = [values.nan_to_num().requires_grad_() for values in logits]
    scale = options["mask"].sum(1).double()
    out = fusion.gated_fusion(logits, **{**options, "scale": scale})[0]
    expected = reference.gated_fusion(logits, **{**options, "scale": scale[:, None]})[0]
    for a, b in zip((out, *gradients([out], logits)), (expected, *gradients([expected], logits))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_keeps_a_result_alive():
    """An output that its own graph holds would only be freed by the garbage collector."""
    import gc
    import weakref

    gc.disable()
    try:
        logits, options, targets = fusion_case(2, 3, 4)
        logits = [values.requires_grad_() for values in logits]
        outputs = [
            *gated_fusion(logits, **options),
            *fusion_cross_entropy(logits, targets, **options),
            *objective.multimodal_objective(logits, targets),
            *iib_kernels.alignment_loss(logits, [torch.eye(4).double()] * 2, targets, [1.0, 0.5]),
        ]
        watched = [weakref.ref(value) for value in outputs]
        del outputs
        assert not any(reference() is not None for reference in watched)
    finally:
        gc.enable()

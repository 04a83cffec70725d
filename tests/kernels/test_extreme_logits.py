"""A finite loss has finite gradients, whatever stands in rows that do not count, and for logits up
to 1e30 in those that do.

A product with a gradient of that size overflows float32, and 0 times what does not count is NaN.
"""

import math
import random

import pytest
import torch

from iib_kernels import fusion_cross_entropy, gated_fusion, multimodal_objective, reference

GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38)
CASES = 320


def spoil(chosen, rows, counts, target):
    """Writes into one sample's logits [K]: anything where they do not count, else extremes."""
    classes = len(rows)
    if not counts:
        if chosen.random() < 0.7:
            every = chosen.random() < 0.5
            rows[slice(None) if every else chosen.randrange(classes)] = chosen.choice(GARBAGE)
    elif chosen.random() < 0.4:
        kind, k = (
            chosen.choice(("scaled", "constant", "one", "ruled out")),
            chosen.randrange(classes),
        )
        if kind == "scaled":
            rows *= chosen.choice((1e10, 1e18, 1e25, 1e30))
        elif kind == "constant":
            rows[:] = chosen.choice((1e30, -1e30, 1e19))
        elif kind == "one":
            rows[k] = chosen.choice((1e30, -1e30))
        elif k != target:
            rows[k] = -math.inf


def draw(seed):
    """Logits, targets, the gate's tensors and other options of ``fusion_cross_entropy``."""
    chosen, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, count = chosen.randint(1, 4), chosen.randint(1, 3)
    classes = chosen.choice((1, 2, 3, 5, 17))
    randn = lambda *size: torch.randn(*size, generator=g)
    maybe = lambda value: value if chosen.random() < 0.5 else None
    logits = [2 * randn(batch, classes) for _ in range(count)]
    targets = torch.randint(classes, (batch,), generator=g)
    targets[torch.rand(batch, generator=g) < 0.3] = -100
    mask = torch.rand(batch, count, generator=g) < 0.6
    mask[torch.arange(batch), torch.randint(count, (batch,), generator=g)] = True
    mask = maybe(mask)
    for b in range(batch):
        for m in range(count):
            counts = targets[b] >= 0 and (mask is None or bool(mask[b, m]))
            spoil(chosen, logits[m][b], counts, targets[b])
    temperature = randn(count).abs() + 0.5 if chosen.random() < 0.5 else torch.tensor(0.7)
    gate = {
        "log_prior": maybe(randn(count)),
        "gate_logits": maybe(randn(batch, count)),
        "temperature": maybe(temperature),
        "uncertainty_weight": maybe(randn(count)),
        "scale": maybe(torch.tensor(1.7)),
    }
    gate = {name: value for name, value in gate.items() if value is not None}
    rest = {
        "mask": mask,
        "reduction": chosen.choice(("mean", "sum")),
        "label_smoothing": chosen.choice((0.0, 0.1)),
        "weight": maybe(torch.rand(classes, generator=g) + 0.1),
    }
    return logits, targets, gate, rest


def gradients(logits, targets, gate, rest, impl):
    """The sum of all losses, and its gradients by name."""
    leaves = {f"logits[{m}]": values for m, values in enumerate(logits)} | gate
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    rows, gate = [*leaves.values()][: len(logits)], {name: leaves[name] for name in gate}
    out = fusion_cross_entropy(rows, targets, **gate, **rest, impl=impl)
    loss = out.fused + out.unimodal.sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {k: v for k, v in zip(leaves, found) if v is not None}


@pytest.mark.parametrize(
    "impl, cases",
    [
        ("reference", range(CASES)),
        ("auto", range(CASES)),
        ("triton", range(12)),
        pytest.param("triton", range(12, CASES), marks=pytest.mark.slow),
    ],
    ids=["reference", "auto", "triton", "triton-more"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_finite_loss_has_finite_gradients(impl, cases):
    finite = 0
    for seed in cases:
        loss, found = gradients(*draw(seed), impl)
        if not torch.isfinite(loss):
            continue
        finite += 1
        for name, value in found.items():
            assert torch.isfinite(value).all(), (seed, name, value)
    assert finite > 0.9 * len(cases)


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_ignored_row_changes_no_gradient(impl, garbage):
    """Neither those of the other rows nor those of the gate, and its own is 0."""
    targets, results = torch.tensor([0, -100, 2]), []
    for fill in (0.5, garbage):
        logits = [torch.randn(3, 4, generator=torch.Generator().manual_seed(m)) for m in range(2)]
        logits[0][1], logits[1][1, 2] = fill, fill
        gate = {"log_prior": torch.zeros(2), "temperature": torch.tensor([0.7, 1.2])}
        gate |= {"uncertainty_weight": torch.ones(2), "scale": torch.tensor(1.7)}
        results.append(gradients(logits, targets, gate, {}, impl))
    (clean, expected), (loss, found) = results
    torch.testing.assert_close(loss, clean)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert not found["logits[0]"][1].any()


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
def test_gradients_of_extreme_logits_are_those_of_float64(impl):
    """One modality certain to 1e30, of a wrong class in one row: the gate's gradient is as large,
    and the certain modality's own uncertainty has none.
    """
    logits = [
        torch.tensor([[1e30, 0.0, 1.0], [0.5, -1e30, 2.0]]),
        torch.tensor([[0.3, 1.0, 0.1]] * 2),
    ]
    targets, gate = torch.tensor([1, 2]), {"temperature": torch.tensor([0.7, 1.2])}
    gate |= {"uncertainty_weight": torch.ones(2), "gate_logits": torch.zeros(2, 2)}
    wide = lambda value: value.double()
    loss, found = gradients(logits, targets, gate, {}, impl)
    exact = {name: wide(value) for name, value in gate.items()}
    truth, expected = gradients([*map(wide, logits)], targets, exact, {}, "reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    assert expected["gate_logits"].abs().max() > 1e29
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_counts_still_shows_that_it_is_no_number(impl):
    """NaN is not hidden where it matters: a GradScaler looks for it in the gradients."""
    logits = [torch.randn(2, 3), torch.randn(2, 3)]
    logits[0][1, 0] = math.nan
    loss, found = gradients(logits, torch.tensor([0, 1]), {"log_prior": torch.zeros(2)}, {}, impl)
    assert loss.isnan() and found["log_prior"].isnan().any() and found["logits[1]"][1].isnan().any()
    assert gated_fusion(logits, impl=impl).logits[1, 0].isnan()


@pytest.mark.parametrize("impl", ["reference", "auto", "triton"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_objective_takes_anything_in_rows_that_do_not_count(impl):
    results = []
    for fill in (0.5, *GARBAGE):
        g = torch.Generator().manual_seed(0)
        leaves = [torch.randn(4, 3, generator=g) for _ in range(4)]
        for rows in leaves:
            rows[1] = fill
        leaves[0][2], leaves[2][2] = fill, fill  # missing
        mask = torch.ones(4, 2, dtype=torch.bool)
        mask[2, 0] = False
        leaves = [rows.requires_grad_() for rows in leaves]
        loss = multimodal_objective(
            leaves[:2],
            torch.tensor([0, -100, 1, 2]),
            features=leaves[2:],
            prototypes=[torch.eye(3)] * 2,
            mask=mask,
            impl=impl,
        ).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for clean, *others in zip(*results):
        for other in others:
            torch.testing.assert_close(other, clean)


def test_the_entropy_has_the_gradients_of_its_equation():
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 5, generator=g, dtype=torch.float64)).requires_grad_()
    inverse = (torch.rand(4, 1, generator=g, dtype=torch.float64) + 0.5).requires_grad_()
    left_out = torch.zeros(4, 5, dtype=torch.bool)
    function = lambda *values: reference.entropy(*values, left_out)
    log_p = (logits * inverse).log_softmax(-1)
    torch.testing.assert_close(function(logits, inverse), -(log_p.exp() * log_p).sum(-1))
    assert torch.autograd.gradcheck(function, (logits, inverse))
    assert torch.autograd.gradgradcheck(function, (logits, inverse))

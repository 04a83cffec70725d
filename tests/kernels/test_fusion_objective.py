"""The fusion's part of the objective: one launch gives losses and gradients.

They must be what autograd makes of `fusion_cross_entropy` and given weights, in float64 and, within
its tolerance, in every other dtype.
"""

import contextlib
import math

import pytest
import torch

pytest.importorskip("triton")
import interpreter
from test_triton_values import FLOATS, TOLERANCE, bits, close

from iib_kernels import fusion_cross_entropy
from iib_kernels._runtime import compute_dtype
from iib_kernels.ops.fusion import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = [1.0, 1.3, 1.7]


@pytest.fixture(autouse=True)
def watched():
    """The sanitizer around every interpreted kernel."""
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        yield report


def inputs(batch, classes, modalities, dtype, *, weight=False, smoothing=0.0, garbage=math.nan):
    """Logits, labels, gating and factors; a modality is absent and a row is ignored."""
    g = torch.Generator().manual_seed(classes * modalities)
    draw = lambda *size: torch.randn(*size, generator=g).to(DEVICE)
    mask = torch.ones(batch, modalities, dtype=torch.bool, device=DEVICE)
    targets = torch.randint(classes, (batch,), generator=g).to(DEVICE)
    logits = [(2 * draw(batch, classes)).to(dtype) for _ in range(modalities)]
    for rows in logits:
        if classes > 1:
            rows[0, (int(targets[0]) + 1) % classes] = -math.inf
        rows[1] = garbage
    targets[1] = -100
    if modalities > 1:
        mask[2, 0] = False
        logits[0][2] = garbage
    class_weight = draw(classes).abs() + 0.1 if weight else None
    labels = launch.Labels(targets, -100, class_weight, smoothing)
    temperature = draw(modalities).abs() + 0.5
    parameters = launch.Parameters(temperature, None, None, NUMBERS, mask)
    gating = launch.Gating(parameters, draw(modalities), draw(batch, modalities))
    return logits, labels, gating, draw(modalities + 1).abs()


def expected(logits, labels, gating, factors, dtype):
    """The same by autograd through plain PyTorch, computed in ``dtype`` from the same numbers."""
    raise_ = lambda value: value.to(dtype, copy=True).requires_grad_()
    leaves = [raise_(rows) for rows in logits]
    prior, gate, temperature, kappa, scale = parameters = [
        raise_(value)
        for value in (
            gating.log_prior,
            gating.gate_logits,
            gating.parameters.temperature,
            factors.new_full((len(logits),), NUMBERS[1], dtype=torch.float64),
            factors.new_full((), NUMBERS[2], dtype=torch.float64),
        )
    ]
    with torch.no_grad():
        for rows in leaves:
            rows[1] = 0.0  # what stands in an ignored row has no effect
    found = fusion_cross_entropy(
        leaves,
        labels.targets,
        prior,
        gate_logits=gate,
        temperature=temperature,
        uncertainty_weight=kappa,
        scale=scale,
        mask=gating.parameters.mask,
        weight=labels.class_weight,
        label_smoothing=labels.smoothing,
        reduction="sum",
        impl="reference",
    )
    losses = torch.cat([found.fused[None], found.unimodal])
    (factors.to(dtype) * losses).sum().backward()
    by = [value.grad for value in parameters]
    shares = torch.cat([by[0], by[3], by[2], by[4][None]])
    return {
        "losses": losses.detach(),
        "weights": found.weights.detach(),
        "gate": by[1],
        "parameters": shares,
        **{f"logits[{m}]": rows.grad for m, rows in enumerate(leaves)},
    }


def run(logits, labels, gating, factors):
    """What the launch gives, under the same names; the programs' shares added up."""
    found = launch.objective(logits, labels, gating, factors, need_gate=True, need_parameters=True)
    return {
        "losses": found.losses.sum(0),
        "weights": found.weights,
        "gate": found.grad_gate,
        "parameters": found.grad_parameters.sum(0),
        **{f"logits[{m}]": rows for m, rows in enumerate(found.grad_logits)},
    }


def check(batch, classes, modalities, dtype, **options):
    given = inputs(batch, classes, modalities, dtype, **options)
    found, truth = run(*given), expected(*given, torch.float64)
    eager = expected(*given, compute_dtype(*given[0]))
    for name, value in found.items():
        if name.startswith("logits"):
            assert value.dtype == dtype
            eager[name] = eager[name].to(dtype)
        if name == "weights":  # of the ignored row they are what garbage makes of them
            value, eager[name], truth[name] = (
                torch.cat([rows[:1], rows[2:]]) for rows in (value, eager[name], truth[name])
            )
        tolerance = max(TOLERANCE[value.dtype], TOLERANCE[dtype] if "logits" in name else 0)
        close(name, value.double(), eager[name].double(), truth[name], tolerance, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes, modalities", [(1, 1), (2, 3), (31, 2), (309, 1)])
def test_losses_and_gradients_are_those_of_autograd(classes, modalities, dtype):
    check(5, classes, modalities, dtype)
    check(5, classes, modalities, dtype, weight=True, smoothing=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "classes, modalities, dtype",
    [(1000, 3, torch.float32), (4096, 2, torch.bfloat16), (4099, 3, torch.float16)],
)
def test_of_many_classes(classes, modalities, dtype, smoothing):
    check(3, classes, modalities, dtype, smoothing=smoothing)


@pytest.mark.parametrize(
    "modalities, form",
    [
        (1, "streamed"),
        pytest.param(1, "joint", marks=pytest.mark.slow),
        pytest.param(3, "streamed", marks=pytest.mark.slow),
        (3, "joint"),
    ],
)
def test_streamed_rows_and_joint_reductions(modalities, form, monkeypatch):
    if form == "joint":
        monkeypatch.setattr(launch, "is_joint", lambda config: True)
    else:
        monkeypatch.setattr(launch, "MOST_CLASSES", 0)
        monkeypatch.setattr(launch, "STREAMED", 8)
    for options in ({}, {"weight": True}, {"weight": True, "smoothing": 0.2}, {"smoothing": 0.2}):
        check(4, 7, modalities, torch.float64, **options)


@pytest.mark.parametrize(
    "most, smoothing",
    [(0, 0.2), pytest.param(0, 0.0, marks=pytest.mark.slow), (4096, 0.0), (4096, 0.2)],
)
def test_garbage_changes_nothing_and_results_repeat(most, smoothing, monkeypatch):
    monkeypatch.setattr(launch, "MOST_CLASSES", most)
    options = dict(weight=True, smoothing=smoothing)
    results = [
        run(*inputs(6, 21, 2, torch.float32, garbage=value, **options))
        for value in (1.0, 1.0, math.nan, math.inf, -math.inf)
    ]
    for name, value in results[0].items():
        for other in results[1:]:
            if name == "weights":
                value, other[name] = (torch.cat([x[:1], x[-3:]]) for x in (value, other[name]))
            assert bits(value, other[name]) and value.isfinite().all(), name


def test_an_empty_batch_launches_nothing(watched):
    logits = [torch.empty(0, 4, device=DEVICE)] * 2
    labels = launch.Labels(torch.empty(0, dtype=torch.int64, device=DEVICE), -100)
    gating = launch.Gating(launch.Parameters(None, None, None, [1.0, 1.0, 1.0], None))
    found = launch.objective(
        logits, labels, gating, torch.ones(3, device=DEVICE), need_parameters=True
    )
    assert found.losses.sum(0).tolist() == [0.0] * 3 and len(found.weights) == 0
    assert found.grad_parameters.sum(0).tolist() == [0.0] * 7 and found.grad_gate is None
    assert watched is None or watched.count == 0


def test_what_is_not_asked_for_is_not_made(watched):
    logits, labels, gating, factors = inputs(5, 7, 2, torch.float32)
    found = launch.objective(logits, labels, gating, factors)
    assert found.grad_gate is None and found.grad_parameters is None
    if watched is not None:
        stored = sum(value.nbytes for value in (*found.grad_logits, found.weights, found.losses))
        assert watched.count == 1 and watched.stored == stored

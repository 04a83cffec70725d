"""The alignment loss over many classes, which is attention: its parts, options and products.

Values and gradients of generated cases are tested in test_triton_values.py, machine code in
test_alignment_code.py.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import interpreter
from test_triton_values import DEVICE, alignment_case, check, evaluate, start

from iib_kernels import _tuning, alignment_loss
from iib_kernels.ops.alignment import launch

pytestmark = pytest.mark.skipif(
    not interpreter.interpreted(), reason="launches and products are counted in the interpreter"
)


@pytest.fixture
def many_processors(monkeypatch):
    """A device that few rows leave idle, so that classes are split."""
    monkeypatch.setattr(_tuning, "processors", lambda device: 132)


@pytest.mark.parametrize(
    "dtype, metric",
    [
        (torch.float32, "cosine"),
        pytest.param(torch.float32, "sqeuclidean", marks=pytest.mark.slow),
        pytest.param(torch.float16, "cosine", marks=pytest.mark.slow),
        (torch.float16, "sqeuclidean"),
        pytest.param(torch.float64, "cosine", marks=pytest.mark.slow),
        pytest.param(torch.float64, "sqeuclidean", marks=pytest.mark.slow),
    ],
)
def test_parts_of_the_classes_make_the_whole(many_processors, dtype, metric):
    options = dict(metric=metric, seen="each", masked=True, layout="sliced")
    case = alignment_case(3, 5, 1100, 2, (13, 5), dtype, **options)
    with interpreter.sanitized() as report:
        found = check(case)
    names = [found.name for found in report.launches]
    assert names.count("merge") == 2 and "gradients" in names
    assert all(value.isfinite().all() for value in found.values())
    with interpreter.sanitized() as report:
        check(case._replace(needs=[], used=[]))
    assert [found.name for found in report.launches] == ["lay_out", "evidence", "losses"]


def test_a_part_without_any_seen_class(many_processors):
    case = alignment_case(4, 5, 1100, 3, (13, 5), seen="each", budgets="equal")
    for name, value in case.inputs.items():
        if name.startswith("seen"):
            value[:600] = False  # the first part, and a bit of the second
            value[601:] = True
        elif name.startswith("prototypes"):
            value.copy_(torch.randn(value.shape, generator=start(6)))
    targets = case.inputs["targets"]
    wanted = torch.tensor([601, 700, 5, 1099, 601], device=DEVICE)
    targets.copy_(torch.where(targets < 0, targets, wanted))
    found = check(case)
    assert all(value.isfinite().all() for value in found.values())
    check(case._replace(needs=[], used=[]))


@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("table_dtype", [None, torch.float32])
@pytest.mark.parametrize("width", [13, pytest.param(300, marks=pytest.mark.slow)])
def test_rows_of_half_precision_piece_by_piece(monkeypatch, modalities, table_dtype, width):
    """As on GPUs that are not Hopper's."""
    monkeypatch.setattr(_tuning, "hopper", lambda device: False)
    case = alignment_case(
        5, 5, 130, modalities, (width, 7), torch.float16, table_dtype, seen="each", masked=True
    )
    with interpreter.sanitized() as report:
        check(case)
    assert {"attend_streamed"} == {
        found.name for found in report.launches if found.name.startswith("attend")
    }


def inputs(batch, classes, widths, dtype, seen=(), mask=None, **options):
    """Arguments of the launcher."""
    g = start(9)
    features = [torch.randn(batch, width, generator=g).to(DEVICE, dtype) for width in widths]
    tables = [torch.randn(classes, width, generator=g).to(DEVICE, dtype) for width in widths]
    targets = torch.randint(classes, (batch,), generator=g).to(DEVICE)
    targets[1] = -100
    budgets = torch.linspace(0.5, 0.9, len(widths)).to(DEVICE)
    return launch.Inputs(features, tables, targets, budgets, 0.5, True, list(seen), mask, -100)


@pytest.mark.parametrize("classes", [9, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_and_gradients_with_factors_known_beforehand(classes, dtype):
    given = inputs(5, classes, (13, 7, 5), dtype, mask=torch.rand(5, 3, generator=start(2)) < 0.8)
    factors = torch.tensor([[0.5, 1.0, 0.25], [2.0, 3.0, 1.5]], device=DEVICE)
    with interpreter.sanitized():
        gradients, results = launch.losses_and_gradients(given, factors)
    leaves = [value.double().requires_grad_() for value in given.features]
    truth = alignment_loss(
        leaves,
        [table.double() for table in given.prototypes],
        given.targets,
        given.budgets,
        temperature=given.temperature,
        mask=given.mask,
        reduction="none",
        impl="reference",
    )
    total = (factors[0] * truth.contrastive + factors[1] * truth.alignment).sum()
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3}[dtype]
    for found, right in zip(gradients, torch.autograd.grad(total, leaves)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
    for found, right in zip((*results[:2], results.confidence), truth):
        torch.testing.assert_close(found.double(), right.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "classes, dtype",
    [
        (100, torch.float32),
        (100, torch.float16),
        pytest.param(200, torch.float32, marks=pytest.mark.slow),
        (200, torch.float16),
        (1100, torch.float32),
        pytest.param(1100, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_a_sure_anchor_draws_others_over_the_classes_both_have_seen(
    many_processors, classes, dtype
):
    """The anchor, the last, knows the classes; a third of them one or the other has not seen."""
    g = start(12)
    seen = [torch.rand(classes, generator=g) < 0.67 for _ in range(3)]
    given = inputs(6, classes, (13, 7, 9), dtype, seen)
    targets = torch.nonzero(seen[0] & seen[1] & seen[2])[:6, 0]
    anchor = given.prototypes[2][targets] + 0.3 * torch.randn(6, 9, generator=g).to(dtype)
    given = given._replace(targets=targets, features=[*given.features[:2], anchor], temperature=0.2)
    with interpreter.sanitized():
        gradients, results = launch.losses_and_gradients(given, torch.ones(2, 3))
    leaves = [value.double().requires_grad_() for value in given.features]
    truth = alignment_loss(
        leaves,
        [table.double() for table in given.prototypes],
        targets,
        given.budgets,
        temperature=0.2,
        seen=seen,
        reduction="none",
        impl="reference",
    )
    assert truth.alignment[:, :2].median() > 0.3
    if results.share.numel():
        assert results.share[:, :2].min() < 0.9
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for found, right in zip((*results[:2], results.confidence), truth):
        torch.testing.assert_close(found.double(), right.detach(), rtol=tolerance, atol=tolerance)
    total = truth.contrastive.sum() + truth.alignment.sum()
    for found, right in zip(gradients, torch.autograd.grad(total, leaves)):
        scale = right.abs().max().item()
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance * scale)


def test_backward_of_a_forward_that_kept_nothing_says_so():
    given = inputs(3, 200, (5,), torch.float32)
    results = launch.forward(given, False)
    with pytest.raises(RuntimeError, match="keep=False"):
        launch.backward(given, results, results.contrastive, None)


def products(call) -> int:
    """Multiplications of `tl.dot` while it runs."""
    builder, count = interpreter.internals.interpreter_builder, 0
    dot = builder.create_dot

    def counted(a, b, *rest):
        nonlocal count
        count += a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(a, b, *rest)

    builder.create_dot = counted
    try:
        call()
    finally:
        del builder.create_dot
    return count


@pytest.mark.parametrize(
    "modalities, most", [(1, 1.0), (2, 1.2), pytest.param(3, 1.25, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("width", [512, pytest.param(768, marks=pytest.mark.slow)])
def test_losses_and_gradients_take_few_products(modalities, most, width):
    """The least is two for the anchor, and three for each other modality.

    The anchor's scores are computed again for each other modality, whose means fill the registers.
    """
    given = inputs(64, 256, (width,) * modalities, torch.float16)
    factors = torch.ones(2, modalities, device=DEVICE)
    count = products(lambda: launch.losses_and_gradients(given, factors))
    least = (3 * modalities - 1) * 64 * 256 * width
    assert count / least == pytest.approx(most, abs=1e-6)
    count = products(lambda: launch.forward(given, False))
    assert count == modalities * 64 * 256 * width


@pytest.mark.parametrize("width", [512, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize("busy", [True, False])
def test_products_in_ieee_take_no_scores_twice_unless_programs_are_few(width, busy, monkeypatch):
    """One program holds all components of few rows, or each of several holds some of more rows."""
    monkeypatch.setattr(_tuning, "processors", lambda device: 1 if busy else 1000)
    given = inputs(32, 192, (width, width), torch.float32)
    factors = torch.ones(2, 2, device=DEVICE)
    gradients, results = [], []

    def call():
        found = launch.losses_and_gradients(given, factors)
        gradients[:], results[:] = found

    count, padded = products(call), _tuning.padded(width)
    copies, scored = 1 if busy else padded // 256, -(-width // 16) * 16
    # Three scores, as the anchor's are taken again for the other modality, and three means
    assert count == 3 * (copies * scored + padded) * 32 * 256
    leaves = [rows.clone().requires_grad_() for rows in given.features]
    truth = alignment_loss(leaves, *given[1:4], temperature=0.5, reduction="none", impl="reference")
    loss = truth.contrastive.sum() + truth.alignment.sum()
    for found, right in zip(gradients, torch.autograd.grad(loss, leaves)):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    for found, right in zip((*results[:2], results[3]), truth):
        torch.testing.assert_close(found, right.detach(), rtol=1e-4, atol=1e-5)


def test_attention_reads_rows_once_and_stores_nothing_by_classes():
    batch, classes, width = 64, 1024, 64
    given = inputs(batch, classes, (width,) * 2, torch.bfloat16)
    with interpreter.sanitized() as report:
        results = launch.forward(given, True)
        launch.backward(given, results, results.contrastive, results.alignment)
    by_name = {}
    for found in report.launches:
        by_name.setdefault(found.name, []).append(found)
    rows = (batch - 1) * width * 2  # bytes of one modality's rows; one is ignored
    own, across = by_name["attend_resident"]
    loaded = lambda found, name: sum(
        count for key, count in found.loaded.items() if key.startswith(name)
    )
    assert loaded(own, "given.features") == 2 * rows
    # The anchor's once, the other's for its length and for its score
    assert loaded(across, "given.features") == 3 * rows
    # A block of prototypes is read once for scores and means, and a row for each target
    table = classes * width * 2
    assert loaded(own, "given.tables.ptr") == 2 * (table + rows)
    assert loaded(across, "given.tables.ptr") == 2 * table + rows
    stored = sum(
        found.stored.total() for name in by_name for found in by_name[name] if name != "lay_out"
    )
    # Two means and their sums (0 across for the anchor), outputs, and gradients
    means, sums = 4 * batch * width * 2, 4 * 3 * batch * 4
    outputs = 2 * batch * (4 * 4 + 1)
    assert stored == means + sums + outputs + 2 * batch * width * 2


def test_a_posterior_sure_of_the_label_leaves_small_gradients_exact():
    """Their rounding error is relative to them, not to the prototypes: q is nearly 1."""
    given = inputs(4, 200, (32, 32), torch.bfloat16)
    given.targets[:] = torch.arange(4, device=DEVICE)
    features = [(table[:4] * 3).requires_grad_() for table in given.prototypes]
    arguments = given.prototypes, given.targets, [0.9, 0.5]
    options = dict(temperature=0.1)
    found = alignment_loss(features, *arguments, **options, impl="triton").contrastive.sum()
    leaves = [value.detach().double().requires_grad_() for value in features]
    tables = [table.double() for table in given.prototypes]
    truth = alignment_loss(
        leaves, tables, *arguments[1:], **options, impl="reference"
    ).contrastive.sum()
    for left, right in zip(
        torch.autograd.grad(found, features), torch.autograd.grad(truth, leaves)
    ):
        scale = right.norm(dim=1, keepdim=True)
        assert 1e-7 < scale.min() and scale.max() < 1e-2
        assert ((left.double() - right).abs() < 2e-2 * scale).all()


def test_evaluation_and_training_forward_agree():
    case = alignment_case(11, 7, 300, 3, (13, 5), seen="each", masked=True)
    with_gradient = evaluate(case, "triton", {})
    without = evaluate(case._replace(needs=[], used=[]), "triton", {})
    for name, value in without.items():
        torch.testing.assert_close(with_gradient[name], value, rtol=1e-5, atol=1e-5)

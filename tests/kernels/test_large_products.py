"""Distances and nearest prototypes of many rows and classes: lengths before, products alone.

What takes this way only on large inputs is made to take it on small ones, and held to the rule of
test_triton_values.py in its sanitizer.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from test_triton_values import (  # noqa: F401
    DEVICE,
    FLOATS,
    LAYOUTS,
    TOLERANCE,
    check,
    distance_case,
    evaluate,
    laid_out,
    nearest_case,
    watched,
)

from iib_kernels import prototype_distance
from iib_kernels.ops.distance import launch
from iib_kernels.ops.nearest import launch as nearest_launch

HALF = (torch.float16, torch.bfloat16)
METRICS = ("cosine", "sqeuclidean")


@pytest.fixture(autouse=True)
def large(monkeypatch):
    monkeypatch.setattr(launch, "LARGE", 1)


@pytest.fixture
def tf32():
    """Float32 in TF32, which the interpreter computes as float32: the kernels', not PyTorch's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def names(report):
    return None if report is None else [one.name for one in report.launches]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_distances_and_both_gradients(dtype, metric, watched):  # noqa: F811
    check(distance_case(3, (9,), 21, 13, dtype, metric=metric))
    forward = ["measure_rows"] + (
        ["distance_forward_large"] if dtype in HALF else ["distance_from_products"]
    )
    side = ["measure_rows", "gradient_from_pull"]
    assert names(watched) in (None, forward + side * 2)


@pytest.mark.parametrize(
    "dtype, metric",
    [
        *zip(FLOATS, METRICS * 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in zip(FLOATS, METRICS[::-1] * 2)),
    ],
)
def test_nearest_prototypes_and_gradient(dtype, metric, watched):  # noqa: F811
    for seen in ("none", "all", "blind"):
        case = nearest_case(5, 9, 70, 3, (13, 24), dtype, metric=metric, seen=seen)
        check(case)
    assert watched is None or ("measure_rows" in names(watched)) == (dtype in HALF)


@pytest.mark.parametrize(
    "table_layout, layout",
    [
        *zip(LAYOUTS, LAYOUTS[::-1]),
        *(
            pytest.param(table_layout, layout, marks=pytest.mark.slow)
            for table_layout, layout in itertools.product(LAYOUTS, LAYOUTS)
            if (table_layout, layout) not in zip(LAYOUTS, LAYOUTS[::-1])
        ),
    ],
)
def test_any_strides(layout, table_layout):
    check(distance_case(7, (2, 3), 18, 16, torch.float16, None, "cosine", layout, table_layout))
    check(nearest_case(7, 5, 18, 2, (16, 5), torch.float16, None, "cosine", "all", layout))


@pytest.mark.parametrize("width", [1, 8, 13, 64, 70, 1030])
def test_any_width(width):
    check(distance_case(9, (5,), 7, width, torch.float16))
    check(nearest_case(9, 5, 7, 2, (width, 3), torch.float16))


def test_float32_in_tf32_uses_kernels(tf32, watched):  # noqa: F811
    check(distance_case(11, (9,), 21, 13))
    check(nearest_case(11, 9, 21, 2, (13, 8)))
    assert watched is None or {"distance_forward_large", "measure_rows"} <= set(names(watched))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_features_beside_float32_prototypes_are_multiplied_in_half(dtype, metric, monkeypatch):
    """The usual mixed precision: what is lost is what the features' type loses."""
    most = 2 * TOLERANCE[dtype]
    for kind in (dtype, torch.float32):  # the interpreter cuts a bfloat16 off, a GPU rounds
        monkeypatch.setitem(TOLERANCE, kind, most)
    check(distance_case(13, (9,), 21, 33, dtype, torch.float32, metric))
    check(nearest_case(14, 9, 21, 2, (33, 16), dtype, torch.float32, metric, "all"))


def test_copies_have_aligned_rows_of_the_features_type():
    check(distance_case(21, (3,), 5, 7, torch.float16))
    place = launch.place_of_copy
    kind = torch.bfloat16
    assert place(torch.empty(5, 64, dtype=kind), kind) is None
    assert place(torch.empty(5, 64), kind).shape == (5, 64)
    assert place(torch.empty(5, 77, dtype=kind), kind).shape == (5, 80)
    assert place(torch.empty(5, 65)[:, :64], torch.float32).shape == (5, 64)
    assert place(torch.empty(5, 65)[:, 1:], torch.float32).shape == (5, 64)
    assert place(torch.empty(64, 5).T, torch.float32) is None  # loads go along the rows


def test_little_is_left_to_one_launch(monkeypatch, watched):  # noqa: F811
    monkeypatch.undo()
    assert launch.is_large(4096, 1000, 768) and not launch.is_large(64, 309, 512)
    check(distance_case(15, (9,), 21, 13))
    assert names(watched) in (None, ["distance_forward", "distance_backward"])


@pytest.mark.parametrize("metric", METRICS)
def test_rows_wider_than_registers_are_streamed_backward(metric, monkeypatch, watched):  # noqa: F811
    monkeypatch.setattr(nearest_launch, "COMPONENTS", 16)
    monkeypatch.setattr(nearest_launch, "STREAMED", 16)
    check(nearest_case(17, 9, 7, 3, (40, 13), metric=metric, seen="all"))
    assert watched is None or "nearest_backward_streamed" in names(watched)


@pytest.mark.parametrize("metric", ["sqeuclidean", pytest.param("cosine", marks=pytest.mark.slow)])
def test_float64_gradcheck(metric):
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(DEVICE)
    rows, table = draw(3, 5).requires_grad_(), draw(4, 5).requires_grad_()
    call = lambda z, p: prototype_distance(z, p, metric=metric, impl="triton")
    assert torch.autograd.gradcheck(call, (rows, table))


def test_repeats_bit_for_bit_and_autocast_stays_outside():
    case = distance_case(19, (9,), 21, 13)
    once, again = evaluate(case, "triton", {}), evaluate(case, "triton", {})
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = evaluate(case, "triton", {})
    for name, value in once.items():
        assert torch.equal(value, again[name]) and torch.equal(value, cast[name]), name

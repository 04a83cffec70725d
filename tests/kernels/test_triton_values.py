"""Values and gradients of the Triton kernels against plain PyTorch, in float64 and in their dtype.

The rule, element by element::

    |kernel - truth| <= |eager - truth| + tolerance * scale

The truth is ``impl="reference"`` on the same values raised to float64, eager is
``impl="reference"`` on the inputs as they are.

The tolerance goes by the dtype of the compared tensor, or by float32 where that is what the
operator computes in.

The scale is the largest |truth| in the element's row (last dimension), at least 1: a row of logits
near 1e4 lends the other rows nothing. Gradients of the fusion's parameters are sums of products
with logits, often small differences of large ones: their scale is at least the largest logit.

Infinities and NaN must stand where they stand in the truth or in eager.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
import interpreter

from iib_kernels import (
    _checks,
    alignment_loss,
    class_sums,
    fusion_cross_entropy,
    gated_fusion,
    nearest_prototype,
    prototype_distance,
    reference,
    update_prototypes,
)
from iib_kernels._runtime import compute_dtype
from iib_kernels.ops.alignment import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
FLOATS = tuple(TOLERANCE)
SUMS = {
    f"grad {name}"
    for name in ("log_prior", "gate_logits", "temperature", "uncertainty_weight", "scale")
}  # of products with logits
LAYOUTS = ("plain", "transposed", "sliced", "expanded")


@pytest.fixture(autouse=True)
def watched():
    """Every kernel of this file runs in the sanitizer, and no test passes without one.

    On a GPU the kernels are compiled, and nobody watches.
    """
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        yield report
    assert report is None or report.count, "no kernel ran"


class Case(NamedTuple):
    """A call of an operator; outputs and inputs by name."""

    call: Callable[[dict[str, Tensor], str], dict[str, Tensor]]  # (inputs, impl)
    inputs: dict[str, Tensor]
    needs: list[str]  # inputs that get a gradient
    used: list[str]  # outputs that have one
    upstream: str = "plain"  # the memory layout of the upstream gradients

    @property
    def dtype(self) -> torch.dtype:
        """What the operator computes in: float64 if some of the features or logits are.

        Of a single table of prototypes, if those are.
        """
        return compute_dtype(
            *(
                value
                for name, value in self.inputs.items()
                if name.startswith(("features", "logits")) or name == "prototypes"
            )
        )

    @property
    def largest(self) -> float:
        """The largest logit in size, infinities aside; at least 1."""
        logits = [
            value.double().nan_to_num(0.0, 0.0, 0.0)
            for name, value in self.inputs.items()
            if name.startswith("logits") and value.numel()
        ]
        return max([1.0, *(value.abs().max().item() for value in logits)])


def evaluate(
    case: Case, impl: str, upstream: dict[str, Tensor], *, wide: bool = False
) -> dict[str, Tensor]:
    """Outputs and gradients; ``wide`` raises the inputs to float64.

    ``upstream`` takes the upstream gradients of the first call, and gives them to others.
    """
    given = {
        name: (value.double() if wide and value.is_floating_point() else value).detach()
        for name, value in case.inputs.items()
    }
    leaves = [given[name].requires_grad_() for name in case.needs]
    found = case.call(given, impl)
    used = [
        name for name in case.used if found[name].requires_grad
    ]  # the reference's weights, say, do not depend on the scale
    g = start(7)
    for name in case.used:
        drawn = torch.randn(found[name].shape, generator=g)
        if name not in upstream:
            upstream[name] = laid_out(drawn, case.upstream, found[name].dtype)
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if used and leaves:
        gradients = torch.autograd.grad(
            [found[name] for name in used],
            leaves,
            [upstream[name].to(found[name].dtype) for name in used],
            allow_unused=True,
        )
    for name, leaf, gradient in zip(case.needs, leaves, gradients):
        found[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in found.items()}


def error(found: Tensor, truth: Tensor) -> Tensor:
    """Absolute error; 0 for the same infinity or NaN, infinite for another."""
    same = (found == truth) | (found.isnan() & truth.isnan())
    return torch.where(same, 0.0, (found - truth).abs().nan_to_num(nan=math.inf))


def check(case: Case) -> dict[str, Tensor]:
    """The rule, for all outputs and gradients (returned), and their shapes and dtypes.

    Also that the inputs are as they were.
    """
    before = {name: value.clone() for name, value in case.inputs.items()}
    upstream: dict[str, Tensor] = {}
    kernel, eager, truth = (
        evaluate(case, "triton", upstream),
        evaluate(case, "reference", upstream),
        evaluate(case, "reference", upstream, wide=True),
    )
    for name, value in before.items():
        assert bits(case.inputs[name], value), f"{name}: changed in place"
    for name, found in kernel.items():
        assert (found.dtype, found.shape) == (eager[name].dtype, eager[name].shape), name
        if not found.is_floating_point():
            assert torch.equal(found, eager[name]), name
            continue
        least = case.largest if name in SUMS else 1.0
        close(
            name,
            found.double(),
            eager[name].double(),
            truth[name],
            max(TOLERANCE[found.dtype], TOLERANCE[case.dtype]),
            least,
        )
    return kernel


def close(
    name: str, found: Tensor, eager: Tensor, truth: Tensor, tolerance: float, least: float
) -> None:
    """The rule, for one tensor; ``least``: the least scale."""
    if not found.numel():
        return
    size = torch.where(truth.isfinite(), truth, 0.0).abs()
    scale = (size.amax(-1, keepdim=True) if size.dim() else size).clamp_min(least)
    off, allowed = error(found, truth), error(eager, truth)
    allowed = torch.where(allowed.isinf(), 0.0, allowed) + tolerance * scale
    same = (found == eager) | (found.isnan() & eager.isnan())
    bad = (off > allowed) & ~same
    if bad.any():
        worst = torch.where(bad, off / allowed, 0.0).flatten().argmax()
        at = tuple(int(i) for i in torch.unravel_index(worst, bad.shape))
        raise AssertionError(
            f"{name}{list(at)}: kernel {found[at]:.9g}, eager {eager[at]:.9g}, truth "
            f"{truth[at]:.9g}; off by {off[at]:.3g}, allowed {allowed[at]:.3g}; {int(bad.sum())} "
            f"of {bad.numel()} elements"
        )


def bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included (the sign of NaN aside)."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and bool(((left == right) | ((left != left) & (right != right))).all())
    )


# ----- Inputs


def laid_out(values: Tensor, layout: str, dtype: torch.dtype | None = None) -> Tensor:
    """The values on the device, in memory as ``layout`` says.

    Sliced: out of NaN, or what else would show. Expanded: the first entry's, stride 0.
    """
    values = values.to(DEVICE, dtype or values.dtype)
    if layout == "transposed" and values.dim() > 1:
        return values.mT.contiguous().mT
    if layout == "expanded" and values.numel():
        return values[:1].clone().expand(values.shape) if values.dim() else values
    if layout == "sliced":
        outside = (
            math.nan
            if values.is_floating_point()
            else True
            if values.dtype == torch.bool
            else torch.iinfo(values.dtype).max
        )
        around = values.new_full([2 * size + 1 for size in values.shape], outside)
        view = around[(slice(1, None, 2),) * values.dim()]
        view.copy_(values)
        return view
    return values.contiguous()


def start(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pick(g: torch.Generator, options):
    """One of them."""
    return options[int(torch.randint(len(options), (), generator=g))]


def some(g: torch.Generator, names: list[str], all_of_them: bool) -> list[str]:
    """A part of them, or all."""
    chosen = [name for name in names if torch.rand((), generator=g) < 0.5]
    return names if all_of_them else chosen or [pick(g, names)]


def embeddings(
    g: torch.Generator, batch: int, classes: int, width: int, hard: bool
) -> tuple[Tensor, Tensor]:
    """Features and prototypes; ``hard``: some features (nearly) are a prototype, some are 0."""
    rows, table = (
        torch.randn(size, width, generator=g) / max(1, width) ** 0.5 for size in (batch, classes)
    )
    if hard and classes:
        targets = torch.randint(classes, (batch,), generator=g)
        rows[::3] = table[targets[::3]]
        rows[1::3] = table[targets[1::3]] * (
            1 + 1e-3 * torch.randn(len(rows[1::3]), width, generator=g)
        )
        rows[4::5] = 0
        table[5:6] = 0
    return rows, table


def labels(g: torch.Generator, shape, classes: int, kind: torch.dtype, ignored: int) -> Tensor:
    """Class indices, some of them ignored where the type can say so."""
    values = torch.randint(min(classes, torch.iinfo(kind).max), shape, generator=g)
    if torch.iinfo(kind).min <= ignored:
        values = torch.where(torch.rand(shape, generator=g) < 0.2, ignored, values)
    return values.to(kind)


def spoil(g: torch.Generator, rows: Tensor, keep: Tensor, layout: str) -> Tensor:
    """NaN, inf or 1e30 in the rows that are not kept (an expanded tensor has one row only)."""
    return (
        rows
        if layout == "expanded"
        else torch.where(keep[..., None], rows, pick(g, (math.nan, math.inf, -math.inf, 1e4)))
    )


def kinds(g: torch.Generator, dtype: torch.dtype | None, count: int) -> list[torch.dtype]:
    """A dtype for each; None: any."""
    return [dtype or pick(g, (torch.float32, torch.float16, torch.bfloat16)) for _ in range(count)]


def distance_case(
    seed=0,
    leading=(7,),
    classes=5,
    width=13,
    dtype=torch.float32,
    table_dtype=None,
    metric="cosine",
    layout="plain",
    table_layout="plain",
    upstream="plain",
    everything=True,
) -> Case:
    g = start(seed)
    rows, table = embeddings(g, math.prod(leading), classes, width, hard=True)
    inputs = {
        "features": laid_out(rows.reshape(*leading, width), layout, dtype),
        "prototypes": laid_out(table, table_layout, table_dtype or dtype),
    }
    call = lambda given, impl: {
        "distance": prototype_distance(
            given["features"], given["prototypes"], metric=metric, impl=impl
        )
    }
    return Case(
        call, inputs, some(g, ["features", "prototypes"], everything), ["distance"], upstream
    )


def modal_inputs(
    g, batch, classes, modalities, widths, dtype, table_dtype, seen, layout, table_layout
):
    """Features and prototypes of all modalities by name, and which classes each has seen.

    The prototypes of the others are NaN.
    """
    count = {"none": 0, "one": 1}.get(seen, modalities)
    known = [torch.rand(classes, generator=g) < 0.7 for _ in range(count)]
    if seen == "blind":
        known[pick(g, range(modalities))][:] = False
    inputs = {}
    for m, (kind, table_kind) in enumerate(
        zip(kinds(g, dtype, modalities), kinds(g, table_dtype or dtype, modalities))
    ):
        rows, table = embeddings(g, batch, classes, pick(g, widths), hard=True)
        if known:
            table = spoil(g, table, known[m % count], table_layout)
        inputs |= {f"features[{m}]": (rows, kind), f"prototypes[{m}]": (table, table_kind)}
        if m < count:
            inputs[f"seen[{m}]"] = laid_out(known[m], "plain" if layout == "expanded" else layout)
    return inputs, count


def series(given: dict[str, Tensor], name: str, count: int) -> list[Tensor]:
    return [given[f"{name}[{m}]"] for m in range(count)]


def nearest_case(
    seed=0,
    batch=7,
    classes=5,
    modalities=2,
    widths=(13, 3),
    dtype=torch.float32,
    table_dtype=None,
    metric="cosine",
    seen="none",
    layout="plain",
    table_layout="plain",
    upstream="plain",
    everything=True,
) -> Case:
    g = start(seed)
    inputs, count = modal_inputs(
        g, batch, classes, modalities, widths, dtype, table_dtype, seen, layout, table_layout
    )
    for name, value in inputs.items():
        if isinstance(value, tuple):
            inputs[name] = laid_out(
                value[0], layout if name.startswith("features") else table_layout, value[1]
            )
    winners = []

    def call(given, impl):
        """Of several nearest any one will do.

        The reference's gradient is that of the kernel's choice, whose distance must be the least.
        """
        features, prototypes, known = (
            series(given, "features", modalities),
            series(given, "prototypes", modalities),
            series(given, "seen", count),
        )
        found = nearest_prototype(
            features,
            prototypes,
            metric=metric,
            seen=(known[0] if seen == "one" else known) if known else None,
            impl=impl,
        )
        if impl == "triton":
            winners[:] = [found.index]
            return {
                "distance": found.distance,
                "distance of the winner": found.distance.detach(),
                "none": found.index < 0,
                "index": found.index,
            }
        index, dtype = winners[0], compute_dtype(*features)
        tables = [
            torch.where(known[m % count][:, None], table, 0.0) if known else table
            for m, table in enumerate(prototypes)
        ]
        every = [
            reference.prototype_distance(rows.to(dtype), table.to(dtype), metric)
            for rows, table in zip(features, tables)
        ]
        chosen = torch.stack(
            [
                distance.gather(1, index[:, m, None].clamp_min(0))[:, 0]
                for m, distance in enumerate(every)
            ],
            1,
        )
        chosen = torch.where(index < 0, 0.0, chosen)
        distance = found.distance.detach() + chosen - chosen.detach()
        return {
            "distance": distance,
            "distance of the winner": chosen.detach(),
            "none": found.index < 0,
            "index": index,
        }

    return Case(
        call,
        inputs,
        some(g, [f"features[{m}]" for m in range(modalities)], everything),
        ["distance"],
        upstream,
    )


def alignment_case(
    seed=0,
    batch=7,
    classes=5,
    modalities=2,
    widths=(13, 3),
    dtype=torch.float32,
    table_dtype=None,
    metric="cosine",
    seen="none",
    masked=False,
    kind=torch.int64,
    ignored=-100,
    temperature=0.3,
    budgets="tensor",
    reduction="none",
    layout="plain",
    table_layout="plain",
    upstream="plain",
    everything=True,
) -> Case:
    g = start(seed)
    inputs, count = modal_inputs(
        g, batch, classes, modalities, widths, dtype, table_dtype, seen, layout, table_layout
    )
    targets = labels(g, (batch,), classes, kind, ignored)
    mask = (
        torch.rand(batch, modalities, generator=g) < 0.7
        if masked
        else torch.ones(batch, modalities, dtype=torch.bool)
    )
    for name, value in inputs.items():
        if name.startswith("features"):
            keep = mask[:, int(name[9:-1])] & (targets != ignored)
            inputs[name] = laid_out(spoil(g, value[0], keep, layout), layout, value[1])
        elif name.startswith("prototypes"):
            inputs[name] = laid_out(value[0], table_layout, value[1])
    product = launch.multiplied(series(inputs, "features", modalities))
    if classes > 128 and product in (torch.float16, torch.bfloat16):
        # Prototypes are rounded to the features' type before they are multiplied: values it holds
        for m, table in enumerate(series(inputs, "prototypes", modalities)):
            inputs[f"prototypes[{m}]"] = laid_out(table.to(product), table_layout, table.dtype)
    inputs["targets"] = laid_out(targets, layout if layout != "expanded" else "plain")
    if masked:
        inputs["mask"] = laid_out(mask, layout if layout != "expanded" else "plain")
    shares = torch.rand(modalities, generator=g)
    if budgets == "zero":
        shares[:] = 0
    elif budgets == "equal":
        shares[:] = 0.75
    if budgets != "numbers":
        inputs["budgets"] = laid_out(shares, layout, pick(g, FLOATS))

    def call(given, impl):
        known = series(given, "seen", count)
        found = alignment_loss(
            series(given, "features", modalities),
            series(given, "prototypes", modalities),
            given["targets"],
            given.get("budgets", shares.tolist()),
            temperature=temperature,
            metric=metric,
            seen=(known[0] if seen == "one" else known) if known else None,
            mask=given.get("mask"),
            ignore_index=ignored,
            reduction=reduction,
            impl=impl,
        )
        return found._asdict()

    needs = some(g, [f"features[{m}]" for m in range(modalities)], everything)
    return Case(call, inputs, needs, some(g, ["contrastive", "alignment"], everything), upstream)


def fusion_case(
    seed=0,
    leading=(7,),
    classes=5,
    modalities=2,
    dtype=torch.float32,
    parameter_dtype=None,
    stacked=False,
    prior=True,
    gate=True,
    temperature="each",
    kappa="each",
    scale="scalar",
    masked=False,
    extreme=False,
    layout="plain",
    parameter_layout="plain",
    loss=False,
    kind=torch.int64,
    ignored=-100,
    reduction="none",
    weight=False,
    smoothing=0.0,
    width=0,
    upstream="plain",
    everything=True,
) -> Case:
    """Fusion of logits, of values where there is a ``width``, or with its cross-entropies."""
    g = start(seed)
    logits = 2 * torch.randn(modalities, math.prod(leading), classes, generator=g)
    if extreme:
        large = 1e4 * torch.where(torch.rand(logits.shape, generator=g) < 0.5, -1.0, 1.0)
        which = torch.randint(5, logits.shape[:2], generator=g)[..., None]
        logits = torch.where(which == 0, large, torch.where(which == 1, logits * 5e3, logits))
        never = (
            (torch.rand(logits.shape, generator=g) < 0.3)
            & (which < 4)
            & (torch.arange(classes) > 0)
        )
        logits = logits.masked_fill(never, -math.inf)
    mask = None
    if masked:
        mask = torch.rand(*leading, modalities, generator=g) < 0.6
        mask |= torch.arange(modalities) == torch.randint(modalities, (*leading, 1), generator=g)
        logits = spoil(g, logits, mask.reshape(-1, modalities).T, layout)
    logits = logits.reshape(modalities, *leading, classes)
    parameter = lambda values: laid_out(
        values, parameter_layout, parameter_dtype or pick(g, FLOATS)
    )
    rows = torch.randn(modalities, math.prod(leading), width, generator=g)
    if masked and width:
        rows = spoil(g, rows, mask.reshape(-1, modalities).T, layout)
    if stacked:
        inputs = {"logits": laid_out(logits, layout, kinds(g, dtype, 1)[0])}
    else:
        inputs = {
            f"logits[{m}]": laid_out(logits[m], layout, value)
            for m, value in enumerate(kinds(g, dtype, modalities))
        }
    if prior:
        inputs["log_prior"] = parameter(torch.randn(modalities, generator=g))
    if gate:
        inputs["gate_logits"] = parameter(torch.randn(*leading, modalities, generator=g))
    numbers = {"temperature": 0.7, "uncertainty_weight": 1.3, "scale": 1.7}
    for name, form in (
        ("temperature", temperature),
        ("uncertainty_weight", kappa),
        ("scale", scale),
    ):
        if form != "number":
            inputs[name] = parameter(
                0.5 + torch.rand((modalities,) if form == "each" else (), generator=g)
            )
    if width:
        inputs |= {
            f"values[{m}]": laid_out(rows[m].reshape(*leading, width), layout, value)
            for m, value in enumerate(kinds(g, dtype, modalities))
        }
    needs = some(g, [name for name in inputs], everything)
    if weight:
        inputs["weight"] = parameter(torch.rand(classes, generator=g) + 0.1)
    used = some(
        g,
        ["fused", "unimodal", "weights"] if loss else ["logits", "weights", "uncertainty"],
        everything,
    )
    flat = "plain" if layout == "expanded" else layout
    if masked:
        inputs["mask"] = laid_out(mask, flat)
    if loss:
        inputs["targets"] = laid_out(labels(g, leading, classes, kind, ignored), flat)

    def call(given, impl):
        values = given["logits"] if stacked else series(given, "logits", modalities)
        options = {
            **numbers,
            **{name: given.get(name) for name in ("log_prior", "gate_logits", "mask")},
            "impl": impl,
        }
        options |= {name: given[name] for name in numbers if name in given}
        if loss:
            return fusion_cross_entropy(
                values,
                given["targets"],
                ignore_index=ignored,
                reduction=reduction,
                weight=given.get("weight"),
                label_smoothing=smoothing,
                **options,
            )._asdict()
        if width:
            options["values"] = series(given, "values", modalities)
        return gated_fusion(values, **options)._asdict()

    return Case(call, inputs, needs, used, upstream)


def update_case(
    seed=0,
    batch=7,
    classes=5,
    width=13,
    dtype=torch.float32,
    table_dtype=None,
    metric="cosine",
    momentum=0.9,
    kind=torch.int64,
    ignored=-100,
    layout="plain",
    table_layout="plain",
    sums=False,
) -> Case:
    g = start(seed)
    rows, table = embeddings(g, batch, classes, width, hard=True)
    targets = labels(g, (batch,), classes, kind, ignored)
    counts = torch.randint(3, (classes,), generator=g)
    inputs = {
        "features": laid_out(spoil(g, rows, targets != ignored, layout), layout, dtype),
        "targets": laid_out(targets, layout if layout != "expanded" else "plain"),
    }
    if sums:
        return Case(
            lambda given, impl: dict(
                zip(
                    ("sums", "counts"),
                    class_sums(
                        given["features"],
                        given["targets"],
                        classes,
                        metric=metric,
                        ignore_index=ignored,
                        impl=impl,
                    ),
                )
            ),
            inputs,
            [],
            [],
        )
    inputs["prototypes"] = laid_out(
        spoil(g, table, counts > 0, table_layout), table_layout, table_dtype or dtype
    )
    inputs["counts"] = laid_out(counts, table_layout if table_layout != "expanded" else "plain")
    return Case(
        lambda given, impl: dict(
            zip(
                ("prototypes", "counts"),
                update_prototypes(
                    given["prototypes"],
                    given["counts"],
                    given["features"],
                    given["targets"],
                    momentum=momentum,
                    metric=metric,
                    ignore_index=ignored,
                    impl=impl,
                ),
            )
        ),
        inputs,
        [],
        [],
    )


# ----- Strategies


SEEDS, FLAGS, ORDERS = st.integers(0, 10**6), st.booleans(), st.sampled_from(LAYOUTS)
METRICS = st.sampled_from(["cosine", "sqeuclidean"])
ANY = st.sampled_from([*FLOATS, None])  # None: each its own
BATCHES, CLASSES, WIDTHS = (
    st.sampled_from([0, 1, 2, 7, 17, 19]),
    st.sampled_from([1, 2, 7, 31, 128, 129]),
    st.sampled_from([1, 3, 13, 33, 67]),
)
LEADING = st.sampled_from([(7,), (0,), (1,), (), (17,), (2, 3), (3, 0), (5, 1)])
KINDS = st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8])
IGNORED = st.sampled_from([-100, 0, 200])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
FORMS = st.sampled_from(["number", "scalar", "each"])


def cases(build: Callable[..., Case], *drawn, **named) -> st.SearchStrategy[Case]:
    """Cases of drawn arguments."""
    return st.builds(build, *drawn, **named).filter(interpretable)


def interpretable(case: Case) -> bool:
    """False for bfloat16 results of float64 arithmetic.

    Triton's interpreter stores garbage for them (see the last test).
    """
    return (
        DEVICE != "cpu"
        or case.dtype != torch.float64
        or all(value.dtype != torch.bfloat16 for value in case.inputs.values())
    )


def examples(count: int):
    """That many, always the same ones; a failing one is printed as it was drawn."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        print_blob=False,
    )


FUSION = dict(
    seed=SEEDS,
    leading=LEADING,
    classes=st.sampled_from([1, 2, 3, 7, 31, 128, 129, 309]),
    modalities=st.integers(1, 6),
    dtype=ANY,
    parameter_dtype=ANY,
    stacked=FLAGS,
    prior=FLAGS,
    gate=FLAGS,
    temperature=FORMS,
    kappa=FORMS,
    scale=st.sampled_from(["number", "scalar"]),
    masked=FLAGS,
    extreme=FLAGS,
    layout=ORDERS,
    parameter_layout=ORDERS,
    upstream=ORDERS,
    everything=FLAGS,
)
GENERATED = {  # how many examples, and of what
    "distances": (
        25,
        cases(
            distance_case,
            SEEDS,
            LEADING,
            CLASSES,
            WIDTHS,
            st.sampled_from(FLOATS),
            st.sampled_from(FLOATS),
            METRICS,
            ORDERS,
            ORDERS,
            ORDERS,
            FLAGS,
        ),
    ),
    "nearest prototypes": (
        20,
        cases(
            nearest_case,
            SEEDS,
            BATCHES,
            CLASSES,
            st.integers(1, 6),
            st.just((1, 3, 13, 33, 67)),
            ANY,
            st.sampled_from(FLOATS),
            METRICS,
            st.sampled_from(["none", "one", "each", "blind"]),
            ORDERS,
            ORDERS,
            ORDERS,
            FLAGS,
        ),
    ),
    "alignment": (
        25,
        cases(
            alignment_case,
            seed=SEEDS,
            batch=BATCHES,
            classes=CLASSES,
            modalities=st.integers(1, 6),
            widths=st.just((1, 3, 13, 33, 37)),
            dtype=ANY,
            table_dtype=st.sampled_from(FLOATS),
            metric=METRICS,
            seen=st.sampled_from(["none", "one", "each", "blind"]),
            masked=FLAGS,
            kind=KINDS,
            ignored=IGNORED,
            temperature=st.sampled_from([0.1, 0.5, 2.0]),
            budgets=st.sampled_from(["tensor", "numbers", "zero", "equal"]),
            reduction=REDUCTIONS,
            layout=ORDERS,
            table_layout=ORDERS,
            upstream=ORDERS,
            everything=FLAGS,
        ),
    ),
    "fusion": (25, cases(fusion_case, **FUSION)),
    "fusion of values": (
        25,
        cases(fusion_case, width=st.sampled_from([1, 3, 13, 37]), **FUSION),
    ),
    "fusion cross-entropies": (
        25,
        cases(
            fusion_case,
            loss=st.just(True),
            kind=KINDS,
            ignored=IGNORED,
            reduction=REDUCTIONS,
            weight=FLAGS,
            smoothing=st.sampled_from([0.0, 0.1, 1.0]),
            **FUSION,
        ),
    ),
    "updates and sums": (
        25,
        cases(
            update_case,
            SEEDS,
            BATCHES,
            CLASSES,
            WIDTHS,
            st.sampled_from(FLOATS),
            st.sampled_from(FLOATS),
            METRICS,
            st.sampled_from([0.0, 0.5, 0.9]),
            KINDS,
            IGNORED,
            ORDERS,
            ORDERS,
            FLAGS,
        ),
    ),
}


def check_generated(what: str, share: float) -> None:
    """The rule for generated cases of one kind, or for a share of them."""
    count, strategy = GENERATED[what]

    @examples(int(count * share))
    @given(strategy)
    def holds(case):
        check(case)

    holds()


@pytest.mark.parametrize("what", GENERATED)
def test_values_and_gradients(what):
    check_generated(what, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("what", GENERATED)
def test_values_and_gradients_of_more_cases(what):
    check_generated(what, 1)


# ----- Chosen sizes: the other code paths


@pytest.mark.parametrize(
    "leading, classes, width, dtype, metric",
    [
        pytest.param((67,), 309, 130, torch.float32, "cosine", marks=pytest.mark.slow),
        pytest.param((67,), 309, 130, torch.float32, "sqeuclidean", marks=pytest.mark.slow),
        pytest.param((1031,), 2, 5, torch.bfloat16, "cosine", marks=pytest.mark.slow),
        ((1031,), 2, 5, torch.bfloat16, "sqeuclidean"),
        ((5,), 131, 300, torch.float16, "cosine"),
        pytest.param((5,), 131, 300, torch.float16, "sqeuclidean", marks=pytest.mark.slow),
    ],
)
def test_distances_over_several_blocks(leading, classes, width, dtype, metric):
    check(distance_case(3, leading, classes, width, dtype, metric=metric))


@pytest.mark.parametrize(
    "size",
    [
        {"leading": (0,)},
        {"classes": 0},
        {"width": 0},
        {"leading": (3, 0)},
        {"leading": (), "classes": 1, "width": 1},
    ],
)
def test_distances_of_nothing(size):
    check(distance_case(4, **size))
    check(distance_case())  # one kernel at least


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize(
    "widths, classes, dtype, layout",
    [
        ((1031,), 7, torch.float32, "plain"),
        ((1025, 2), 3, torch.bfloat16, "transposed"),
        pytest.param((2500, 1024), 1, None, "sliced", marks=pytest.mark.slow),
        ((37, 3), 309, torch.float16, "plain"),
        pytest.param((1100, 33), 5, torch.float64, "expanded", marks=pytest.mark.slow),
    ],
)
def test_nearest_prototypes_of_wide_rows_and_many_classes(widths, classes, dtype, layout, metric):
    check(
        nearest_case(
            5,
            5,
            classes,
            3,
            widths,
            dtype,
            metric=metric,
            seen="each",
            layout=layout,
            upstream="expanded",
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize(
    "batch, classes, modalities, widths, dtype",
    [
        (19, 309, 1, (37,), torch.float32),
        (3, 309, 2, (300, 7), torch.float32),
        (5, 309, 6, (5, 13), None),
        (17, 309, 2, (67, 33), torch.float64),
        (5, 1000, 2, (3, 5), torch.bfloat16),
    ],
)
def test_alignment_over_many_classes(batch, classes, modalities, widths, dtype, metric):
    check(
        alignment_case(
            6,
            batch,
            classes,
            modalities,
            widths,
            dtype,
            metric=metric,
            seen="each",
            masked=True,
            layout="sliced",
            upstream="transposed",
        )
    )


@pytest.mark.parametrize("classes", [7, 129])
@pytest.mark.parametrize("blind", [0, 1])
def test_alignment_where_one_modality_has_seen_no_class(classes, blind):
    case = alignment_case(
        7, 5, classes, 2, (3, 5), seen="each", budgets="equal"
    )  # the anchor is the first
    case.inputs[f"seen[{blind}]"][:] = False
    case.inputs[f"seen[{1 - blind}]"][:] = True
    case.inputs[f"prototypes[{1 - blind}]"].copy_(
        torch.randn(classes, case.inputs[f"prototypes[{1 - blind}]"].shape[1], generator=start(8))
    )
    case.inputs[f"prototypes[{blind}]"][:] = math.nan
    found = check(case)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize(
    "classes, modalities, dtype, layout",
    [
        (1000, 3, torch.float32, "plain"),
        (1024, 6, torch.bfloat16, "transposed"),
        (4096, 2, torch.float16, "plain"),
        (2049, 3, torch.float32, "sliced"),
        (5000, 2, torch.float16, "expanded"),
        (4099, 6, None, "transposed"),
        (4097, 1, torch.float64, "plain"),
    ],
)
def test_fusion_of_many_classes(classes, modalities, dtype, layout, loss):
    for stacked, extreme in ((False, False), (True, True)):
        check(
            fusion_case(
                8,
                (3,),
                classes,
                modalities,
                dtype,
                torch.float32,
                stacked,
                masked=True,
                extreme=extreme,
                layout=layout,
                loss=loss,
                weight=loss and stacked,
                smoothing=0.1 if loss and not stacked else 0.0,
                width=0 if loss or stacked else 700,
                upstream=layout,
            )
        )


@pytest.mark.parametrize(
    "modalities, form",
    [
        (1, "streamed"),
        pytest.param(1, "joint", marks=pytest.mark.slow),
        pytest.param(3, "streamed", marks=pytest.mark.slow),
        (3, "joint"),
        pytest.param(5, "streamed", marks=pytest.mark.slow),
        pytest.param(5, "joint", marks=pytest.mark.slow),
    ],
)
def test_fusion_where_registers_hold_little_or_reductions_are_joined(modalities, form, monkeypatch):
    """Streamed rows of few classes, and the reductions of rows that several warps share."""
    from iib_kernels.ops.fusion import launch

    if form == "joint":
        monkeypatch.setattr(launch, "is_joint", lambda config: True)
    else:
        monkeypatch.setattr(launch, "MOST_CLASSES", 0)
        monkeypatch.setattr(launch, "STREAMED", 8)
    shape = dict(leading=(3,), classes=7, modalities=modalities, masked=True, extreme=True)
    check(fusion_case(13, **shape))
    check(fusion_case(13, width=9, **shape))
    check(fusion_case(13, loss=True, **shape))
    check(fusion_case(13, loss=True, smoothing=0.3, weight=True, **shape))


@pytest.mark.parametrize("classes", [7, pytest.param(4099, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", [False, True])
def test_each_gradient_of_fusion_alone(loss, classes):
    """One input asks for a gradient, one output has one."""
    whole = fusion_case(9, (2,), classes, 2, masked=True, loss=loss, width=0 if loss else 5)
    for needed in whole.needs:
        for used in whole.used:
            check(whole._replace(needs=[needed], used=[used]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [2, 5, pytest.param(4099, marks=pytest.mark.slow)])
def test_fusion_of_logits_of_ten_thousand(classes, dtype):
    """All rows hold +-1e4, so that several classes tie; all outputs, with all gradients."""
    for loss in (False, True):
        case = fusion_case(10, (7,), classes, 3, dtype, torch.float32, loss=loss)
        for m in range(3):
            case.inputs[f"logits[{m}]"].copy_(1e4 * case.inputs[f"logits[{m}]"].sign())
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch, width, dtype, layout",
    [
        (7, 1031, torch.float32, "plain"),
        (300, 3, torch.float32, "sliced"),
        (9, 1025, torch.bfloat16, "transposed"),
        (3, 1500, torch.float64, "expanded"),
        (1, 1, torch.float16, "plain"),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_updates_of_wide_rows_and_large_batches(batch, width, dtype, layout, metric):
    for sums in (False, True):
        check(
            update_case(
                11,
                batch,
                2,
                width,
                dtype,
                metric=metric,
                layout=layout,
                table_layout=layout,
                sums=sums,
            )
        )


@pytest.mark.parametrize("classes", [37, pytest.param(309, marks=pytest.mark.slow)])
def test_updates_of_many_classes(classes):
    check(update_case(12, 67, classes, 3))


# ----- What the memory held, repetition, garbage


LARGE = ("alignment tiled", "fusion two passes", "losses two passes", "update wide")


def by_name(builds: dict[str, Callable[..., Case]], slow: Sequence[str] = LARGE):
    """The test for each of these cases; the large ones are slow in the interpreter."""
    mark = lambda name: [pytest.mark.slow] if name in slow else []
    return pytest.mark.parametrize(
        "build", [pytest.param(build, id=name, marks=mark(name)) for name, build in builds.items()]
    )


ROUGH = {
    "distance": lambda: distance_case(20, (67,), 31, 33, upstream="expanded"),
    "distance sqeuclidean": lambda: distance_case(
        20, (2, 3), 129, 5, torch.bfloat16, metric="sqeuclidean", layout="transposed"
    ),
    "nearest": lambda: nearest_case(21, 19, 31, 3, (33, 3), seen="blind"),
    "nearest wide": lambda: nearest_case(21, 3, 2, 2, (1031, 3), dtype=None, layout="sliced"),
    "alignment": lambda: alignment_case(
        22, 19, 31, 3, (33, 3), seen="each", masked=True, reduction="mean"
    ),
    "alignment mixed": lambda: alignment_case(
        22, 7, 5, 6, (33, 3), dtype=None, masked=True, layout="transposed"
    ),
    "alignment tiled": lambda: alignment_case(
        22, 17, 129, 2, (37, 3), dtype=None, masked=True, seen="one", metric="sqeuclidean"
    ),
    "fusion": lambda: fusion_case(23, (19,), 31, 3, masked=True),
    "fusion of one": lambda: fusion_case(23, (5, 3), 1, 1, torch.float16),
    "fusion of values": lambda: fusion_case(23, (7,), 31, 3, masked=True, width=33),
    "fusion two passes": lambda: fusion_case(23, (3,), 4099, 3, masked=True),
    "losses": lambda: fusion_case(24, (19,), 31, 6, masked=True, loss=True, reduction="mean"),
    "losses smoothed": lambda: fusion_case(
        24, (7,), 31, 2, masked=True, loss=True, reduction="mean", smoothing=0.1, weight=True
    ),
    "losses two passes": lambda: fusion_case(
        24, (3,), 4099, 2, torch.bfloat16, stacked=True, masked=True, loss=True, smoothing=0.1
    ),
    "update": lambda: update_case(25, 17, 7, 33),
    "update wide": lambda: update_case(25, 3, 2, 1031, torch.bfloat16),
    "sums": lambda: update_case(25, 17, 7, 33, torch.float16, sums=True),
}
rough = by_name(ROUGH)
QUICK = ("distance sqeuclidean", "nearest", "alignment mixed", "fusion of one", "losses smoothed")
QUICK += ("update",)
few = by_name(ROUGH, [name for name in ROUGH if name not in QUICK])


@rough
def test_garbage_where_nothing_counts_changes_nothing(build):
    """Absent and ignored rows and unseen classes hold NaN, infinities or 1e4 in these cases."""
    assert all(
        value.isfinite().all() for name, value in check(build()).items() if name != "prototypes"
    )  # of classes never seen they stay what they were


@few
def test_results_are_the_same_whatever_the_memory_held(build, monkeypatch):
    case, found, empty = build(), [], Tensor.new_empty
    for number, integer, truth in ((math.nan, -7, False), (1e4, 10**4, True)):
        made: list[Tensor] = []

        def filled(self, *size, **options):
            made.append(empty(self, *size, **options))
            return made[-1].fill_(
                number
                if made[-1].is_floating_point()
                else truth
                if made[-1].dtype == torch.bool
                else integer
            )  # noqa: B023

        monkeypatch.setattr(Tensor, "new_empty", filled)
        found.append(evaluate(case, "triton", {}))
        monkeypatch.setattr(Tensor, "new_empty", empty)
        assert made, "nothing was allocated"
    for name, value in found[0].items():
        for other in found[1:]:
            assert bits(value, other[name]), name


@few
def test_results_repeat_bit_for_bit(build):
    case = build()
    first, second = evaluate(case, "triton", {}), evaluate(case, "triton", {})
    for name, value in first.items():
        assert bits(value, second[name]), name


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("classes", [5, 129])
def test_a_nan_that_counts_is_not_lost(classes, metric):
    """NaN in a feature or logit shows wherever it does in plain PyTorch.

    Whose weights take a modality with NaN for a sure one: the kernels' are NaN.
    """
    for case, names in (
        (distance_case(30, classes=classes, metric=metric), ["distance"]),
        (nearest_case(30, classes=classes, metric=metric), ["distance"]),
        (
            alignment_case(30, classes=classes, metric=metric, ignored=200),
            ["contrastive", "confidence", "alignment"],
        ),
        (fusion_case(30, classes=classes), ["logits", "weights", "uncertainty"]),
        (
            fusion_case(30, classes=classes, loss=True, ignored=200),
            ["fused", "unimodal", "weights"],
        ),
    ):
        first = next(name for name in case.inputs if name.startswith(("features", "logits")))
        case.inputs[first][2, 1] = math.nan
        if "targets" in case.inputs:
            case.inputs["targets"][2] = 0
        kernel, eager = (
            evaluate(case._replace(used=[]), "triton", {}),
            evaluate(case._replace(used=[]), "reference", {}),
        )
        assert any(eager[name].isnan().any() for name in names)
        for name in names:
            assert (kernel[name].isnan() >= eager[name].isnan()).all() and not kernel[name][
                3:
            ].isnan().any(), name


# ----- Targets


TARGETED = {
    "alignment": lambda **options: alignment_case(40, 9, 7, 2, (3, 5), masked=True, **options),
    "alignment tiled": lambda **options: alignment_case(
        40, 5, 129, 2, (3, 5), seen="each", **options
    ),
    "losses": lambda **options: fusion_case(40, (9,), 7, 2, loss=True, **options),
    "losses two passes": lambda **options: fusion_case(40, (3,), 4099, 2, loss=True, **options),
    "update": lambda **options: update_case(40, 9, 7, 3, **options),
    "sums": lambda **options: update_case(40, 9, 7, 3, sums=True, **options),
}
targeted = by_name(TARGETED)


def without_assertions(monkeypatch) -> None:
    """Device assertions off, as on a GPU without TRITON_DEBUG.

    The sanitizer's other checks stay.
    """
    if interpreter.interpreted():
        builder = interpreter.internals.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=False))


@targeted
def test_targets_of_any_integer_type(build):
    case = build()
    case.inputs["targets"].clamp_(0, 6)
    expected = evaluate(case, "triton", {})
    for kind in (torch.int32, torch.int16, torch.int8, torch.uint8):
        found = evaluate(
            case._replace(inputs={**case.inputs, "targets": case.inputs["targets"].to(kind)}),
            "triton",
            {},
        )
        for name, value in expected.items():
            assert bits(found[name], value), (kind, name)


@targeted
def test_targets_out_of_range_are_ignored_where_nobody_looks(build, monkeypatch):
    """As on a GPU: no check of values on the host, no assertion on the device.

    The sanitizer would see an index made of them.
    """
    wild, tame = build(), build()
    for row, value in (
        (0, 10**9),
        (1, -7),
        (2, len(wild.inputs.get("prototypes", torch.empty(7))) + 10**6),
    ):
        wild.inputs["targets"][row], tame.inputs["targets"][row] = value, -100
    without_assertions(monkeypatch)
    expected = evaluate(tame, "triton", {})
    monkeypatch.setattr(_checks, "eager_on_cpu", lambda tensor: False)
    found = evaluate(wild, "triton", {})
    for name, value in expected.items():
        assert bits(found[name], value), name


@pytest.mark.parametrize("classes", [5, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", [None, 7])
def test_a_scale_that_counts_the_modalities_present(classes, width):
    """Uniform weights then give the sum of the logits, or values, that are there."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 0]], device=DEVICE, dtype=torch.bool)
    g = start(5)
    logits = [torch.randn(3, classes, generator=g).to(DEVICE) for _ in range(3)]
    values = width and [torch.randn(3, width, generator=g).to(DEVICE) for _ in range(3)]
    leaves = [rows.requires_grad_() for rows in (*logits, *(values or []))]
    options = {"scale": "present", "uncertainty_weight": 0.0, "mask": mask, "values": values}
    found = gated_fusion(logits, **options, impl="triton")
    rows = torch.stack(values or logits)
    expected = torch.where(mask.T[..., None], rows, 0.0).sum(0)
    torch.testing.assert_close(found.logits, expected)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(found.logits, leaves, upstream, allow_unused=True)
    right = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for grad, other in zip(gradients[-3:], right[-3:]):
        torch.testing.assert_close(grad, other)
    targets = torch.tensor([1, 0, 3], device=DEVICE)
    losses = fusion_cross_entropy(
        logits, targets, scale="present", uncertainty_weight=0.0, mask=mask, impl="triton"
    )
    whole = torch.where(mask.T[..., None], torch.stack(logits), 0.0).sum(0)
    torch.testing.assert_close(losses.fused, torch.nn.functional.cross_entropy(whole, targets))


def test_operators_ignore_targets_out_of_range(monkeypatch):
    """torch.ops.iib directly: nothing between the caller and the kernel."""
    without_assertions(monkeypatch)
    rows, table, budgets = (
        torch.randn(size, generator=start(41)).to(DEVICE) for size in ((5, 3), (4, 3), (1,))
    )
    counts, seen = (
        torch.ones(4, dtype=torch.int64, device=DEVICE),
        torch.ones(4, dtype=torch.bool, device=DEVICE),
    )
    calls = (
        lambda targets: torch.ops.iib.alignment_loss(
            [rows], [table], targets, budgets, 0.5, True, [seen], None, -100, False, "none"
        )[:4],
        lambda targets: torch.ops.iib.fusion_cross_entropy(
            [rows], targets, -100, None, 0.0, *[None] * 5, [1.0, 1.0, 1.0], None, "none"
        )[:3],
        lambda targets: torch.ops.iib.update_prototypes(
            table, counts, rows, targets, 0.9, True, -100
        ),
        lambda targets: torch.ops.iib.class_sums(rows, targets, 4, True, -100),
    )
    for call in calls:
        wild, tame = (
            call(torch.tensor(targets, device=DEVICE))
            for targets in ([2, 10**9, -7, 4, 0], [2, -100, -100, -100, 0])
        )
        assert all(bits(value, other) for value, other in zip(wild, tame))


@pytest.mark.skipif(
    not interpreter.interpreted(), reason="a device assertion ends the process's use of a GPU"
)
@pytest.mark.parametrize("build", [TARGETED["alignment"], TARGETED["losses"]])
def test_targets_out_of_range_are_named_by_a_device_assertion(build, monkeypatch):
    case = build()
    case.inputs["targets"][1] = 10**9
    monkeypatch.setattr(_checks, "eager_on_cpu", lambda tensor: False)
    with pytest.raises(Exception) as caught:
        evaluate(case, "triton", {})
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, AssertionError) and "targets: class index out of range" in str(error)


# ----- bfloat16 results of float64 arithmetic: Triton's interpreter (3.7.1) stores garbage where
# float64 is cast to bfloat16 (float32 it casts right)


@pytest.mark.skipif(
    interpreter.interpreted(),
    reason="Triton's interpreter (3.7.1) casts float64 to bfloat16 wrongly: 1.0 becomes 9e-41",
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            lambda: distance_case(50, dtype=torch.bfloat16, table_dtype=torch.float64),
            id="distance",
        ),
        pytest.param(
            lambda: fusion_case(50, dtype=torch.float64, parameter_dtype=torch.bfloat16),
            id="fusion",
        ),
        pytest.param(
            lambda: update_case(50, dtype=torch.float64, table_dtype=torch.bfloat16), id="update"
        ),
    ],
)
def test_bfloat16_beside_float64(case):
    check(case())

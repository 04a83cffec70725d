"""Bytes that interpreted kernels load and store, against the least possible.

The least is every input element once and every output element once. Prototypes, which every program
reads and a cache serves, are counted apart; so are the targets of `update_prototypes_`, which each
few classes search.

``python tests/kernels/test_triton_traffic.py`` prints the table of iib_kernels/README.md.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import interpreter

from iib_kernels import (
    alignment_loss,
    fusion_cross_entropy,
    gated_fusion,
    nearest_prototype,
    prototype_distance,
    trusted_fusion,
    update_prototypes_,
)
from iib_kernels.ops.fusion import launch

pytestmark = pytest.mark.skipif(
    not interpreter.interpreted(), reason="bytes are counted in the interpreter"
)
SMALL = {
    "gate.log_prior_ptr",
    "gate.temperature.ptr",
    "gate.kappa.ptr",
    "gate.scale.ptr",
    "targets.class_weight_ptr",
    "factors_ptr",
    "temperature",
    "rows.budgets",
    "means.sums_ptr",
    "means.tickets_ptr",
    "means.means_ptrs",
    "means.divisors_ptr",
    "upstream.divisors_ptr",
    "upstream.divisors.ptr",
}  # a few numbers that every program reads or writes
SHARED = {
    "prototypes",
    "prototypes.ptr",
    "flow.prototypes",
    "prototypes.squares_ptr",
    "rows.seen",
    "seen_ptrs",
}
SEARCHED = {"rows.targets_ptr", "rows.lists_ptr"}  # every few classes' search for their rows


def size(*values) -> int:
    """Bytes of the elements of tensors, nested in sequences or None."""
    return sum(
        size(*value)
        if isinstance(value, (tuple, list))
        else 0
        if value is None
        else value.numel() * value.element_size()
        for value in values
    )


def traffic(call, apart=SMALL | SHARED) -> tuple[int, int]:
    """(bytes of one launch without those counted apart, number of launches)."""
    with interpreter.sanitized() as report:
        call()
    moved = sum(
        sum(
            count
            for name, count in (*launch.loaded.items(), *launch.stored.items())
            if name.split("[")[0] not in apart
        )
        for launch in report.launches
    )
    return moved, report.count


def once(outputs, inputs, upstream=None):
    """Backward of some outputs at once, with given upstream gradients."""
    upstream = [torch.randn_like(value) for value in outputs] if upstream is None else upstream
    return lambda: torch.autograd.grad(outputs, inputs, upstream)


def fusion_case(batch, classes, modalities, dtype=torch.float32, mask=True):
    """Inputs of both fusion operators."""
    logits = [torch.randn(batch, classes, dtype=dtype).requires_grad_() for _ in range(modalities)]
    mask = (
        torch.ones(batch, modalities, dtype=torch.bool) if mask else None
    )  # an absent modality's logits are not read at all
    return logits, torch.randn(batch, modalities), mask, torch.randint(classes, (batch,))


def fusion_rows(batch, classes, modalities, dtype=torch.float32):
    """(operator, mode, bytes, least) of the fusion operators."""
    logits, gate, mask, targets = fusion_case(batch, classes, modalities, dtype)
    streamed = not launch.in_registers(classes, modalities, torch.float32)
    kept = lambda columns: 4 * batch * columns if streamed else 0  # what forward leaves to backward
    again = size(logits) // classes if classes > 64 or streamed else 0  # targets' logits
    values = [torch.randn(batch, 37, dtype=dtype).requires_grad_() for _ in range(modalities)]
    small = [torch.randn(batch, modalities), torch.randn(batch, modalities)]
    options = {"gate_logits": gate, "mask": mask, "impl": "triton"}
    out = []
    for name, rows in (("gated_fusion", logits), ("gated_fusion of values", values)):
        given = {} if rows is logits else {"values": values}
        call = lambda: gated_fusion(logits, **options, **given)
        fused = call()
        moved, launches = traffic(call)
        least = size(logits, *given.values(), gate, mask, fused) + kept(3 * modalities)
        out.append((name, "forward", moved, least, launches))
        leaves = [*logits, *given.get("values", ())]
        grads = [torch.randn_like(fused.logits), *small]
        moved, launches = traffic(once(fused, leaves, grads))
        least = size(leaves, mask, fused.weights, grads, leaves) + kept(3 * modalities)
        out.append((name, "backward", moved, least, launches))
    v = gate.clone().requires_grad_()
    call = lambda: trusted_fusion(logits, v, mask=mask, impl="triton")
    moved, launches = traffic(call)
    trusted = call()
    least = size(logits, v, mask, trusted) + kept(2 * modalities)
    out.append(("trusted_fusion", "forward", moved, least, launches))
    moved, launches = traffic(once([trusted.logits], [*logits, v]))
    least = size(logits, v, mask, trusted.logits, logits, v) + kept(2 * modalities)
    out.append(("trusted_fusion", "backward", moved, least, launches))
    name, both = "fusion_cross_entropy", kept(4 * modalities + 2)
    backward = both + (0 if streamed else again)
    for reduction in ("none", "mean"):
        call = lambda: fusion_cross_entropy(logits, targets, reduction=reduction, **options)
        loss = call()
        # Of means the losses and their gradients are a few numbers too
        stored = loss if reduction == "none" else loss.weights
        few = set() if reduction == "none" else {"upstream.nll_ptr", "upstream.unimodal_ptr"}
        moved, launches = traffic(call)
        least = size(logits, gate, mask, targets, stored) + both + again
        out.append((name, "forward", moved, least, launches))
        moved, launches = traffic(once(loss, logits), SMALL | SHARED | few)
        least = size(logits, mask, targets, loss.weights, stored, logits) + backward
        out.append((name, "backward", moved, least, launches))
    gating = launch.Gating(launch.Parameters(None, None, None, [1.0, 1.0, 1.0], mask), None, gate)
    labels, factors = launch.Labels(targets, -100), torch.rand(modalities + 1)
    plain = [rows.detach() for rows in logits]
    call = lambda: launch.objective(plain, labels, gating, factors, need_gate=True)
    found = call()
    moved, launches = traffic(call)
    least = size(logits, gate, mask, targets, found) + (0 if streamed else again)
    out.append(("fusion objective", "both", moved, least, launches))
    return out


def prototype_rows(batch, classes, width, modalities, dtype=torch.float32, metric="cosine"):
    """(operator, mode, bytes, least) of the operators on features and prototypes."""
    features = [torch.randn(batch, width, dtype=dtype).requires_grad_() for _ in range(modalities)]
    tables = [torch.randn(classes, width, dtype=dtype) for _ in range(modalities)]
    targets, budgets = torch.randint(classes, (batch,)), torch.rand(modalities)
    out = []
    call = lambda: alignment_loss(
        features, tables, targets, budgets, metric=metric, reduction="none", impl="triton"
    )
    loss = call()
    moved, launches = traffic(call)
    out.append(
        (
            "alignment_loss",
            "forward",
            moved,
            size(features, targets, loss),
            launches,
        )
    )
    moved, launches = traffic(once(loss[:2], features))
    out.append(
        (
            "alignment_loss",
            "backward",
            moved,
            size(features, targets, loss[0], loss[1][:, 1:], features),
            launches,
        )
    )  # the anchor is not aligned
    call = lambda: nearest_prototype(features, tables, metric=metric, impl="triton")
    near = call()
    moved, launches = traffic(call)
    out.append(("nearest_prototype", "forward", moved, size(features, near), launches))
    moved, launches = traffic(once([near.distance], features))
    out.append(
        (
            "nearest_prototype",
            "backward",
            moved,
            size(features, near.index, near.distance, features),
            launches,
        )
    )
    call = lambda: prototype_distance(features[0], tables[0], metric=metric, impl="triton")
    distance = call()
    kept = size(torch.empty(batch)) if metric == "cosine" else 0
    moved, launches = traffic(call)
    kept_too = (
        size(torch.empty(classes)) + (0 if dtype == torch.float32 else distance.numel() * 4)
        if metric == "cosine"
        else 0
    )
    out.append(
        (
            "prototype_distance",
            "forward",
            moved,
            size(features[0], distance) + kept + kept_too,
            launches,
        )
    )
    moved, launches = traffic(once([distance], features[:1]))
    given = (
        distance.numel() * 4 if metric == "cosine" else 0
    )  # the distances, before rounding to half precision, give the cosines again
    out.append(
        (
            "prototype_distance",
            "backward",
            moved,
            size(features[0], distance, features[0]) + given + kept,
            launches,
        )
    )
    counts = [torch.ones(classes, dtype=torch.int64) for _ in range(modalities)]
    given = [values.detach() for values in features]
    moved, launches = traffic(
        lambda: update_prototypes_(tables, counts, given, targets, metric=metric, impl="triton"),
        SEARCHED,
    )
    there = targets.unique()  # the other classes are neither read nor written
    changed = size([table[there] for table in tables], [count[there] for count in counts])
    out.append(("update_prototypes_", "forward", moved, size(given) + 2 * changed, launches))
    return out


# Alignment's backward needs the features for the scores and, where the cosine's gradient is taken
# across a row, once more
EXCEPT = {("alignment_loss", "backward"): 1.55}


@pytest.mark.parametrize(
    "batch, classes, modalities, dtype",
    [
        (7, 6, 2, torch.float32),
        (5, 31, 2, torch.float16),
        (3, 309, 2, torch.float32),
        (3, 1000, 3, torch.float32),
        (2, 1024, 6, torch.bfloat16),
        (70, 3, 1, torch.float32),
    ],
)
def test_fusion_reads_every_logit_once(batch, classes, modalities, dtype):
    for name, mode, moved, least, launches in fusion_rows(batch, classes, modalities, dtype):
        assert launches == 1 and 1.0 <= moved / least <= 1.0001, (
            name,
            mode,
            moved,
            least,
            launches,
        )


# What is read more than once of more classes than registers hold: the logits, and backward the
# fused logits' gradient too
STREAMED = {
    ("gated_fusion", "forward"): 1.8,
    ("gated_fusion", "backward"): 1.65,
    ("gated_fusion of values", "forward"): 1.0001,
    ("gated_fusion of values", "backward"): 1.0001,
    ("trusted_fusion", "forward"): 1.76,
    ("trusted_fusion", "backward"): 1.6,
    ("fusion_cross_entropy", "forward"): 2.0,
    ("fusion_cross_entropy", "backward"): 1.0001,
    ("fusion objective", "both"): 2.0,
}


@pytest.mark.parametrize(
    "classes, modalities", [(4099, 2), pytest.param(5000, 3, marks=pytest.mark.slow)]
)
def test_how_often_fusion_of_many_classes_reads_them(classes, modalities):
    for name, mode, moved, least, launches in fusion_rows(2, classes, modalities):
        assert launches == 1 and moved / least <= STREAMED[name, mode], (name, mode, moved, least)


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize(
    "batch, classes, width, modalities, dtype",
    [
        (17, 6, 70, 2, torch.float32),
        pytest.param(33, 6, 200, 2, torch.float32, marks=pytest.mark.slow),
        pytest.param(17, 31, 100, 3, torch.bfloat16, marks=pytest.mark.slow),
        (5, 128, 130, 1, torch.float32),
        pytest.param(19, 100, 37, 6, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_features_are_read_once_where_the_classes_fit_a_block(
    batch, classes, width, modalities, dtype, metric
):
    for name, mode, moved, least, launches in prototype_rows(
        batch, classes, width, modalities, dtype, metric
    ):
        limit = EXCEPT.get((name, mode), 1.05) if metric == "cosine" else 1.05
        assert launches == 1 and 1.0 <= moved / least <= limit, (name, mode, moved, least, launches)


def test_alignment_of_many_classes_never_stores_more_than_rows():
    """Forward and backward store [B, M] and [B, D] only, and prototypes laid out, [K, D]."""
    batch, classes, width = 5, 309, 40
    features = [torch.randn(batch, width).requires_grad_() for _ in range(2)]
    tables = [torch.randn(classes, width) for _ in range(2)]
    call = lambda: alignment_loss(
        features,
        tables,
        torch.randint(classes, (batch,)),
        torch.rand(2),
        reduction="none",
        impl="triton",
    )
    with interpreter.sanitized() as report:
        loss = call()
    laid_out = next(launch for launch in report.launches if launch.name == "lay_out")
    per_row = torch.empty(batch, 2)
    # Two means a modality, their sums, the share and the rows that count
    kept = (4 * size(torch.empty(batch, 64)), 6 * size(per_row), size(per_row, per_row.bool()))
    assert report.stored - laid_out.stored.total() == size(loss) + sum(kept)
    assert laid_out.stored.total() == 4 * 2 * 384 * (64 + 3)  # padded
    with interpreter.sanitized() as report:
        torch.autograd.grad(sum(value.sum() for value in loss[:2]), features)
    assert report.stored == size(features)


if __name__ == "__main__":
    print("| operator | mode | shape | bytes | least | ratio |\n|---|---|---|---|---|---|")
    shapes = [
        (64, 6, 512, 2),
        (64, 31, 512, 2),
        (64, 309, 512, 2),
        (8, 1000, 768, 3),
        (4, 4000, 0, 2),
    ]
    for batch, classes, width, modalities in shapes:
        rows = fusion_rows(batch, classes, modalities) + (
            prototype_rows(batch, classes, width, modalities) if width else []
        )
        size = f"B={batch} K={classes} {f'D={width} ' if width else ''}M={modalities}"
        for name, mode, moved, least, _ in rows:
            print(f"| {name} | {mode} | {size} | {moved} | {least} | {moved / least:.3f} |")

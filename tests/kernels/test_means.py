"""Means over no rows at all: 0, with gradients of 0, and nothing NaN."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from iib_kernels import alignment_loss, fusion_cross_entropy, multimodal_objective

pytest.importorskip("triton")
import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, WIDTH = 5, 4
# Why no row counts: for any loss; for those of the second modality; for the cross-entropies
WHY = ("all ignored", "one absent", "weights of 0")


@pytest.fixture(autouse=True)
def watched():
    """The sanitizer around every interpreted kernel."""
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        yield report


class Found(NamedTuple):
    """An output or a gradient."""

    name: str
    modality: int | None
    value: Tensor

    def counts(self, why: str) -> bool:
        """Whether there are rows behind it."""
        if why == "one absent":
            return self.modality != 1
        return why == "weights of 0" and self.name not in ("fused", "unimodal", "logits")


def evaluate(operator: str, classes: int, why: str, reduction: str, impl: str) -> list[Found]:
    """Losses and gradients of an operator, for two modalities."""
    torch.manual_seed(classes)
    draw = lambda *size: [torch.randn(size, device=DEVICE) for _ in range(2)]
    logits, features, prototypes = draw(BATCH, classes), draw(BATCH, WIDTH), draw(classes, WIDTH)
    budgets = torch.tensor([1.0, 0.9], device=DEVICE)
    targets = torch.full((BATCH,), -100 if why == "all ignored" else 1, device=DEVICE)
    rest: dict = {"impl": impl}
    if why == "one absent":
        rest["mask"] = torch.tensor([[True, False]], device=DEVICE).repeat(BATCH, 1)
    if why == "weights of 0":
        rest["weight"] = torch.ones(classes, device=DEVICE)
        rest["weight"][1] = 0.0

    leaves = {"logits": logits, "features": features}
    for leaf in (*logits, *features):
        leaf.requires_grad_()
    if operator == "alignment_loss":
        out = alignment_loss(features, prototypes, targets, budgets, reduction=reduction, **rest)
        total, named = (out.contrastive + out.alignment).sum(), out._asdict()
        del leaves["logits"]
    elif operator == "fusion_cross_entropy":
        out = fusion_cross_entropy(logits, targets, reduction=reduction, **rest)
        total, named = out.fused + out.unimodal.sum(), out._asdict()
        del leaves["features"], named["weights"]
    else:
        tables = {"features": features, "prototypes": prototypes, "budgets": budgets}
        out = multimodal_objective(logits, targets, **tables, **rest)
        total, named = out.loss, {"loss": out.loss, **out.parts._asdict()}
    for name, group in leaves.items():
        named[name] = torch.stack(torch.autograd.grad(total, group, retain_graph=True))
    return [
        Found(name, m, part)
        for name, value in named.items()
        for m, part in (enumerate(value) if value.dim() else [(None, value)])
    ]


CASES = [
    (operator, why, reduction)
    for operator in ("fusion_cross_entropy", "alignment_loss", "multimodal_objective")
    for why in WHY
    for reduction in ("mean", "sum")
    if (operator, why) != ("alignment_loss", "weights of 0")  # it takes none
    if (operator, reduction) != ("multimodal_objective", "sum")
]


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("classes", [5, 140])
@pytest.mark.parametrize("operator, why, reduction", CASES)
def test_what_no_row_counts_for_is_zero(operator, why, reduction, classes, impl):
    found = evaluate(operator, classes, why, reduction, impl)
    for each in found:
        assert each.value.isfinite().all(), each
        assert each.counts(why) or not each.value.any(), each
    # And it is not that everything is
    left = [each for each in found if each.counts(why)]
    assert not left or any(each.value.any() for each in left)

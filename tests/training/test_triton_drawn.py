"""``iibalance_drawn`` through the Triton kernels.

The losses, prototypes, gradients and predictions are those of plain PyTorch.
"""

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn

from iibalance import RunConfig
from iibalance.budgets import Budgets
from iibalance.data.dataset import Batch
from iibalance.methods import make_method

pytest.importorskip("triton")
import interpreter

STEPS = 3
SIZES = {"audio": 5, "video": 6, "text": 4}


def trained(impl, masked):
    """(parts of each step's loss, gradients of the last, prototypes, predictions)."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = make_method("iibalance_drawn", RunConfig(kernels=impl))
    model = method.build({m: nn.Linear(size, 8) for m, size in SIZES.items()}, 3).to(device)
    budgets = Budgets.given({"audio": 0.6, "video": 0.9, "text": 0.8})
    method.set_budgets(model, budgets)
    optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(18) % 3
    inputs = {m: torch.randn(18, size, generator=generator) for m, size in SIZES.items()}
    mask = torch.rand(18, 3, generator=generator) > 0.3
    mask[~mask.any(1), 1] = True
    batch = Batch(
        {m: values.to(device) for m, values in inputs.items()},
        targets.to(device),
        mask.to(device) if masked else None,
    )
    model.train()
    losses = []
    for step in range(STEPS):
        out = method.step(model, optimizer, batch, progress=step / STEPS)
        parts = out.parts
        losses.append(
            torch.stack([out.loss, parts.fused, *parts.unimodal, *parts.pra, *parts.branches])
        )
    out = model(batch.inputs, batch.targets, mask=batch.mask, progress=0.5)
    out.loss.backward()
    with torch.no_grad():
        told = model.eval()(batch.inputs, mask=batch.mask)
    gradients = [value.grad for value in model.parameters()]
    found = [
        torch.stack(losses).detach(),
        torch.cat([value.flatten() for value in gradients]),
        model.head.prototypes.prototypes[0],
        told.logits,
        told.weights,
    ]
    return [value.cpu() for value in found]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_steps_are_those_of_plain_pytorch(masked):
    expected = trained("reference", masked)
    with (
        interpreter.sanitized() if interpreter.interpreted() else contextlib.nullcontext() as report
    ):
        found = trained("triton", masked)
    # loss, fused, 3 own, then the alignments: the anchor's is 0, the others' act
    alignment = found[0][1:, 5:8]
    assert alignment[:, [0, 2]].min() > 1e-2 and not alignment[:, 1].any()
    assert found[0][-1, 2:5].sum() < found[0][0, 2:5].sum()
    for actual, right in zip(found, expected):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)
    if report is not None:
        # A step is four launches forward (entropies, fused features, alignment, prototypes) and
        # three backward; at last comes the prediction
        launched = Counter(launch.name for launch in report.launches)
        steps = STEPS + 1
        assert launched == {
            "fusion_rows": steps + 1,
            "values_rows": steps + 1,
            "alignment_forward": steps,
            "move_prototypes": steps,
            "fusion_rows_backward": steps,
            "values_rows_backward": steps,
            "alignment_backward": steps,
        }

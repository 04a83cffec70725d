"""``reconboost``: the boosting and memory terms, whose turn it is, and who learns; by hand."""

import math

import pytest
import torch
from test_formulas import arrays, draw, ready, run, softmax

from iibalance.methods.reconboost import ReconBoost


def at_epoch(method, model, split, epoch):
    for _ in range(epoch + 1):
        method.before_epoch(model, split, 0.0)


def loss_by_hand(model, split, k, before, reconcile, memory):
    """L of the turn of modality ``k``, sample by sample."""
    logits = []
    for m, (encoder, classifier) in enumerate(zip(model.encoders, model.head.classifiers)):
        (rows,) = arrays([classifier(encoder(list(split.inputs.values())[m]))])
        logits.append(rows)
    total, count, squares, both = 0.0, 0, 0.0, 0
    for i, y in enumerate(split.targets.tolist()):
        if not split.mask[i, k] or y == -100:
            continue
        others = [0.0] * 3
        for m, rows in enumerate(logits):
            if m != k and split.mask[i, m]:
                others = [a + b for a, b in zip(others, rows[i])]
        p, q = softmax(logits[k][i]), softmax(others)
        total += -(1 - reconcile * q[y]) * math.log(p[y])
        count += 1
        if before is not None and split.mask[i, before]:
            r = softmax(logits[before][i])
            squares += sum((a - b) ** 2 for a, b in zip(p, r)) / 3
            both += 1
    return total / count + (memory * squares / both if both else 0.0)


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize(("epoch", "k", "before"), [(0, 0, None), (2, 1, 0), (4, 2, 1), (6, 0, 2)])
def test_the_learner_of_a_turn_minimises_what_the_others_get_wrong(epoch, k, before, missing):
    method, model = ready("reconboost", 3, reconcile=0.7, memory=0.9)
    split = draw(3, missing=missing)
    split.targets[4] = -100
    at_epoch(method, model, split, epoch)
    batch = split.batch() if missing else split.batch()._replace(mask=None)
    loss = method.loss(run(model, batch), model, batch, 0.5)
    expected = loss_by_hand(model, split, k, before, 0.7, 0.9)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    if before is not None:
        assert expected != pytest.approx(loss_by_hand(model, split, k, None, 0.7, 0.9), rel=1e-3)


def test_the_gradient_is_that_of_the_label_less_what_the_others_know():
    """By the learner's logits: (1 - reconcile q_y)(p - y) / B, and the memory's, both by hand."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    others = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.arange(6) % 3
    ReconBoost.boosting(logits, others, targets, 0.4).backward()
    assert others.grad is None
    for i, y in enumerate(targets.tolist()):
        p, q = softmax(arrays([logits])[0][i]), softmax(arrays([others])[0][i])
        for c in range(3):
            expected = (1 - 0.4 * q[y]) * (p[c] - (c == y)) / 6
            assert logits.grad[i, c].item() == pytest.approx(expected, abs=1e-6)
    logits.grad = None
    rows = torch.tensor([True, False, True, True, False, True])
    ReconBoost.consolidation(logits, others, rows).backward()
    assert others.grad is None
    for i in range(6):
        p, r = softmax(arrays([logits])[0][i]), softmax(arrays([others])[0][i])
        slope = [2 * (a - b) / 3 / 4 if rows[i] else 0.0 for a, b in zip(p, r)]
        mean = sum(a * b for a, b in zip(p, slope))
        for c in range(3):
            assert logits.grad[i, c].item() == pytest.approx(p[c] * (slope[c] - mean), abs=1e-6)


def test_turns_go_round_and_end_in_the_rectification():
    turns = [ReconBoost.turn(epoch, 3, 2) for epoch in range(14)]
    assert [turn.modality for turn in turns] == [
        *(0, 0, None, None, 1, 1, None, None, 2, 2, None, None, 0, 0)
    ]
    assert [turn.before for turn in turns] == [*4 * [None], *4 * [0], *4 * [1], 2, 2]
    assert ReconBoost.turn(2, 1, 1) == (0, 0)  # one modality is its own predecessor


def test_the_rectification_is_the_cross_entropy_of_the_sum():
    method, model = ready("reconboost", 3)
    split = draw(3, missing=0.3)
    at_epoch(method, model, split, 1)
    out = run(model, split.batch())
    logits = [
        [row if there else [0.0] * 3 for row, there in zip(rows, split.mask[:, m].tolist())]
        for m, rows in enumerate(
            arrays(
                classifier(encoder(values))
                for encoder, classifier, values in zip(
                    model.encoders, model.head.classifiers, split.inputs.values()
                )
            )
        )
    ]
    expected = 0.0
    for i, y in enumerate(split.targets.tolist()):
        fused = [sum(rows[i][c] for rows in logits) for c in range(3)]
        expected -= math.log(softmax(fused)[y]) / 12
    loss = method.loss(out, model, split.batch(), 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_only_the_learner_moves_and_in_the_rectification_all_do():
    """Weight decay and the moments of an earlier epoch included."""
    method, model = ready("reconboost", 3)
    split, groups = draw(3), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(6):
        method.before_epoch(model, split, 0.0)
        before = [arrays(part.parameters()) for part in parts(model)]
        method.step(model, optimizer, split.batch())
        groups.append(
            [
                any((a != b).any() for a, b in zip(arrays(part.parameters()), values))
                for part, values in zip(parts(model), before)
            ]
        )
    for epoch, moved in enumerate(groups):
        learner = None if epoch % 2 else epoch // 2
        assert moved == [learner is None or m == learner for m in range(3)], epoch


def parts(model):
    """What is each modality's: encoder and classifier."""
    pairs = zip(model.encoders, model.head.classifiers)
    return [torch.nn.ModuleList(pair) for pair in pairs]


def test_it_says_that_before_epoch_is_missing():
    method, model = ready("reconboost")
    batch = draw().batch()
    with pytest.raises(ValueError, match="call before_epoch"):
        method.loss(run(model, batch), model, batch, 0.5)

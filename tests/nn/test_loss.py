"""The objective against its equations, written out with torch operations sample by sample.

Prototype losses: method page, section 3. Their sum: method page, section 5.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from iibalance.nn.loss import IIBalanceLoss

SIZES, CLASSES, BATCH = (5, 3, 4), 4, 10


def case(seed=0, dtype=torch.float64, masked=True, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    logits = [2 * draw(BATCH, CLASSES) for _ in SIZES]
    embeddings, prototypes = (
        [draw(BATCH, size) for size in SIZES],
        [draw(CLASSES, size) for size in SIZES],
    )
    targets = torch.randint(CLASSES, (BATCH,), generator=generator)
    if ignored:
        targets[3] = -100
    mask = (
        torch.rand(BATCH, len(SIZES), generator=generator) < 0.7
        if masked
        else torch.ones(BATCH, len(SIZES), dtype=torch.bool)
    )
    mask[~mask.any(1), 0] = True
    for tensor in (*logits, *embeddings):
        tensor.requires_grad_(True)
    return logits, embeddings, prototypes, targets, mask


def mean(values):
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def log_posterior(z, prototypes, temperature):
    distances = (F.normalize(z, dim=0) - F.normalize(prototypes, dim=1)).square().sum(1)
    return (-distances / temperature).log_softmax(0)


def by_hand(logits, embeddings, prototypes, targets, mask, budgets, gate, temperature):
    """(fused, unimodal [M], contrastive [M], alignment [M]): means over what counts for each."""
    fused, unimodal, contrastive, alignment = (
        [],
        [[] for _ in SIZES],
        [[] for _ in SIZES],
        [[] for _ in SIZES],
    )
    anchor = max(range(len(SIZES)), key=lambda m: budgets[m])
    for i, y in enumerate(targets.tolist()):
        if y == -100:
            continue
        present = [m for m in range(len(SIZES)) if mask[i, m]]
        weights = gate[i, present].softmax(0)
        fused.append(
            -(len(SIZES) * sum(w * logits[m][i] for w, m in zip(weights, present))).log_softmax(0)[
                y
            ]
        )
        log_q = {m: log_posterior(embeddings[m][i], prototypes[m], temperature) for m in present}
        for m in present:
            unimodal[m].append(-logits[m][i].log_softmax(0)[y])
            contrastive[m].append(-log_q[m][y])
            term = torch.zeros((), dtype=torch.float64)
            if m != anchor and anchor in present:
                q_a = log_q[anchor].detach().exp()
                delta = (
                    budgets[m] / budgets[anchor] * q_a[y] - log_q[m][y].detach().exp()
                ).clamp_min(0)
                term = delta * (q_a * (q_a.log() - log_q[m])).sum()
            alignment[m].append(term)
    return mean(fused), *(
        torch.stack([mean(v) for v in part]) for part in (unimodal, contrastive, alignment)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
def test_total_is_the_weighted_sum_of_parts_computed_by_hand(seed, masked):
    logits, embeddings, prototypes, targets, mask = case(seed, masked=masked)
    budgets = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)
    gate = torch.randn(BATCH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    criterion = IIBalanceLoss(
        fused_weight=0.7,
        unimodal_weight=1.3,
        alpha=0.4,
        beta=2.5,
        temperature=0.5,
        warmup=0.2,
        ramp=0.4,
    )
    loss = criterion(
        logits,
        targets,
        embeddings=embeddings,
        prototypes=prototypes,
        budgets=budgets,
        gate_logits=gate,
        mask=mask,
        progress=0.5,
    )
    hand = by_hand(logits, embeddings, prototypes, targets, mask, budgets, gate, 0.5)
    for got, expected in zip(loss[1:], hand):
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
    # The case shows every part
    assert (hand[2] > 0).all() and hand[3][1] == 0 and hand[3][[0, 2]].min() > 0
    expected = (
        0.7 * hand[0] + 1.3 * hand[1].sum() + 0.75 * (0.4 * hand[2].sum() + 2.5 * hand[3].sum())
    )
    torch.testing.assert_close(loss.total.double(), expected, atol=1e-6, rtol=1e-6)
    inputs = [*logits, *embeddings]
    for got, right in zip(
        torch.autograd.grad(loss.total, inputs), torch.autograd.grad(expected, inputs)
    ):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-5)


def test_by_default_the_fused_logits_are_the_sum_of_those_available():
    """Whatever their number: a sample with one modality is not made three times as sharp."""
    logits, _, _, targets, mask = case()
    loss = IIBalanceLoss(fused_weight=1.0, unimodal_weight=0.0)(logits, targets, mask=mask)
    expected = mean(
        [
            -sum(logits[m][i] for m in range(3) if mask[i, m]).log_softmax(0)[y]
            for i, y in enumerate(targets.tolist())
            if y >= 0
        ]
    )
    assert not mask.all() and loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, right in zip(
        torch.autograd.grad(loss.total, logits), torch.autograd.grad(expected, logits)
    ):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-5)


def test_schedule():
    criterion = IIBalanceLoss(warmup=0.1, ramp=0.3)
    assert [criterion.strength(p) for p in (0.0, 0.05, 0.1)] == [0, 0, 0]
    assert [criterion.strength(p) for p in (0.2, 0.25, 0.4, 0.7, 1.0)] == pytest.approx(
        [1 / 3, 0.5, 1, 1, 1]
    )


@pytest.mark.parametrize(
    ("warmup", "ramp", "expected"),
    [(0.0, 0.0, [1, 1, 1]), (0.5, 0.0, [0, 0, 1]), (0.0, 1.0, [0, 0.5, 1]), (1.0, 0.5, [0, 0, 0])],
)
def test_schedule_at_its_limits(warmup, ramp, expected):
    criterion = IIBalanceLoss(warmup=warmup, ramp=ramp)
    assert [criterion.strength(p) for p in (0.0, 0.5, 1.0)] == expected


def test_during_warm_up_the_prototype_terms_are_out():
    logits, embeddings, prototypes, targets, mask = case()
    criterion = IIBalanceLoss(warmup=0.5)
    loss = criterion(
        logits, targets, embeddings=embeddings, prototypes=prototypes, mask=mask, progress=0.4
    )
    assert loss.total.item() == criterion(logits, targets, mask=mask).total.item()
    loss.total.backward()
    assert all(embedding.grad is None for embedding in embeddings) and not loss.contrastive.any()


@pytest.mark.parametrize("part", ["fused", "unimodal", "contrastive", "alignment"])
def test_each_weight_belongs_to_its_part(part):
    logits, embeddings, prototypes, targets, mask = case()
    names = dict(
        fused="fused_weight", unimodal="unimodal_weight", contrastive="alpha", alignment="beta"
    )
    criterion = IIBalanceLoss(**{weight: float(name == part) for name, weight in names.items()})
    loss = criterion(
        logits,
        targets,
        embeddings=embeddings,
        prototypes=prototypes,
        budgets=torch.tensor([0.3, 0.8, 0.5]),
        mask=mask,
    )
    assert (
        loss.total.item() == pytest.approx(getattr(loss, part).sum().item(), rel=1e-6)
        and loss.total > 0
    )


def test_no_gradient_into_prototypes_budgets_gate_and_the_anchor():
    logits, embeddings, prototypes, targets, mask = case(masked=False)
    budgets = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)
    gate = torch.zeros(BATCH, 3, dtype=torch.float64, requires_grad=True)
    criterion = IIBalanceLoss(fused_weight=1.0, unimodal_weight=1.0, alpha=0.0, beta=5.0)
    loss = criterion(
        logits,
        targets,
        embeddings=embeddings,
        prototypes=prototypes,
        budgets=budgets,
        gate_logits=gate,
        mask=mask,
    )
    assert loss.alignment.sum() > 0
    loss.total.backward()
    assert gate.grad is None  # the gate cannot starve an encoder, nor learn from training data
    assert not prototypes[0].requires_grad and not budgets.requires_grad
    # The anchor is nobody's pupil
    assert embeddings[1].grad is None or not embeddings[1].grad.any()
    assert embeddings[0].grad.any() and embeddings[2].grad.any()


def test_alignment_acts_only_below_the_budgeted_share():
    """One sample, two classes, prototypes on the axes.

    So q(y) is a function of the embedding's angle that can be written down.
    """
    prototypes, targets, temperature = [torch.eye(2)] * 2, torch.tensor([0]), 0.5

    def embedding(q):
        # -d^2 / tau differs between the classes by 2 (cos a - sin a) / tau, which is to be logit(q)
        difference = math.log(q / (1 - q)) * temperature / 2
        angle = math.acos(difference / math.sqrt(2)) - math.pi / 4
        return torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)

    criterion = IIBalanceLoss(alpha=0.0, beta=1.0, temperature=temperature)

    def align(q_anchor, q_weak, budgets):
        features = [embedding(q_anchor), embedding(q_weak).requires_grad_(True)]
        loss = criterion(
            [torch.zeros(1, 2, dtype=torch.float64)] * 2,
            targets,
            embeddings=features,
            prototypes=[p.double() for p in prototypes],
            budgets=budgets,
        )
        return loss.alignment[1].item()

    # The weak modality owes half of the anchor's evidence
    budgets = torch.tensor([0.8, 0.4], dtype=torch.float64)
    assert align(0.9, 0.46, budgets) == 0.0  # above 0.45: left alone, though far below the anchor
    expected = 0.05 * (0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6))
    assert align(0.9, 0.4, budgets) == pytest.approx(expected, rel=1e-4)
    # With an equal budget it owes everything
    assert align(0.9, 0.46, torch.tensor([0.8, 0.8], dtype=torch.float64)) > 0.1
    assert align(0.3, 0.2, budgets) == 0.0  # an anchor that is itself wrong is no teacher


def test_a_missing_modality_contributes_nothing():
    logits, embeddings, prototypes, targets, mask = case()
    mask[:, 2] = False
    mask[~mask.any(1), 0] = True
    budgets = torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64)
    criterion = IIBalanceLoss()
    loss = criterion(
        logits, targets, embeddings=embeddings, prototypes=prototypes, budgets=budgets, mask=mask
    )
    assert loss.unimodal[2] == loss.contrastive[2] == loss.alignment[2] == 0
    dirty = [
        values.detach().masked_fill(~mask[:, m, None], 1e30).requires_grad_(True)
        for m, values in enumerate(logits)
    ]
    features = [
        values.detach().masked_fill(~mask[:, m, None], -7.0).requires_grad_(True)
        for m, values in enumerate(embeddings)
    ]
    other = criterion(
        dirty, targets, embeddings=features, prototypes=prototypes, budgets=budgets, mask=mask
    )
    assert other.total.item() == pytest.approx(loss.total.item(), rel=1e-9)
    other.total.backward()
    for m in range(3):
        assert not dirty[m].grad[~mask[:, m]].any() and not features[m].grad[~mask[:, m]].any()
        assert m == 2 or dirty[m].grad.any()


def test_without_the_anchor_nobody_is_aligned():
    logits, embeddings, prototypes, targets, mask = case()
    mask[:] = torch.tensor([True, False, True])  # the second has the largest budget
    loss = IIBalanceLoss()(
        logits,
        targets,
        embeddings=embeddings,
        prototypes=prototypes,
        budgets=torch.tensor([0.3, 0.8, 0.5]),
        mask=mask,
    )
    assert not loss.alignment.any() and loss.contrastive[0] > 0


def test_ignored_rows_do_not_count():
    logits, embeddings, prototypes, targets, mask = case(ignored=False)
    options = dict(prototypes=prototypes, budgets=torch.tensor([0.3, 0.8, 0.5]))
    rows = torch.arange(BATCH) != 6
    expected = IIBalanceLoss()(
        [v[rows] for v in logits],
        targets[rows],
        embeddings=[v[rows] for v in embeddings],
        mask=mask[rows],
        **options,
    )
    targets[6] = -100
    got = IIBalanceLoss()(logits, targets, embeddings=embeddings, mask=mask, **options)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_classes_not_seen_are_left_out_of_the_softmax():
    logits, embeddings, prototypes, _, _ = case(masked=False)
    targets = torch.arange(BATCH) % 2
    seen = [torch.tensor([True, True, False, False])] * 3
    options = dict(budgets=torch.tensor([0.3, 0.8, 0.5]))
    few = IIBalanceLoss()(
        logits, targets, embeddings=embeddings, prototypes=prototypes, seen=seen, **options
    )
    cut = IIBalanceLoss()(
        [values[:, :2] for values in logits],
        targets,
        embeddings=embeddings,
        prototypes=[table[:2] for table in prototypes],
        **options,
    )
    torch.testing.assert_close(few.contrastive, cut.contrastive)
    torch.testing.assert_close(few.alignment, cut.alignment)


@pytest.mark.parametrize(
    "name", ["fused_weight", "unimodal_weight", "alpha", "beta", "warmup", "ramp"]
)
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_weights_below_zero(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number >= 0"):
        IIBalanceLoss(**{name: value})

"""Predictions whose truth is known, for the tests of the gate."""

import torch
from torch.nn import functional as F

NAMES = ["audio", "visual"]


def bayes(count=4000, scales=(1.0, 1.0), seed=0, classes=4, sharpness=(1.2, 0.9)):
    """Targets, and per modality the true log-likelihoods of an observation times a scale.

    Temperatures equal to the scales make the sum Bayes' rule.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    logits = []
    for scale, sharp in zip(scales, sharpness, strict=True):
        # log p(x | k) = sharp x_k + constant
        x = sharp * F.one_hot(targets, classes) + torch.randn(count, classes, generator=generator)
        logits.append(scale * sharp * x)
    return targets, logits


def corrupted(count=1500, seed=0):
    """A third is clean; in the others the first or the second modality is another sample's.

    It is as sure as ever, and far from everything seen.
    """
    targets, logits = bayes(count, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    surprise = 0.3 * torch.rand(count, 2, generator=generator)
    kind = torch.arange(count) % 3  # 0 = clean, 1, 2 = corrupted modality + 1
    for m in (0, 1):
        rows = kind == m + 1
        logits[m][rows] = 2 * logits[m][rows].roll(1, 0)
        surprise[rows, m] += 4.0
    return targets, logits, surprise, kind


def with_liars(targets, logits, seed=0):
    """(logits, targets, clean): clean rows, and a copy of each in which one modality lies.

    It is another sample's, and so looks as usual as any.
    """
    generator = torch.Generator().manual_seed(seed)
    liar = torch.randint(2, (len(targets),), generator=generator)
    both = [
        torch.cat([values, torch.where(liar[:, None] == m, values.roll(1, 0), values)])
        for m, values in enumerate(logits)
    ]
    return both, targets.repeat(2), torch.arange(2 * len(targets)) < len(targets)


def nll(gate, targets, logits, *more):
    return F.cross_entropy(gate(logits, *more).logits, targets).item()


def accuracy(gate, targets, logits, *more):
    return (gate(logits, *more).logits.argmax(1) == targets).double().mean().item()


def all_values(gate):
    return torch.cat([value.flatten() for value in gate.state_dict().values()])

"""What is reported of a trained model (method page, section 6), on clean or degraded input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from iibalance.data.corruption import corrupt
from iibalance.data.dataset import Split
from iibalance.metrics import classification_metrics, exact_shapley, reliability_curve
from iibalance.nn.model import MultimodalClassifier, embed_split

MAX_SHAPLEY = 6


@torch.no_grad()
def evaluate(
    model: MultimodalClassifier,
    split: Split,
    *,
    alone: Mapping[str, float] | None = None,
    majority: int | None = None,
) -> tuple[dict, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Metrics of the fused prediction and of each modality's, Shapley contributions, weights; and the reliability curves behind the ECE.

    Args:
        model: in any mode; evaluated in evaluation mode.
        split: standardised samples.
        alone: test accuracy of each modality's encoder trained alone, for ``utilisation`` (None where it was not trained).
        majority: the class predicted where nothing is known (the most frequent one in training): what Shapley counts for the empty set.

    Returns ``(metrics, reliability)``: metrics with accuracy, macro_f1, nll, ece, brier, weights (mean over the samples; None without a gate), shapley
    (None for more than 6 modalities) and modalities.<name>.{accuracy, macro_f1, nll, ece, brier, alone_accuracy, utilisation}, numbers in [0, 1] or
    nats. A modality's own numbers are over the samples in which it is present; None where there are none, or where
    the head has no predictions of single modalities.
    """
    embeddings = embed_split(model, split)
    mask, targets = split.mask.to(embeddings[0].device), split.targets

    def fuse(present: Tensor):
        """Fused predictions where at least one modality is present; rows without one are left out."""
        rows = present.any(1)
        return rows.cpu(), model.head.fuse([values[rows] for values in embeddings], present[rows])

    _, out = fuse(mask)
    log_p = out.logits.double().log_softmax(-1).cpu()
    metrics = classification_metrics(log_p, targets)
    reliability = {"fused": reliability_curve(log_p, targets)}
    metrics["weights"] = (
        None
        if out.weights is None
        else dict(zip(model.modalities, out.weights.double().mean(0).tolist()))
    )

    def value(subset: tuple[bool, ...]) -> float:
        present = mask & torch.tensor(subset, device=mask.device)
        right = torch.full_like(targets, -1 if majority is None else majority) == targets
        if any(subset):
            rows, part = fuse(present)
            right[rows] = part.logits.argmax(-1).cpu() == targets[rows]
        return float(right.double().mean())

    shapley = (
        exact_shapley(value, len(model.modalities))
        if len(model.modalities) <= MAX_SHAPLEY
        else None
    )
    metrics["shapley"] = None if shapley is None else dict(zip(model.modalities, shapley))
    metrics["modalities"] = {}
    for index, name in enumerate(model.modalities):
        rows = split.mask[:, index]
        if not rows.any() or not out.modality_logits:
            metrics["modalities"][name] = None
            continue
        log_p = out.modality_logits[index].double().log_softmax(-1).cpu()[rows]
        own = classification_metrics(log_p, targets[rows])
        reliability[name] = reliability_curve(log_p, targets[rows])
        reference = (alone or {}).get(name)
        own |= {
            "alone_accuracy": reference,
            "utilisation": own["accuracy"] / reference if reference else None,
        }
        metrics["modalities"][name] = own
    return metrics, reliability


def degrade(
    split: Split,
    modality: str,
    kind: str,
    *,
    fraction: float = 0.5,
    strength: float = 3.0,
    seed: int = 0,
) -> Split:
    """``split`` with ``modality`` degraded (``noise`` of ``strength`` standard deviations, ``missing``, ``shuffled``) in a random ``fraction`` of samples.

    The rows and the noise depend on ``seed`` alone, so every model and method meets the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    return Split(
        *corrupt(
            split.batch(), modality, kind, fraction=fraction, strength=strength, generator=generator
        )[:3],
        groups=split.groups,
    )

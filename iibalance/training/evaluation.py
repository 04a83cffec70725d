"""What is reported of a trained model (method page, section 6), on clean or degraded input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iibalance.data.corruption import corrupt
from iibalance.data.dataset import Split
from iibalance.metrics import (
    MAX_PLAYERS,
    classification_metrics,
    exact_shapley,
    reliability_curve,
    scaled,
)
from iibalance.nn.model import BATCH_SIZE, MultimodalClassifier, embed_split, in_batches


class Outputs(NamedTuple):
    """A model's predictions for N samples, on the CPU in float32."""

    logits: Tensor  #: [N, K] fused
    modality_logits: Tensor  #: [N, M, K]; [N, 0, K] for a head without any
    weights: Tensor | None  #: [N, M]
    targets: Tensor  #: [N]


class Evaluation(NamedTuple):
    """What :func:`evaluate` finds."""

    metrics: dict  #: numbers in [0, 1] or nats
    reliability: dict[str, tuple[Tensor, Tensor, Tensor]]  #: the curves behind the ECE
    log_probabilities: Tensor  #: [N, K] float64, of the fused prediction


@torch.no_grad()
def evaluate(
    model: MultimodalClassifier,
    split: Split,
    *,
    alone: Mapping[str, float] | None = None,
    majority: int | None = None,
    shapley: bool = True,
) -> Evaluation:
    """Metrics of the fused prediction and of each modality's, on standardised samples.

    Args:
        model: in any mode; evaluated in evaluation mode.
        alone: test accuracy of each modality's encoder trained alone, for ``utilisation`` (None
            where it was not trained).
        majority: the class predicted where nothing is known (the most frequent one in training):
            what Shapley counts for the empty set.
        shapley: whether contributions are wanted; they take 2**M predictions.

    The metrics are accuracy, macro_f1, nll, ece, brier, weights (mean over the samples; None
    without a gate), shapley (None for more than 6 modalities) and, for each modality,
    modalities.<name>.{accuracy, macro_f1, nll, ece, brier, alone_accuracy, utilisation}. A
    modality's own numbers are over the samples in which it is present; None where there are none,
    or where the head has no predictions of single modalities.
    """
    embeddings = embed_split(model, split)
    mask, targets = split.mask.to(embeddings[0].device), split.targets

    def fuse(present: Tensor):
        """Fused predictions where at least one modality is present, and which rows they are."""
        rows = present.any(1)
        return rows.cpu(), model.head.fuse([values[rows] for values in embeddings], present[rows])

    def accuracy(subset: tuple[bool, ...]) -> float:
        present = mask & torch.tensor(subset, device=mask.device)
        right = torch.full_like(targets, -1 if majority is None else majority) == targets
        if any(subset):
            rows, part = fuse(present)
            right[rows] = part.logits.argmax(-1).cpu() == targets[rows]
        return float(right.double().mean())

    _, out = fuse(mask)
    log_p = _log_probabilities(out.logits)
    metrics = classification_metrics(log_p, targets)
    reliability = {"fused": reliability_curve(log_p, targets)}
    metrics["weights"] = metrics["shapley"] = None
    if out.weights is not None:
        metrics["weights"] = dict(zip(model.modalities, out.weights.double().mean(0).tolist()))
    if shapley and len(model.modalities) <= MAX_PLAYERS:
        shares = exact_shapley(accuracy, len(model.modalities))
        metrics["shapley"] = dict(zip(model.modalities, shares))
    metrics["modalities"] = dict.fromkeys(model.modalities)
    for index, name in enumerate(model.modalities):
        rows = split.mask[:, index]
        if not rows.any() or not out.modality_logits:
            continue
        own_log_p = _log_probabilities(out.modality_logits[index])[rows]
        own = classification_metrics(own_log_p, targets[rows])
        reliability[name] = reliability_curve(own_log_p, targets[rows])
        reference = (alone or {}).get(name)
        share = own["accuracy"] / reference if reference else None
        metrics["modalities"][name] = own | {"alone_accuracy": reference, "utilisation": share}
    return Evaluation(metrics, reliability, log_p)


@torch.no_grad()
def predict_split(model: nn.Module, split: Split, accelerator: Accelerator) -> Outputs:
    """Predictions for a whole split, in its order.

    They are shared out over the processes and gathered on all of them.
    """
    module, part = accelerator.unwrap_model(model), split
    world, rank = accelerator.num_processes, accelerator.process_index
    if world > 1:
        share, last = math.ceil(len(split) / world), len(split) - 1
        # The last process repeats rows to fill up.
        mine = [min(index, last) for index in range(rank * share, (rank + 1) * share)]
        part = split.subset(torch.tensor(mine))
    rows = []
    batches = in_batches(module, part.batches(BATCH_SIZE), autocast=accelerator.autocast)
    for _, embeddings, mask in batches:
        out = module.head.fuse([embedding.float() for embedding in embeddings], mask)
        own = out.logits.new_zeros(len(mask), 0, out.logits.shape[1])
        if out.modality_logits:
            own = torch.stack(out.modality_logits, 1)
        weights = None if out.weights is None else out.weights.float()
        rows.append((out.logits.float(), own.float(), weights))
    columns = [
        None if column[0] is None else accelerator.gather(torch.cat(column))[: len(split)].cpu()
        for column in zip(*rows)
    ]
    return Outputs(*columns, split.targets)


def score(outputs: Outputs, split: Split, weights: Tensor | None = None) -> dict:
    """``validation.nll`` and ``validation.accuracy``, of the fused prediction and of each head.

    Each is taken after one temperature fitted on the same samples: what counts is what a prediction
    is worth once it is calibrated. With ``weights`` [N] the NLL counts each sample by its own, as
    the training did.
    """
    row = {}
    everything = torch.ones_like(split.mask[:, 0])
    columns = [("", outputs.logits, everything)]
    if outputs.modality_logits.shape[1]:
        columns += [
            (f".{name}", outputs.modality_logits[:, index], split.mask[:, index])
            for index, name in enumerate(split.modalities)
        ]
    for suffix, logits, rows in columns:
        if rows.any():
            targets = outputs.targets[rows]
            log_p = scaled(logits[rows], targets).log_softmax(-1)
            metrics = classification_metrics(log_p, targets)
            if weights is not None:
                losses = -log_p.gather(1, targets[:, None]).squeeze(1).double()
                metrics["nll"] = float((weights[rows] * losses).sum() / weights[rows].sum())
            row |= {f"validation.{key}{suffix}": metrics[key] for key in ("nll", "accuracy")}
    return row


def degrade(
    split: Split,
    modality: str,
    kind: str,
    *,
    fraction: float = 0.5,
    strength: float = 3.0,
    seed: int = 0,
) -> Split:
    """``split`` with ``modality`` degraded in a random ``fraction`` of samples.

    ``kind`` is ``noise`` of ``strength`` standard deviations, ``missing`` or ``shuffled``. The rows
    and the noise depend on ``seed`` alone, so every model and method meets the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = corrupt(
        split.batch(),
        modality,
        kind,
        fraction=fraction,
        strength=strength,
        generator=generator,
        scale=split.scale,
    )
    return Split(*batch[:3], groups=split.groups, scale=split.scale)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).cpu()

"""What is reported of a trained model (method page, section 6), on clean or degraded input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from iibalance.nn.contributions import contributions
from iibalance.nn.model import BATCH_SIZE, MultimodalClassifier, embed_split, in_batches


class Outputs(NamedTuple):
    """A model's predictions for N samples, on the CPU in float32."""

    logits: Tensor  #: [N, K] fused
    modality_logits: Tensor  #: [N, M, K]; [N, 0, K] for a head without any
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
    shapley: bool = True,
) -> Evaluation:
    """Metrics of the fused prediction and of each modality's, on standardised samples.

    Args:
        model: in any mode; evaluated in evaluation mode.
        alone: test accuracy of each modality's encoder trained alone, for ``utilisation`` (None
            where it was not trained).
        shapley: whether shapley and contributions are wanted; each takes 2**M predictions.

    The metrics are accuracy, macro_f1, nll, ece, brier, trust and contributions (means over the
    samples that have the modality; trust is None without a gate), shapley (each modality's share of
    the accuracy, where the most frequent class in training is what is predicted from nothing; it
    and contributions are None for more than 6 modalities) and, for each modality,
    modalities.<name>.{accuracy, macro_f1, nll, ece, brier, alone_accuracy, utilisation, samples}. A
    modality's own numbers are over the samples in which it is present; None where there are none,
    or where the head has no predictions of single modalities.
    """
    embeddings = embed_split(model, split)
    mask, targets = split.mask.to(embeddings[0].device), split.targets
    majority = int(model.base_rate.argmax())

    def fuse(present: Tensor):
        """Fused predictions where at least one modality is present, and which rows they are."""
        rows = present.any(1)
        return rows.cpu(), model.head.fuse([values[rows] for values in embeddings], present[rows])

    def accuracy(subset: tuple[bool, ...]) -> float:
        present = mask & torch.tensor(subset, device=mask.device)
        right = torch.full_like(targets, majority) == targets
        if any(subset):
            rows, part = fuse(present)
            right[rows] = part.logits.argmax(-1).cpu() == targets[rows]
        return float(right.double().mean())

    _, out = fuse(mask)
    log_p = _log_probabilities(out.logits)
    metrics = classification_metrics(log_p, targets)
    reliability = {"fused": reliability_curve(log_p, targets)}
    metrics |= dict.fromkeys(("trust", "contributions", "shapley"))
    if out.trust is not None:
        metrics["trust"] = _means(model.modalities, out.trust.cpu(), split.mask)
    if shapley and len(model.modalities) <= MAX_PLAYERS:
        added = contributions(model.head, embeddings, mask, model.base_rate).cpu()
        metrics["contributions"] = _means(model.modalities, added, split.mask)
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
        own |= {"alone_accuracy": reference, "utilisation": share, "samples": int(rows.sum())}
        metrics["modalities"][name] = own
    return Evaluation(metrics, reliability, log_p)


def _means(names: Sequence[str], values: Tensor, mask: Tensor) -> dict[str, float | None]:
    """The mean of each column of ``values`` [N, M] over the samples that have the modality."""
    rows = zip(names, values.double().unbind(1), mask.unbind(1))
    return {name: float(its[own].mean()) if own.any() else None for name, its, own in rows}


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
        rows.append((out.logits.float(), own.float()))
    columns = [accelerator.gather(torch.cat(column))[: len(split)].cpu() for column in zip(*rows)]
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
    layout: str | None = None,
) -> Split:
    """``split`` with ``modality`` degraded in a random ``fraction`` of the samples that have it.

    ``kind`` is one of ``iibalance.data.degrade.KINDS``: ``noise``, ``missing`` and ``shuffled``,
    which the gate is calibrated on, or ``blur``, ``dropped`` and ``gain``, which it has never seen.
    What ``strength`` means for each is told by :func:`~iibalance.data.corruption.corrupt`: standard
    deviations of noise, positions of blur. The rows and the draws depend on ``seed`` alone, so
    every model and method meets the same ones.

    ``layout`` says how a sample of the modality is read (``MultimodalData.layouts``), which decides
    along which axes it is blurred or loses a segment; inferred from its shape where not given.

    Raises InputError for an unknown modality or kind, an impossible amount, and a kind that is not
    defined for what the modality holds, such as the blur of token ids.
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
        layout=layout,
    )
    return Split(*batch[:3], groups=split.groups, scale=split.scale)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).cpu()

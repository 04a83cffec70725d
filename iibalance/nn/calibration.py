"""Gate calibration (method page, section 5, stage 3).

Held-out samples and corrupted copies of them, and the MAP fit on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from iibalance.budgets import label_entropy
from iibalance.config import CalibrationConfig
from iibalance.data.corruption import random_corruptions
from iibalance.data.dataset import Split
from iibalance.metrics import own_temperatures
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import BATCH_SIZE, MultimodalClassifier, in_batches
from iibalance.nn.prototypes import surprise, usual_novelty


class HeldOut(NamedTuple):
    """What the gate is fitted on: predictions for N samples that training has not seen."""

    logits: list[Tensor]  #: M of [N, K], before any temperature
    novelty: Tensor  #: [N, M, 2] distance to the nearest prototype and log length of the embedding
    targets: Tensor  #: [N]
    mask: Tensor  #: [N, M]
    weight: Tensor  #: [N] how much a row counts
    clean: Tensor  #: [N] bool, not a corrupted copy

    def temperatures(self, nats: Tensor | None = None) -> Tensor:
        """[M]: what calibrates each modality's own prediction on the clean samples.

        ``nats`` [M]: cross-entropies known from elsewhere, as
        :func:`~iibalance.metrics.own_temperatures` takes them.
        """
        return own_temperatures(self.logits, self.targets, self.mask, self.clean, nats=nats)

    def cross_entropies(self) -> Tensor:
        """[M] nats: of each modality's own calibrated prediction on the clean samples.

        NaN where it is not below the entropy of the labels by two standard errors: a training that
        found nothing says little of a longer one.
        """
        entropy, found = label_entropy(self.targets[self.clean]), []
        for index, temperature in enumerate(self.temperatures()):
            rows = self.clean & self.mask[:, index]
            found.append(math.nan)
            if rows.sum() < 2:  # one sample has no standard error
                continue
            logits = self.logits[index][rows].double() / temperature
            losses = F.cross_entropy(logits, self.targets[rows], reduction="none")
            mean, error = float(losses.mean()), float(losses.std()) / len(losses) ** 0.5
            if mean + 2 * error < entropy:
                found[index] = mean
        return torch.tensor(found, dtype=torch.float64)

    def select(self, rows: Tensor) -> HeldOut:
        """The rows [N] bool alone."""
        logits, *columns = self
        return HeldOut([values[rows] for values in logits], *(column[rows] for column in columns))


@torch.no_grad()
def collect(
    model: MultimodalClassifier,
    split: Split,
    config: CalibrationConfig,
    *,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> HeldOut:
    """Predictions of ``model`` for ``split`` and for ``config.copies`` corrupted copies of it.

    The model has an IIBalanceHead; ``seed`` chooses the corruptions.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for copy in range(config.copies + 1):
        weight = config.corrupted_weight / config.copies if copy else 1.0
        for batch in split.chunks():
            if copy:
                batch = random_corruptions(
                    batch,
                    generator=generator,
                    max_strength=config.max_strength,
                    scale=split.scale,
                )
            parts_of = Split(batch.inputs, batch.targets, batch.mask).batches(batch_size)
            for rows, embeddings, mask in in_batches(model, parts_of):
                parts.append(
                    HeldOut(
                        [values.float().cpu() for values in model.head.heads(embeddings, mask)],
                        model.head.prototypes.novelty(embeddings).cpu(),
                        batch.targets[rows],
                        mask.cpu(),
                        torch.full((len(mask),), weight),
                        torch.full((len(mask),), copy == 0),
                    )
                )
    return merge(parts)


def merge(parts: Iterable[HeldOut]) -> HeldOut:
    """The rows of several held-out sets (the folds) as one."""
    logits, *columns = zip(*parts)
    return HeldOut(
        [torch.cat(values) for values in zip(*logits)], *(torch.cat(column) for column in columns)
    )


def calibrate(
    head: IIBalanceHead,
    out_of_fold: HeldOut | None,
    validation: HeldOut,
    config: CalibrationConfig,
    *,
    surprise_scale: float = 1.0,
    **options,
) -> None:
    """Fit ``head.gate`` on the held-out samples that ``config.source`` names.

    Where there are no out-of-fold samples, on the validation samples. ``surprise_scale`` 0 fits a
    gate that is told of no surprise; ``options`` go to :meth:`~iibalance.nn.gate.Gate.fit`.
    """
    source = "validation" if out_of_fold is None else config.source
    sources = {
        "out_of_fold": [out_of_fold],
        "validation": [validation],
        "both": [out_of_fold, validation],
    }
    # What the budgets say: how good a modality's prediction is on samples of all training groups,
    # which a small validation split may not tell.
    nats = None if out_of_fold is None else out_of_fold.cross_entropies()
    gate, temperature = head.gate, validation.temperatures(nats)
    head.prototypes.set_usual(
        validation.novelty[validation.clean], validation.mask[validation.clean]
    )
    parts, surprises = [], []
    for held_out in sources[source]:
        # Each set by its own temperatures and its own idea of what is usual: models of different
        # folds are less sure than the joint one, and their embeddings lie elsewhere.
        own = temperature if held_out is validation else held_out.temperatures()
        logits = [values * its for values, its in zip(held_out.logits, temperature / own)]
        clean = held_out.clean
        usual = usual_novelty(held_out.novelty[clean], held_out.mask[clean])
        parts.append(held_out._replace(logits=logits))
        surprises.append(surprise(held_out.novelty, *usual))
    whole = merge(parts)
    gate.fit(
        whole.logits,
        whole.targets,
        surprise=torch.cat(surprises) * surprise_scale,
        mask=whole.mask,
        sample_weight=whole.weight,
        clean=whole.clean,
        temperature=temperature,
        prior_scale=config.prior_scale,
        tolerance=config.tolerance,
        **options,
    )
    if len(head.modalities) > 1:  # the joint model's own predictions decide the scale
        own = validation.select(validation.clean)
        usual = head.prototypes.usual.cpu(), head.prototypes.spread.cpu()
        gate.fit_scale(
            own.logits,
            own.targets,
            surprise=surprise_scale * surprise(own.novelty, *usual),
            mask=own.mask,
        )
    gate.own_temperature.copy_(temperature)

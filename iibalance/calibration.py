"""Gate calibration (method page, section 5, stage 3): held-out samples and corrupted copies of them, and the MAP fit on both."""
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from iibalance.config import CalibrationConfig
from iibalance.data.base import Split
from iibalance.data.corruption import random_corruptions
from iibalance.head import IIBalanceHead
from iibalance.model import evaluating
from iibalance.temperature import fit_temperature


class HeldOut(NamedTuple):
    """What the gate is fitted on: predictions of models for N samples that they were not trained on."""

    logits: list[Tensor]  #: M of [N, K], before any temperature
    surprise: Tensor  #: [N, M] distance to the nearest prototype
    targets: Tensor  #: [N]
    mask: Tensor  #: [N, M]
    weight: Tensor  #: [N] how much a row counts
    clean: Tensor  #: [N] bool, not a corrupted copy


@torch.no_grad()
def collect(model, split: Split, config: CalibrationConfig, *, seed: int, batch_size: int = 256) -> HeldOut:
    """Predictions of ``model`` (with an IIBalanceHead) for ``split`` as it is and for ``config.copies`` randomly corrupted copies of it."""
    generator = torch.Generator().manual_seed(seed)
    device, clean, rows = next(model.parameters()).device, split.batch(), []
    for copy in range(config.copies + 1):
        batch = clean if copy == 0 else random_corruptions(clean, generator=generator, max_strength=config.max_strength)
        weight = 1.0 if copy == 0 else config.corrupted_weight / config.copies
        with evaluating(model):
            for start in range(0, len(split), batch_size):
                part = slice(start, start + batch_size)
                mask = batch.mask[part].to(device)
                embeddings = model.embed({name: values[part].to(device) for name, values in batch.inputs.items()})
                logits = [values.float().cpu() for values in model.head.heads(embeddings, mask)]
                surprise = model.head.prototypes.nearest(embeddings).float().cpu()
                rows.append((logits, surprise, batch.targets[part], mask.cpu(), torch.full((len(mask),), weight), torch.full((len(mask),), copy == 0)))
    logits, *columns = zip(*rows)
    return HeldOut([torch.cat(values) for values in zip(*logits)], *(torch.cat(column) for column in columns))


def merge(parts: Iterable[HeldOut]) -> HeldOut:
    """The rows of several held-out sets (the folds) as one."""
    logits, *columns = zip(*parts)
    return HeldOut([torch.cat(values) for values in zip(*logits)], *(torch.cat(column) for column in columns))


def calibrate(head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut, config: CalibrationConfig) -> None:
    """Fit ``head.gate`` on the held-out samples that ``config.source`` names (the validation samples where there are no out-of-fold ones)."""
    source = "validation" if out_of_fold is None else config.source
    sets = {"out_of_fold": [out_of_fold], "validation": [validation], "both": [out_of_fold, validation]}[source]
    # Each set around its own clean mean: models of different folds lie at different distances from their prototypes
    held_out = merge(part._replace(surprise=part.surprise - _clean_mean(part)) for part in sets)
    gate = head.gate
    gate.surprise_mean.zero_()
    gate.fit(
        held_out.logits, held_out.targets, log_prior=head.log_prior, surprise=held_out.surprise, mask=held_out.mask, sample_weight=held_out.weight,
        prior_scale=config.prior_scale,
    )
    gate.surprise_mean.copy_(_clean_mean(validation))
    for index, logits in enumerate(validation.logits):  # the joint model's own heads: no other model's predictions will do here
        rows = validation.clean & validation.mask[:, index]
        if rows.any():
            gate.own_temperature[index] = fit_temperature(logits[rows], validation.targets[rows])


def _clean_mean(held_out: HeldOut) -> Tensor:
    """Mean surprise of each modality over the clean samples that have it, [M]."""
    rows = held_out.clean[:, None] & held_out.mask
    return torch.where(rows, held_out.surprise, 0.0).sum(0) / rows.sum(0).clamp_min(1)

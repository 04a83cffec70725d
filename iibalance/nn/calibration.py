"""Gate calibration (method page, section 5, stage 3): held-out samples and corrupted copies of them, and the MAP fit on both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from iibalance.config import CalibrationConfig
from iibalance.data.corruption import random_corruptions
from iibalance.data.dataset import Split
from iibalance.nn.gate import own_temperatures
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import evaluating
from iibalance.nn.prototypes import surprise, usual_novelty


class HeldOut(NamedTuple):
    """What the gate is fitted on: predictions of models for N samples that they were not trained on."""

    logits: list[Tensor]  #: M of [N, K], before any temperature
    novelty: Tensor  #: [N, M, 2] distance to the nearest prototype and log length of the embedding
    targets: Tensor  #: [N]
    mask: Tensor  #: [N, M]
    weight: Tensor  #: [N] how much a row counts
    clean: Tensor  #: [N] bool, not a corrupted copy


@torch.no_grad()
def collect(
    model, split: Split, config: CalibrationConfig, *, seed: int, batch_size: int = 256
) -> HeldOut:
    """Predictions of ``model`` (with an IIBalanceHead) for ``split`` as it is and for ``config.copies`` randomly corrupted copies of it."""
    generator = torch.Generator().manual_seed(seed)
    device, clean, rows = next(model.parameters()).device, split.batch(), []
    for copy in range(config.copies + 1):
        batch = (
            clean
            if copy == 0
            else random_corruptions(clean, generator=generator, max_strength=config.max_strength)
        )
        weight = 1.0 if copy == 0 else config.corrupted_weight / config.copies
        with evaluating(model):
            for start in range(0, len(split), batch_size):
                part = slice(start, start + batch_size)
                mask = batch.mask[part].to(device)
                embeddings = model.embed(
                    {name: values[part].to(device) for name, values in batch.inputs.items()}
                )
                logits = [values.float().cpu() for values in model.head.heads(embeddings, mask)]
                novelty = model.head.prototypes.novelty(embeddings).cpu()
                rows.append(
                    (
                        logits,
                        novelty,
                        batch.targets[part],
                        mask.cpu(),
                        torch.full((len(mask),), weight),
                        torch.full((len(mask),), copy == 0),
                    )
                )
    logits, *columns = zip(*rows)
    return HeldOut(
        [torch.cat(values) for values in zip(*logits)], *(torch.cat(column) for column in columns)
    )


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
    """Fit ``head.gate`` on the held-out samples that ``config.source`` names (the validation samples where there are no out-of-fold ones).

    ``surprise_scale`` 0 fits a gate that is told of no surprise; ``options`` go to :meth:`~iibalance.nn.gate.Gate.fit`.
    """
    source = "validation" if out_of_fold is None else config.source
    gate, temperature = head.gate, temperatures(validation)
    head.prototypes.set_usual(
        validation.novelty[validation.clean], validation.mask[validation.clean]
    )
    parts = []
    for held_out in {
        "out_of_fold": [out_of_fold],
        "validation": [validation],
        "both": [out_of_fold, validation],
    }[source]:
        # Each set by its own temperatures and its own idea of what is usual: models of different folds are less sure and lie elsewhere than the joint one
        logits = [
            values * (own / its)
            for values, own, its in zip(held_out.logits, temperature, temperatures(held_out))
        ]
        usual = usual_novelty(held_out.novelty[held_out.clean], held_out.mask[held_out.clean])
        parts.append((held_out._replace(logits=logits), surprise(held_out.novelty, *usual)))
    whole, surprises = (
        merge([part for part, _ in parts]),
        torch.cat([values for _, values in parts]),
    )
    gate.fit(
        whole.logits,
        whole.targets,
        log_prior=head.log_prior,
        surprise=surprises * surprise_scale,
        mask=whole.mask,
        sample_weight=whole.weight,
        clean=whole.clean,
        temperature=temperature,
        prior_scale=config.prior_scale,
        **options,
    )
    rows = validation.clean
    if len(head.modalities) > 1:  # the joint model's own predictions decide the scale
        gate.fit_scale(
            [values[rows] for values in validation.logits],
            validation.targets[rows],
            log_prior=head.log_prior,
            surprise=surprise_scale
            * surprise(
                validation.novelty[rows], head.prototypes.usual.cpu(), head.prototypes.spread.cpu()
            ),
            mask=validation.mask[rows],
        )
    gate.own_temperature.copy_(temperature)


def temperatures(held_out: HeldOut) -> Tensor:
    """[M]: what calibrates each modality's own prediction on the clean samples."""
    return own_temperatures(held_out.logits, held_out.targets, held_out.clean, held_out.mask)

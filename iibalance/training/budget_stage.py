"""estimate_budgets: the three sources of budgets behind one function (method page, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from iibalance.budgets import (
    Budgets,
    budgets_from_logits,
    label_entropy,
    make_folds,
    probe_logits,
    smooth_budgets,
)
from iibalance.config import TrainingConfig
from iibalance.data.dataset import Split
from iibalance.errors import InputError, check_names
from iibalance.nn.encoders import build_encoder
from iibalance.nn.model import embed_split
from iibalance.training.trainer import Stages, cross_fit


def estimate_budgets(
    inputs: Mapping[str, Tensor | np.ndarray],
    targets: Tensor | np.ndarray,
    *,
    source: str = "unimodal",
    mask: Tensor | np.ndarray | None = None,
    groups: Tensor | np.ndarray | None = None,
    folds: int = 3,
    encoders: Mapping[str, Callable[[], nn.Module]] | None = None,
    epochs: int = 30,
    training: TrainingConfig | None = None,
    previous: Budgets | None = None,
    momentum: float = 0.5,
    seed: int = 0,
) -> Budgets:
    """Estimate the Intrinsic Information Budget of every modality: b_m = max(0, 1 - CE_m / H(Y)) on held-out samples, with standard errors.

    Args:
        inputs: modality name -> array. For ``unimodal`` standardised inputs [N, ...]; for ``probe`` features [N, ...] (flattened); for ``online``
            held-out logits [N, K] of the heads that are being trained.
        targets: [N] class indices. Training samples for the first two sources (never the test split), held-out ones for ``online``.
        source: ``"unimodal"``: short cross-fitted trainings of an encoder a modality, the default and the most faithful; ``"probe"``: cross-fitted linear
            probes, seconds; beware of features made by a network that was trained on the same labels, against which no fold helps (on public CMU-MOSI
            features 0.54 was estimated for a modality that is at chance on new videos); ``"online"``: a moving average over epochs.
        mask: [N, M] bool, True = present.
        groups: [N], whose values (speakers, videos, subjects) no two folds share.
        folds, epochs, training, seed: of the cross-fitting.
        encoders: modality name -> function that makes a new encoder; built-in ones by shape by default.
        previous, momentum: ``online`` only: what the moving average starts from, and how much of it stays.

    Raises :class:`~iibalance.errors.InputError` naming the argument for a single class, unequal lengths, too few samples or groups for the folds.

    >>> x, y = torch.randn(120, 3), torch.arange(120) % 2
    >>> budgets = estimate_budgets({"copy": torch.nn.functional.one_hot(y).float(), "noise": x}, y, source="probe")
    >>> budgets.values[0] > 0.9, budgets.uninformative
    (True, ['noise'])
    """
    names = check_names(inputs)
    values = {name: torch.as_tensor(inputs[name]).float() for name in names}
    targets = torch.as_tensor(targets)
    if targets.dim() != 1 or targets.is_floating_point():
        raise InputError(
            f"targets: expected class indices [N], got {targets.dtype} {list(targets.shape)}"
        )
    targets = targets.long()
    for name in names:
        if len(values[name]) != len(targets):
            raise InputError(
                f"inputs: {name} has {len(values[name])} samples, targets {len(targets)}"
            )
    mask = (
        torch.ones(len(targets), len(names), dtype=torch.bool)
        if mask is None
        else torch.as_tensor(mask).bool()
    )
    if mask.shape != (len(targets), len(names)):
        raise InputError(
            f"mask: has shape {list(mask.shape)}, expected [{len(targets)}, {len(names)}] ({', '.join(names)})"
        )
    if groups is not None and len(groups) != len(targets):
        raise InputError(f"groups: has {len(groups)} entries, targets {len(targets)}")
    groups = (
        None
        if groups is None
        else torch.as_tensor(np.unique(np.asarray(groups), return_inverse=True)[1])
    )
    entropy = label_entropy(targets)
    if source == "online":
        return smooth_budgets(
            previous,
            budgets_from_logits(values, targets, mask=mask, entropy=entropy, source=source),
            momentum,
        )
    if source not in ("unimodal", "probe"):
        raise InputError(f"source: {source!r} is none of unimodal, probe, online")
    held = make_folds(targets, folds, groups=groups, seed=seed)
    if source == "probe":
        return budgets_from_logits(
            probe_logits(values, targets, held, mask),
            targets,
            mask=mask,
            entropy=entropy,
            source=source,
        )
    split = Split(values, targets, mask, groups)
    if encoders is None:
        encoders = {
            name: (lambda shape=tuple(x.shape[1:]): build_encoder(shape))
            for name, x in values.items()
        }
    num_classes = int(targets.max()) + 1
    models = cross_fit(
        Stages(training or TrainingConfig(), seed=seed),
        dict(encoders),
        split,
        held,
        num_classes=num_classes,
        epochs=epochs,
    )
    return budgets_from_logits(
        out_of_fold_logits(models, split, held), targets, mask=mask, entropy=entropy, source=source
    )


@torch.no_grad()
def out_of_fold_logits(models, split: Split, folds, *, batch_size: int = 256) -> dict[str, Tensor]:
    """Each sample's logits by the fold model that has not seen it, [N, K] a modality."""
    result = None
    for model, held in zip(models, folds):
        part = split.subset(torch.from_numpy(held))
        logits = [values.cpu() for values in model.head.heads(embed_split(model, part, batch_size))]
        if result is None:
            result = [torch.zeros(len(split), values.shape[1]) for values in logits]
        for whole, values in zip(result, logits):
            whole[torch.from_numpy(held)] = values
    return dict(zip(models[0].modalities, result))

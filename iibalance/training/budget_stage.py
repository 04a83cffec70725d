"""Stage 1: Intrinsic Information Budgets on held-out folds (method page, section 1).

:func:`budget_stage` is the one place where budgets are estimated before training: ``iibalance
train``, ``iibalance budgets`` and :func:`estimate_budgets` all come here, and give the same budgets
for the same samples, options and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from iibalance.budgets import Budgets, budgets_from_logits, label_entropy, smooth_budgets
from iibalance.config import BudgetConfig, ObjectiveConfig, RunConfig, TrainingConfig
from iibalance.data.dataset import Split
from iibalance.data.labels import check_labels, encode_labels
from iibalance.data.lazy import ArrayReader, LazySplit
from iibalance.data.samples import Samples
from iibalance.data.splits import make_folds
from iibalance.data.values import Values, is_numeric
from iibalance.errors import InputError
from iibalance.nn.encoders import build_encoder
from iibalance.nn.encoding import encoder_size
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import MultimodalClassifier, embed_split
from iibalance.nn.own_encoders import Encoder, Factory, as_factories
from iibalance.training.sampling import derive_seed
from iibalance.training.surroundings import surroundings
from iibalance.training.trainer import Trainer, fit_alone


def budget_stage(
    trainer: Trainer,
    encoders: Mapping[str, Factory],
    train: Split,
    folds: Sequence[np.ndarray],
    *,
    source: str,
    num_classes: int,
    epochs: int,
    alpha: float,
    impl: str = "auto",
    measure: Callable[..., Budgets] = budgets_from_logits,
) -> tuple[Budgets, list[MultimodalClassifier]]:
    """Budgets from held-out predictions, and the fold models that made them (none for probes).

    Args:
        encoders: modality name -> function that makes a new encoder.
        train: standardised training samples.
        folds: row numbers of each held-out fold, of :func:`folds_of`.
        source: ``"unimodal"`` or ``"probe"``.
        epochs, alpha: of the unimodal trainings; alpha weighs the prototype contrastive loss.
        measure: makes budgets of the predictions, as ``Method.measure_budgets``.
    """
    models: list[MultimodalClassifier] = []
    if source == "probe":
        if isinstance(train, LazySplit):
            raise InputError(
                "budgets.source: probe needs all inputs in memory, and these stay on the disk; "
                "use unimodal"
            )
        for name, values in train.inputs.items():
            if not is_numeric(values):
                raise InputError(
                    f"budgets.source: probe is a linear model of numbers, and {name} holds ids or "
                    "fields; use unimodal"
                )
        logits = probe_logits(train.inputs, train.targets, folds, train.mask)
    else:
        models = cross_fit(
            trainer,
            encoders,
            train,
            folds,
            num_classes=num_classes,
            epochs=epochs,
            alpha=alpha,
            impl=impl,
        )
        logits = out_of_fold_logits(models, train, folds)
    entropy = label_entropy(train.targets)
    budgets = measure(logits, train.targets, mask=train.mask, entropy=entropy, source=source)
    return budgets, models


def folds_of(
    train: Split, folds: int, seed: int, class_names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """The held-out folds of a run of ``seed``, disjoint by the split's groups.

    ``class_names``: what messages call the classes.
    """
    seed = derive_seed(seed, "folds")
    return make_folds(train.targets, folds, groups=train.groups, seed=seed, names=class_names)


def check_folds(train: Split, folds: Sequence[np.ndarray]) -> None:
    """InputError unless every training finds two samples, and outside each fold two classes."""
    for index, name in enumerate(train.modalities):
        present = train.mask[:, index]
        if int(present.sum()) < 2:
            raise InputError(
                f"{name}: present in only 1 training sample; give more of them, "
                f"or leave {name} out with data.modalities"
            )
        for held in folds:
            rest = present.clone()
            rest[torch.from_numpy(held)] = False
            if len(train.targets[rest].unique()) < 2:
                raise InputError(
                    f"budgets.folds: outside one of the {len(folds)} folds {name} is present for "
                    f"fewer than two classes; leave {name} out with data.modalities, "
                    "or give budgets.path"
                )


def cross_fit(
    trainer: Trainer,
    encoders: Mapping[str, Factory],
    train: Split,
    folds: Sequence[np.ndarray],
    *,
    num_classes: int,
    epochs: int,
    alpha: float = 0.0,
    impl: str = "auto",
) -> list[MultimodalClassifier]:
    """For each fold a model of encoders trained alone on the other folds, under one neutral head.

    No early stopping: the held-out fold must not choose the epoch at which it is judged.
    """
    models = []
    for number, held in enumerate(folds):
        rows = torch.ones(len(train), dtype=torch.bool)
        rows[torch.from_numpy(held)] = False
        rest = train.subset(rows)
        parts = {}
        for name, encoder in encoders.items():
            parts[name], _ = fit_alone(
                trainer,
                name,
                encoder,
                rest,
                None,
                num_classes=num_classes,
                epochs=epochs,
                alpha=alpha,
                stage=f"fold-{number}",
                impl=impl,
            )
        models.append(join(parts, impl=impl))
    return models


@torch.no_grad()
def join(parts: Mapping[str, MultimodalClassifier], *, impl: str = "auto") -> MultimodalClassifier:
    """One model of several trained alone: encoders, classifiers and prototypes, a neutral gate."""
    first = next(iter(parts.values()))
    sizes = {name: part.head.embedding_dims[name] for name, part in parts.items()}
    encoders = {name: part.encoders[0] for name, part in parts.items()}
    head = IIBalanceHead(sizes, first.num_classes, impl=impl)
    model = MultimodalClassifier(encoders, head=head).to(next(first.parameters()).device)
    for index, part in enumerate(parts.values()):
        head.classifiers[index].load_state_dict(part.head.classifiers[0].state_dict())
        for kept, trained in zip(head.prototypes.table(index), part.head.prototypes.table(0)):
            kept.copy_(trained)
    return model


@torch.no_grad()
def out_of_fold_logits(
    models: Sequence[MultimodalClassifier], split: Split, folds: Sequence[np.ndarray]
) -> dict[str, Tensor]:
    """Each sample's logits by the fold model that has not seen it, [N, K] a modality."""
    first = models[0]
    result = {name: torch.zeros(len(split), first.num_classes) for name in first.modalities}
    for model, held in zip(models, folds):
        rows = torch.from_numpy(held)
        logits = model.head.heads(embed_split(model, split.subset(rows)))
        for whole, values in zip(result.values(), logits):
            whole[rows] = values.cpu()
    return result


def probe_logits(
    features: Mapping[str, Tensor],
    targets: Tensor,
    folds: Sequence[np.ndarray],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-fitted log-probabilities [N, K] of a linear probe a modality.

    The probe is multinomial logistic regression on standardised features.

    No fold helps against features made by a network that was trained on the same labels: on public
    CMU-MOSI features this gave 0.54 for a modality that is at chance on new videos. Use raw inputs,
    features of a frozen network trained on other data, or the ``unimodal`` source.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes, y = int(targets.max()) + 1, targets.numpy()
    result = {}
    for index, (name, values) in enumerate(features.items()):
        x = values.flatten(1).double().numpy()
        out = np.full((len(y), classes), -30.0)
        present = np.ones(len(y), bool) if mask is None else mask[:, index].numpy()
        for held in folds:
            fit = present.copy()
            fit[held] = False
            if len(np.unique(y[fit])) < 2:
                raise InputError(
                    f"budgets: outside one fold {name} is present for fewer than two classes; "
                    "lower budgets.folds"
                )
            held = held[present[held]]  # elsewhere may stand anything, NaN included
            # On two shared cores 0.05 s a fit of 1,000 x 240; 3.7 s with OpenBLAS's two threads.
            with threadpool_limits(1, user_api="blas"):
                probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
                probe.fit(x[fit], y[fit])
                if len(held):
                    out[np.ix_(held, probe.classes_)] = probe.predict_log_proba(x[held])
        result[name] = torch.from_numpy(np.maximum(out, -30.0))
    return result


def estimate_budgets(
    inputs: Mapping[str, Tensor | np.ndarray] | Samples,
    targets: Tensor | np.ndarray | Sequence | None = None,
    *,
    source: str = BudgetConfig.source,
    mask: Tensor | np.ndarray | None = None,
    groups: Tensor | np.ndarray | None = None,
    folds: int = BudgetConfig.folds,
    encoders: Mapping[str, Encoder] | None = None,
    epochs: int = RunConfig.epochs,
    training: TrainingConfig | None = None,
    alpha: float = ObjectiveConfig.alpha,
    previous: Budgets | None = None,
    momentum: float = 0.5,
    seed: int = 0,
) -> Budgets:
    """Estimate the Intrinsic Information Budget of every modality, with standard errors.

    b_m = max(0, 1 - CE_m / H(Y)) on held-out samples (method page, section 1).

    Args:
        inputs: modality name -> array. For ``unimodal`` standardised inputs [N, ...]; for ``probe``
            features [N, ...] (flattened); for ``online`` held-out logits [N, K] of the heads that
            are being trained.
        targets: [N] classes, integers or strings. Training samples for the first two sources (never
            the test split), held-out ones for ``online``.
        source: ``"unimodal"``: short cross-fitted trainings of an encoder a modality, the default
            and the most faithful. ``"probe"``: cross-fitted linear probes, seconds; beware of
            features made by a network that was trained on the same labels (see
            :func:`probe_logits`). ``"online"``: a moving average over epochs.
        mask: [N, M] bool, True = present.
        groups: [N], whose values (speakers, videos, subjects) no two folds share.
        folds, epochs, training, seed: of the cross-fitting.
        encoders: modality name -> module, or function that makes one; built-in ones by shape by
            default.
        alpha: weight of the prototype contrastive loss in these trainings.
        previous, momentum: ``online`` only: what the moving average starts from, and how much of it
            stays.

    Raises :class:`~iibalance.errors.InputError` naming the argument for a single class, unequal
    lengths, too few samples or groups for the folds.

    >>> x, y = torch.randn(120, 3), torch.arange(120) % 2
    >>> copy = torch.nn.functional.one_hot(y).float()
    >>> budgets = estimate_budgets({"copy": copy, "noise": x}, y, source="probe")
    >>> budgets.values[0] > 0.9, budgets.uninformative
    (True, ['noise'])
    """
    if source not in ("unimodal", "probe", "online"):
        raise InputError(f"source: {source!r} is none of unimodal, probe, online")
    split, class_names = _as_split(inputs, targets, mask, groups, encoders)
    entropy = label_entropy(split.targets)
    if source == "online":
        fresh = budgets_from_logits(
            split.inputs, split.targets, mask=split.mask, entropy=entropy, source=source
        )
        return smooth_budgets(previous, fresh, momentum)
    makers = as_factories(encoders, split.modalities)
    for name, make in makers.items():
        encoder_size(make(), split.head(name), name)
    for name in split.modalities:
        if name not in makers:
            makers[name] = partial(build_encoder, tuple(split.inputs[name].shape[1:]))
    trainer = Trainer(training or TrainingConfig(), seed=seed, class_names=class_names)
    plain = {name: _as_layout(values) for name, values in split.inputs.items()}
    with surroundings(plain, trainer.accelerator.device):
        budgets, _ = budget_stage(
            trainer,
            {name: makers[name] for name in split.modalities},
            split,
            folds_of(split, folds, seed, class_names),
            source=source,
            num_classes=int(split.targets.max()) + 1,
            epochs=epochs,
            alpha=alpha,
        )
    return budgets


def _as_layout(values: Values) -> str:
    return "vector" if is_numeric(values) and values.dim() == 2 else "other"


def _as_split(
    inputs: Any, targets: Any, mask: Any, groups: Any, encoders: Any
) -> tuple[Split, list[str]]:
    """The arguments of :func:`estimate_budgets`, checked, and the names of the classes."""
    if not isinstance(inputs, Samples):
        samples = Samples(inputs, mask=mask, some=False)
    else:
        samples = inputs if mask is None else inputs.with_mask(mask)
    labels = samples.targets if targets is None else targets
    if labels is None:
        raise InputError("targets: there are none; give the class of each sample")
    labels = check_labels(labels, len(samples), InputError, "targets")
    if len(np.unique(labels)) < 2:
        raise InputError("targets: hold a single class; a budget needs at least two")
    positions, class_names = encode_labels(labels, None, InputError)
    numbered = samples.groups if groups is None else np.asarray(groups)
    if numbered is not None:
        if numbered.shape != (len(samples),):
            raise InputError(f"groups: has {len(numbered)} entries, targets {len(samples)}")
        numbered = torch.as_tensor(np.unique(numbered, return_inverse=True)[1])
    values = ArrayReader(samples.inputs)(range(len(samples)), samples.modalities)
    for name, part in values.items():
        if isinstance(part, dict):
            if name not in (encoders or {}):
                raise InputError(f"inputs: {name} holds fields; give encoders={{{name!r}: ...}}")
        elif name not in (encoders or {}):
            values[name] = part.float()
    mask, positions = torch.from_numpy(samples.mask), torch.from_numpy(positions)
    return Split(values, positions, mask, numbered), class_names

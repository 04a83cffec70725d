"""Trainings one after another: each starts from its own seed, and its result is kept in the run's folder so that a resumed run skips it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from iibalance.config import TrainingConfig
from iibalance.data.dataset import Split
from iibalance.files import read_model, write_model
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier, encoder_size
from iibalance.training.folder import RunFolder
from iibalance.training.loop import derive_seed, fit

Factory = Callable[[], nn.Module]


def make_accelerator(training: TrainingConfig, **options) -> Accelerator:
    """An Accelerator for one run; an earlier run of this process may have used another precision."""
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation,
        **options,
    )


class Stages:
    """Runs trainings in order. With a ``folder``, each one's weights and history stand in ``stages/<name>.safetensors`` once it is done."""

    def __init__(
        self,
        training: TrainingConfig,
        *,
        seed: int,
        accelerator: Accelerator | None = None,
        folder: RunFolder | None = None,
    ):
        self.training, self.seed, self.folder, self.order = training, seed, folder, 0
        self.accelerator = make_accelerator(training) if accelerator is None else accelerator

    def path(self, name: str, key: dict, epochs: int) -> Path | None:
        """Where this training's result stands, or is to stand; None = nowhere. ``key``: what else than name and seed makes it what it is."""
        return None if self.folder is None else self.folder.path / "stages" / f"{name}.safetensors"

    def fit(
        self,
        name: str,
        build: Factory,
        train: Split,
        validation: Split | None,
        *,
        epochs: int,
        key: dict | None = None,
        **options,
    ) -> tuple[nn.Module, list[dict]]:
        """Build a model, train it (see :func:`iibalance.training.loop.fit`) and return it with its history; or read both if this stage is done already."""
        torch.manual_seed(derive_seed(self.seed, name, "init"))
        model = build()
        path = self.path(name, key or {}, epochs)
        order, self.order = self.order, self.order + 1
        if path is not None and path.exists():
            weights, metadata = read_model(path)
            model.load_state_dict(weights)
            return model.to(self.accelerator.device), json.loads(metadata["history"])
        groups = options.pop("groups", None)
        history = fit(
            model,
            train,
            validation,
            epochs=epochs,
            training=self.training,
            seed=self.seed,
            accelerator=self.accelerator,
            name=name,
            folder=self.folder,
            order=order,
            groups=None if groups is None else groups(model),
            **options,
        )
        if path is not None and self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_model(path, model.state_dict(), {"history": json.dumps(history)})
        self.accelerator.wait_for_everyone()
        return model, history


def only(split: Split, name: str) -> Split:
    """The samples of ``split`` in which modality ``name`` is present, with that modality alone."""
    rows = split.mask[:, list(split.inputs).index(name)].nonzero().squeeze(1)
    groups = None if split.groups is None else split.groups[rows]
    return Split(
        {name: split.inputs[name][rows]},
        split.targets[rows],
        torch.ones(len(rows), 1, dtype=torch.bool),
        groups,
    )


def alone_model(
    name: str,
    encoder: nn.Module,
    sample: torch.Tensor,
    num_classes: int,
    *,
    alpha: float = 0.0,
    impl: str = "auto",
) -> MultimodalClassifier:
    """The model that trains one modality's encoder alone, by the cross-entropy of its head and ``alpha`` times the prototype contrastive loss."""
    sizes, objective = (
        {name: encoder_size(encoder, sample)},
        IIBalanceLoss(fused_weight=0.0, alpha=alpha, beta=0.0, impl=impl),
    )
    return MultimodalClassifier(
        {name: encoder},
        num_classes,
        embedding_dims=sizes,
        objective=objective,
        gate_hidden=0,
        impl=impl,
    )


def fit_alone(
    stages: Stages,
    name: str,
    encoder: Factory,
    train: Split,
    validation: Split | None,
    *,
    num_classes: int,
    epochs: int,
    alpha: float = 0.0,
    rate: float = 1.0,
    stage: str = "alone",
    impl: str = "auto",
) -> tuple[MultimodalClassifier, list[dict]]:
    """Train one modality's encoder alone (:func:`alone_model`), at ``rate`` times the learning rate."""
    own = only(train, name)
    build = lambda: alone_model(
        name, encoder(), own.inputs[name][:2], num_classes, alpha=alpha, impl=impl
    )
    validation = None if validation is None else only(validation, name)
    index = list(train.inputs).index(name)
    return stages.fit(
        f"{stage}-{index}",
        build,
        own,
        validation if validation is not None and len(validation) else None,
        epochs=epochs,
        rate=rate,
        key={"alpha": alpha, "rate": rate},
    )


def cross_fit(
    stages: Stages,
    encoders: dict[str, Factory],
    train: Split,
    folds: Sequence[np.ndarray],
    *,
    num_classes: int,
    epochs: int,
    alpha: float = 0.0,
    rate: float = 1.0,
    impl: str = "auto",
) -> list[MultimodalClassifier]:
    """For each fold a model of encoders trained alone on the other folds, put together under one (uncalibrated) head.

    No early stopping: the held-out fold must not choose the epoch at which it is judged.
    """
    models = []
    for number, held in enumerate(folds):
        rows = torch.ones(len(train), dtype=torch.bool)
        rows[torch.from_numpy(held)] = False
        rest = train.subset(rows)
        parts = [
            fit_alone(
                stages,
                name,
                encoder,
                rest,
                None,
                num_classes=num_classes,
                epochs=epochs,
                alpha=alpha,
                rate=rate,
                stage=f"fold-{number}",
                impl=impl,
            )[0]
            for name, encoder in encoders.items()
        ]
        models.append(join(dict(zip(encoders, parts)), impl=impl))
    return models


def join(parts: dict[str, MultimodalClassifier], *, impl: str = "auto") -> MultimodalClassifier:
    """One model of several trained alone: their encoders, classifiers and prototypes, under a neutral gate."""
    sizes = {name: part.head.embedding_dims[name] for name, part in parts.items()}
    first = next(iter(parts.values()))
    head = IIBalanceHead(sizes, first.num_classes, gate_hidden=0, impl=impl)
    model = MultimodalClassifier(
        {name: part.encoders[0] for name, part in parts.items()}, head=head
    )
    model.to(next(first.parameters()).device)
    for index, part in enumerate(parts.values()):
        model.head.classifiers[index].load_state_dict(part.head.classifiers[0].state_dict())
        for key in ("prototypes", "counts"):
            getattr(model.head.prototypes, f"{key}_{index}").copy_(
                getattr(part.head.prototypes, f"{key}_0")
            )
    return model

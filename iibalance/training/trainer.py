"""Trainings one after another, each kept once it is done, and encoders trained alone.

Each training starts from its own seed, and its result is kept in the run's folder, so that a
resumed run skips it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from iibalance.config import TrainingConfig
from iibalance.data.dataset import Split
from iibalance.data.values import Values
from iibalance.files import read_model, write_model
from iibalance.nn.encoding import encoder_size
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.own_encoders import Factory, GroupMaker
from iibalance.training.folder import RunFolder
from iibalance.training.loop import fit, speaker
from iibalance.training.sampling import derive_seed


def make_accelerator(training: TrainingConfig, **options) -> Accelerator:
    """An Accelerator for one run, whatever precision an earlier run of this process had."""
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=training.mixed_precision,
        gradient_accumulation_steps=training.gradient_accumulation,
        **options,
    )


class Trainer:
    """Runs trainings in order.

    With a ``folder``, each one's weights and history stand in ``stages/<name>.safetensors`` once it
    is done. ``parameter_groups``: see :func:`~iibalance.nn.own_encoders.with_own_groups`.
    """

    def __init__(
        self,
        training: TrainingConfig,
        *,
        seed: int,
        accelerator: Accelerator | None = None,
        folder: RunFolder | None = None,
        parameter_groups: Mapping[str, GroupMaker] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.class_names = class_names
        self.parameter_groups = dict(parameter_groups or {})
        self.training, self.seed, self.folder, self.order = training, seed, folder, 0
        self.accelerator = make_accelerator(training) if accelerator is None else accelerator

    def path(self, name: str, key: dict, epochs: int) -> Path | None:
        """Where this training's result stands, or is to stand; None = nowhere.

        ``key``: what else than name and seed makes it what it is.
        """
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
        """Build a model, train it and return it with its history; or read both if this is done.

        ``options`` are those of :func:`iibalance.training.loop.fit`.
        """
        torch.manual_seed(derive_seed(self.seed, name, "init"))
        model = build()
        path = self.path(name, key or {}, epochs)
        order, self.order = self.order, self.order + 1
        if path is not None and path.exists():
            weights, metadata = read_model(path)
            model.load_state_dict(weights)
            speaker(name, train, self.training, self.accelerator)("is done already")
            return model.to(self.accelerator.device), json.loads(metadata["history"])
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
            parameter_groups=self.parameter_groups,
            class_names=self.class_names,
            **options,
        )
        if path is not None and self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_model(path, model.state_dict(), {"history": json.dumps(history)})
        self.accelerator.wait_for_everyone()
        return model, history


def alone_model(
    name: str,
    encoder: nn.Module,
    sample: Values,
    num_classes: int,
    *,
    alpha: float = 0.0,
    impl: str = "auto",
) -> MultimodalClassifier:
    """The model that trains one modality's encoder alone.

    Its loss is the cross-entropy of its head and ``alpha`` times the prototype contrastive loss.
    """
    return MultimodalClassifier(
        {name: encoder},
        num_classes,
        embedding_dims={name: encoder_size(encoder, sample, name)},
        objective=IIBalanceLoss(fused_weight=0.0, alpha=alpha, beta=0.0, impl=impl),
        impl=impl,
    )


def fit_alone(
    trainer: Trainer,
    name: str,
    encoder: Factory,
    train: Split,
    validation: Split | None,
    *,
    num_classes: int,
    epochs: int,
    alpha: float = 0.0,
    stage: str = "alone",
    impl: str = "auto",
) -> tuple[MultimodalClassifier, list[dict]]:
    """Train one modality's encoder alone (:func:`alone_model`)."""
    own = train.only(name)
    held_out = None if validation is None else validation.only(name)
    return trainer.fit(
        f"{stage}-{train.modalities.index(name)}",
        lambda: alone_model(name, encoder(), own.head(name), num_classes, alpha=alpha, impl=impl),
        own,
        held_out if held_out is not None and len(held_out) else None,
        epochs=epochs,
        key={"alpha": alpha},
    )

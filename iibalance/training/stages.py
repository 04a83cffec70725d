"""The stages of one run, from data to report: budgets, encoders alone, joint training, calibration, one look at the test split."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from iibalance.budgets import (
    Budgets,
    budgets_from_logits,
    label_entropy,
    make_folds,
    probe_logits,
    smooth_budgets,
)
from iibalance.config import RunConfig
from iibalance.data.dataset import MultimodalData, Split
from iibalance.files import write_bytes, write_json
from iibalance.methods import Method
from iibalance.nn.calibration import HeldOut, collect, merge
from iibalance.nn.encoders import build_encoder
from iibalance.nn.model import MultimodalClassifier, embed_split, encoder_size
from iibalance.training.budget_stage import out_of_fold_logits
from iibalance.training.evaluation import evaluate
from iibalance.training.folder import RunFolder
from iibalance.training.loop import Outputs, derive_seed
from iibalance.training.report import write_report
from iibalance.training.saving import save_model
from iibalance.training.trainer import Factory, Stages, cross_fit, fit_alone, only


class Run:
    """The stages of one run, in order."""

    def __init__(
        self,
        config: RunConfig,
        data: MultimodalData,
        method: Method,
        folder: RunFolder | None,
        accelerator: Accelerator,
        encoders,
        given,
        folds,
        stages: Stages | None = None,
    ):
        self.config, self.data, self.method, self.folder, self.accelerator = (
            config,
            data,
            method,
            folder,
            accelerator,
        )
        self.given, self.folds = given, folds
        self.fold_models: list[
            MultimodalClassifier
        ] = []  # what the budget stage trained, for the joint training to start from
        self.stages = stages or Stages(
            config.training, seed=config.seed, accelerator=accelerator, folder=folder
        )
        m = config.model
        builtin = lambda name: (
            lambda: build_encoder(
                data.shapes[name],
                embedding_dim=m.embedding_dim,
                width=m.width,
                dropout=m.dropout,
                layout=data.layouts[name],
            )
        )
        self.encoders: dict[str, Factory] = {
            name: (encoders or {}).get(name) or builtin(name) for name in data.modalities
        }
        self.custom = encoders is not None

    @staticmethod
    def folds_of(method: Method, config: RunConfig, train: Split) -> list[np.ndarray] | None:
        """The held-out folds of the budget stage, where the method has one."""
        if not method.needs_budgets or config.budgets.source == "online":
            return None
        return make_folds(
            train.targets,
            config.budgets.folds,
            groups=train.groups,
            seed=derive_seed(config.seed, "folds"),
        )

    def run(self) -> dict:
        """All stages and the report: what ``metrics.json`` holds, {} on processes other than the main one."""
        model, history, budgets, alone = self.fit()
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return {}
        metrics = self.report(model, history, budgets, alone)
        self.accelerator.wait_for_everyone()
        return metrics

    def fit(
        self,
    ) -> tuple[MultimodalClassifier, list[dict], Budgets | None, dict[str, MultimodalClassifier]]:
        """The stages up to the calibrated model; nothing here sees the test split."""
        budgets, out_of_fold = self.estimate() if self.method.needs_budgets else (None, None)
        alone, alone_history = (
            self.train_alone() if self.config.training.alone or not self.method.joint else ({}, [])
        )
        if self.method.joint:
            model, history, budgets = self.train_joint(budgets)
        else:
            model, history = self.build(), alone_history
            if budgets is not None:
                self.method.set_budgets(model, budgets)
        self.method.assemble(model, alone)
        self.method.calibrate(
            model,
            self.data.train,
            self.data.validation,
            out_of_fold,
            derive_seed(self.config.seed, "calibration"),
        )
        return model, history, budgets, alone

    def build(self) -> MultimodalClassifier:
        parts = {name: encoder() for name, encoder in self.encoders.items()}
        sizes = {
            name: encoder_size(encoder, self.data.train.inputs[name][:2])
            for name, encoder in parts.items()
        }
        model = MultimodalClassifier(
            parts,
            head=self.method.head(sizes, self.data.num_classes),
            standardizer=self.data.standardizer,
            class_names=self.data.class_names,
        )
        return model.to(self.accelerator.device)

    def estimate(self) -> tuple[Budgets | None, HeldOut | None]:
        """Stage 1: budgets, and the held-out predictions that calibration can use."""
        config, train = self.config, self.data.train
        entropy, source, out_of_fold = label_entropy(train.targets), config.budgets.source, None
        budgets = self.given
        if budgets is None and source == "online":
            return None, None
        if budgets is None:
            folds = self.folds
            if source == "probe":
                logits = probe_logits(train.inputs, train.targets, folds, train.mask)
            else:
                models = self.fold_models = cross_fit(
                    self.stages,
                    self.encoders,
                    train,
                    folds,
                    num_classes=self.data.num_classes,
                    epochs=config.budgets.epochs or max(1, config.epochs // 2),
                    alpha=self.method.budget_alpha,
                    rate=self.method.rate,
                    impl=config.kernels,
                )
                logits = out_of_fold_logits(models, train, folds)
                out_of_fold = merge(
                    collect(
                        model,
                        train.subset(torch.from_numpy(held)),
                        config.calibration,
                        seed=derive_seed(config.seed, "copies", index),
                    )
                    for index, (model, held) in enumerate(zip(models, folds))
                )
            budgets = budgets_from_logits(
                logits, train.targets, mask=train.mask, entropy=entropy, source=source
            )
        if self.accelerator.is_main_process and self.folder is not None:
            budgets.save(self.folder.path / "budgets.json")
        return budgets, out_of_fold

    def train_alone(self) -> tuple[dict[str, MultimodalClassifier], list[dict]]:
        """The same encoders, each trained alone with the same budget of epochs."""
        models, histories = {}, {}
        for name, encoder in self.encoders.items():
            models[name], histories[name] = fit_alone(
                self.stages,
                name,
                encoder,
                self.data.train,
                self.data.validation,
                num_classes=self.data.num_classes,
                epochs=self.config.epochs,
                impl=self.config.kernels,
            )
        rows = []
        for epoch in range(max(map(len, histories.values()))):
            row = {"epoch": epoch + 1}
            for name, history in histories.items():
                if epoch < len(history):
                    row |= {
                        f"{key}.{name}": value
                        for key, value in history[epoch].items()
                        if key.endswith((".nll", ".accuracy", ".loss"))
                    }
            rows.append(row)
        return models, rows

    def train_joint(
        self, budgets: Budgets | None
    ) -> tuple[MultimodalClassifier, list[dict], Budgets | None]:
        """Stage 2."""
        online = self.method.needs_budgets and budgets is None

        def build() -> MultimodalClassifier:
            model = self.build()
            if budgets is not None:
                self.method.set_budgets(model, budgets)
            folds, self.fold_models = self.fold_models, []  # not kept through the training
            if folds:
                self.method.initialise(model, folds)
            return model

        def on_epoch(
            row: dict, model: MultimodalClassifier, outputs: Outputs, before: list[dict]
        ) -> dict:
            if self.accelerator.is_main_process:
                self.accelerator.log(
                    {key: value for key, value in row.items() if key != "epoch"}, step=row["epoch"]
                )
            if not online:
                return {}
            fresh = self._online(outputs)
            mixed = smooth_budgets(_from_row(before[-1], fresh) if before else None, fresh)
            self.method.set_budgets(model, mixed)
            return {
                f"budget.{name}": value for name, value in zip(mixed.modalities, mixed.values)
            } | {
                f"budget_error.{name}": value
                for name, value in zip(mixed.modalities, mixed.standard_errors)
            }

        self.method.prepare(self.measure, self.data.train, derive_seed(self.config.seed, "prepare"))
        model, history = self.stages.fit(
            "joint",
            build,
            self.data.train,
            self.data.validation,
            epochs=self.config.epochs,
            method=self.method,
            on_epoch=on_epoch,
            keep_last=True,
            groups=self.method.groups,
            rate=self.method.rate,
            key={
                **self.method.training_key(),
                "budgets": None if budgets is None else list(budgets.values),
            },
        )
        if online:
            best = min(history, key=lambda row: row["validation.nll"])
            budgets = _from_row(
                best,
                Budgets(
                    self.data.modalities,
                    (0.0,) * len(self.data.modalities),
                    (0.0,) * len(self.data.modalities),
                    label_entropy(self.data.train.targets),
                    "online",
                ),
            )
            if self.accelerator.is_main_process and self.folder is not None:
                budgets.save(self.folder.path / "budgets.json")
        return model, history, budgets

    def measure(
        self, name: str, loss: Callable, split: Split, measure: Callable, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train a new model by ``loss`` of its output for ``share`` of the epochs; ``measure(model)`` before and after (see ``Method.prepare``)."""
        found = {}

        def build() -> MultimodalClassifier:
            model = self.build()
            found["before"] = measure(model)
            return model

        method = Method(replace(self.config, method_options={}))
        method.loss = lambda output, model, batch, progress: loss(output)
        epochs = max(1, round(share * self.config.epochs))
        model, _ = self.stages.fit(
            name, build, split, None, epochs=epochs, method=method, key=self.method.training_key()
        )
        return found["before"], measure(model)

    def _chosen(self, history: list[dict]) -> dict:
        """``best_epoch`` where all weights are of one epoch, ``best_epochs`` by modality where each modality kept its own."""
        argmin = lambda column: (
            1 + min(range(len(history)), key=lambda epoch: history[epoch].get(column, float("inf")))
        )
        if self.method.joint and self.method.one_epoch:
            return {"best_epoch": argmin("validation.nll"), "best_epochs": None}
        return {
            "best_epoch": None,
            "best_epochs": {
                name: argmin(f"validation.nll.{name}") for name in self.data.modalities
            },
        }

    def _online(self, outputs: Outputs) -> Budgets:
        logits = {
            name: outputs.modality_logits[:, index]
            for index, name in enumerate(self.data.modalities)
        }
        return budgets_from_logits(
            logits,
            outputs.targets,
            mask=self.data.validation.mask,
            entropy=label_entropy(self.data.train.targets),
            source="online",
        )

    def report(
        self,
        model: MultimodalClassifier,
        history: list[dict],
        budgets: Budgets | None,
        alone: dict[str, MultimodalClassifier],
    ) -> dict:
        """The one look at the test split, and everything that a run's folder holds at the end. ``metrics.json`` is written last."""
        config, data, path = self.config, self.data, self.folder.path
        majority = int(torch.bincount(data.train.targets).argmax())
        accuracy = (
            {name: _alone_accuracy(part, data, name) for name, part in alone.items()}
            if config.training.alone
            else {}
        )
        test, reliability = evaluate(model, data.test, alone=accuracy, majority=majority)
        validation, _ = evaluate(model, data.validation, majority=majority)
        metrics = {
            "method": config.method,
            "seed": config.seed,
            "data": data.name,
            "classes": data.num_classes,
            "samples": {
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
            },
            "epochs": len(history),
            **self._chosen(history),
            "parameters": sum(value.numel() for value in model.parameters()),
            "budgets": None if budgets is None else dict(zip(budgets.modalities, budgets.values)),
            "validation": validation,
            "test": test,
        }
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_bytes(path / "history.csv", text.getvalue().encode())
        save_model(path / "model.safetensors", model, config, data, custom=self.custom)
        write_report(
            path / "report.png",
            history=history,
            metrics=metrics,
            budgets=None if budgets is None else budgets.to_dict(),
            reliability=reliability,
            title=f"{config.method} on {data.name}",
        )
        write_json(path / "metrics.json", metrics)
        shutil.rmtree(path / "stages", ignore_errors=True)
        return metrics


def _alone_accuracy(model: MultimodalClassifier, data: MultimodalData, name: str) -> float | None:
    split = only(data.test, name)
    if not len(split):
        return None
    logits = model.head.heads(embed_split(model, split))[0].cpu()
    return float((logits.argmax(-1) == split.targets).double().mean())


def _from_row(row: dict, like: Budgets) -> Budgets:
    values = tuple(row[f"budget.{name}"] for name in like.modalities)
    return Budgets(
        like.modalities,
        values,
        tuple(row[f"budget_error.{name}"] for name in like.modalities),
        like.label_entropy,
        like.source,
    )

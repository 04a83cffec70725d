"""The stages of one run, in order.

Budgets, encoders alone, joint training, calibration, one look at the test split, report.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from iibalance.budgets import Budgets, label_entropy, smooth_budgets
from iibalance.config import RunConfig
from iibalance.data.dataset import MultimodalData, Split
from iibalance.files import write_bytes, write_json
from iibalance.methods import Method
from iibalance.nn.calibration import HeldOut, collect, merge
from iibalance.nn.encoders import builtin
from iibalance.nn.encoding import encoder_size
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.own_encoders import Factory, GroupMaker
from iibalance.training.budget_stage import budget_stage, folds_of
from iibalance.training.evaluation import Outputs, evaluate
from iibalance.training.folder import RunFolder
from iibalance.training.report import report_title, write_report
from iibalance.training.sampling import derive_seed
from iibalance.training.saving import save_model
from iibalance.training.trainer import Trainer, fit_alone


class Run:
    """The stages of one run.

    Args:
        config, data, method: of the run.
        folder: where results go; None = nowhere.
        accelerator: the run's device and processes.
        encoders: modality name -> function that makes the user's own encoder.
        given: budgets that are not to be estimated.
        folds: of the budget stage, by :meth:`folds_of`.
        trainer: makes the trainings; one of the run's own by default.
        parameter_groups: modality name -> groups of its encoder's parameters.
    """

    def __init__(
        self,
        config: RunConfig,
        data: MultimodalData,
        method: Method,
        folder: RunFolder | None,
        accelerator: Accelerator,
        encoders: Mapping[str, Factory] | None = None,
        given: Budgets | None = None,
        folds: list[np.ndarray] | None = None,
        trainer: Trainer | None = None,
        parameter_groups: Mapping[str, GroupMaker] | None = None,
    ):
        self.config, self.data, self.method = config, data, method
        self.folder, self.accelerator = folder, accelerator
        self.given, self.folds = given, folds
        self.trainer = trainer or Trainer(
            config.training,
            seed=config.seed,
            accelerator=accelerator,
            folder=folder,
            parameter_groups=parameter_groups,
            class_names=data.class_names,
        )
        #: The modalities whose encoders are the user's own.
        self.own = tuple(encoders or ())
        self.encoders: dict[str, Factory] = {
            name: (encoders or {}).get(name) or self._builtin(name) for name in data.modalities
        }

    @staticmethod
    def folds_of(
        method: Method, config: RunConfig, data: MultimodalData, given: Budgets | None = None
    ) -> list[np.ndarray] | None:
        """The held-out folds of the budget stage, where the method has one and none are given."""
        if given is not None or not method.needs_budgets or config.budgets.source == "online":
            return None
        return folds_of(data.train, config.budgets.folds, config.seed, data.class_names)

    def run(self) -> tuple[MultimodalClassifier, dict, Budgets | None]:
        """All stages and the report: the model, what ``metrics.json`` holds, and the budgets.

        The metrics are empty on processes other than the main one.
        """
        model, history, budgets, alone = self.fit()
        metrics = {}
        if self.accelerator.is_main_process:
            metrics = self.report(model, history, budgets, alone)
        self.accelerator.wait_for_everyone()
        return model.eval(), metrics, budgets

    def fit(
        self,
    ) -> tuple[MultimodalClassifier, list[dict], Budgets | None, dict[str, MultimodalClassifier]]:
        """The stages up to the calibrated model; nothing here sees the test split.

        Returns the model, its history, the budgets, and the models of encoders trained alone.
        """
        budgets, out_of_fold = None, None
        if self.method.needs_budgets:
            budgets, out_of_fold = self.estimate()
        alone, alone_history = {}, []
        method = self.method
        if self.config.training.alone or not method.joint or method.starts_alone:
            alone, alone_history = self.train_alone()
        if method.joint:
            model, history, budgets = self.train_joint(budgets, alone)
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
        """A new model of the run's encoders and the method's head."""
        parts = {name: make() for name, make in self.encoders.items()}
        train = self.data.train
        sizes = {n: encoder_size(part, train.head(n), n) for n, part in parts.items()}
        model = MultimodalClassifier(
            parts,
            head=self.method.head(sizes, self.data.num_classes),
            standardizer=self.data.standardizer,
            class_names=self.data.class_names,
            base_rate=base_rate_of(train.targets, self.data.num_classes),
        )
        return model.to(self.accelerator.device)

    def budgets(self) -> tuple[Budgets, list[MultimodalClassifier]]:
        """Budgets that are not given and not online, and the fold models that made them."""
        return budget_stage(
            self.trainer,
            self.encoders,
            self.data.train,
            self.folds,
            source=self.config.budgets.source,
            num_classes=self.data.num_classes,
            epochs=self.config.budgets.epochs_of(self.config.epochs),
            alpha=self.method.budget_alpha,
            impl=self.config.kernels,
            measure=self.method.measure_budgets,
        )

    def estimate(self) -> tuple[Budgets | None, HeldOut | None]:
        """Stage 1: budgets, and the held-out predictions that calibration can use.

        Online budgets are None here: the joint training estimates them.
        """
        budgets, out_of_fold = self.given, None
        if budgets is None and self.config.budgets.source == "online":
            return None, None
        if budgets is not None:
            # What makes a prior of them is the method's, whichever method they were written by
            budgets = replace(budgets, prior_softmax=self.method.prior_softmax)
        else:
            (budgets, models), train = self.budgets(), self.data.train
            if models:
                out_of_fold = merge(
                    collect(
                        model,
                        train.subset(torch.from_numpy(held)),
                        self.config.calibration,
                        seed=derive_seed(self.config.seed, "copies", index),
                    )
                    for index, (model, held) in enumerate(zip(models, self.folds))
                )
        self._save(budgets)
        return budgets, out_of_fold

    def train_alone(self) -> tuple[dict[str, MultimodalClassifier], list[dict]]:
        """The same encoders, each trained alone with the same budget of epochs."""
        models, histories = {}, {}
        for name, encoder in self.encoders.items():
            models[name], histories[name] = fit_alone(
                self.trainer,
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
                for key, value in (history[epoch] if epoch < len(history) else {}).items():
                    if key.endswith((".nll", ".accuracy", ".loss")):
                        row[f"{key}.{name}"] = value
            rows.append(row)
        return models, rows

    def train_joint(
        self, budgets: Budgets | None, alone: Mapping[str, MultimodalClassifier]
    ) -> tuple[MultimodalClassifier, list[dict], Budgets | None]:
        """Stage 2, from the models of encoders trained ``alone`` where the method wants it."""
        online = self.method.needs_budgets and budgets is None

        def build() -> MultimodalClassifier:
            model = self.build()
            if budgets is not None:
                self.method.set_budgets(model, budgets)
            if self.method.starts_alone:
                self.method.initialise(model, alone)
            return model

        def on_epoch(
            row: dict, model: MultimodalClassifier, outputs: Outputs, before: list[dict]
        ) -> dict:
            if self.accelerator.is_main_process:
                logged = {key: value for key, value in row.items() if key != "epoch"}
                self.accelerator.log(logged, step=row["epoch"])
            return self._online(model, outputs, before) if online else {}

        seed = derive_seed(self.config.seed, "prepare")
        self.method.prepare(self.measure, self.data.train, seed)
        values = None if budgets is None else list(budgets.values)
        model, history = self.trainer.fit(
            "joint",
            build,
            self.data.train,
            self.data.validation,
            epochs=self.config.epochs,
            method=self.method,
            on_epoch=on_epoch,
            keep_last=True,
            key={**self.method.training_key(), "budgets": values},
        )
        if online:
            best = min(history, key=lambda row: row["validation.nll"])
            budgets = self._from_row(best)
            self._save(budgets)
        return model, history, budgets

    def measure(
        self, name: str, loss: Callable, split: Split, measure: Callable, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``measure(model)`` before and after a training (see ``Method.prepare``).

        A new model is trained by ``loss`` of its output, for ``share`` of the epochs.
        """
        found = {}

        def build() -> MultimodalClassifier:
            model = self.build()
            found["before"] = measure(model)
            return model

        method = Method(replace(self.config, method_options={}))
        method.loss = lambda output, model, batch, progress: loss(output)
        epochs = max(1, round(share * self.config.epochs))
        key = self.method.training_key()
        model, _ = self.trainer.fit(name, build, split, None, epochs=epochs, method=method, key=key)
        return found["before"], measure(model)

    def report(
        self,
        model: MultimodalClassifier,
        history: list[dict],
        budgets: Budgets | None,
        alone: Mapping[str, MultimodalClassifier],
    ) -> dict:
        """The one look at the test split, and everything that a run's folder holds at the end.

        ``metrics.json`` is written last.
        """
        config, data, path = self.config, self.data, self.folder.path
        test = evaluate(model, data.test, alone=self._alone_accuracy(alone))
        metrics = {
            "method": self.method.name,
            "seed": config.seed,
            "data": data.name,
            "classes": data.num_classes,
            "samples": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
            "epochs": len(history),
            **self._chosen(history),
            "parameters": sum(value.numel() for value in model.parameters()),
            "budgets": None if budgets is None else dict(zip(budgets.modalities, budgets.values)),
            "validation": evaluate(model, data.validation).metrics,
            "test": test.metrics,
        }
        write_bytes(path / "history.csv", _as_csv(history).encode())
        save_model(path / "model.safetensors", model, own=self.own)
        write_report(
            path / "report.png",
            history=history,
            metrics=metrics,
            budgets=None if budgets is None else budgets.to_dict(),
            reliability=test.reliability,
            title=report_title(self.method.name, data.name, config.data),
        )
        write_json(path / "metrics.json", metrics)
        shutil.rmtree(path / "stages", ignore_errors=True)
        return metrics

    def _builtin(self, name: str) -> Factory:
        return builtin(name, self.config.model, self.data.standardizer)

    def _save(self, budgets: Budgets) -> None:
        if self.accelerator.is_main_process and self.folder is not None:
            budgets.save(self.folder.path / "budgets.json")

    def _online(
        self, model: MultimodalClassifier, outputs: Outputs, before: list[dict]
    ) -> dict[str, float]:
        """Move the online budgets by an epoch's validation outputs; their columns of its row."""
        names = self.data.modalities
        fresh = self.method.measure_budgets(
            {name: outputs.modality_logits[:, index] for index, name in enumerate(names)},
            outputs.targets,
            mask=self.data.validation.mask,
            entropy=label_entropy(self.data.train.targets),
            source="online",
        )
        mixed = smooth_budgets(self._from_row(before[-1]) if before else None, fresh)
        self.method.set_budgets(model, mixed)
        columns = {f"budget.{name}": value for name, value in zip(names, mixed.values)}
        errors = zip(names, mixed.standard_errors)
        return columns | {f"budget_error.{name}": value for name, value in errors}

    def _from_row(self, row: Mapping[str, float]) -> Budgets:
        """The online budgets that a row of the history holds."""
        names = self.data.modalities
        return Budgets(
            names,
            tuple(row[f"budget.{name}"] for name in names),
            tuple(row[f"budget_error.{name}"] for name in names),
            label_entropy(self.data.train.targets),
            "online",
            self.method.prior_softmax,
        )

    def _chosen(self, history: list[dict]) -> dict:
        """``best_epoch`` of all weights, or ``best_epochs`` by modality where each kept its own."""

        def lowest(column: str) -> int:
            values = [row.get(column, float("inf")) for row in history]
            return 1 + values.index(min(values))

        if self.method.joint and self.method.one_epoch:
            return {"best_epoch": lowest("validation.nll"), "best_epochs": None}
        epochs = {name: lowest(f"validation.nll.{name}") for name in self.data.modalities}
        return {"best_epoch": None, "best_epochs": epochs}

    def _alone_accuracy(self, alone: Mapping[str, MultimodalClassifier]) -> dict[str, float | None]:
        """Test accuracy of the encoders trained alone, where that was asked for."""
        if not self.config.training.alone:
            return {}
        found = {}
        for name, model in alone.items():
            split = self.data.test.only(name)
            found[name] = None
            if len(split):
                own = evaluate(model, split, shapley=False).metrics["modalities"][name]
                found[name] = own["accuracy"]
        return found


def base_rate_of(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """[K]: each class's share of the training samples.

    >>> base_rate_of(torch.tensor([0, 1, 1, 1]), 3).tolist()
    [0.25, 0.75, 0.0]
    """
    return torch.bincount(targets, minlength=num_classes).float() / len(targets)


def _as_csv(history: list[dict]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in history for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()

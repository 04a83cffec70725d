"""One training run from data to report: budgets, encoders alone, joint training, calibration, one look at the test split.

Each stage writes its result whole before the next begins, so a run killed at any moment goes on from the last stage or checkpoint and ends with the same
numbers, bit for bit on the CPU.
"""
from __future__ import annotations

import csv
import hashlib
import io
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import iib_kernels
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, is_tensorboard_available
from torch import nn

from iibalance.budgets import Budgets, budgets_from_logits, label_entropy, make_folds, probe_logits, smooth_budgets
from iibalance.calibration import HeldOut, collect, merge
from iibalance.config import RunConfig, save_config
from iibalance.data import load_data
from iibalance.data.base import MultimodalData, Split
from iibalance.encoders import build_encoder
from iibalance.errors import InputError
from iibalance.estimation import out_of_fold_logits
from iibalance.evaluation import evaluate
from iibalance.loading import save_model
from iibalance.loop import Outputs, derive_seed
from iibalance.methods import Method, make_method
from iibalance.model import MultimodalClassifier, embed_split, encoder_size
from iibalance.report import write_report
from iibalance.runs import RunFolder, read_json, write_bytes, write_json
from iibalance.stages import Factory, Stages, cross_fit, fit_alone, make_accelerator, only

PACKAGES = ("torch", "triton", "numpy", "accelerate", "torchmetrics", "scikit-learn", "iibalance")


def train(
    config: RunConfig, *, data: MultimodalData | None = None, encoders: Mapping[str, Callable[[], nn.Module]] | None = None, resume: bool = False,
) -> dict:
    """Train by ``config`` into the folder ``config.output`` and return what ``metrics.json`` holds.

    Args:
        data: by default what ``config.data`` names.
        encoders: modality name -> function that makes a new encoder (several copies of each are trained); built-in ones by layout by default. Given
            encoders must be given to :func:`iibalance.load` as well.
        resume: go on with the run in ``config.output``; a finished run is left as it is.

    Raises :class:`~iibalance.errors.InputError` for anything that is wrong with data, options or folder, before anything is written where it can.
    """
    method = make_method(config.method, config)
    check_options(config)
    data = load_data(config.data) if data is None else data
    method.check(data.modalities)
    for name, make in (encoders or {}).items():
        if name not in data.modalities:
            raise InputError(f"encoders: {name!r} is none of the data's modalities ({', '.join(data.modalities)})")
        encoder_size(make(), data.train.inputs[name][:2])  # refused before a folder is made
    given = Budgets.load(config.budgets.path) if config.budgets.path else None
    if given is not None and set(given.modalities) != set(data.modalities):
        raise InputError(f"{config.budgets.path}: budgets of {', '.join(given.modalities)}, the data has {', '.join(data.modalities)}")
    folds = None if given is not None else Run.folds_of(method, config, data.train)
    _check_samples(data.train, folds or [])
    config = replace(config, output=config.output or default_output(config))
    accelerator = make_accelerator(config.training, **_trackers(config))
    if accelerator.num_processes > 1 and not method.processes:
        raise InputError(f"method: {config.method} trains in one process only, there are {accelerator.num_processes}")
    _check_kernels(config.kernels, accelerator.device)
    main, threads = accelerator.is_main_process, torch.get_num_threads()
    if accelerator.device.type == "cpu" and set(data.layouts.values()) == {"vector"}:
        torch.set_num_threads(1)  # so small that two threads mostly wait for each other: 66 against 46 s of CPU time on digits
    folder = RunFolder.create(config.output, resume=resume) if main else RunFolder(config.output)
    try:
        if main:
            _describe(folder, config, data, resume)
        accelerator.wait_for_everyone()
        if (folder.path / "metrics.json").exists():
            return read_json(folder.path / "metrics.json")
        if main and resume:
            folder.latest_checkpoint()  # damaged: refused before anything else is written
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")  # the folder of the events
        return Run(config, data, method, folder, accelerator, encoders, given, folds).run()
    finally:
        accelerator.end_training()
        torch.set_num_threads(threads)
        folder.close()


class Run:
    """The stages of one run, in order."""

    def __init__(self, config: RunConfig, data: MultimodalData, method: Method, folder: RunFolder | None, accelerator: Accelerator, encoders, given, folds,
                 stages: Stages | None = None):
        self.config, self.data, self.method, self.folder, self.accelerator = config, data, method, folder, accelerator
        self.given, self.folds = given, folds
        self.fold_models: list[MultimodalClassifier] = []  # what the budget stage trained, for the joint training to start from
        self.stages = stages or Stages(config.training, seed=config.seed, accelerator=accelerator, folder=folder)
        m = config.model
        builtin = lambda name: lambda: build_encoder(
            data.shapes[name], embedding_dim=m.embedding_dim, width=m.width, dropout=m.dropout, layout=data.layouts[name])
        self.encoders: dict[str, Factory] = {name: (encoders or {}).get(name) or builtin(name) for name in data.modalities}
        self.custom = encoders is not None

    @staticmethod
    def folds_of(method: Method, config: RunConfig, train: Split) -> list[np.ndarray] | None:
        """The held-out folds of the budget stage, where the method has one."""
        if not method.needs_budgets or config.budgets.source == "online":
            return None
        return make_folds(train.targets, config.budgets.folds, groups=train.groups, seed=derive_seed(config.seed, "folds"))

    def run(self) -> dict:
        """All stages and the report: what ``metrics.json`` holds, {} on processes other than the main one."""
        model, history, budgets, alone = self.fit()
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return {}
        metrics = self.report(model, history, budgets, alone)
        self.accelerator.wait_for_everyone()
        return metrics

    def fit(self) -> tuple[MultimodalClassifier, list[dict], Budgets | None, dict[str, MultimodalClassifier]]:
        """The stages up to the calibrated model; nothing here sees the test split."""
        budgets, out_of_fold = self.estimate() if self.method.needs_budgets else (None, None)
        alone, alone_history = self.train_alone() if self.config.training.alone or not self.method.joint else ({}, [])
        if self.method.joint:
            model, history, budgets = self.train_joint(budgets)
        else:
            model, history = self.build(), alone_history
            if budgets is not None:
                self.method.set_budgets(model, budgets)
        self.method.assemble(model, alone)
        self.method.calibrate(model, self.data.train, self.data.validation, out_of_fold, derive_seed(self.config.seed, "calibration"))
        return model, history, budgets, alone

    def build(self) -> MultimodalClassifier:
        parts = {name: encoder() for name, encoder in self.encoders.items()}
        sizes = {name: encoder_size(encoder, self.data.train.inputs[name][:2]) for name, encoder in parts.items()}
        model = MultimodalClassifier(parts, head=self.method.head(sizes, self.data.num_classes), standardizer=self.data.standardizer,
                                     class_names=self.data.class_names)
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
                    self.stages, self.encoders, train, folds, num_classes=self.data.num_classes, epochs=config.budgets.epochs or max(1, config.epochs // 2),
                    alpha=self.method.budget_alpha, rate=self.method.rate, impl=config.kernels,
                )
                logits = out_of_fold_logits(models, train, folds)
                out_of_fold = merge(
                    collect(model, train.subset(torch.from_numpy(held)), config.calibration, seed=derive_seed(config.seed, "copies", index))
                    for index, (model, held) in enumerate(zip(models, folds))
                )
            budgets = budgets_from_logits(logits, train.targets, mask=train.mask, entropy=entropy, source=source)
        if self.accelerator.is_main_process and self.folder is not None:
            budgets.save(self.folder.path / "budgets.json")
        return budgets, out_of_fold

    def train_alone(self) -> tuple[dict[str, MultimodalClassifier], list[dict]]:
        """The same encoders, each trained alone with the same budget of epochs."""
        models, histories = {}, {}
        for name, encoder in self.encoders.items():
            models[name], histories[name] = fit_alone(
                self.stages, name, encoder, self.data.train, self.data.validation, num_classes=self.data.num_classes, epochs=self.config.epochs,
                impl=self.config.kernels,
            )
        rows = []
        for epoch in range(max(map(len, histories.values()))):
            row = {"epoch": epoch + 1}
            for name, history in histories.items():
                if epoch < len(history):
                    row |= {f"{key}.{name}": value for key, value in history[epoch].items() if key.endswith((".nll", ".accuracy", ".loss"))}
            rows.append(row)
        return models, rows

    def train_joint(self, budgets: Budgets | None) -> tuple[MultimodalClassifier, list[dict], Budgets | None]:
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

        def on_epoch(row: dict, model: MultimodalClassifier, outputs: Outputs, before: list[dict]) -> dict:
            if self.accelerator.is_main_process:
                self.accelerator.log({key: value for key, value in row.items() if key != "epoch"}, step=row["epoch"])
            if not online:
                return {}
            fresh = self._online(outputs)
            mixed = smooth_budgets(_from_row(before[-1], fresh) if before else None, fresh)
            self.method.set_budgets(model, mixed)
            return {f"budget.{name}": value for name, value in zip(mixed.modalities, mixed.values)} | {
                f"budget_error.{name}": value for name, value in zip(mixed.modalities, mixed.standard_errors)}

        self.method.prepare(self.measure, self.data.train, derive_seed(self.config.seed, "prepare"))
        model, history = self.stages.fit(
            "joint", build, self.data.train, self.data.validation, epochs=self.config.epochs, method=self.method, on_epoch=on_epoch, keep_last=True,
            groups=self.method.groups, rate=self.method.rate, key={**self.method.training_key(), "budgets": None if budgets is None else list(budgets.values)},
        )
        if online:
            best = min(history, key=lambda row: row["validation.nll"])
            budgets = _from_row(best, Budgets(self.data.modalities, (0.0,) * len(self.data.modalities), (0.0,) * len(self.data.modalities),
                                              label_entropy(self.data.train.targets), "online"))
            if self.accelerator.is_main_process and self.folder is not None:
                budgets.save(self.folder.path / "budgets.json")
        return model, history, budgets

    def measure(self, name: str, loss: Callable, split: Split, measure: Callable, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Train a new model by ``loss`` of its output for ``share`` of the epochs; ``measure(model)`` before and after (see ``Method.prepare``)."""
        found = {}

        def build() -> MultimodalClassifier:
            model = self.build()
            found["before"] = measure(model)
            return model

        method = Method(replace(self.config, method_options={}))
        method.loss = lambda output, model, batch, progress: loss(output)
        epochs = max(1, round(share * self.config.epochs))
        model, _ = self.stages.fit(name, build, split, None, epochs=epochs, method=method, key=self.method.training_key())
        return found["before"], measure(model)

    def _chosen(self, history: list[dict]) -> dict:
        """``best_epoch`` where all weights are of one epoch, ``best_epochs`` by modality where each modality kept its own."""
        argmin = lambda column: 1 + min(range(len(history)), key=lambda epoch: history[epoch].get(column, float("inf")))
        if self.method.joint and self.method.one_epoch:
            return {"best_epoch": argmin("validation.nll"), "best_epochs": None}
        return {"best_epoch": None, "best_epochs": {name: argmin(f"validation.nll.{name}") for name in self.data.modalities}}

    def _online(self, outputs: Outputs) -> Budgets:
        logits = {name: outputs.modality_logits[:, index] for index, name in enumerate(self.data.modalities)}
        return budgets_from_logits(logits, outputs.targets, mask=self.data.validation.mask, entropy=label_entropy(self.data.train.targets), source="online")

    def report(self, model: MultimodalClassifier, history: list[dict], budgets: Budgets | None, alone: dict[str, MultimodalClassifier]) -> dict:
        """The one look at the test split, and everything that a run's folder holds at the end. ``metrics.json`` is written last."""
        config, data, path = self.config, self.data, self.folder.path
        majority = int(torch.bincount(data.train.targets).argmax())
        accuracy = {name: _alone_accuracy(part, data, name) for name, part in alone.items()} if config.training.alone else {}
        test, reliability = evaluate(model, data.test, alone=accuracy, majority=majority)
        validation, _ = evaluate(model, data.validation, majority=majority)
        metrics = {
            "method": config.method, "seed": config.seed, "data": data.name, "classes": data.num_classes,
            "samples": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
            "epochs": len(history), **self._chosen(history),
            "parameters": sum(value.numel() for value in model.parameters()),
            "budgets": None if budgets is None else dict(zip(budgets.modalities, budgets.values)),
            "validation": validation, "test": test,
        }
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_bytes(path / "history.csv", text.getvalue().encode())
        save_model(path / "model.safetensors", model, config, data, custom=self.custom)
        write_report(path / "report.png", history=history, metrics=metrics, budgets=None if budgets is None else budgets.to_dict(),
                     reliability=reliability, title=f"{config.method} on {data.name}")
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
    return Budgets(like.modalities, values, tuple(row[f"budget_error.{name}"] for name in like.modalities), like.label_entropy, like.source)


def check_options(config: RunConfig) -> None:
    """InputError for an option out of range."""
    t, c, o, inf = config.training, config.calibration, config.objective, float("inf")
    checks = [
        (config.epochs >= 1, "epochs", config.epochs, "at least 1"),
        (t.batch_size is None or t.batch_size >= 2, "training.batch_size", t.batch_size, "at least 2"),
        (0 < t.learning_rate < inf, "training.learning_rate", t.learning_rate, "a number above 0"),
        (0 <= t.weight_decay < inf, "training.weight_decay", t.weight_decay, "a number >= 0"),
        (t.max_gradient_norm >= 0, "training.max_gradient_norm", t.max_gradient_norm, "a number >= 0"),
        (t.checkpoint_seconds >= 0, "training.checkpoint_seconds", t.checkpoint_seconds, "a number >= 0"),
        (t.gradient_accumulation >= 1, "training.gradient_accumulation", t.gradient_accumulation, "at least 1"),
        (0 <= t.modality_dropout < 1, "training.modality_dropout", t.modality_dropout, "a number in [0, 1)"),
        (t.patience >= 1, "training.patience", t.patience, "at least 1"),
        (config.budgets.epochs is None or config.budgets.epochs >= 1, "budgets.epochs", config.budgets.epochs, "at least 1"),
        (config.budgets.folds >= 2, "budgets.folds", config.budgets.folds, "at least 2"),
        (c.copies >= 1, "calibration.copies", c.copies, "at least 1"),
        (0 <= c.corrupted_weight < inf, "calibration.corrupted_weight", c.corrupted_weight, "a number >= 0"),
        (0 <= c.max_strength < inf, "calibration.max_strength", c.max_strength, "a number >= 0"),
        (c.hidden >= 0, "calibration.hidden", c.hidden, "0 or more"),
        (c.prior_scale > 0, "calibration.prior_scale", c.prior_scale, "a number above 0"),
        (0 <= config.model.dropout < 1, "model.dropout", config.model.dropout, "a number in [0, 1)"),
        (config.model.width >= 1, "model.width", config.model.width, "at least 1"),
        (config.model.embedding_dim >= 1, "model.embedding_dim", config.model.embedding_dim, "at least 1"),
        (0 <= o.fused_weight < inf, "objective.fused_weight", o.fused_weight, "a number >= 0"),
        (0 <= o.alpha < inf, "objective.alpha", o.alpha, "a number >= 0"), (0 <= o.beta < inf, "objective.beta", o.beta, "a number >= 0"),
        (o.temperature > 0, "objective.temperature", o.temperature, "a number above 0"),
        (0 <= o.warmup <= 1, "objective.warmup", o.warmup, "a number in [0, 1]"), (0 <= o.ramp <= 1, "objective.ramp", o.ramp, "a number in [0, 1]"),
        (0 <= o.momentum < 1, "objective.momentum", o.momentum, "a number in [0, 1)"),
    ]
    for right, name, value, expected in checks:
        if not right:
            raise InputError(f"{name}: {value} cannot be used; give {expected}")


def _check_kernels(impl: str, device: torch.device) -> None:
    try:
        iib_kernels.gated_fusion([torch.zeros(1, 2, device=device)], impl=impl)
    except RuntimeError as error:
        raise InputError(f"kernels: {impl} cannot run on {device} ({error})") from None


def _check_samples(train: Split, folds: Sequence[np.ndarray]) -> None:
    """Every training of one modality must find two samples of it, and those outside a fold two classes."""
    for index, name in enumerate(train.inputs):
        present = train.mask[:, index]
        if int(present.sum()) < 2:
            raise InputError(f"{name}: present in only 1 training sample; give more of them, or leave {name} out with data.modalities")
        for held in folds:
            rest = present.clone()
            rest[torch.from_numpy(held)] = False
            if len(train.targets[rest].unique()) < 2:
                raise InputError(f"budgets.folds: outside one of the {len(folds)} folds {name} is present for fewer than two classes; "
                                 f"leave {name} out with data.modalities, or give budgets.path")


def default_output(config: RunConfig) -> str:
    """``runs/<data>-<method>-seed<seed>``, numbered so that it is a folder that is not there yet; the same on every process."""
    source = Path(config.data.path).stem if config.data.name == "npz" and config.data.path else config.data.name
    name, number = f"runs/{source}-{config.method}-seed{config.seed}", 1
    while Path(name if number == 1 else f"{name}-{number}").exists():
        number += 1
    chosen = [name if number == 1 else f"{name}-{number}"]
    PartialState()  # joins the processes, if there are several
    return broadcast_object_list(chosen)[0]


def _trackers(config: RunConfig) -> dict:
    return {"log_with": "tensorboard", "project_dir": config.output} if is_tensorboard_available() else {}


def _describe(folder: RunFolder, config: RunConfig, data: MultimodalData, resume: bool) -> None:
    """Write ``config.yaml`` and ``run.json``; on resuming, check that the data are still those of the first start."""
    path = config.data.path if config.data.name == "npz" else None
    digest = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() if path else None
    if resume:
        first = read_json(folder.path / "run.json").get("data_sha256")
        if first != digest:
            raise InputError(f"data.path: {path} is not the file that this run was started on (its sha256 differs); restore it, or start a new run")
        return
    write_json(folder.path / "run.json", {"command": sys.argv, "python": platform.python_version(), "machine": platform.platform(),
                                          "threads": torch.get_num_threads(), "versions": versions(), "data_sha256": digest})
    save_config(folder.config_path, config)  # last: with it the folder is a run


@cache
def code_digest() -> str:
    """A digest of the two packages' source, to tell results of different versions apart."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(iib_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """What is installed of the packages that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except Exception:  # not installed here: nothing to record
            found[package] = None
    return found

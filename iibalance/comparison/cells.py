"""What a comparison is made of: cells of one method, data set and seed.

Each has its results in files of its own. Trainings that several cells have in common (encoders
alone, folds) are made once.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from iibalance.comparison.resampling import load_split, shares
from iibalance.config import CompareConfig, DataConfig, RunConfig, TrainingConfig
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData, Split
from iibalance.files import (
    code_digest,
    data_digest,
    locked,
    read_json,
    versions,
    write_bytes,
    write_json,
)
from iibalance.method_names import METHOD_NAMES
from iibalance.methods import METHODS, make_method, own_source
from iibalance.training.evaluation import degrade, evaluate
from iibalance.training.sampling import derive_seed
from iibalance.training.stages import Run
from iibalance.training.trainer import Trainer, make_accelerator

CLEAN = "clean"
# The encoders trained alone: their heads' reference, and every comparison has it.
REFERENCE = METHOD_NAMES[0]
# What every method tunes; the last two where encoders are trained separately.
TRAINING_OPTIONS = ("learning_rate", "weight_decay", "learning_rates", "weight_decays")
STRENGTHS = {"noise1": 1.0, "noise6": 6.0}  # conditions of noise of a strength of their own
MILD = 1.0  # strength of the noise that is on everything


@dataclass(frozen=True)
class Cell:
    """One training and what is asked of it."""

    data: str
    method: str
    seed: int
    trial: int  #: which setting of the search
    #: "trial" (validation only), "test" (every condition), "low" (a share of the training samples,
    #: clean test).
    kind: str

    @property
    def key(self) -> str:
        """A file name."""
        method = self.method
        if method not in METHODS:
            method = "own-" + hashlib.sha256(method.encode()).hexdigest()[:10]
        trial = f"-trial{self.trial}" if self.kind == "trial" else ""
        return f"{self.kind}-{self.data}-{method}-seed{self.seed}{trial}"


def cell_files(folder: Path, cell: Cell) -> tuple[Path, Path]:
    """(numbers, per-sample test log-probabilities) of a cell."""
    return folder / "cells" / f"{cell.key}.json", folder / "cells" / f"{cell.key}.npz"


def run_config(config: CompareConfig, cell: Cell, setting: dict) -> RunConfig:
    """The options of a cell's run: the comparison's, and ``setting`` over them.

    Dotted names in the setting are options of a section, the rest the method's own.
    """
    data, about = data_config(config, cell.data), config.data[cell.data]
    if config.splits:
        data = replace(data, split_seed=cell.seed)
    if cell.kind == "low":
        data = replace(data, train_fraction=data.train_fraction * config.low_data)
    chosen = {name: setting[name] for name in TRAINING_OPTIONS if name in setting}
    own = {name: value for name, value in setting.items() if name not in TRAINING_OPTIONS}
    options = RunConfig(
        data=data,
        model=config.model,
        objective=config.objective,
        training=replace(config.training, alone=False, progress=False, **chosen),
        budgets=replace(config.budgets, folds=about.folds or config.budgets.folds),
        calibration=config.calibration,
        method=cell.method,
        method_options={name: value for name, value in own.items() if "." not in name},
        seed=cell.seed,
        epochs=about.epochs or config.epochs,
    )
    for dotted, value in own.items():
        section, dot, name = dotted.partition(".")
        if dot:
            changed = replace(getattr(options, section), **{name: value})
            options = replace(options, **{section: changed})
    return options


def data_config(config: CompareConfig, name: str) -> DataConfig:
    """The options of data set ``name``, as ``train --data.*`` takes them."""
    about = config.data[name]
    return DataConfig(**{field.name: getattr(about, field.name) for field in fields(DataConfig)})


def conditions(data: MultimodalData, config: CompareConfig, seed: int) -> dict[str, Split]:
    """The test split as it is, and as ``config.conditions`` degrade it.

    A share ``fraction`` of its samples is degraded, a modality at a time: the same ones for every
    method. Of ``mild`` there is one, with every modality of every sample noisy. Noise of several
    strengths is the same noise, scaled.
    """
    found = {CLEAN: data.test}
    for condition in config.condition_list():
        if condition == "missing" and len(data.modalities) == 1:
            continue
        if condition == "mild":
            found[condition] = _mild(data, seed)
            continue
        kind = "noise" if condition in STRENGTHS else condition
        for name in data.modalities:
            found[f"{name} {condition}"] = degrade(
                data.test,
                name,
                kind,
                fraction=config.fraction,
                strength=STRENGTHS.get(condition, config.strength),
                seed=derive_seed(seed, kind, name),
                layout=data.layouts.get(name),
            )
    return found


def check_conditions(data: MultimodalData, config: CompareConfig) -> None:
    """InputError for a condition that is not defined for what a modality holds: token ids, fields.

    Tried on two samples, before hours of training.
    """
    few = data.test.subset(range(min(2, len(data.test))))
    conditions(replace(data, test=few), config, 0)


def _mild(data: MultimodalData, seed: int) -> Split:
    split = data.test
    for name in data.modalities:
        seed_of = derive_seed(seed, "mild", name)
        split = degrade(split, name, "noise", fraction=1.0, strength=MILD, seed=seed_of)
    return split


def run_cell(folder: str, config: CompareConfig, cell: Cell, setting: dict) -> None:
    """Train one cell and write its results; nothing is there until all is."""
    import_module("torch._dynamo")  # every optimiser does: not in the time of the first training
    torch.set_num_threads(1)
    folder = Path(folder)
    numbers, predictions = cell_files(folder, cell)
    if stands(folder, cell, setting):
        return
    for path in (numbers, predictions):
        path.unlink(missing_ok=True)  # of another setting, or of what a user's file was before
    options, source = run_config(config, cell, setting), own_source(cell.method)
    data = load_split(config, options.data) if config.splits else load_data(options.data)
    method = make_method(cell.method, options)
    about = {
        "data": asdict(options.data),
        "sha256": data_digest(options.data.path),
        "model": asdict(config.model),
        "budgets": asdict(options.budgets),
        **({"resampled": shares(config)} if config.splits else {}),
    }
    trainer = SharedTrainer(
        folder,
        about,
        options.training,
        seed=cell.seed,
        source=source,
        class_names=data.class_names,
    )
    started = time.perf_counter()
    model, history, budgets, _ = Run(
        options,
        data,
        method,
        None,
        make_accelerator(options.training),
        folds=Run.folds_of(method, options, data),
        trainer=trainer,
    ).fit()
    result = {
        "cell": asdict(cell),
        "setting": setting,
        "source": source,
        "code": code_digest(),
        "versions": versions(),
        "epochs": len(history),
        "parameters": sum(value.numel() for value in model.parameters()),
        "budgets": None if budgets is None else dict(zip(budgets.modalities, budgets.values)),
        # Beside other workers, and less where trainings were shared: not a benchmark.
        "seconds": time.perf_counter() - started,
        # Of all trainings that it needed, whoever made them.
        "train_seconds": sum(trainer.seconds.values()),
        "validation": evaluate(model, data.validation, shapley=False).metrics,
    }
    numbers.parent.mkdir(exist_ok=True)
    if cell.kind != "trial":
        splits = {CLEAN: data.test}
        if cell.kind == "test":
            splits = conditions(data, config, cell.seed)
        found = {name: evaluate(model, split, shapley=False) for name, split in splits.items()}
        result["test"] = {name: part.metrics for name, part in found.items()}
        # Of resampled splits the clean ones alone are kept: their statistics are of splits.
        kept = {CLEAN: found[CLEAN]} if config.splits else found
        arrays = {name: part.log_probabilities.numpy() for name, part in kept.items()}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            targets=data.test.targets.numpy(),
            **{name: values.astype(np.float32) for name, values in arrays.items()},
        )
        write_bytes(predictions, buffer.getvalue())
    write_json(numbers, result)


def stands(folder: Path, cell: Cell, setting: dict) -> bool:
    """Whether a cell's results are there, of this setting.

    For a user's own method, also of its file as it is now.
    """
    path = cell_files(folder, cell)[0]
    if not path.exists():
        return False
    found = read_json(path)
    return found["setting"] == setting and found.get("source") == own_source(cell.method)


class SharedTrainer(Trainer):
    """Trainings kept by what determines them, for all the cells that need one.

    Two processes never make the same one. What a training cost stands beside it, in seconds of
    processor time, which other work on the machine does not lengthen as it does those of a clock;
    ``seconds`` holds it for all that this trainer has made or found.
    """

    def __init__(
        self,
        folder: Path,
        about: dict,
        training: TrainingConfig,
        *,
        seed: int,
        source: str | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__(training, seed=seed, class_names=class_names)
        self.cache, self.about, self.source = folder / "stages", about, source
        self.seconds: dict[Path, float] = {}

    def path(self, name: str, key: dict, epochs: int) -> Path:
        """Where this training's result stands, by a digest of what determines it."""
        training = asdict(self.training)
        for option in ("alone", "progress", "checkpoint_seconds"):
            del training[option]
        parts = [name, key, epochs, self.seed, training, self.about, code_digest()]
        if self.source is not None and not name.startswith(("alone-", "fold-")):
            parts.append(self.source)  # a user's method changes no training of encoders alone
        text = json.dumps(parts, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return self.cache / f"{name}-{digest}.safetensors"

    def fit(self, name, build, train, validation, *, epochs, key=None, **options):
        """As :meth:`Trainer.fit`; waits where another process is making the same one."""
        whole = self.training
        if len(train.modalities) == 1:
            self.training = alone_options(whole, train.modalities[0])
        try:
            path = self.path(name, key or {}, epochs)
            path.parent.mkdir(exist_ok=True)
            cost = path.with_suffix(".json")
            with locked(path.with_suffix(".lock")):
                if not cost.exists():  # the training was killed before all of it was written
                    path.unlink(missing_ok=True)
                made, started = not path.exists(), time.process_time()
                found = super().fit(
                    name, build, train, validation, epochs=epochs, key=key, **options
                )
                if made:
                    write_json(cost, {"seconds": time.process_time() - started})
        finally:
            self.training = whole
        self.seconds[path] = read_json(cost)["seconds"]
        return found


def alone_options(training: TrainingConfig, modality: str) -> TrainingConfig:
    """The options of a training of one modality alone, its own rate and decay in their place.

    So it is found by what it really had, whichever settings named it.

    >>> alone_options(TrainingConfig(learning_rates={"a": 0.1, "b": 0.2}), "b").learning_rate
    0.2
    """
    return replace(
        training,
        learning_rate=training.learning_rates.get(modality, training.learning_rate),
        weight_decay=training.weight_decays.get(modality, training.weight_decay),
        learning_rates={},
        weight_decays={},
    )

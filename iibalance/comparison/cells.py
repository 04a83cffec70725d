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
from pathlib import Path

import numpy as np
import torch

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
TRAINING_OPTIONS = ("learning_rate", "weight_decay")  # what every method tunes


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
    """The test split as it is, and with each modality missing or noisy.

    A share ``fraction`` of its samples is degraded: the same ones for every method.
    """
    found = {CLEAN: data.test}
    for kind in ("missing", "noise") if len(data.modalities) > 1 else ("noise",):
        for name in data.modalities:
            found[f"{name} {kind}"] = degrade(
                data.test,
                name,
                kind,
                fraction=config.fraction,
                strength=config.strength,
                seed=derive_seed(seed, kind, name),
            )
    return found


def run_cell(folder: str, config: CompareConfig, cell: Cell, setting: dict) -> None:
    """Train one cell and write its results; nothing is there until all is."""
    torch.set_num_threads(1)
    folder = Path(folder)
    numbers, predictions = cell_files(folder, cell)
    if stands(folder, cell, setting):
        return
    for path in (numbers, predictions):
        path.unlink(missing_ok=True)  # of another setting, or of what a user's file was before
    options, source = run_config(config, cell, setting), own_source(cell.method)
    data = load_data(options.data)
    method = make_method(cell.method, options)
    about = {
        "data": asdict(options.data),
        "sha256": data_digest(options.data.path),
        "model": asdict(config.model),
        "budgets": asdict(options.budgets),
    }
    started = time.perf_counter()
    model, history, budgets, _ = Run(
        options,
        data,
        method,
        None,
        make_accelerator(options.training),
        folds=Run.folds_of(method, options, data),
        trainer=SharedTrainer(
            folder,
            about,
            options.training,
            seed=cell.seed,
            source=source,
            class_names=data.class_names,
        ),
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
        "validation": evaluate(model, data.validation, shapley=False).metrics,
    }
    numbers.parent.mkdir(exist_ok=True)
    if cell.kind != "trial":
        splits = {CLEAN: data.test}
        if cell.kind == "test":
            splits = conditions(data, config, cell.seed)
        found = {name: evaluate(model, split, shapley=False) for name, split in splits.items()}
        result["test"] = {name: part.metrics for name, part in found.items()}
        arrays = {name: part.log_probabilities.numpy() for name, part in found.items()}
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

    Two processes never make the same one.
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
        path = self.path(name, key or {}, epochs)
        path.parent.mkdir(exist_ok=True)
        with locked(path.with_suffix(".lock")):
            return super().fit(name, build, train, validation, epochs=epochs, key=key, **options)

"""What a comparison is made of: its options, and cells of one method, data set and seed, each with its results in files of its own.

Trainings that several cells have in common (encoders alone, folds) are made once.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from iibalance.config import (
    CompareConfig,
    DataConfig,
    RunConfig,
    TrainingConfig,
)
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData, Split
from iibalance.errors import InputError
from iibalance.files import (
    code_digest,
    fcntl,
    file_digest,
    read_json,
    versions,
    write_bytes,
    write_json,
)
from iibalance.methods import METHODS, make_method, own_source
from iibalance.metrics import classification_metrics
from iibalance.nn.model import MultimodalClassifier, embed_split
from iibalance.training.evaluation import degrade
from iibalance.training.sampling import derive_seed
from iibalance.training.stages import Run
from iibalance.training.trainer import Trainer, make_accelerator

CLEAN = "clean"
REFERENCE = "unimodal"  # whose heads are the encoders trained alone: every comparison has it


def method_names(config: CompareConfig) -> list[str]:
    """The methods in order, the encoders alone first."""
    names = (
        list(METHODS)
        if config.methods == "all"
        else config.methods.split(",")
        if isinstance(config.methods, str)
        else list(config.methods)
    )
    names = [name.strip() for name in names]
    return [REFERENCE, *dict.fromkeys(name for name in names if name != REFERENCE)]


@dataclass(frozen=True)
class Cell:
    """One training and what is asked of it."""

    data: str
    method: str
    seed: int
    trial: int  #: which setting of the search
    kind: str  #: "trial" (validation only), "test" (every condition) or "low" (a share of the training samples, clean test)

    @property
    def key(self) -> str:
        """A file name."""
        method = (
            self.method
            if self.method in METHODS
            else "own-" + hashlib.sha256(self.method.encode()).hexdigest()[:10]
        )
        return f"{self.kind}-{self.data}-{method}-seed{self.seed}" + (
            f"-trial{self.trial}" if self.kind == "trial" else ""
        )


def cell_files(folder: Path, cell: Cell) -> tuple[Path, Path]:
    """(numbers, per-sample test log-probabilities) of a cell."""
    return folder / "cells" / f"{cell.key}.json", folder / "cells" / f"{cell.key}.npz"


def run_config(config: CompareConfig, cell: Cell, setting: dict) -> RunConfig:
    """The options of a cell's run: the comparison's, and ``setting`` over them (dotted names are options of a section, the rest the method's own)."""
    data = data_config(config, cell.data)
    if cell.kind == "low":
        data = replace(data, train_fraction=data.train_fraction * config.low_data)
    about = config.data[cell.data]
    training = replace(
        config.training,
        alone=False,
        progress=False,
        learning_rate=setting.get("learning_rate", config.training.learning_rate),
        weight_decay=setting.get("weight_decay", config.training.weight_decay),
    )
    own = {
        key: value for key, value in setting.items() if key not in ("learning_rate", "weight_decay")
    }
    options = RunConfig(
        data=data,
        model=config.model,
        objective=config.objective,
        training=training,
        budgets=replace(config.budgets, folds=about.folds or config.budgets.folds),
        calibration=config.calibration,
        method=cell.method,
        method_options={key: value for key, value in own.items() if "." not in key},
        seed=cell.seed,
        epochs=about.epochs or config.epochs,
    )
    for key, value in own.items():
        section, dot, name = key.partition(".")
        if dot:
            options = replace(
                options, **{section: replace(getattr(options, section), **{name: value})}
            )
    return options


def data_config(config: CompareConfig, name: str) -> DataConfig:
    """The options of data set ``name``, as ``train --data.*`` takes them."""
    values = asdict(config.data[name])
    return DataConfig(
        **{key: value for key, value in values.items() if key not in ("epochs", "folds")}
    )


def conditions(data: MultimodalData, config: CompareConfig, seed: int) -> dict[str, Split]:
    """The test split as it is, and with each modality missing or noisy in ``fraction`` of its samples: the same ones for every method."""
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
    digest = file_digest(Path(options.data.path).expanduser()) if options.data.path else None
    about = {
        "data": asdict(options.data),
        "sha256": digest,
        "model": asdict(config.model),
        "budgets": asdict(options.budgets),
    }
    stages = SharedStages(folder, about, options.training, seed=cell.seed, source=source)
    folds = Run.folds_of(method, options, data.train)
    started = time.perf_counter()
    model, history, budgets, _ = Run(
        options, data, method, None, make_accelerator(options.training), None, None, folds, stages
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
        "seconds": time.perf_counter()
        - started,  # beside other workers, and less where trainings were shared: not a benchmark
        "validation": _metrics(model, data.validation)[0],
    }
    if cell.kind != "trial":
        arrays = {"targets": data.test.targets.numpy()}
        result["test"] = {}
        for name, split in (
            conditions(data, config, cell.seed).items()
            if cell.kind == "test"
            else [(CLEAN, data.test)]
        ):
            result["test"][name], log_p = _metrics(model, split)
            arrays[name] = log_p.numpy().astype(np.float32)
        predictions.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(predictions, buffer.getvalue())
    numbers.parent.mkdir(exist_ok=True)
    write_json(numbers, result)


@torch.no_grad()
def _metrics(model: MultimodalClassifier, split: Split) -> tuple[dict, torch.Tensor]:
    """Metrics of the fused prediction and of each modality's own, and the fused log-probabilities [N, K]."""
    embeddings = embed_split(model, split)
    out = model.eval().head.fuse(embeddings, split.mask.to(embeddings[0].device))
    log_p = out.logits.double().log_softmax(-1).cpu()
    metrics = classification_metrics(log_p, split.targets)
    metrics["weights"] = (
        None
        if out.weights is None
        else dict(zip(model.modalities, out.weights.double().mean(0).tolist()))
    )
    metrics["modalities"] = {}
    for index, name in enumerate(model.modalities):
        rows = split.mask[:, index]
        own = None
        if out.modality_logits and rows.any():
            own = classification_metrics(
                out.modality_logits[index].double().log_softmax(-1).cpu()[rows], split.targets[rows]
            )
        metrics["modalities"][name] = own
    return metrics, log_p


def stands(folder: Path, cell: Cell, setting: dict) -> bool:
    """Whether a cell's results are there, of this setting and, for a user's own method, of its file as it is now."""
    path = cell_files(folder, cell)[0]
    if not path.exists():
        return False
    found = read_json(path)
    return found["setting"] == setting and found.get("source") == own_source(cell.method)


class SharedStages(Trainer):
    """Trainings kept by what determines them, for all the cells that need one; two processes never make the same one."""

    def __init__(
        self,
        folder: Path,
        about: dict,
        training: TrainingConfig,
        *,
        seed: int,
        source: str | None = None,
    ):
        super().__init__(training, seed=seed)
        self.cache, self.about, self.source = folder / "stages", about, source

    def path(self, name: str, key: dict, epochs: int) -> Path:
        training = {
            option: value
            for option, value in asdict(self.training).items()
            if option not in ("alone", "progress", "checkpoint_seconds")
        }
        own = (
            [] if self.source is None or name.startswith(("alone-", "fold-")) else [self.source]
        )  # a user's method changes no training of encoders alone
        text = json.dumps(
            [name, key, epochs, self.seed, training, self.about, code_digest(), *own],
            sort_keys=True,
            default=str,
        )
        return self.cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    def fit(
        self,
        name: str,
        build,
        train: Split,
        validation: Split | None,
        *,
        epochs: int,
        key: dict | None = None,
        **options,
    ):
        """As :meth:`Trainer.fit`; waits where another process is making the same one."""
        path = self.path(name, key or {}, epochs)
        path.parent.mkdir(exist_ok=True)
        with locked(path.with_suffix(".lock")):
            return super().fit(name, build, train, validation, epochs=epochs, key=key, **options)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of file ``path``. Without ``wait``, InputError where another process holds it."""
    with open(path, "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(
                f"output: another process is running the comparison in {path.parent}"
            ) from None
        yield

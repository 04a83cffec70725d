"""Every method under one protocol: methods x seeds x data sets, equally tuned on validation data, tested once, under clean and degraded conditions.

Cells (one method, data set, seed) are independent and their results stand in files of their own: a comparison that was killed goes on where it was, and
cells run in as many processes as there are workers. Trainings that several methods have in common (encoders alone, folds) are made once.
"""
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Optional, Union

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm

from iibalance.config import BudgetConfig, CalibrationConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainingConfig
from iibalance.data import load_data
from iibalance.data.base import DataConfig, MultimodalData, Split
from iibalance.errors import InputError
from iibalance.evaluation import degrade
from iibalance.loop import derive_seed
from iibalance.metrics import classification_metrics
from iibalance.methods import METHODS, make_method, method_class, own_source
from iibalance.model import MultimodalClassifier, embed_split
from iibalance.runs import fcntl, read_json, write_bytes, write_json, write_text
from iibalance.stages import Stages, make_accelerator
from iibalance.step_time import time_steps
from iibalance.training import Run, check_options, code_digest, versions

CLEAN = "clean"
FREE = ("methods", "seeds", "tuning_seeds", "low_data_seeds", "bootstrap", "workers", "output", "focus", "timing_steps")  # may change when a comparison is gone on with
REFERENCE = "unimodal"  # whose heads are the encoders trained alone: every comparison has it


@dataclass
class CompareData(DataConfig):
    """A data set of a comparison."""

    epochs: Optional[int] = None
    """Epochs of every method on this set, instead of the comparison's."""
    folds: Optional[int] = None
    """Folds of the budgets on this set, instead of ``budgets.folds``."""


@dataclass
class CompareConfig:
    """One comparison."""

    data: dict[str, CompareData] = field(default_factory=lambda: {"digits": CompareData()})
    """Data sets by name: ``{avletters: {name: npz, path: avletters.npz, groups: speaker}, ...}``; the options are those of ``train --data.*``."""
    methods: Union[str, list[str]] = "all"
    """``all``, or a list of names (joined by commas on the command line); ``my_file.py:MyMethod`` is a name too. The encoders alone are always there."""
    focus: str = "iibalance"
    """The method that is compared with the best of the others (its ablations apart) by a paired bootstrap."""
    seeds: int = 5
    """Training seeds, from 0."""
    trials: int = 3
    """Settings of learning rate, weight decay and the method's own main parameter that every method tries on each data set, the defaults being the first and
    the parameter's values coming in turn; the lowest validation NLL wins."""
    tuning_seeds: int = 1
    """Seeds, from 0, that every setting is tried with; their mean validation NLL counts. Where validation samples are few, one seed chooses by chance."""
    epochs: int = 20
    """Epochs of every training."""
    workers: Optional[int] = None
    """Processes, one thread each; by default as many as there are cores."""
    fraction: float = 0.5
    """Share of the test samples that a condition degrades."""
    strength: float = 3.0
    """Noise of the noisy conditions, in standard deviations of the training inputs."""
    low_data: float = 0.25
    """Share of the training samples in the low-data condition, for which every method is trained once more; 0 = leave it out."""
    low_data_seeds: Optional[int] = None
    """Seeds of the low-data condition; all of them by default."""
    bootstrap: int = 2000
    """Resamples of the paired bootstrap."""
    timing_steps: int = 30
    """Training steps that are timed of every method, one after the other at the end, in one thread with nothing else running; 0 = none."""
    timing_batch: int = 64
    """Samples a timed step."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(width=32))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(progress=False, alone=False))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    budgets: BudgetConfig = field(default_factory=BudgetConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    output: str = "runs/comparison"
    """The comparison's folder. One that is there is gone on with, if its options are the same."""

    def method_names(self) -> list[str]:
        """The methods in order, the encoders alone first."""
        names = list(METHODS) if self.methods == "all" else self.methods.split(",") if isinstance(self.methods, str) else list(self.methods)
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
        method = self.method if self.method in METHODS else "own-" + hashlib.sha256(self.method.encode()).hexdigest()[:10]
        return f"{self.kind}-{self.data}-{method}-seed{self.seed}" + (f"-trial{self.trial}" if self.kind == "trial" else "")


def compare(config: CompareConfig) -> dict:
    """Run, or go on with, the comparison in ``config.output``; writes ``comparison.json``, ``comparison.md`` and ``comparison.png`` and returns the first.

    Raises :class:`~iibalance.errors.InputError` for wrong options or data before anything is trained. A method that is not defined for a data set's number of
    modalities is left out there and said so; a training that diverges fails its cell, which is reported and tried again by the next call.
    """
    from iibalance.comparison import summarise, write_comparison

    _check(config)
    methods, folder = config.method_names(), Path(config.output).expanduser()
    sets = {name: load_data(_data(config, name)) for name in config.data}
    defined = {name: [method for method in methods if _defined(method, data)] for name, data in sets.items()}
    for name in sets:
        check_options(_run_config(config, Cell(name, "iibalance", 0, 0, "test"), {}))
        if config.low_data:
            load_data(_run_config(config, Cell(name, "iibalance", 0, 0, "low"), {}).data)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock", wait=False):
        _describe(folder, config, sets)
        settings = {method: _settings(config, _tuned_as(method)) for method in {*methods, *map(_tuned_as, methods)}}
        tuned = {name: dict.fromkeys(_tuned_as(method) for method in defined[name]) for name in sets}
        trials = [Cell(name, method, seed, trial, "trial") for seed in range(config.tuning_seeds) for trial in range(config.trials)
                  for name in sets for method in tuned[name]]
        failures = _run_cells(folder, config, [(cell, settings[cell.method][cell.trial]) for cell in trials], "tuning")
        chosen, searched = _choose(folder, trials, settings)
        low = 0 if not config.low_data else config.seeds if config.low_data_seeds is None else min(config.low_data_seeds, config.seeds)
        finals = [Cell(name, method, seed, chosen[name, _tuned_as(method)], kind) for kind, seeds in (("test", config.seeds), ("low", low)) for seed in range(seeds)
                  for name in sets for method in defined[name] if (name, _tuned_as(method)) in chosen]
        failures |= _run_cells(folder, config, [(cell, settings[cell.method][cell.trial]) for cell in finals], "comparing")
        seconds = {}
        if config.timing_steps:
            plain = lambda name, method: _run_config(config, Cell(name, method, 0, 0, "test"), {})
            seconds = time_steps(folder / "seconds.json", plain, sets, defined, steps=config.timing_steps, batch_size=config.timing_batch, progress=config.training.progress)
        result = summarise(folder, config, sets, finals, settings, searched, seconds, failures)
        result["machine"] = read_json(folder / "run.json")
        write_comparison(folder, result)
    return result


def cell_files(folder: Path, cell: Cell) -> tuple[Path, Path]:
    """(numbers, per-sample test log-probabilities) of a cell."""
    return folder / "cells" / f"{cell.key}.json", folder / "cells" / f"{cell.key}.npz"


class SharedStages(Stages):
    """Trainings kept by what determines them, for all the cells that need one; two processes never make the same one."""

    def __init__(self, folder: Path, about: dict, training: TrainingConfig, *, seed: int, source: str | None = None):
        super().__init__(training, seed=seed)
        self.cache, self.about, self.source = folder / "stages", about, source

    def path(self, name: str, key: dict, epochs: int) -> Path:
        training = {option: value for option, value in asdict(self.training).items() if option not in ("alone", "progress", "checkpoint_seconds")}
        own = [] if self.source is None or name.startswith(("alone-", "fold-")) else [self.source]  # a user's method changes no training of encoders alone
        text = json.dumps([name, key, epochs, self.seed, training, self.about, *own], sort_keys=True, default=str)
        return self.cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    def fit(self, name: str, build, train: Split, validation: Split | None, *, epochs: int, key: dict | None = None, **options):
        """As :meth:`Stages.fit`; waits where another process is making the same one."""
        path = self.path(name, key or {}, epochs)
        path.parent.mkdir(exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            return super().fit(name, build, train, validation, epochs=epochs, key=key, **options)


def _stands(folder: Path, cell: Cell, setting: dict) -> bool:
    """Whether a cell's results are there, of this setting and, for a user's own method, of its file as it is now."""
    path = cell_files(folder, cell)[0]
    if not path.exists():
        return False
    found = read_json(path)
    return found["setting"] == setting and found.get("source") == own_source(cell.method)


def run_cell(folder: str, config: CompareConfig, cell: Cell, setting: dict) -> None:
    """Train one cell and write its results; nothing is there until all is."""
    torch.set_num_threads(1)
    folder = Path(folder)
    numbers, predictions = cell_files(folder, cell)
    if _stands(folder, cell, setting):
        return
    numbers.unlink(missing_ok=True)  # of another setting, or of what a user's file was before
    run_config, source = _run_config(config, cell, setting), own_source(cell.method)
    data = load_data(run_config.data)
    method = make_method(cell.method, run_config)
    digest = hashlib.sha256(Path(run_config.data.path).expanduser().read_bytes()).hexdigest() if run_config.data.path else None
    about = {"data": asdict(run_config.data), "sha256": digest, "model": asdict(config.model), "budgets": asdict(run_config.budgets)}
    stages = SharedStages(folder, about, run_config.training, seed=cell.seed, source=source)
    folds = Run.folds_of(method, run_config, data.train)
    started = time.perf_counter()
    model, history, budgets, _ = Run(run_config, data, method, None, make_accelerator(run_config.training), None, None, folds, stages).fit()
    result = {
        "cell": asdict(cell), "setting": setting, "source": source, "code": code_digest(), "versions": versions(),
        "epochs": len(history), "parameters": sum(value.numel() for value in model.parameters()),
        "budgets": None if budgets is None else dict(zip(budgets.modalities, budgets.values)),
        "seconds": time.perf_counter() - started,  # beside other workers, and less where trainings were shared: not a benchmark
        "validation": _metrics(model, data.validation)[0],
    }
    if cell.kind != "trial":
        arrays = {"targets": data.test.targets.numpy()}
        result["test"] = {}
        for name, split in conditions(data, config, cell.seed).items() if cell.kind == "test" else [(CLEAN, data.test)]:
            result["test"][name], log_p = _metrics(model, split)
            arrays[name] = log_p.numpy().astype(np.float32)
        predictions.parent.mkdir(exist_ok=True)
        with _buffer() as buffer:
            np.savez_compressed(buffer, **arrays)
            write_bytes(predictions, buffer.getvalue())
    numbers.parent.mkdir(exist_ok=True)
    write_json(numbers, result)


def conditions(data: MultimodalData, config: CompareConfig, seed: int) -> dict[str, Split]:
    """The test split as it is, and with each modality missing or noisy in ``fraction`` of its samples: the same ones for every method."""
    found = {CLEAN: data.test}
    for kind in ("missing", "noise") if len(data.modalities) > 1 else ("noise",):
        for name in data.modalities:
            found[f"{name} {kind}"] = degrade(data.test, name, kind, fraction=config.fraction, strength=config.strength, seed=derive_seed(seed, kind, name))
    return found


@torch.no_grad()
def _metrics(model: MultimodalClassifier, split: Split) -> tuple[dict, torch.Tensor]:
    """Metrics of the fused prediction and of each modality's own, and the fused log-probabilities [N, K]."""
    embeddings = embed_split(model, split)
    out = model.eval().head.fuse(embeddings, split.mask.to(embeddings[0].device))
    log_p = out.logits.double().log_softmax(-1).cpu()
    metrics = classification_metrics(log_p, split.targets)
    metrics["weights"] = None if out.weights is None else dict(zip(model.modalities, out.weights.double().mean(0).tolist()))
    metrics["modalities"] = {}
    for index, name in enumerate(model.modalities):
        rows = split.mask[:, index]
        own = None
        if out.modality_logits and rows.any():
            own = classification_metrics(out.modality_logits[index].double().log_softmax(-1).cpu()[rows], split.targets[rows])
        metrics["modalities"][name] = own
    return metrics, log_p


def _settings(config: CompareConfig, method: str) -> list[dict]:
    """The ``trials`` settings that a method tries: the defaults, then draws. Learning rates and weight decays are the same for every method."""
    parameter, values = next(iter(method_class(method).search.items()), (None, ()))
    settings = []
    for trial in range(config.trials):
        generator = torch.Generator().manual_seed(derive_seed("settings", trial))
        draw = torch.rand(2, generator=generator).tolist()
        rate, decay = (0.5, 0.5) if trial == 0 else draw
        setting = {
            "learning_rate": config.training.learning_rate * 3 ** (2 * rate - 1),  # a third to three times
            "weight_decay": config.training.weight_decay * 10 ** (2 * decay - 1),  # a tenth to ten times
        }
        if parameter is not None:
            setting[parameter] = values[trial % len(values)]
        settings.append(setting)
    return settings


def _run_config(config: CompareConfig, cell: Cell, setting: dict) -> RunConfig:
    data = _data(config, cell.data)
    if cell.kind == "low":
        data = replace(data, train_fraction=data.train_fraction * config.low_data)
    about = config.data[cell.data]
    training = replace(config.training, alone=False, progress=False, learning_rate=setting.get("learning_rate", config.training.learning_rate),
                       weight_decay=setting.get("weight_decay", config.training.weight_decay))
    own = {key: value for key, value in setting.items() if key not in ("learning_rate", "weight_decay")}
    run = RunConfig(
        data=data, model=config.model, objective=config.objective, training=training, budgets=replace(config.budgets, folds=about.folds or config.budgets.folds),
        calibration=config.calibration, method=cell.method, method_options={key: value for key, value in own.items() if "." not in key}, seed=cell.seed,
        epochs=about.epochs or config.epochs,
    )
    for key, value in own.items():
        section, dot, name = key.partition(".")
        if dot:
            run = replace(run, **{section: replace(getattr(run, section), **{name: value})})
    return run


def _data(config: CompareConfig, name: str) -> DataConfig:
    values = asdict(config.data[name])
    return DataConfig(**{key: value for key, value in values.items() if key not in ("epochs", "folds")})


def _tuned_as(name: str) -> str:
    """The method whose settings this one takes: an ablation those of what it is an ablation of."""
    return method_class(name).tuned_as or name


def _defined(name: str, data: MultimodalData) -> bool:
    kind = method_class(name)
    return kind.modalities is None or kind.modalities == len(data.modalities)


def _run_cells(folder: Path, config: CompareConfig, cells: Sequence[tuple[Cell, dict]], name: str) -> dict[str, str]:
    """Run those that have no result yet, in ``workers`` processes; returns what failed, by cell."""
    waiting = [(cell, setting) for cell, setting in cells if not _stands(folder, cell, setting)]
    workers = min(config.workers or os.cpu_count() or 1, max(len(waiting), 1))
    failures: dict[str, str] = {}
    bar = tqdm(total=len(cells), initial=len(cells) - len(waiting), desc=name, unit="cell", disable=None if config.training.progress else not sys.stderr.isatty())
    with bar:
        if workers == 1:
            threads = torch.get_num_threads()
            for cell, setting in waiting:
                failures |= _outcome(cell, lambda: run_cell(str(folder), config, cell, setting))
                bar.update()
            torch.set_num_threads(threads)
        elif waiting:
            context = multiprocessing.get_context("spawn")
            with _few_threads(), ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
                futures = {pool.submit(run_cell, str(folder), config, cell, setting): cell for cell, setting in waiting}
                try:
                    for future in as_completed(futures):
                        failures |= _outcome(futures[future], future.result)
                        bar.update()
                        bar.set_postfix_str(futures[future].key)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return failures


def _end_with(parent: int) -> None:
    """In a worker: end when the process that started it is gone, however it went; a worker of a killed comparison would train on for nobody."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _outcome(cell: Cell, run) -> dict[str, str]:
    try:
        run()
    except (InputError, FloatingPointError, ValueError) as error:  # this cell's data and setting; anything else is a bug and stops the comparison
        return {cell.key: f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {}


def _choose(folder: Path, trials: Sequence[Cell], settings: dict) -> tuple[dict, dict]:
    """(data set, method) -> the trial with the lowest mean validation NLL, and all that was tried. A trial that failed with one seed is out, unless all have."""
    found: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for cell in trials:
        path = cell_files(folder, cell)[0]
        if path.exists():
            found.setdefault((cell.data, cell.method), {}).setdefault(cell.trial, []).append(read_json(path)["validation"])
    chosen, searched = {}, {}
    for (data, method), rows in found.items():
        searched[data, method] = {
            trial: {**settings[method][trial], **{f"validation_{name}": sum(row[name] for row in values) / len(values) for name in ("nll", "accuracy")}, "seeds": len(values)}
            for trial, values in rows.items()
        }
        chosen[data, method] = best_trial(searched[data, method])
    return chosen, searched


def best_trial(tried: Mapping) -> int | str:
    """The key of the trial that wins: the lowest mean validation NLL among those that most tuning seeds finished."""
    return min(tried, key=lambda trial: (-tried[trial]["seeds"], tried[trial]["validation_nll"]))


def _check(config: CompareConfig) -> None:
    checks = [
        (bool(config.data), "data", config.data, "at least one data set"), (config.seeds >= 1, "seeds", config.seeds, "at least 1"),
        (config.trials >= 1, "trials", config.trials, "at least 1"),
        (1 <= config.tuning_seeds <= config.seeds, "tuning_seeds", config.tuning_seeds, f"1 to seeds, {config.seeds}"), (config.epochs >= 1, "epochs", config.epochs, "at least 1"),
        (config.workers is None or config.workers >= 1, "workers", config.workers, "at least 1"), (0 <= config.fraction <= 1, "fraction", config.fraction, "0 to 1"),
        (0 <= config.strength < float("inf"), "strength", config.strength, "a number >= 0"), (0 <= config.low_data < 1, "low_data", config.low_data, "0 to below 1"),
        (fcntl is not None or config.workers == 1, "workers", config.workers, "1 on this system, which has no file locks"),
        (config.bootstrap >= 1, "bootstrap", config.bootstrap, "at least 1"), (config.timing_steps >= 0, "timing_steps", config.timing_steps, "0 or more"),
        (config.timing_batch >= 2, "timing_batch", config.timing_batch, "at least 2"), (config.budgets.path is None, "budgets.path", config.budgets.path, "none"),
    ]
    for right, name, value, expected in checks:
        if not right:
            raise InputError(f"{name}: {value} cannot be used; give {expected}")
    for name, data in config.data.items():
        if not name or any(not (letter.isalnum() or letter in "_+.") for letter in name):
            raise InputError(f"data: {name!r} is no name for a data set; use letters, digits, _, + and .")
        if data.epochs is not None and data.epochs < 1 or data.folds is not None and data.folds < 2:
            raise InputError(f"data: {name}: epochs {data.epochs} or folds {data.folds} cannot be used; give at least 1 and 2")
    names = config.method_names()
    for name in names:
        method_class(name)
    labels = [method_class(name).name for name in names]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"methods: two are called {label}; give yours another name")
    if config.focus not in labels:
        raise InputError(f"focus: {config.focus} is none of the methods compared ({', '.join(labels)})")


def _describe(folder: Path, config: CompareConfig, sets: dict[str, MultimodalData]) -> None:
    """Write the comparison's options; where they stand already they must be the same, but for those that change no cell."""
    values = asdict(config) | {key: None for key in FREE}
    values["training"]["progress"] = False
    digests = {name: hashlib.sha256(Path(data.path).expanduser().read_bytes()).hexdigest() if data.path else None for name, data in config.data.items()}
    path = folder / "compare.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            if before.get(key) != json.loads(json.dumps(value)):
                raise InputError(f"{key}: differs from that of the comparison in {folder} ({before.get(key)!r}); give it another output, or the same options")
        first = read_json(folder / "run.json")
        if first["data_sha256"] != digests:
            raise InputError(f"data: a file is not the one that the comparison in {folder} was started on (its sha256 differs)")
        return
    write_json(folder / "run.json", {"command": sys.argv, "python": platform.python_version(), "machine": platform.platform(), "cores": os.cpu_count(),
                                     "versions": versions(), "data_sha256": digests, "date": time.strftime("%Y-%m-%d")})
    write_text(path, yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"output: another process is running the comparison in {path.parent}") from None
        yield


@contextmanager
def _few_threads() -> Iterator[None]:
    """New processes with one OpenMP thread each: the cores are the workers'."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _buffer():
    import io

    with io.BytesIO() as buffer:
        yield buffer

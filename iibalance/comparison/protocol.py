"""Every method under one protocol: methods x seeds x data sets, equally tuned on validation data, tested once, under clean and degraded conditions.

Cells (one method, data set, seed) are independent: a comparison that was killed goes on where it was, and cells run in as many processes as there are workers.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from iibalance.comparison.cells import (
    Cell,
    cell_files,
    data_config,
    locked,
    method_names,
    run_config,
)
from iibalance.comparison.statistics import best_trial, focus_name, summarise, write_comparison
from iibalance.comparison.timing import time_steps
from iibalance.comparison.workers import run_cells
from iibalance.config import CompareConfig, CompareData
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData
from iibalance.errors import InputError
from iibalance.files import fcntl, file_digest, read_json, versions, write_json, write_text
from iibalance.methods import ablation_of, method_class, search_of
from iibalance.training.sampling import derive_seed

__all__ = ["CompareConfig", "CompareData", "compare"]

FREE = (
    "methods",
    "seeds",
    "tuning_seeds",
    "low_data_seeds",
    "bootstrap",
    "workers",
    "output",
    "focus",
    "timing_steps",
)  # may change when a comparison is gone on with


def compare(config: CompareConfig) -> dict:
    """Run, or go on with, the comparison in ``config.output``; writes ``comparison.json``, ``comparison.md`` and ``comparison.png`` and returns the first.

    Raises :class:`~iibalance.errors.InputError` for wrong options or data before anything is trained. A method that is not defined for a data set's number of
    modalities is left out there and said so; a training that diverges fails its cell, which is reported and tried again by the next call.
    """
    _check(config)
    methods, folder = method_names(config), Path(config.output).expanduser()
    sets = {name: load_data(data_config(config, name)) for name in config.data}
    defined = {
        name: [method for method in methods if _defined(method, data)]
        for name, data in sets.items()
    }
    for name in sets:
        run_config(config, Cell(name, "iibalance", 0, 0, "test"), {})
        if config.low_data:
            load_data(run_config(config, Cell(name, "iibalance", 0, 0, "low"), {}).data)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", wait=False):
        _describe(folder, config, sets)
        settings = {
            method: settings_of(config, _tuned_as(method))
            for method in {*methods, *map(_tuned_as, methods)}
        }
        tuned = {
            name: dict.fromkeys(_tuned_as(method) for method in defined[name]) for name in sets
        }
        trials = [
            Cell(name, method, seed, trial, "trial")
            for seed in range(config.tuning_seeds)
            for trial in range(config.trials)
            for name in sets
            for method in tuned[name]
        ]
        failures = run_cells(
            folder, config, [(cell, settings[cell.method][cell.trial]) for cell in trials], "tuning"
        )
        chosen, searched = choose(folder, trials, settings)
        low = (
            0
            if not config.low_data
            else config.seeds
            if config.low_data_seeds is None
            else min(config.low_data_seeds, config.seeds)
        )
        finals = [
            Cell(name, method, seed, chosen[name, _tuned_as(method)], kind)
            for kind, seeds in (("test", config.seeds), ("low", low))
            for seed in range(seeds)
            for name in sets
            for method in defined[name]
            if (name, _tuned_as(method)) in chosen
        ]
        failures |= run_cells(
            folder,
            config,
            [(cell, settings[cell.method][cell.trial]) for cell in finals],
            "comparing",
        )
        seconds = {}
        if config.timing_steps:
            plain = lambda name, method: run_config(config, Cell(name, method, 0, 0, "test"), {})
            seconds = time_steps(
                folder / "seconds.json",
                plain,
                sets,
                defined,
                steps=config.timing_steps,
                batch_size=config.timing_batch,
                progress=config.training.progress,
            )
        result = summarise(folder, config, sets, finals, settings, searched, seconds, failures)
        result["machine"] = read_json(folder / "run.json")
        write_comparison(folder, result)
    return result


def settings_of(config: CompareConfig, method: str) -> list[dict]:
    """The ``trials`` settings that a method tries: the defaults, then draws. Learning rates and weight decays are the same for every method."""
    parameter, values = next(iter(search_of(method_class(method)).items()), (None, ()))
    settings = []
    for trial in range(config.trials):
        generator = torch.Generator().manual_seed(derive_seed("settings", trial))
        draw = torch.rand(2, generator=generator).tolist()
        rate, decay = (0.5, 0.5) if trial == 0 else draw
        setting = {
            "learning_rate": config.training.learning_rate
            * 3 ** (2 * rate - 1),  # a third to three times
            "weight_decay": config.training.weight_decay
            * 10 ** (2 * decay - 1),  # a tenth to ten times
        }
        if parameter is not None:
            setting[parameter] = values[trial % len(values)]
        settings.append(setting)
    return settings


def _tuned_as(name: str) -> str:
    """The method whose settings this one takes: an ablation those of what it is an ablation of."""
    return ablation_of(method_class(name)) or name


def _defined(name: str, data: MultimodalData) -> bool:
    kind = method_class(name)
    return kind.modalities is None or kind.modalities == len(data.modalities)


def choose(folder: Path, trials: Sequence[Cell], settings: dict) -> tuple[dict, dict]:
    """(data set, method) -> the trial with the lowest mean validation NLL, and all that was tried. A trial that failed with one seed is out, unless all have."""
    found: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for cell in trials:
        path = cell_files(folder, cell)[0]
        if path.exists():
            found.setdefault((cell.data, cell.method), {}).setdefault(cell.trial, []).append(
                read_json(path)["validation"]
            )
    chosen, searched = {}, {}
    for (data, method), rows in found.items():
        searched[data, method] = {
            trial: {
                **settings[method][trial],
                **{
                    f"validation_{name}": sum(row[name] for row in values) / len(values)
                    for name in ("nll", "accuracy")
                },
                "seeds": len(values),
            }
            for trial, values in rows.items()
        }
        chosen[data, method] = best_trial(searched[data, method])
    return chosen, searched


def _check(config: CompareConfig) -> None:
    checks = [
        (bool(config.data), "data", config.data, "at least one data set"),
        (config.seeds >= 1, "seeds", config.seeds, "at least 1"),
        (config.trials >= 1, "trials", config.trials, "at least 1"),
        (
            1 <= config.tuning_seeds <= config.seeds,
            "tuning_seeds",
            config.tuning_seeds,
            f"1 to seeds, {config.seeds}",
        ),
        (config.epochs >= 1, "epochs", config.epochs, "at least 1"),
        (config.workers is None or config.workers >= 1, "workers", config.workers, "at least 1"),
        (0 <= config.fraction <= 1, "fraction", config.fraction, "0 to 1"),
        (0 <= config.strength < float("inf"), "strength", config.strength, "a number >= 0"),
        (0 <= config.low_data < 1, "low_data", config.low_data, "0 to below 1"),
        (
            fcntl is not None or config.workers == 1,
            "workers",
            config.workers,
            "1 on this system, which has no file locks",
        ),
        (config.bootstrap >= 1, "bootstrap", config.bootstrap, "at least 1"),
        (config.timing_steps >= 0, "timing_steps", config.timing_steps, "0 or more"),
        (config.timing_batch >= 2, "timing_batch", config.timing_batch, "at least 2"),
        (config.budgets.path is None, "budgets.path", config.budgets.path, "none"),
    ]
    for right, name, value, expected in checks:
        if not right:
            raise InputError(f"{name}: {value} cannot be used; give {expected}")
    for name, data in config.data.items():
        if not name or any(not (letter.isalnum() or letter in "_+.") for letter in name):
            raise InputError(
                f"data: {name!r} is no name for a data set; use letters, digits, _, + and ."
            )
        if data.epochs is not None and data.epochs < 1 or data.folds is not None and data.folds < 2:
            raise InputError(
                f"data: {name}: epochs {data.epochs} or folds {data.folds} cannot be used; give at least 1 and 2"
            )
    names = method_names(config)
    for name in names:
        method_class(name)
    labels = [method_class(name).name for name in names]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"methods: two are called {label}; give yours another name")
    if focus_name(config) not in labels:
        raise InputError(
            f"focus: {config.focus} is none of the methods compared ({', '.join(labels)})"
        )


def _describe(folder: Path, config: CompareConfig, sets: dict[str, MultimodalData]) -> None:
    """Write the comparison's options and what starts it; where they stand already they must be the same, but for those that change no cell."""
    values = asdict(config) | {key: None for key in FREE}
    values["training"]["progress"] = False
    digests = {
        name: file_digest(Path(data.path).expanduser()) if data.path else None
        for name, data in config.data.items()
    }
    path, run = folder / "compare.yaml", folder / "run.json"
    start = {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in values.items():
            if before.get(key) != json.loads(json.dumps(value)):
                raise InputError(
                    f"{key}: differs from that of the comparison in {folder} ({before.get(key)!r}); give it another output, or the same options"
                )
        first = read_json(run)
        if first["data_sha256"] != digests:
            raise InputError(
                f"data: a file is not the one that the comparison in {folder} was started on (its sha256 differs)"
            )
        starts = [*first.get("starts", []), *([] if start in first.get("starts", []) else [start])]
        write_json(run, {"starts": starts, "data_sha256": digests})
        return
    write_json(run, {"starts": [start], "data_sha256": digests})
    write_text(path, yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))

"""Every method under one protocol.

Methods x seeds x data sets, equally tuned on validation data, tested once, on clean and degraded
input. Cells (one method, data set, seed) are independent: a comparison that was killed goes on
where it was, and cells run in as many processes as there are workers.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from iibalance.comparison import results as measured
from iibalance.comparison.cells import Cell, cell_files, data_config, run_config
from iibalance.comparison.picture import write_picture
from iibalance.comparison.statistics import best_trial, bootstrap, focus_name, summary
from iibalance.comparison.tables import page
from iibalance.comparison.timing import time_steps
from iibalance.comparison.workers import run_cells
from iibalance.config import CompareConfig
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData
from iibalance.errors import InputError
from iibalance.files import (
    data_digest,
    locked,
    read_json,
    recorded_command,
    versions,
    write_json,
    write_text,
)
from iibalance.methods import ablation_of, method_class, search_of
from iibalance.training.sampling import derive_seed

# Options that may change when a comparison is gone on with: they change no cell.
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
)

Sets = Mapping[str, MultimodalData]


def compare(config: CompareConfig) -> dict:
    """Run, or go on with, the comparison in ``config.output``.

    Writes ``comparison.csv`` (every figure, a row a seed and condition), ``comparison.md`` (the
    page) and ``comparison.png``, and returns what the page shows. A method that is not defined for
    a data set's number of modalities is left out there and said so; a training that diverges fails
    its cell, which is reported and tried again by the next call.

    Raises :class:`~iibalance.errors.InputError` for wrong options or data before anything is
    trained.
    """
    methods, folder = _check(config), Path(config.output).expanduser()
    sets = {name: load_data(data_config(config, name)) for name in config.data}
    defined = {name: [m for m in methods if _defined(m, data)] for name, data in sets.items()}
    for name in sets:  # what a setting may not be, and too few samples for low data
        run_config(config, Cell(name, "iibalance", 0, 0, "test"), {})
        if config.low_data:
            load_data(run_config(config, Cell(name, "iibalance", 0, 0, "low"), {}).data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output: {folder} cannot be made ({error.strerror or error}); choose another folder"
        ) from None
    taken = f"output: another process is running the comparison in {folder}"
    with locked(folder / ".lock", wait=False, held=taken):
        _describe(folder, config)
        return _run(folder, config, sets, defined)


def _run(
    folder: Path, config: CompareConfig, sets: Sets, defined: Mapping[str, Sequence[str]]
) -> dict:
    methods = list(dict.fromkeys(method for names in defined.values() for method in names))
    tuned = {method: _tuned_as(method) for method in methods}
    settings = {m: settings_of(config, m) for m in {*methods, *tuned.values()}}

    trials = [
        Cell(name, method, seed, trial, "trial")
        for seed in range(config.tuning_seeds)
        for trial in range(config.trials)
        for name in sets
        for method in dict.fromkeys(tuned[method] for method in defined[name])
    ]
    failures = run_cells(folder, config, _with_settings(trials, settings), "tuning")
    chosen, searched = choose(folder, trials, settings)

    low = config.seeds if config.low_data_seeds is None else config.low_data_seeds
    low = min(low, config.seeds) if config.low_data else 0
    finals = [
        Cell(name, method, seed, chosen[name, tuned[method]], kind)
        for kind, seeds in (("test", config.seeds), ("low", low))
        for seed in range(seeds)
        for name in sets
        for method in defined[name]
        if (name, tuned[method]) in chosen
    ]
    failures |= run_cells(folder, config, _with_settings(finals, settings), "comparing")

    result = _summarise(folder, config, sets, finals, searched)
    result["failures"] = failures
    _add_step_times(folder, config, sets, defined, result["results"])
    write_text(folder / "comparison.md", page(result))
    write_picture(folder / "comparison.png", result)
    return result


def _with_settings(cells: Sequence[Cell], settings: Mapping) -> list[tuple[Cell, dict]]:
    return [(cell, settings[cell.method][cell.trial]) for cell in cells]


def _summarise(
    folder: Path, config: CompareConfig, sets: Sets, cells: Sequence[Cell], searched: Mapping
) -> dict:
    """What the page shows, but for times and failures; writes ``comparison.csv``."""
    table = measured.collect(folder, cells)
    measured.write_table(folder / "comparison.csv", table)
    results, made = measured.by_method(table), {}
    for cell in cells:
        file = cell_files(folder, cell)[0]
        if file.exists():
            found = read_json(file)
            entry = results[cell.data][method_class(cell.method).name]
            entry |= {"trial": cell.trial, "setting": found["setting"]}
            made[_version(found)] = made.get(_version(found), 0) + 1
    focus, parts = focus_name(config), ("train", "validation", "test")
    return {
        "focus": focus,
        "seeds": config.seeds,
        "low_data_seeds": len({cell.seed for cell in cells if cell.kind == "low"}),
        "tuning_seeds": config.tuning_seeds,
        "epochs": {name: data.epochs or config.epochs for name, data in config.data.items()},
        "trials": [
            {"data": data, "method": method_class(method).name, "tried": rows}
            for (data, method), rows in searched.items()
        ],
        "samples": {n: {p: len(getattr(data, p)) for p in parts} for n, data in sets.items()},
        "modalities": {name: list(data.modalities) for name, data in sets.items()},
        "results": results,
        **summary(results, focus, list(dict.fromkeys(cell.method for cell in cells))),
        "bootstrap": bootstrap(folder, config, cells, results),
        "made_by": made,
        "machine": read_json(folder / "run.json"),
    }


def _version(found: Mapping) -> str:
    """What made a cell: a digest of this code's source, and its libraries."""
    packages = found.get("versions", {}).items()
    code = f"code {found.get('code', 'not recorded')}"
    return ", ".join([code, *(f"{name} {number}" for name, number in packages if number)])


def _add_step_times(
    folder: Path, config: CompareConfig, sets: Sets, defined: Mapping, results: Mapping
) -> None:
    """Time the training steps where that was asked for; ``seconds_a_step`` of every entry."""
    seconds = {}
    if config.timing_steps:
        seconds = time_steps(
            folder / "seconds.json",
            lambda name, method: run_config(config, Cell(name, method, 0, 0, "test"), {}),
            sets,
            defined,
            steps=config.timing_steps,
            batch_size=config.timing_batch,
            progress=config.training.progress,
        )
    for name, entries in results.items():
        found = seconds.get(name, {}).items()
        timed = {method_class(method).name: times for method, times in found}
        for method, entry in entries.items():
            times = dict(enumerate(timed.get(method, [])))
            entry["seconds_a_step"] = measured.spread(times)


def settings_of(config: CompareConfig, method: str) -> list[dict]:
    """The ``trials`` settings that a method tries: the defaults, then draws.

    Learning rates and weight decays are the same for every method.
    """
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
    """The method whose settings this one takes: an ablation those of its whole."""
    return ablation_of(method_class(name)) or name


def _defined(name: str, data: MultimodalData) -> bool:
    kind = method_class(name)
    return kind.modalities is None or kind.modalities == len(data.modalities)


def choose(folder: Path, trials: Sequence[Cell], settings: dict) -> tuple[dict, dict]:
    """(data set, method) -> the trial that wins, and all that was tried.

    The lowest mean validation NLL wins. A trial that failed with one seed is out, unless all have.
    """
    found: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for cell in trials:
        path = cell_files(folder, cell)[0]
        if path.exists():
            rows = found.setdefault((cell.data, cell.method), {}).setdefault(cell.trial, [])
            rows.append(read_json(path)["validation"])
    chosen, searched = {}, {}
    for (data, method), by_trial in found.items():
        searched[data, method] = tried = {}
        for trial, rows in by_trial.items():
            means = {n: sum(row[n] for row in rows) / len(rows) for n in ("nll", "accuracy")}
            means = {f"validation_{name}": value for name, value in means.items()}
            tried[trial] = {**settings[method][trial], **means, "seeds": len(rows)}
        chosen[data, method] = best_trial(tried)
    return chosen, searched


def _check(config: CompareConfig) -> list[str]:
    """The methods in order; InputError for names that cannot be compared."""
    names = config.method_list()
    labels = [method_class(name).name for name in names]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"methods: two are called {label}; give yours another name")
    if focus_name(config) not in labels:
        raise config.focus_error(labels)
    return names


def _describe(folder: Path, config: CompareConfig) -> None:
    """Write the comparison's options and what starts it.

    Where they stand already they must be the same, but for those that change no cell.
    """
    values = asdict(config) | dict.fromkeys(FREE)
    values["training"]["progress"] = False
    values = json.loads(json.dumps(values))
    digests = {name: data_digest(data.path) for name, data in config.data.items()}
    path, run = folder / "compare.yaml", folder / "run.json"
    start = {
        "command": recorded_command(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    starts = [start]
    if path.exists():
        before, first = yaml.safe_load(path.read_text(encoding="utf-8")), read_json(run)
        for key, value in values.items():
            if before.get(key) != value:
                raise InputError(
                    f"{key}: differs from that of the comparison in {folder} "
                    f"({before.get(key)!r}); give it another output, or the same options"
                )
        if first["data_sha256"] != digests:
            raise InputError(
                f"data: a file is not the one that the comparison in {folder} was started on "
                "(its sha256 differs)"
            )
        starts = first.get("starts", [])
        starts = starts if start in starts else [*starts, start]
    write_json(run, {"starts": starts, "data_sha256": digests})
    if not path.exists():
        write_text(path, yaml.safe_dump(values, sort_keys=False))

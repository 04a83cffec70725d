"""Every method under one protocol.

Methods x seeds x data sets, equally tuned on validation data, tested once, on clean and degraded
input; or methods x resampled splits x data sets, tuned within each split. Cells (one method, data
set, seed) are independent: a comparison that was killed goes on where it was, and cells run in as
many processes as there are workers.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml

from iibalance.comparison import results as measured
from iibalance.comparison.cells import (
    Cell,
    cell_files,
    check_conditions,
    data_config,
    run_config,
)
from iibalance.comparison.joining import join, over_all
from iibalance.comparison.picture import write_picture
from iibalance.comparison.resampling import check_splits, load_split, shares
from iibalance.comparison.statistics import bootstrap, focus_name, summary
from iibalance.comparison.tables import page
from iibalance.comparison.timing import time_steps
from iibalance.comparison.tuning import (
    choices,
    choose,
    chosen_setting,
    settings_of,
    tuned_as,
    wins,
)
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
from iibalance.methods import method_class

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
    "region_accuracy",
    "region_nll",
    "join",
)

Sets = Mapping[str, MultimodalData]


def compare(config: CompareConfig) -> dict:
    """Run, or go on with, the comparison in ``config.output``.

    Writes ``comparison.csv`` (every figure, a row a seed and condition), ``comparison.md`` (the
    page) and ``comparison.png``, and returns what the page shows. A method that is not defined for
    a data set's number of modalities is left out there and said so; a training that diverges fails
    its cell, which is reported and tried again by the next call. With ``join``, the tables of
    comparisons that are done are joined instead.

    Raises :class:`~iibalance.errors.InputError` for wrong options or data before anything is
    trained.
    """
    if config.join is not None:
        return join(config)
    methods, folder = _check(config), Path(config.output).expanduser()
    load = partial(load_split, config) if config.splits else load_data
    sets = {name: load(data_config(config, name)) for name in config.data}
    defined = {name: [m for m in methods if _defined(m, data)] for name, data in sets.items()}
    for name in sets:  # what a setting may not be, and too few samples for low data
        run_config(config, Cell(name, "iibalance", 0, 0, "test"), {})
        check_conditions(sets[name], config)
        if config.splits:
            check_splits(config, data_config(config, name))
        if config.low_data:
            load(run_config(config, Cell(name, "iibalance", 0, 0, "low"), {}).data)
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
    tuned = {method: tuned_as(method) for method in methods}
    seeds = config.splits or config.seeds  # split r has the seed r, and no other
    tuning = config.splits or config.tuning_seeds
    settings = {m: settings_of(config, m) for m in {*methods, *tuned.values()}}

    trials = [
        Cell(name, method, seed, trial, "trial")
        for seed in range(tuning)
        for trial in range(config.trials)
        for name in sets
        for method in dict.fromkeys(tuned[method] for method in defined[name])
    ]
    failures = run_cells(folder, config, _with_settings(trials, settings), "tuning")
    chosen, searched = _chosen(folder, config, trials, settings)

    low = seeds if config.low_data_seeds is None else config.low_data_seeds
    low = min(low, seeds) if config.low_data else 0
    finals = []
    for kind, count in (("test", seeds), ("low", low)):
        for seed in range(count):
            for name, names in defined.items():
                for method in names:
                    choice = chosen[seed].get((name, tuned[method]))
                    if choice is not None:
                        cell = Cell(name, method, seed, choice.trial, kind)
                        finals.append((cell, chosen_setting(settings[method], choice)))
    failures |= run_cells(folder, config, finals, "comparing")

    result = _summarise(folder, config, sets, [cell for cell, _ in finals])
    result["failures"] = failures
    result["trials"] = _tried(chosen, searched, settings, bool(config.splits))
    _add_step_times(folder, config, sets, defined, result["results"])
    write_text(folder / "comparison.md", page(result))
    write_picture(folder / "comparison.png", result)
    return result


def _with_settings(cells: Sequence[Cell], settings: Mapping) -> list[tuple[Cell, dict]]:
    return [(cell, settings[cell.method][cell.trial]) for cell in cells]


def _chosen(
    folder: Path, config: CompareConfig, trials: Sequence[Cell], settings: Mapping
) -> tuple[dict[int, dict], dict]:
    """seed -> what validation chose for its cells, and all that was tried.

    Each resampled split has a choice of its own, from its own trials; else the seeds share one.
    """
    if not config.splits:
        best, searched = choose(folder, trials, settings)
        return dict.fromkeys(range(config.seeds), choices(folder, trials, best)), searched
    chosen, searched = {}, {}
    for seed in range(config.splits):
        own = [cell for cell in trials if cell.seed == seed]
        best, searched = choose(folder, own, settings)
        chosen[seed] = choices(folder, own, best)
    return chosen, searched


def _tried(chosen: Mapping, searched: Mapping, settings: Mapping, splits: bool) -> list[dict]:
    """What the page says of settings: what was tried and won; of splits, how often each won."""
    found: dict[tuple[str, str], list] = {}
    for of_cells in chosen.values():  # a seed each
        for key, choice in of_cells.items():
            found.setdefault(key, []).append(choice)
    rows = []
    for (data, method), of_seeds in found.items():
        row = {"data": data, "method": method_class(method).name}
        if splits:
            row |= {"settings": settings[method], "wins": wins(of_seeds, len(settings[method]))}
        else:
            setting = chosen_setting(settings[method], of_seeds[0])
            row |= {"tried": searched[data, method], "setting": setting}
        rows.append(row)
    return rows


def _summarise(folder: Path, config: CompareConfig, sets: Sets, cells: Sequence[Cell]) -> dict:
    """What the page shows, but for times, settings and failures; writes ``comparison.csv``."""
    table, splits = measured.collect(folder, cells), bool(config.splits)
    if splits or set(config.condition_list()) - {"missing", "noise"}:
        table = measured.condense(table)
    measured.write_table(folder / "comparison.csv", table, splits=splits)
    results, made = measured.by_method(table), {}
    for cell in cells:
        file = cell_files(folder, cell)[0]
        if file.exists():
            found = read_json(file)
            entry = results[cell.data][method_class(cell.method).name]
            if not splits:
                entry |= {"trial": cell.trial, "setting": found["setting"]}
            made[_version(found)] = made.get(_version(found), 0) + 1
    focus, parts = focus_name(config), ("train", "validation", "test")
    names = list(dict.fromkeys(cell.method for cell in cells))
    result = {
        "focus": focus,
        "seeds": config.splits or config.seeds,
        "low_data_seeds": len({cell.seed for cell in cells if cell.kind == "low"}),
        "tuning_seeds": config.tuning_seeds,
        "epochs": {name: data.epochs or config.epochs for name, data in config.data.items()},
        "samples": {n: {p: len(getattr(data, p)) for p in parts} for n, data in sets.items()},
        "modalities": {name: list(data.modalities) for name, data in sets.items()},
        "results": results,
        **summary(results, focus, names),
        "train_seconds": measured.training_seconds(table),
        "made_by": made,
        "machine": read_json(folder / "run.json"),
    }
    if splits:
        result |= {"splits": config.splits, "shares": shares(config)}
        result |= over_all(result, config, names)
    else:  # of samples, which the seeds share
        result["bootstrap"] = bootstrap(folder, config, cells, results)
    return result


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


def _defined(name: str, data: MultimodalData) -> bool:
    kind = method_class(name)
    return kind.modalities is None or kind.modalities == len(data.modalities)


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
    values = _fixed(config)
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
        for key, value in _fixed(CompareConfig()).items():  # an earlier version had fewer options
            section = key != "data" and isinstance(value, dict)
            before[key] = value | before.get(key, {}) if section else before.get(key, value)
        for key, value in values.items():
            if before[key] != value:
                raise InputError(
                    f"{key}: differs from that of the comparison in {folder} "
                    f"({before[key]!r}); give it another output, or the same options"
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


def _fixed(config: CompareConfig) -> dict:
    """The options as YAML has them, those that may change left open.

    More splits can be added; a comparison without any cannot be given some.
    """
    values = asdict(config) | dict.fromkeys(FREE) | {"splits": bool(config.splits)}
    values["conditions"] = config.condition_list()
    values["training"]["progress"] = False
    return json.loads(json.dumps(values))

"""One page over several comparisons: their tables joined, and what is said over all splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path

import pandas as pd

from iibalance.comparison import results as measured
from iibalance.comparison.blocks import over_splits
from iibalance.comparison.picture import write_picture
from iibalance.comparison.statistics import ablation_names, published_names, summary
from iibalance.comparison.tables import page
from iibalance.config import CompareConfig
from iibalance.errors import InputError
from iibalance.files import write_text


def join(config: CompareConfig) -> dict:
    """Join the tables that ``config.join`` names, and write table, page and picture of all of them.

    What needs a prediction of each sample is not on the page: tables hold none. A method that is
    none of :data:`iibalance.methods.METHODS` takes a rank: what it might be an ablation of is not
    in the tables.

    Raises :class:`~iibalance.errors.InputError` where there is no table, or two hold the same.
    """
    folder = Path(config.output).expanduser()
    table = joined(parts(config))
    results = measured.by_method(table)
    methods = list(dict.fromkeys(method for entries in results.values() for method in entries))
    focus = config.focus or ("iibalance" if "iibalance" in methods else methods[-1])
    if focus not in methods:
        raise InputError(
            f"focus: {focus} is not compared; give --focus NAME, one of {', '.join(methods)}"
        )
    known = published_names(methods)
    seeds = {data: set(rows["seed"]) for data, rows in table.groupby("data", sort=False)}
    result = {
        "focus": focus,
        "seeds": max(map(len, seeds.values())),
        "splits": max(map(len, seeds.values())),
        "parts": [str(path) for path in parts(config)],
        "modalities": {name: _modalities(entries) for name, entries in results.items()},
        "results": results,
        **summary(results, focus, known),
        "train_seconds": measured.training_seconds(table),
        "failures": {},
    }
    result |= over_all(result, config, known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output: {folder} cannot be made ({error.strerror or error}); choose another folder"
        ) from None
    measured.write_table(folder / "comparison.csv", table, splits=table.attrs["splits"])
    write_text(folder / "comparison.md", page(result))
    write_picture(folder / "comparison.png", result)
    return result


def over_all(result: Mapping, config: CompareConfig, methods: Sequence[str]) -> dict:
    """What is said over sets and splits of a result, and the mean ranks over the blocks.

    ``methods``: the names that were compared, of which ablations take no rank.
    """
    lesser = ablation_names(methods)
    whole = {
        data: {method: entry for method, entry in entries.items() if method not in lesser}
        for data, entries in result["results"].items()
    }
    found = over_splits(
        result["results"],
        whole,
        result["focus"],
        regions={"accuracy": config.region_accuracy / 100, "nll": config.region_nll},
        resamples=config.bootstrap,
    )
    ranks = {
        kind: {
            metric: {
                method: {"rank": rank, "sets": test["blocks"]}
                for method, rank in test["ranks"].items()
            }
            for metric, test in tests.items()
        }
        for kind, tests in found["tests"].items()
    }
    return found | {"ranks": ranks}


def parts(config: CompareConfig) -> list[Path]:
    """The files that are to be joined, but for the one that joining writes.

    Raises InputError where there is none.
    """
    given = [config.join] if isinstance(config.join, str) else list(config.join or ())
    written = Path(config.output).expanduser() / "comparison.csv"
    if written.with_name("compare.yaml").exists():
        raise InputError(
            f"output: {written.parent} holds a comparison of its own, whose table would be "
            "replaced; choose another folder"
        )
    found: list[Path] = []
    for pattern in given:
        paths = [Path(path) for path in sorted(glob(str(Path(pattern).expanduser())))]
        paths = [path for path in paths if path.resolve() != written.resolve()]
        if not paths:
            raise InputError(
                f"join: there is no file {pattern}; give the comparison.csv of comparisons that "
                "are done, such as 'parts/*.csv'"
            )
        found += [path for path in paths if path not in found]
    return found


def joined(paths: Sequence[Path]) -> pd.DataFrame:
    """All rows of the tables; ``attrs["splits"]`` says whether all are of resampled splits.

    Raises InputError for a file that is no table of a comparison, that holds nothing, or the same
    as another one.
    """
    tables, owner = [], {}
    for path in paths:
        table = measured.read_table(path)
        if table.empty:
            raise InputError(f"join: {path} holds no row; leave it out")
        held = table[["data", "method", "seed", "condition", "modality"]]
        for row in held.itertuples(index=False, name=None):
            if row in owner:
                data, method, seed = row[:3]
                which = "twice" if owner[row] == path else f"as {owner[row]} does"
                raise InputError(
                    f"join: {path} holds {method} on {data}, split {seed}, {which}; leave one out"
                )
            owner[row] = path
        tables.append(table)
    whole = pd.concat(tables, ignore_index=True)
    whole.attrs["splits"] = all(table.attrs["splits"] for table in tables)
    return whole


def _modalities(entries: Mapping) -> list[str]:
    """The modalities of a data set: those of which some method has a prediction of its own."""
    return list(dict.fromkeys(name for entry in entries.values() for name in entry["heads"]))

"""What a comparison measured: one tidy table, and the same by data set and method.

The table has a row for each data set, method, seed and condition, and one for each modality's own
prediction on clean input:

    data, method, seed, condition, modality, accuracy, macro_f1, nll, ece, train_seconds

``modality`` is empty for the fused prediction. Rows of a modality hold its accuracy alone.
``train_seconds`` stands in the fused rows on clean input: processor time of all trainings that the
row's one needed. A table of resampled splits has ``split`` in the place of ``seed``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from iibalance.comparison.cells import CLEAN, REFERENCE, Cell, cell_files
from iibalance.errors import InputError
from iibalance.files import read_json, write_text
from iibalance.methods import method_class
from iibalance.metrics import mean_and_stderr

METRICS = ("accuracy", "macro_f1", "nll", "ece")
LOW = "low data"
# Conditions of one group are averaged, for ranks.
GROUPS = ("clean", "missing", "noise", "unseen", "mild", LOW)
_GROUP_OF = {"noise1": "noise", "noise6": "noise"}
_GROUP_OF |= dict.fromkeys(("blur", "dropped", "gain", "shuffled"), "unseen")
KEYS = ("data", "method", "seed", "condition", "modality")
SECONDS = "train_seconds"
SPLIT = "split"  # what the column of seeds is called where each has a split of its own


def collect(folder: Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """The tidy table of the cells that have results."""
    rows = []
    for cell in cells:
        numbers, _ = cell_files(folder, cell)
        if not numbers.exists():
            continue
        name, found = method_class(cell.method).name, read_json(numbers)
        for condition, metrics in found["test"].items():
            condition = LOW if cell.kind == "low" else condition
            key = dict(zip(KEYS, (cell.data, name, cell.seed, condition, "")))
            row = key | {metric: metrics[metric] for metric in METRICS}
            if condition == CLEAN:  # cells of earlier versions have none
                row[SECONDS] = found.get(SECONDS)
            rows.append(row)
            if condition == CLEAN:
                for modality, own in metrics["modalities"].items():
                    accuracy = None if own is None else own["accuracy"]
                    rows.append(key | {"modality": modality, "accuracy": accuracy})
    table = pd.DataFrame(rows, columns=[*KEYS, *METRICS, SECONDS])
    return table.astype(dict.fromkeys((*METRICS, SECONDS), float))


def condense(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each kind of condition averaged over the modalities, and rounded.

    So a table of many splits and conditions stays small: accuracies have five significant digits,
    the rest four. Conditions are then called by their kind, ``noise6``.
    """
    fused, own = table[table["modality"] == ""], table[table["modality"] != ""]
    fused = fused.assign(condition=fused["condition"].map(kind_of))
    means = fused.groupby(list(KEYS), sort=False, as_index=False).mean()
    small = pd.concat([means, own], ignore_index=True)[list(table.columns)]
    for name in (*METRICS, SECONDS):
        digits = 5 if name == "accuracy" else 4
        small[name] = [float(f"{value:.{digits}g}") for value in small[name]]
    return small


def kind_of(condition: str) -> str:
    """What a condition does, whatever the modality.

    >>> kind_of("audio noise6"), kind_of("low data"), kind_of("mild")
    ('noise6', 'low data', 'mild')
    """
    return condition if condition in GROUPS else condition.rsplit(" ", 1)[-1]


def group_of(condition: str) -> str:
    """The one of ``GROUPS`` that a condition belongs to.

    >>> group_of("audio noise6"), group_of("audio gain"), group_of("low data")
    ('noise', 'unseen', 'low data')
    """
    return _GROUP_OF.get(kind_of(condition), kind_of(condition))


def write_table(
    path: Path, table: pd.DataFrame, digits: int | None = None, *, splits: bool = False
) -> None:
    """Write the table as CSV, whole or not at all; with ``splits`` it says that seeds are splits.

    With ``digits``, NLL and ECE are rounded to so many significant ones, to keep a published table
    small. Accuracies have ten: equal ones must stay equal, for ranks.
    """
    if digits is not None:
        forms = {name: 10 if name == "accuracy" else digits for name in (*METRICS, SECONDS)}
        table = table.copy()
        for name, count in forms.items():
            table[name] = table[name].map(f"{{:.{count}g}}".format, na_action="ignore")
    if splits:
        table = table.rename(columns={"seed": SPLIT})
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def read_table(path: str | Path) -> pd.DataFrame:
    """Read what :func:`write_table` wrote; ``attrs["splits"]`` says whether seeds are splits.

    Tables of earlier versions have no ``train_seconds``: there is none.

    Raises InputError, in one line, for a file that is no such table.
    """
    numbers = (*METRICS, SECONDS)
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in numbers})
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, UnicodeDecodeError) as error:  # what pandas raises is a ValueError
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is no table of a comparison ({reason})") from None
    splits = SPLIT in table and "seed" not in table
    table = table.rename(columns={SPLIT: "seed"}) if splits else table
    absent = [name for name in (*KEYS, *METRICS) if name not in table]
    if absent:
        raise InputError(
            f"{path}: is no table of a comparison (it lacks the columns {', '.join(absent)}); "
            "give a comparison.csv that compare has written"
        )
    if SECONDS not in table:
        table[SECONDS] = math.nan
    for name in ("seed", *numbers):
        if not pd.api.types.is_numeric_dtype(table[name]) and len(table):
            raise InputError(f"{path}: is no table of a comparison ({name} holds no numbers)")
    table = table[[*KEYS, *numbers]]
    table.attrs["splits"] = splits
    return table


def training_seconds(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """data set -> method -> mean seconds of a training on clean rows, where they are known."""
    known = table[table[SECONDS].notna()]
    found: dict[str, dict[str, float]] = {}
    for (data, method), rows in known.groupby(["data", "method"], sort=False):
        found.setdefault(str(data), {})[str(method)] = float(rows[SECONDS].mean())
    return found


def by_method(table: pd.DataFrame) -> dict:
    """data set -> method -> ``conditions``, ``heads`` and ``seeds``.

    ``conditions``: condition -> metric -> mean, standard error and values by seed. ``heads``: each
    modality's ``accuracy`` on clean input, and ``utilisation``: over that of the same encoder
    trained alone with the same seed.
    """
    results: dict = {}
    for (data, method), rows in table.groupby(["data", "method"], sort=False):
        fused, own = rows[rows["modality"] == ""], rows[rows["modality"] != ""]
        results.setdefault(data, {})[method] = {
            "conditions": {
                condition: {metric: spread(by_seed(part, metric)) for metric in METRICS}
                for condition, part in fused.groupby("condition", sort=False)
            },
            "heads": {
                modality: {"accuracy": spread(by_seed(part, "accuracy"))}
                for modality, part in own.groupby("modality", sort=False)
            },
            "seeds": fused.loc[fused["condition"] == CLEAN, "seed"].tolist(),
        }
    for methods in results.values():
        alone = methods.get(REFERENCE, {}).get("heads", {})
        for entry in methods.values():
            for modality, head in entry["heads"].items():
                head["utilisation"] = _ratio(head, alone.get(modality))
    return results


def by_seed(rows: pd.DataFrame, metric: str) -> dict[int, float | None]:
    """seed -> value; None where there is none."""
    values = zip(rows["seed"].tolist(), rows[metric].tolist())
    return {seed: None if value is None or math.isnan(value) else value for seed, value in values}


def spread(values: Mapping[int, float | None]) -> dict | None:
    """Mean and standard error over the seeds that have a value, and the values; None for none."""
    found = {seed: value for seed, value in sorted(values.items()) if value is not None}
    if not found:
        return None
    mean, error = mean_and_stderr(list(found.values()))
    return {"mean": mean, "error": None if math.isnan(error) else error, "values": found}


def group_means(entry: Mapping, metric: str) -> dict[str, dict[int, float]]:
    """group of conditions -> seed -> the metric, averaged over that group's conditions."""
    found: dict[str, list] = {}
    for condition, row in entry["conditions"].items():
        if row[metric] is not None:
            found.setdefault(group_of(condition), []).append(row[metric]["values"])
    return {
        kind: {
            seed: sum(row[seed] for row in rows) / len(rows)
            for seed in set.intersection(*(set(row) for row in rows))
        }
        for kind, rows in found.items()
    }


def _ratio(head: Mapping, alone: Mapping | None) -> dict | None:
    if head["accuracy"] is None or alone is None or alone["accuracy"] is None:
        return None
    reference = alone["accuracy"]["values"]
    values = head["accuracy"]["values"].items()
    return spread({seed: value / reference[seed] for seed, value in values if reference.get(seed)})

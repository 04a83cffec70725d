"""What a comparison measured: one tidy table, and the same by data set and method.

The table has a row for each data set, method, seed and condition, and one for each modality's own
prediction on clean input:

    data, method, seed, condition, modality, accuracy, macro_f1, nll, ece

``modality`` is empty for the fused prediction. Rows of a modality hold its accuracy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from iibalance.comparison.cells import CLEAN, REFERENCE, Cell, cell_files
from iibalance.files import read_json, write_text
from iibalance.methods import method_class
from iibalance.metrics import mean_and_stderr

METRICS = ("accuracy", "macro_f1", "nll", "ece")
LOW = "low data"
GROUPS = ("clean", "missing", "noise", LOW)  # conditions of one kind are averaged for ranks
KEYS = ("data", "method", "seed", "condition", "modality")


def collect(folder: Path, cells: Sequence[Cell]) -> pd.DataFrame:
    """The tidy table of the cells that have results."""
    rows = []
    for cell in cells:
        numbers, _ = cell_files(folder, cell)
        if not numbers.exists():
            continue
        name = method_class(cell.method).name
        for condition, metrics in read_json(numbers)["test"].items():
            condition = LOW if cell.kind == "low" else condition
            key = dict(zip(KEYS, (cell.data, name, cell.seed, condition, "")))
            rows.append(key | {metric: metrics[metric] for metric in METRICS})
            if condition == CLEAN:
                for modality, own in metrics["modalities"].items():
                    accuracy = None if own is None else own["accuracy"]
                    rows.append(key | {"modality": modality, "accuracy": accuracy})
    return pd.DataFrame(rows, columns=[*KEYS, *METRICS])


def write_table(path: Path, table: pd.DataFrame, digits: int | None = None) -> None:
    """Write the table as CSV, whole or not at all.

    With ``digits``, NLL and ECE are rounded to so many significant ones, to keep a published table
    small. Accuracies have ten: equal ones must stay equal, for ranks.
    """
    if digits is not None:
        forms = {name: 10 if name == "accuracy" else digits for name in METRICS}
        table = table.copy()
        for name, count in forms.items():
            table[name] = table[name].map(f"{{:.{count}g}}".format, na_action="ignore")
    write_text(path, table.to_csv(index=False, lineterminator="\n"))


def read_table(path: str | Path) -> pd.DataFrame:
    """Read what :func:`write_table` wrote."""
    return pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in METRICS})


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
    """kind of condition -> seed -> the metric, averaged over that kind's conditions.

    There is one condition a modality.
    """
    found: dict[str, list] = {}
    for condition, row in entry["conditions"].items():
        if row[metric] is not None:
            kind = condition if condition in GROUPS else condition.rsplit(" ", 1)[1]
            found.setdefault(kind, []).append(row[metric]["values"])
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

"""``iibalance predict``: probabilities for new samples, as CSV or npz."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from iibalance.cli.command import Command, check_output, other_file, trained_run
from iibalance.errors import InputError
from iibalance.files import write_bytes

if TYPE_CHECKING:
    from iibalance.nn.model import MultimodalClassifier, Prediction


class Predict(Command):
    """``iibalance predict``."""

    def check(self) -> None:
        """A place for the predictions, the run's folder, the samples."""
        self.output = Path(self.values["output"]).expanduser()
        if self.output.suffix not in (".csv", ".npz"):
            raise InputError(f"output: {self.output} must end in .csv or .npz")
        check_output(self.output)
        run = trained_run(self.values["run"])
        data = other_file(run.config.data, self.values["data"]["path"])

        from iibalance.data.labels import encode_as_trained
        from iibalance.data.sources import read_to_predict

        # By name: a pattern may find other columns in this file, or in another order.
        data = replace(data, columns=run.columns)
        samples = read_to_predict(data, run.modalities, self.values["missing"])
        samples = samples.in_order(run.columns)
        self.targets = None
        if samples.targets is not None:
            self.targets = encode_as_trained(
                samples.targets, run.classes, samples.error, samples.target, samples.classes
            )
        self.folder, self.read = run.folder, [samples]

    def work(self) -> None:
        """Predict, and write a row a sample."""
        from iibalance.training.saving import load

        model, samples = load(self.folder), self.read.pop()
        ids = samples.ids or [str(row) for row in range(len(samples))]
        try:
            found = model.predict(samples)
        except InputError as error:
            raise samples.error(str(error).removeprefix("batch: ")) from None
        as_bytes = _as_npz if self.output.suffix == ".npz" else _as_csv
        write_bytes(self.output, as_bytes(model, found, ids))
        print(f"{len(ids)} predictions written to {self.output}")
        if self.targets is not None:
            right = (found.probabilities.argmax(1).numpy() == self.targets).mean()
            print(f"accuracy on the labels in the file: {float(right):.4f}")


def _as_npz(model: MultimodalClassifier, found: Prediction, ids: Sequence[str]) -> bytes:
    import numpy as np

    arrays = {
        "id": np.array(ids),
        "probabilities": found.probabilities.numpy(),
        "classes": np.array(model.class_names),
    }
    for name in ("trust", "contributions", "uncertainty"):
        values = getattr(found, name)
        if values is not None:
            arrays[name] = values.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _as_csv(model: MultimodalClassifier, found: Prediction, ids: Sequence[str]) -> bytes:
    columns = {
        "trust": found.trust,
        "contribution": found.contributions,
        "uncertainty": found.uncertainty,
    }
    columns = {name: values for name, values in columns.items() if values is not None}
    header = ["id", "prediction", *(f"p.{name}" for name in model.class_names)]
    header += [f"{kind}.{name}" for kind in columns for name in model.modalities]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row, identifier in enumerate(ids):
        p = found.probabilities[row]
        numbers = [*p.tolist(), *(x for values in columns.values() for x in values[row].tolist())]
        label = model.class_names[int(p.argmax())]
        writer.writerow([identifier, label, *(f"{number:.6g}" for number in numbers)])
    return text.getvalue().encode()

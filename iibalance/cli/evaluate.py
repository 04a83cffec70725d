"""``iibalance evaluate``: a trained run's test split again, another file's, or a degraded one."""

from __future__ import annotations

from pathlib import Path

from iibalance.checks import require
from iibalance.cli.command import Command, check_output, other_file, read_data, trained_run
from iibalance.cli.summary import summary
from iibalance.data.degrade import check_amount, parse_degrade
from iibalance.files import read_json, write_json


class Evaluate(Command):
    """``iibalance evaluate``."""

    def check(self) -> None:
        """A place for the result, the run and what it was, what to degrade, the data."""
        options, path = self.values, self.values["data"]["path"]
        check_output(options["output"])
        run = trained_run(options["run"])
        self.folder, self.first = run.folder, read_json(run.folder / "metrics.json")
        self.conditions = [parse_degrade(text, run.modalities) for text in options["degrade"]]
        self.how = {name: options[name] for name in ("fraction", "strength", "seed")}
        for kind in (None, *(kind for _, kind in self.conditions)):
            check_amount(options["fraction"], options["strength"], kind)
        seed = options["seed"]
        require(0 <= seed < 2**63, "seed", seed, "an integer from 0 to 2**63 - 1")
        self.data = run.config.data if path is None else other_file(run.config.data, path)
        self.read = [read_data(self.data, run)]

    def work(self) -> None:
        """Evaluate, write the metrics and print their table."""
        from iibalance.data.load import load_data
        from iibalance.training.evaluation import degrade, evaluate
        from iibalance.training.saving import load

        model, first = load(self.folder), self.first
        # Standardised as the model was trained, not by another file's own training split.
        data = load_data(
            self.data,
            self.read.pop(),
            standardizer=model.standardizer,
            classes=model.class_names,
        )
        split = data.test
        for modality, kind in self.conditions:
            layout = data.layouts.get(modality)
            split = degrade(split, modality, kind, **self.how, layout=layout)
        modalities = first["test"]["modalities"]
        alone = {name: (value or {}).get("alone_accuracy") for name, value in modalities.items()}
        result = {
            "method": first["method"],
            "conditions": self.values["degrade"],
            **self.how,
            "test": evaluate(model, split, alone=alone).metrics,
        }
        name = "-".join(f"{modality}-{kind}" for modality, kind in self.conditions) or "clean"
        output = self.folder / f"evaluation-{name}.json"
        if self.values["output"]:
            output = Path(self.values["output"]).expanduser()
        write_json(output, result)
        print(summary(result))
        print(f"written to {output}")

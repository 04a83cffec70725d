"""``iibalance train``: a run from data to report, new, gone on with or replaced."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from iibalance.cli.command import Command, check_json, configuration, read_data
from iibalance.cli.summary import fusion_note, summary
from iibalance.config import RunConfig
from iibalance.config_files import load_config
from iibalance.errors import InputError
from iibalance.method_names import absolute_method, check_method
from iibalance.training.folder import RunFolder


class Train(Command):
    """``iibalance train``."""

    config: RunConfig | None = None
    before: int | None = None  #: when the run began that stood in the output folder before

    def check(self) -> None:
        """The options, the method's name, the folder, budgets that are given, the data."""
        values = self.values
        self.config, self.resume = configuration(RunConfig, values), values["resume"]
        self.overwrite = values["overwrite"]
        if self.resume is not None:
            self.config = saved_options(self.config, self.resume)
        self.progress = self.config.training.progress
        output = self.config.output
        if output is None and self.overwrite:
            raise InputError(
                "overwrite: name the folder to replace with --output; "
                "without it a new folder is made"
            )
        check_method(self.config.method)
        if output is not None:
            RunFolder(output).check(self.resume is not None, self.overwrite)
            self.before = self._begun()
        check_json(self.config.budgets.path)
        self.read = [read_data(self.config.data)]

    def work(self) -> None:
        """Train, and print the table of the test split."""
        from iibalance.training.run import default_output, run_training

        if self.config.output is None:
            self.config = replace(self.config, output=default_output(self.config))
        resume = self.resume is not None
        found = run_training(self.config, self.read.pop(), resume=resume, overwrite=self.overwrite)
        if found.metrics:
            print(summary(found.metrics))
            note = fusion_note(found.metrics)
            if note is not None:
                print(note)
            print(f"run folder: {self.config.output}")

    def interrupted(self) -> str:
        """A run that has begun can be gone on with."""
        begun = self._begun()
        if begun is not None and (self.resume is not None or begun != self.before):
            output = shlex.quote(str(self.config.output))
            return f"go on with: iibalance train --resume {output}"
        return "no run had begun; give the same command again"

    def _begun(self) -> int | None:
        """When the run in the output folder began; None where there is none."""
        if self.config is None or self.config.output is None:
            return None
        path = RunFolder(self.config.output).config_path
        return path.stat().st_mtime_ns if path.is_file() else None


def saved_options(config: RunConfig, resume: str) -> RunConfig:
    """The options of the run that is gone on with; InputError where others were given."""
    path = RunFolder(resume).config_path
    if not path.is_file():
        raise InputError(
            f"resume: {resume} holds no run (no config.yaml); give the folder of an interrupted run"
        )
    saved = replace(load_config(path), output=resume)
    given = replace(config, method=absolute_method(config.method))
    for name, value, default, first in _leaves(given, RunConfig(), saved):
        if value not in (default, first):
            raise InputError(
                f"{name}: {value!r} differs from {first!r} of the run in {resume}; "
                "leave it out, or start a new run"
            )
    return saved


def _leaves(*configs: Any, prefix: str = "") -> Iterator[tuple]:
    """Dotted names with the values that several configurations of a class hold there."""
    for option in fields(configs[0]):
        values = [getattr(config, option.name) for config in configs]
        if is_dataclass(values[0]):
            yield from _leaves(*values, prefix=f"{prefix}{option.name}.")
        else:
            yield (prefix + option.name, *values)

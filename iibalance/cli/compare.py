"""``iibalance compare``: every method under one protocol."""

from __future__ import annotations

import sys
from pathlib import Path

from iibalance.cli.command import Command, configuration, read_data
from iibalance.config import CompareConfig
from iibalance.method_names import check_method
from iibalance.training.folder import check_place


class Compare(Command):
    """``iibalance compare``."""

    def check(self) -> None:
        """The options, the methods' names, the folder, the data, which the cells read again."""
        self.config = config = configuration(CompareConfig, self.values)
        self.progress = config.training.progress
        if config.join is not None:  # the tables are checked as they are read, before the work
            return check_place(Path(config.output).expanduser(), "comparison")
        for name in config.method_list():
            check_method(name)
        config.check_focus()
        check_place(Path(config.output).expanduser(), "comparison")
        for data in config.data.values():
            read_data(data)

    def work(self) -> None:
        """Compare, and print the ranks."""
        from iibalance.comparison.protocol import compare

        result = compare(self.config)
        ranks = result["ranks"].get("clean", {"accuracy": {}, "nll": {}})
        print(f"{'':<24}average rank, clean: accuracy    NLL")
        for method, row in ranks["accuracy"].items():
            print(f"{method:<24}{row['rank']:>29.2f} {ranks['nll'][method]['rank']:>6.2f}")
        for key, text in result["failures"].items():
            print(f"failed: {key}: {text}", file=sys.stderr)
        print(f"comparison: {self.config.output} (comparison.md, comparison.csv, comparison.png)")

    def interrupted(self) -> str:
        """Its cells stay."""
        return "give the same command again: it goes on where it was"

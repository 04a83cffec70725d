"""``iibalance budgets``: the budgets that train estimates, alone."""

from __future__ import annotations

from iibalance.cli.command import Command, check_output, configuration, read_data
from iibalance.config import RunConfig
from iibalance.method_names import check_method


class EstimateBudgets(Command):
    """``iibalance budgets``."""

    def check(self) -> None:
        """The options, the method's name, a place for the result, the data."""
        self.output = self.values.pop("output")
        self.config = configuration(RunConfig, self.values)
        self.progress = self.config.training.progress
        self.config.budgets.check_estimable()
        check_method(self.config.method)
        check_output(self.output)
        self.read = [read_data(self.config.data)]

    def work(self) -> None:
        """Estimate, print and write."""
        from iibalance.training.run import estimate_run_budgets

        found = estimate_run_budgets(self.config, data=self.read.pop())
        print(found.table())
        if self.output:
            found.save(self.output)
            print(f"written to {self.output}")

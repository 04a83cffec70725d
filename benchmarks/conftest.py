"""What this machine can time, and a word on what it cannot."""

from __future__ import annotations

import torch
from torch._functorch import config as functorch_config

from benchmarks import timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
functorch_config.donated_buffer = False  # compiled backwards are repeated on one output
LEFT_OUT: list[str] = []


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Record device, versions and commit with what is saved."""
    machine_info.update(timing.environment(DEVICE))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say at the end which cases could not be timed here."""
    terminalreporter.section("what was left out")
    for line in LEFT_OUT or ["nothing"]:
        terminalreporter.line(line)

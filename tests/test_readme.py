"""What README shows is what runs: its commands, its ten lines, its names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import figures, tables
from iibalance.files import read_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, re.S)
    if not block.startswith("# not run here")
]


def test_the_two_commands_stand_there():
    assert "pip install -c constraints.txt -e . && python -m iibalance train\n" in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2\n' in README


def test_the_ten_lines_are_ten():
    lines = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert "IIBalanceHead" in PYTHON[0] and len(lines) <= 10


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_examples_run(number):
    namespace = {}
    exec(compile(PYTHON[number], f"README example {number}", "exec"), namespace)  # noqa: S102 - our own README
    if number == 0:
        assert (
            namespace["out"].loss.item() < 3
            and namespace["prediction"].weights.sum(1).sub(1).abs().max() < 1e-5
        )


def test_the_tables_of_the_comparison_are_those_of_its_file():
    result = read_json(ROOT / "benchmarks" / "results" / "comparison.json")
    found = tables(result)
    assert len(found) == 6 and all("\n".join(lines) + "\n" in README for lines in found)
    without = next(
        line for line in figures(result) if line.startswith("without the warm start, iibalance: ")
    )
    assert without.partition(": ")[2] in README


def test_every_option_that_is_named_exists():
    text = subprocess.run(
        [sys.executable, "-m", "iibalance", "train", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    known = set(re.findall(r"--[a-z_.]+", text))
    for command in ("evaluate", "predict", "budgets", "compare"):
        known |= set(
            re.findall(
                r"--[a-z_.]+",
                subprocess.run(
                    [sys.executable, "-m", "iibalance", command, "--help"],
                    capture_output=True,
                    text=True,
                    timeout=120,
                    check=True,
                ).stdout,
            )
        )
    named = set(re.findall(r"(--[a-z_]+(?:\.[a-z_]+)*)", README)) - {
        "--num_processes",
        "--nproc_per_node",
        "--benchmark",
        "--output",
    }  # of accelerate, torchrun, pytest-benchmark
    assert not named - known, named - known

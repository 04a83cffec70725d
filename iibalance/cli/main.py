"""One command: its arguments, its checks, its work, its exit code.

Whatever is wrong with what the user gave is one line on standard error and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from iibalance.cli.arguments import in_plain_words, one_data_set, parse, read_configs
from iibalance.cli.budgets import EstimateBudgets
from iibalance.cli.command import Command
from iibalance.cli.compare import Compare
from iibalance.cli.evaluate import Evaluate
from iibalance.cli.parsers import main_parser
from iibalance.cli.predict import Predict
from iibalance.cli.train import Train
from iibalance.errors import InputError

COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "budgets": EstimateBudgets,
    "compare": Compare,
}


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit code is 0, 2 for input that cannot be used, 130 for Ctrl-C."""
    command = None
    try:
        parser, contents = main_parser(), list(read_configs(arguments))
        options = parse(parser, one_data_set(arguments, contents))
        name = options.subcommand
        command = COMMANDS[name](parser.instantiate(options)[name])
        command.check()
        with _log(command.progress):
            command.work()
        return 0
    # The last one: a training that diverged.
    except (InputError, ArgumentError, FloatingPointError) as error:
        return _refuse(str(error))
    except OSError as error:  # what no check foresaw: a folder that may not be read, a full disk
        if error.filename is None:
            raise
        return _refuse(
            f"{error.filename}: {error.strerror}; choose another path, or make it usable"
        )
    except KeyboardInterrupt:
        advice = "nothing was written" if command is None else command.interrupted()
        print(f"iibalance: interrupted; {advice}", file=sys.stderr)
        return 130


def _refuse(text: str) -> int:
    print(f"iibalance: error: {in_plain_words(text)}", file=sys.stderr)
    return 2


@contextmanager
def _log(shown: bool) -> Iterator[None]:
    """Write progress to standard error, a line each with the time, where no terminal shows bars."""
    if not shown or sys.stderr.isatty():
        yield
        return
    logger, handler = logging.getLogger("iibalance"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

"""The command line: train, evaluate, predict, budgets, compare. ``cli.run`` is the way in.

    main        one command from its arguments to its exit code
    arguments   what stands in them before they are parsed, and refusals in plain words
    parsers     the options of each command
    command     Command, and the checks that several commands share
    <command>   one file a command
    summary     the table that train and evaluate print

A command first checks all that can be told without torch, its data too; importing torch takes
seconds. What may come in: everything. Nothing imports the command line.
"""

from iibalance.cli.main import run

__all__ = ["run"]

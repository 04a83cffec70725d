"""The options of each command.

Those of a run and of a comparison come from the dataclasses of :mod:`iibalance.config`.
"""

from __future__ import annotations

from jsonargparse import ArgumentParser, set_parsing_settings

from iibalance.config import CompareConfig
from iibalance.config_files import config_parser, name_methods
from iibalance.data.degrade import KINDS


def main_parser() -> ArgumentParser:
    """The parser of all commands."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="iibalance",
        description="Budget-aware multimodal training (IIBalance).",
        exit_on_error=False,
        allow_abbrev=False,  # of each command too: a typo such as --epoch must not train
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand(
        "train",
        _train_parser(),
        help="train on digits or on your own data, and test once at the end",
    )
    commands.add_subcommand(
        "evaluate",
        _evaluate_parser(),
        help="metrics of a trained run on the test split, clean or degraded",
    )
    commands.add_subcommand(
        "predict",
        _predict_parser(),
        help="probabilities for new samples, and what they rest on: trust and contributions",
    )
    commands.add_subcommand(
        "budgets",
        _budgets_parser(),
        help="estimate the Intrinsic Information Budgets alone: those that train estimates",
    )
    commands.add_subcommand(
        "compare",
        _compare_parser(),
        help="every method under one protocol: tuned alike, several seeds, degraded input too",
    )
    return parser


def _train_parser() -> ArgumentParser:
    parser = config_parser()
    _add_config(parser)
    parser.add_argument(
        "--resume",
        type=str,
        default=None,
        metavar="DIR",
        help="Go on with the interrupted run in DIR, with its own options.",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Replace the run that is in the output folder, once everything has been checked.",
    )
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_argument
    add("run", type=str, help="the run's folder")
    add(
        "--degrade",
        nargs="+",
        default=[],
        metavar="MODALITY=KIND",
        help=f"degrade a modality: {', '.join(KINDS)}",
    )
    add("--fraction", type=float, default=0.5, help="share of the samples that are degraded")
    add(
        "--strength",
        type=float,
        default=3.0,
        help="of noise in standard deviations of the training inputs, of a blur in positions; "
        "a share s / (1 + s) is dropped, a gain is exp(s / 3) up or down",
    )
    add("--seed", type=int, default=0, help="chooses the degraded samples and all that is drawn")
    add(
        "--data.path",
        type=str,
        default=None,
        help="another file or folder than the one the run was trained on",
    )
    add(
        "--output",
        type=str,
        default=None,
        help="JSON file; evaluation-<conditions>.json in the run's folder by default",
    )
    return parser


def _predict_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("run", type=str, help="the run's folder")
    parser.add_argument(
        "--data.path",
        type=str,
        required=True,
        help="file or folder of new samples, as for train; labels are not needed",
    )
    parser.add_argument(
        "--output", type=str, default="predictions.csv", help="file to write: .csv or .npz"
    )
    parser.add_argument(
        "--missing",
        nargs="+",
        default=[],
        metavar="MODALITY",
        help="modalities that the file does not have: predict without them",
    )
    return parser


def _budgets_parser() -> ArgumentParser:
    parser = config_parser(skip={"output"})
    _add_config(parser)
    parser.add_argument(
        "--output", type=str, default=None, help="JSON file for --budgets.path of train"
    )
    return parser


def _compare_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CompareConfig)
    parser.set_defaults({"data": {"digits": {}}})  # as plain values, for --print_config
    name_methods(parser, "methods")
    _add_config(parser)
    return parser


def _add_config(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="config", help="YAML file with some or all of these options"
    )

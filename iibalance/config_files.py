"""Options as files and as command-line arguments: one parser of :class:`RunConfig` for both.

What may come in: config, files, method_names and errors.
"""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from iibalance.config import (
    BudgetConfig,
    CalibrationConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainingConfig,
)
from iibalance.errors import InputError
from iibalance.files import write_text
from iibalance.method_names import METHOD_NAMES


def name_methods(parser: Any, option: str) -> None:
    """Add the methods' names to the help of an option."""
    for action in parser._actions:
        if action.dest == option:
            action.help = f"{action.help} The methods: {', '.join(METHOD_NAMES)}."


def config_parser(skip: set[str] | None = None):
    """A jsonargparse parser of the options of :class:`RunConfig`, ``--data.name`` and so on.

    ``skip``: options to leave out.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, skip=skip)
    parser.set_defaults({"data.name": None})  # or a path alone would not choose it
    name_methods(parser, "method")
    return parser


def save_config(path: str | Path, config: RunConfig) -> None:
    """Write every option as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(asdict(config), sort_keys=False))


def load_config(path: str | Path) -> RunConfig:
    """Read what :func:`save_config` wrote, or any YAML file with some of the options.

    Raises InputError naming the option that is wrong.

    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_config(os.path.join(folder, "config.yaml"), RunConfig(epochs=3))
    ...     load_config(os.path.join(folder, "config.yaml")).epochs
    3
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}: is not a readable YAML file ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected options by name")
    parser = config_parser()
    try:
        return RunConfig(**vars(parser.instantiate(parser.parse_object(content))))
    except (ArgumentError, InputError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None


def config_from(content: Mapping[str, Any]) -> RunConfig:
    """The options that ``dataclasses.asdict`` made plain.

    >>> config_from(asdict(RunConfig(epochs=3))) == RunConfig(epochs=3)
    True
    """
    kinds = {
        "data": DataConfig,
        "model": ModelConfig,
        "objective": ObjectiveConfig,
        "training": TrainingConfig,
        "budgets": BudgetConfig,
        "calibration": CalibrationConfig,
    }
    return RunConfig(
        **{
            name: kinds[name](**value) if name in kinds else value
            for name, value in content.items()
        }
    )

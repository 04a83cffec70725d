"""What a command is, and the checks that several share: of paths, data and trained runs.

Nothing here imports torch, and reading data imports what that needs only when it is called.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iibalance.config import DataConfig, RunConfig
from iibalance.config_files import load_config
from iibalance.errors import InputError
from iibalance.files import read_json
from iibalance.method_names import check_method
from iibalance.training.folder import RunFolder
from iibalance.training.header import own_encoders, read_description

if TYPE_CHECKING:
    from iibalance.data.samples import Samples


class Command:
    """One command. Only its ``work`` may import what imports torch."""

    progress = False  #: whether it logs how far it is

    def __init__(self, values: Any):
        self.values = values
        #: What ``check`` has read. ``work`` pops it: then the arrays go once they are tensors.
        self.read: list[Samples] = []

    def check(self) -> None:
        """InputError for what can be told without torch."""

    def work(self) -> None:
        """All the rest, with checks of its own."""
        raise NotImplementedError

    def interrupted(self) -> str:
        """What Ctrl-C has left, and how to go on."""
        return "nothing was written"


def configuration(kind: type, values: Any) -> Any:
    """The options of ``kind`` among the parsed values."""
    return kind(
        **{field.name: values[field.name] for field in fields(kind) if field.name in values}
    )


# Data


def read_data(config: DataConfig, run: Trained | None = None) -> Samples:
    """The samples that ``config`` names, checked; their labels too.

    ``run``: whose modalities and classes they must be of; they come in the order of the former.
    """
    check_data_path(config.path)
    # Here, because help and other mistakes are not to wait for scikit-learn, about a second.
    from iibalance.data.labels import encode_as_trained, encode_labels
    from iibalance.data.sources import read_samples

    if run is not None:  # by name: a pattern may find other columns, or in another order
        config = replace(config, columns=run.columns)
    samples = read_samples(config)
    labels, how = samples.targets, (samples.error, samples.target)
    if run is not None:
        if set(samples.modalities) != set(run.modalities):
            raise samples.error(
                f"holds the modalities {', '.join(samples.modalities)}, the run has "
                f"{', '.join(run.modalities)}; give data of the same ones with --data.path"
            )
        samples = samples.select(run.modalities).in_order(run.columns)
    if labels is not None and run is not None:
        encode_as_trained(labels, run.classes, *how, samples.classes)
    elif labels is not None:
        encode_labels(labels, samples.classes, *how)
    return samples


def check_data_path(path: str | None) -> None:
    """InputError where nothing is at the path that is given."""
    if path is not None and not (path and Path(path).expanduser().exists()):
        raise InputError(f"{path or repr(path)}: no such file; check data.path")


def other_file(data: DataConfig, path: str) -> DataConfig:
    """The options of ``data`` for another file than the run's, read as its own ending says."""
    check_data_path(path)
    try:
        return replace(data, path=path, name=None)
    except InputError:  # the ending says nothing
        if data.path is None:
            raise
        return replace(data, path=path)


# Results


def check_output(path: str | Path | None) -> None:
    """Before the work: a result without a place to go is work lost."""
    if path is None:
        return
    place = Path(path).expanduser()
    if not place.parent.is_dir():
        raise InputError(f"output: {path} cannot be written: there is no folder {place.parent}")
    if place.is_dir():
        raise InputError(f"output: {path} is a folder; give a file's name")


def check_json(path: str | None) -> None:
    """InputError where the file that is given is no JSON."""
    if path is not None:
        read_json(Path(path).expanduser())


# Trained runs


class Trained(NamedTuple):
    """A finished run."""

    folder: Path
    config: RunConfig
    modalities: list[str]
    classes: list[str]
    columns: dict[str, str | list[str]]  #: of tables: modality -> the names of its columns


def trained_run(path: str) -> Trained:
    """The finished run in a folder; InputError where there is none that commands can use."""
    folder = RunFolder(path)
    file = folder.model_path()
    config = load_config(folder.config_path)
    check_method(config.method)
    about = read_description(file)
    own = own_encoders(about)
    if own:
        raise InputError(
            f"{file}: was trained with encoders of your own ({', '.join(own)}), which a command "
            "cannot be given; use iibalance.load(run, encoders=...) in Python"
        )
    columns = about.get("columns") or {}
    return Trained(folder.path, config, about["modalities"], about["classes"], columns)

"""Where data come from: each source reads a user's files into :class:`Samples`, without torch.

A new source is a function ``(DataConfig) -> Samples`` and its line in ``_SOURCES``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iibalance.config import DataConfig
from iibalance.data.arrays import as_array, frame_numbers, length
from iibalance.data.npz_file import NpyFolder, NpzFile
from iibalance.data.samples import Samples
from iibalance.data.table import find_columns
from iibalance.errors import InputError


def read_samples(config: DataConfig, *, labels: bool = True) -> Samples:
    """What ``config`` names, checked: all its modalities, or those of ``config.modalities``.

    ``labels`` False reads samples to predict: labels are taken where they are there.

    Raises InputError, in one line, for what cannot be used.

    >>> read_samples(DataConfig(name="digits")).modalities
    ('pixels', 'fourier', 'shape')
    """
    if config.name not in _SOURCES:
        raise InputError(f"data.name: {config.name!r} is none of {', '.join(_SOURCES)}")
    if config.name != "digits" and not config.path:
        raise InputError(
            f"data.path: no file is given; data.name {config.name} needs one, "
            "such as data.path clips.npz"
        )
    samples = _SOURCES[config.name](config, labels)
    if config.modalities is not None:
        samples = samples.select(config.modality_list() or ())
    return samples


def read_to_predict(
    config: DataConfig, modalities: Sequence[str], missing: Collection[str] = ()
) -> Samples:
    """Samples for a model of these ``modalities``; labels are there if the file has them.

    A modality that the file lacks must be named in ``missing``: a misspelt one would be taken for
    one that no sample has. One that is named so is left out wherever it stands, and so is what the
    model does not know.
    """
    for name in missing:
        if name not in modalities:
            raise InputError(
                f"missing: {name!r} is none of the model's modalities ({', '.join(modalities)})"
            )
    # Groups and split are for training: a file to predict need not have them.
    rest = replace(config, modalities=None, groups=None, split=DataConfig.split)
    rest.columns = {name: which for name, which in config.columns.items() if name not in missing}
    samples = read_samples(rest, labels=False)
    there = [name for name in modalities if name in samples.inputs and name not in missing]
    for name in modalities:
        if name not in there and name not in missing:
            listed = ", ".join(samples.key(other) for other in samples.modalities)
            raise samples.error(
                f"{samples.key(name)} is not there; it holds {listed}. Name it as in training, or "
                f"say --missing {name} to predict without it"
            )
    if not there:
        raise samples.error(f"none of {', '.join(modalities)} is there")
    return samples.select(there)


def read_npz(config: DataConfig, labels: bool = True) -> Samples:
    """The arrays of an npz file.

    ============================ ==========================================================
    ``x_<modality>``             [N, ...] real numbers
    ``x_<modality>.<field>``     [N, ...] one of the fields of a dict input
    ``y``                        [N] classes: integers or strings (``config.target``)
    ``mask_<modality>``          optional [N] bool; False: missing, the row may hold anything
    ``split``                    optional [N] of 0 (train), 1 (validation), 2 (test)
    ``config.groups``            optional [N] of anything
    ``ids``                      optional [N] names of the samples (``config.ids``)
    ``classes``                  optional [K] names, where ``y`` are their positions
    ============================ ==========================================================
    """
    return _named_arrays(NpzFile(config.path or ""), config, labels)


def read_folder(config: DataConfig, labels: bool = True) -> Samples:
    """A folder of ``.npy`` files named as the arrays of an npz; large ones stay on the disk."""
    return _named_arrays(NpyFolder(config.path or ""), config, labels)


def read_csv(config: DataConfig, labels: bool = True) -> Samples:
    """A CSV file with a header: the columns of each modality by ``config.columns``."""
    return _table(config, labels, _csv)


def read_parquet(config: DataConfig, labels: bool = True) -> Samples:
    """A Parquet file, as :func:`read_csv`; it needs pyarrow."""
    return _table(config, labels, _parquet)


def read_digits(config: DataConfig, labels: bool = True) -> Samples:
    """scikit-learn's handwritten digits, which take importing it."""
    from iibalance.data import digits

    return digits.read_digits(config)


_SOURCES: dict[str, Callable[[DataConfig, bool], Samples]] = {
    "digits": read_digits,
    "npz": read_npz,
    "folder": read_folder,
    "csv": read_csv,
    "parquet": read_parquet,
}


def _named_arrays(file: NpzFile, config: DataConfig, labels: bool) -> Samples:
    there = file.modalities()
    if not there:
        raise file.error(
            "no modality: array names must begin with x_, such as x_audio; "
            f"it holds {file.listing()}"
        )
    asked = config.modality_list() or tuple(there)
    for name in asked:
        if name not in there:
            raise file.error(f"data.modalities: no x_{name}; there are {', '.join(there)}")
    targets = None
    if config.target in file:
        targets = file.read(config.target)
    elif labels:
        raise file.error(
            f"no {config.target}; add the class of each sample as y, or name its array with "
            f"data.target; it holds {file.listing()}"
        )
    inputs = {name: file.values(name, there[name]) for name in asked}
    count = length(next(iter(inputs.values()))) if targets is None else len(targets)
    for name, values in inputs.items():
        if targets is not None and length(values) != count:
            raise file.error(
                f"x_{name}: has {length(values)} rows, but {config.target} has {count}; "
                "give one row a sample"
            )
    classes = file.read("classes") if "classes" in file else None
    if classes is not None and classes.ndim != 1:
        raise file.error(f"classes: has shape {classes.shape}; give one name a class")
    return Samples(
        inputs,
        targets,
        mask=np.stack([file.mask(name, count) for name in asked], 1),
        groups=file.optional(config.groups, "data.groups", ""),
        split=file.optional(config.split, "data.split", "split"),
        ids=file.optional(config.ids, "data.ids", "ids"),
        classes=None if classes is None else [str(name) for name in classes],
        origin=str(file.path),
        key="x_{}".format,
        target=config.target,
    )


def _table(config: DataConfig, labels: bool, read: Callable[..., Any]) -> Samples:
    path = Path(config.path or "").expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file; check data.path")
    try:
        frame = read(path)
    except ImportError:
        raise InputError(
            f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or save a CSV file"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # whatever pandas and its engines raise on a broken file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as a table ({reason}); give {_FORMS[read]}"
        ) from None
    if not len(frame):
        raise InputError(f"{path}: holds no row; give one row a sample")
    columns = [str(column) for column in frame.columns]
    doubled = [name for name in columns if columns.count(name) > 1]
    if doubled:
        raise InputError(f"{path}: column {doubled[0]!r} is there twice; rename one of them")
    frame.columns = columns

    def column(name: str | None, option: str, default: str) -> np.ndarray | None:
        if not name or (name == default and name not in columns):
            return None
        if name not in columns:
            raise InputError(f"{path}: {option}: no column {name!r}; there are {_few(columns)}")
        return as_array(frame[name])

    chosen = config.columns
    if not chosen:
        raise InputError(
            f"{path}: data.columns: say which columns belong to which modality, such as "
            f'\'{{"audio": "a_*", "video": ["v1", "v2"]}}\'; there are {_few(columns)}'
        )
    roles = {
        config.target: "the labels (data.target)",
        config.groups: "the groups (data.groups)",
        config.split: "the splits (data.split)",
        config.ids: "the names of the samples (data.ids)",
    }
    apart = {str(name): role for name, role in roles.items() if name in columns}
    try:
        found = find_columns(frame, chosen, apart)
        inputs = {
            name: frame_numbers(frame[which], f"columns: {name}") for name, which in found.items()
        }
    except InputError as error:
        raise InputError(f"{path}: data.{error}") from None
    targets = column(config.target, "data.target", "" if labels else config.target)
    samples = Samples(
        inputs,
        targets,
        groups=column(config.groups, "data.groups", ""),
        split=column(config.split, "data.split", "split"),
        ids=column(config.ids, "data.ids", "ids"),
        origin=str(path),
        key="{}".format,
        target=config.target,
    )
    samples.columns = found
    return samples


def _csv(path: Path) -> Any:
    """A DataFrame of a CSV file; InputError where its first row names no columns.

    That row is read apart, because pandas renames columns of one name.
    """
    import pandas as pd

    first = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
    names = first.iloc[0].tolist()
    numbers = pd.to_numeric(first.iloc[0], errors="coerce").notna()
    if numbers.all() and names != [str(index) for index in range(len(names))]:
        raise InputError(
            f"its first row holds numbers ({_few(names)}); "
            "write the names of the columns into the first row"
        )
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise InputError(
            f"its columns are not parted by commas ({names[0]!r}); save it with commas"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
        frame = pd.read_csv(path, index_col=False, low_memory=False)
    frame.columns = [name or numbered for name, numbered in zip(names, frame.columns)]
    return frame


def _parquet(path: Path) -> Any:
    import pandas as pd

    return pd.read_parquet(path)


_FORMS = {_csv: "UTF-8 text with a row of names and one row a sample", _parquet: "a Parquet file"}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")

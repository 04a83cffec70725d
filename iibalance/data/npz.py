"""A user's own data in one ``.npz`` file: to train on, and to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iibalance.config import DataConfig
from iibalance.data.assemble import RawData
from iibalance.data.npz_file import NpzFile
from iibalance.errors import InputError


def read_npz(config: DataConfig) -> RawData:
    """The arrays that ``config`` asks for, checked. Nothing is ever unpickled.

    ======================= ==========================================================
    ``x_<modality>``        [N, ...] real numbers
    ``y``                   [N] integers 0..K-1
    ``mask_<modality>``     optional [N] bool; False: missing, the row may hold anything
    ``config.split``        optional [N] of 0 (train), 1 (validation), 2 (test)
    ``config.groups``       optional [N] of anything
    ``classes``             optional [K] names
    ======================= ==========================================================

    Raises InputError that names file, key, row and value, and says what to do.
    """
    if not config.path:
        raise InputError(
            "data.path: no file is given; data.name npz needs one, such as data.path clips.npz"
        )
    file = NpzFile(config.path)
    names = file.modalities(config.modality_list())
    targets = file.targets()
    count = len(targets)
    class_names = file.class_names(targets)
    arrays = {name: file.features(name, count, "y") for name in names}
    mask = np.stack([file.mask(name, count) for name in names], 1)
    for column, name in enumerate(names):
        file.check_finite(name, arrays[name], mask[:, column])
    file.check_some_modality(mask, names)
    return RawData(
        origin=str(file.path),
        arrays=arrays,
        targets=targets,
        mask=mask,
        groups=file.groups(config.groups, count),
        split=file.split(config.split, count),
        class_names=class_names,
    )


def read_inputs(
    path: str | Path, modalities: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], Tensor, Tensor | None, list[str]]:
    """Samples to predict, with keys as :func:`read_npz` reads them.

    ``y`` is optional, and so is each ``x_<modality>``: one that the file lacks is missing in every
    row. ``shapes[m]`` is the shape of one training sample.

    Returns raw float32 ``inputs[m]`` [N, ...], 0 where missing, to standardise with
    :meth:`Standardizer.transform <iibalance.data.standardize.Standardizer.transform>`; ``mask``
    [N, M]; ``targets`` [N] int64 or None; and N ids, the file's ``ids`` or the row numbers.

    Raises InputError as :func:`read_npz` does, and where shapes differ from training, or a row has
    no modality.

    >>> import tempfile
    >>> shapes = {"audio": (5,), "text": (3,)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/new.npz", x_audio=np.zeros((2, 5)))
    ...     inputs, mask, targets, ids = read_inputs(f"{folder}/new.npz", tuple(shapes), shapes)
    >>> inputs["text"].shape, mask.tolist(), targets, ids
    (torch.Size([2, 3]), [[True, False], [True, False]], None, ['0', '1'])
    """
    file = NpzFile(path)
    there = [name for name in modalities if f"x_{name}" in file]
    if not there:
        wanted = ", ".join(f"x_{name}" for name in modalities)
        raise file.error(f"none of {wanted} is there; it holds {file.listing()}")
    count = len(file.features(there[0]))
    inputs, columns = {}, []
    for name in modalities:
        expected = tuple(shapes[name])
        if name not in there:
            inputs[name] = torch.zeros(count, *expected)
            columns.append(np.zeros(count, dtype=bool))
            continue
        array = file.features(name, count, f"x_{there[0]}")
        if array.shape[1:] != expected:
            raise file.error(
                f"x_{name}: samples have shape {array.shape[1:]}, "
                f"but the model was trained on {expected}; prepare them as for training"
            )
        present = file.mask(name, count)
        file.check_finite(name, array, present)
        with np.errstate(over="ignore", invalid="ignore"):  # missing rows may hold anything
            inputs[name] = torch.from_numpy(array.astype(np.float32))
        inputs[name][torch.from_numpy(~present)] = 0.0
        columns.append(present)
    mask = np.stack(columns, 1)
    file.check_some_modality(mask, modalities)
    targets = torch.from_numpy(file.targets(count)) if "y" in file else None
    ids = file.column("ids", count) if "ids" in file else range(count)
    return inputs, torch.from_numpy(mask), targets, [str(value) for value in ids]

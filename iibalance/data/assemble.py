"""From a source's raw arrays to :class:`MultimodalData`: the checks, splits and standardisation that all sources share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from iibalance.config import DataConfig
from iibalance.data.dataset import (
    MultimodalData,
    Split,
    Standardizer,
    check_layout,
    infer_layout,
)
from iibalance.data.splits import hold_out
from iibalance.errors import InputError

SPLIT_NAMES = ("train", "validation", "test")


@dataclass
class RawData:
    """What a source reads.

    ``arrays[m]`` [N, ...] real, ``targets`` [N] int64 in 0..K-1, ``mask`` [N, M] bool, ``groups`` [N] int64 or None, ``split`` [N] of
    0, 1, 2 or None (then a 70/10/20 split is made), K ``class_names``, and ``origin``, with which error messages begin.
    """

    origin: str
    arrays: dict[str, np.ndarray]
    targets: np.ndarray
    mask: np.ndarray
    groups: np.ndarray | None
    split: np.ndarray | None
    class_names: list[str]


def assemble(raw: RawData, config: DataConfig) -> MultimodalData:
    """Split, cut the training split to ``config.train_fraction``, standardise. InputError for data that cannot be trained on."""
    shapes = {name: array.shape[1:] for name, array in raw.arrays.items()}
    layouts = choose_layouts(raw.arrays, config.layouts, raw.origin)
    try:
        rows = split_rows(raw, config)
    except InputError as error:
        raise InputError(f"{raw.origin}: {error}") from None
    check_training_split(raw, rows["train"])

    splits = {}
    standardizer = Standardizer(shapes, layouts)
    for part in SPLIT_NAMES:  # training first: the others take its statistics
        chosen = rows[part]
        mask = torch.from_numpy(raw.mask[chosen])
        with np.errstate(over="ignore", invalid="ignore"):  # missing rows may hold anything
            inputs = {
                name: torch.from_numpy(array[chosen].astype(np.float32, copy=False))
                for name, array in raw.arrays.items()
            }
        if part == "train":
            standardizer.fit(inputs, mask)
        inputs = standardizer.transform(inputs, mask)
        for name, values in inputs.items():
            bad = ~values.flatten(1).isfinite().all(1)
            if bad.any():
                row = chosen[int(bad.nonzero()[0])]
                raise InputError(
                    f"{raw.origin}: x_{name}: row {row} is too large to standardise in float32; rescale this feature"
                )
        groups = None if raw.groups is None else torch.from_numpy(raw.groups[chosen])
        splits[part] = Split(inputs, torch.from_numpy(raw.targets[chosen]), mask, groups)
    return MultimodalData(
        name=config.name,
        modalities=tuple(raw.arrays),
        num_classes=len(raw.class_names),
        class_names=list(raw.class_names),
        **splits,
        standardizer=standardizer,
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        layouts=layouts,
    )


def choose_layouts(
    arrays: dict[str, np.ndarray], given: dict[str, str], origin: str
) -> dict[str, str]:
    """The user's layout of each modality, or the inferred one; InputError names the modality."""
    given = dict(given or {})
    unknown = sorted(set(given) - set(arrays))
    if unknown:
        raise InputError(
            f"data.layouts: {unknown[0]!r} is no modality in use; there are {', '.join(arrays)}"
        )
    layouts = {}
    for name, array in arrays.items():
        try:
            layouts[name] = given.get(name) or infer_layout(array.shape[1:], array.dtype)
            check_layout(array.shape[1:], layouts[name])
        except InputError as error:
            raise InputError(f"{origin}: x_{name}: {error}") from None
    return layouts


def split_rows(raw: RawData, config: DataConfig) -> dict[str, np.ndarray]:
    """Row numbers of each split, ascending. Without a split column 70/10/20; without validation rows 20 % of the training rows."""
    seed, targets, groups = config.split_seed, raw.targets, raw.groups

    def divide(rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        held = hold_out(
            targets[rows], fraction, seed=seed, groups=None if groups is None else groups[rows]
        )
        return rows[~held], rows[held]

    if raw.split is None:
        rest, test = divide(np.arange(len(targets)), 0.2)
        train, validation = divide(rest, 0.125)
    else:
        train, validation, test = (np.flatnonzero(raw.split == code) for code in range(3))
        if len(train) and not len(validation):
            train, validation = divide(train, 0.2)
    if config.train_fraction < 1 and len(train):
        train = train[~hold_out(targets[train], 1 - config.train_fraction, seed=seed)]
    rows = {"train": train, "validation": validation, "test": test}
    for code, (part, chosen) in enumerate(rows.items()):
        if not len(chosen):
            why = (
                f"no row of {config.split!r} is {code}"
                if raw.split is not None and part != "validation"
                else "there are too few samples"
            )
            raise InputError(
                f"the {part} split is empty: {why}; give more samples or another split column"
            )
    return rows


def check_training_split(raw: RawData, train: np.ndarray) -> None:
    """InputError unless training holds every class and every modality."""
    present = np.bincount(raw.targets[train], minlength=len(raw.class_names))
    for label in np.flatnonzero(present == 0):
        elsewhere = int((raw.targets == label).sum())
        raise InputError(
            f"{raw.origin}: class {label} ({raw.class_names[label]}) has no training sample ({elsewhere} in all); "
            "move some to the training split or remove the class"
        )
    for column, name in enumerate(raw.arrays):
        if not raw.mask[train, column].any():
            raise InputError(
                f"{raw.origin}: mask_{name}: missing in every training sample; leave {name} out with data.modalities"
            )

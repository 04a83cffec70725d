"""From a source's raw arrays to a data set: the checks, splits and standardisation they share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iibalance.config import DataConfig
from iibalance.data.dataset import MultimodalData, Split
from iibalance.data.layouts import choose_layouts
from iibalance.data.splits import hold_out
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError


@dataclass
class RawData:
    """What a source reads.

    ``arrays[m]`` [N, ...] are real numbers, ``targets`` [N] int64 in 0..K-1 and ``mask`` [N, M]
    bool. ``groups`` [N] int64 may be None. ``split`` [N] holds 0 (train), 1 (validation) or 2
    (test); where it is None, a 70/10/20 split is made. There are K ``class_names``, and error
    messages begin with ``origin``.
    """

    origin: str
    arrays: dict[str, np.ndarray]
    targets: np.ndarray
    mask: np.ndarray
    groups: np.ndarray | None
    split: np.ndarray | None
    class_names: list[str]


def assemble(
    raw: RawData, config: DataConfig, standardizer: Standardizer | None = None
) -> MultimodalData:
    """Split, cut the training split to ``config.train_fraction``, standardise.

    Without a ``standardizer``, one is fitted on the training split. Raises InputError for data that
    cannot be trained on, or that are not of the modalities and shapes of the ``standardizer``.
    """
    shapes = {name: tuple(array.shape[1:]) for name, array in raw.arrays.items()}
    if standardizer is None:
        layouts = choose_layouts(raw.arrays, config.layouts, raw.origin)
    else:
        origin = f"data.path: {config.path}" if config.path else raw.origin
        check_as_trained(shapes, standardizer, origin)
        layouts = dict(standardizer.layouts)
    try:
        rows = split_rows(raw, config)
    except InputError as error:
        raise InputError(f"{raw.origin}: {error}") from None
    check_training_split(raw, rows["train"])
    if standardizer is None:
        standardizer = Standardizer(shapes, layouts).fit(*raw_inputs(raw, rows["train"]))
    return MultimodalData(
        name=config.name,
        modalities=tuple(raw.arrays),
        num_classes=len(raw.class_names),
        class_names=list(raw.class_names),
        **{part: make_split(raw, chosen, standardizer) for part, chosen in rows.items()},
        standardizer=standardizer,
        shapes=shapes,
        layouts=layouts,
    )


def raw_inputs(raw: RawData, rows: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
    """``inputs[m]`` [n, ...], float32 but not standardised, and ``mask`` [n, M] of ``rows`` [n]."""
    with np.errstate(over="ignore", invalid="ignore"):  # missing rows may hold anything
        inputs = {
            name: torch.from_numpy(array[rows].astype(np.float32, copy=False))
            for name, array in raw.arrays.items()
        }
    return inputs, torch.from_numpy(raw.mask[rows])


def make_split(raw: RawData, rows: np.ndarray, standardizer: Standardizer) -> Split:
    """The standardised samples of ``rows`` [n]."""
    inputs, mask = raw_inputs(raw, rows)
    inputs = standardizer.transform(inputs, mask)
    for name, values in inputs.items():
        bad = ~values.flatten(1).isfinite().all(1)
        if bad.any():
            row = rows[int(bad.nonzero()[0])]
            raise InputError(
                f"{raw.origin}: x_{name}: row {row} is too large to standardise in float32; "
                "rescale this feature"
            )
    groups = None if raw.groups is None else torch.from_numpy(raw.groups[rows])
    return Split(inputs, torch.from_numpy(raw.targets[rows]), mask, groups)


def split_rows(raw: RawData, config: DataConfig) -> dict[str, np.ndarray]:
    """Row numbers of the train, validation and test split, ascending.

    Without a split column the shares are 70/10/20; where that has no validation rows, they are 20 %
    of the training rows.
    """
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
            f"{raw.origin}: class {label} ({raw.class_names[label]}) has no training sample "
            f"({elsewhere} in all); move some to the training split or remove the class"
        )
    for column, name in enumerate(raw.arrays):
        if not raw.mask[train, column].any():
            raise InputError(
                f"{raw.origin}: mask_{name}: missing in every training sample; "
                f"leave {name} out with data.modalities"
            )


def check_as_trained(
    shapes: dict[str, tuple[int, ...]], standardizer: Standardizer, origin: str
) -> None:
    """InputError unless modalities and shapes are those that ``standardizer`` was fitted on."""
    if tuple(shapes) != tuple(standardizer.shapes):
        raise InputError(
            f"{origin} has the modalities {', '.join(shapes)}, "
            f"the run {', '.join(standardizer.shapes)}"
        )
    for name, shape in shapes.items():
        if shape != standardizer.shapes[name]:
            raise InputError(
                f"{origin}: x_{name}: samples have shape {shape}, "
                f"but the model was trained on {standardizer.shapes[name]}"
            )

"""From a source's samples to a data set: the splits, layouts and standardisation they share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iibalance.config import DataConfig
from iibalance.data.arrays import shape_of
from iibalance.data.dataset import MultimodalData, Split
from iibalance.data.labels import encode_as_trained, encode_labels
from iibalance.data.layouts import choose_layouts
from iibalance.data.lazy import ArrayReader, LazySplit, chunk_size
from iibalance.data.samples import Samples
from iibalance.data.splits import hold_out
from iibalance.data.standardize import Standardizer
from iibalance.data.values import Values
from iibalance.errors import InputError

# Arrays on the disk that take more than this, as float32, are read a batch at a time.
IN_MEMORY = 1 << 30


def assemble(
    samples: Samples,
    config: DataConfig,
    standardizer: Standardizer | None = None,
    *,
    own: Collection[str] = (),
    classes: Sequence[str] | None = None,
    parts: Sequence[str] = ("train", "validation", "test"),
) -> MultimodalData:
    """Split, cut the training split to ``config.train_fraction``, standardise.

    Args:
        standardizer: of a trained model; without it, one is fitted on the training split.
        own: modalities that an encoder of the user's own reads.
        classes: the class names of a trained model.
        parts: the splits that must hold samples; the others may be empty.

    Raises InputError for data that cannot be trained on, or that are not of the modalities and
    shapes of the ``standardizer``.
    """
    if samples.targets is None:
        raise samples.error("targets: there are none; give the class of each sample")
    own_classes = samples.classes
    if classes is None:
        targets, class_names = encode_labels(
            samples.targets, own_classes, samples.error, samples.target
        )
    else:
        class_names = list(classes)
        targets = encode_as_trained(
            samples.targets, class_names, samples.error, samples.target, own_classes
        )
    if standardizer is not None:
        samples = samples.in_order(standardizer.columns)
    shapes = {name: shape_of(values) for name, values in samples.inputs.items()}
    if standardizer is not None:
        origin = f"data.path: {config.path}" if config.path else samples.origin
        check_as_trained(shapes, standardizer, origin or "inputs")
        check_kinds(samples.inputs, standardizer, samples.error)
    else:
        layouts = choose_layouts(samples.inputs, config.layouts, samples.error, samples.key, own)
        off = not_standardised(config.standardize, samples.modalities)
    try:
        rows = split_rows(targets, samples.groups, samples.split, config, parts)
    except InputError as error:
        raise samples.error(str(error)) from None
    check_training_split(samples, targets, class_names, rows["train"])
    source = _Source(samples, targets)
    if standardizer is None:
        standardizer = Standardizer(shapes, layouts, off=off, columns=samples.columns)
        source.fit(standardizer, rows["train"])
    return MultimodalData(
        name=str(config.name) if samples.origin else "samples",
        modalities=samples.modalities,
        num_classes=len(class_names),
        class_names=class_names,
        **{part: source.split(chosen, standardizer) for part, chosen in rows.items()},
        standardizer=standardizer,
        shapes=shapes,
        layouts=dict(standardizer.layouts),
    )


class _Source:
    """The samples as tensors: all at once, or a batch at a time where they are too many."""

    def __init__(self, samples: Samples, targets: np.ndarray):
        self.samples, self.mask = samples, samples.mask
        self.targets, self.groups = targets, samples.groups
        self.read = ArrayReader(samples.inputs)
        arrays = [
            array
            for values in samples.inputs.values()
            for array in (values.values() if isinstance(values, dict) else [values])
        ]
        mapped = any(isinstance(array, np.memmap) for array in arrays)
        self.lazy = mapped and 4 * sum(array.size for array in arrays) > IN_MEMORY

    def inputs(self, rows: np.ndarray) -> tuple[dict[str, Values], Tensor]:
        """Raw ``inputs[m]`` [n, ...] and ``mask`` [n, M] of ``rows`` [n]."""
        mask = torch.from_numpy(self.mask[rows])
        return self.read(rows.tolist(), self.samples.modalities), mask

    def fit(self, standardizer: Standardizer, rows: np.ndarray) -> None:
        """Fit on the rows of the training split."""
        try:
            if self.lazy:
                size = chunk_size(standardizer.shapes)
                blocks = range(0, len(rows), size)
                standardizer.fit_batches(self.inputs(rows[at : at + size]) for at in blocks)
            else:
                standardizer.fit(*self.inputs(rows))
        except InputError as error:
            raise self.samples.error(str(error)) from None

    def split(self, rows: np.ndarray, standardizer: Standardizer) -> Split:
        """The standardised samples of ``rows`` [n]."""
        groups = None if self.groups is None else torch.from_numpy(self.groups[rows])
        targets = torch.from_numpy(self.targets[rows])
        if self.lazy:
            at, mask = torch.from_numpy(rows), torch.from_numpy(self.mask[rows])
            return LazySplit(self.read, at, targets, mask, groups, standardizer)
        inputs, mask = self.inputs(rows)
        try:
            inputs = standardizer.transform(inputs, mask)
        except InputError as error:
            raise self.samples.error(str(error)) from None
        bad = standardizer.first_bad(inputs)
        if bad is not None:
            name, row = bad
            raise self.samples.error(
                f"{self.samples.key(name)}: row {rows[row]} is too large to standardise in "
                "float32; rescale this feature"
            )
        return Split(inputs, targets, mask, groups, standardizer.scale())


def split_rows(
    targets: np.ndarray,
    groups: np.ndarray | None,
    split: np.ndarray | None,
    config: DataConfig,
    parts: Sequence[str] = ("train", "validation", "test"),
) -> dict[str, np.ndarray]:
    """Row numbers of the train, validation and test split, ascending.

    Without a split column the shares are 70/10/20, or 80/20 where no test split is asked for among
    the ``parts``; where the column has no validation rows, they are 20 % of the training rows.
    """
    seed = config.split_seed

    def divide(rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        held = hold_out(
            targets[rows], fraction, seed=seed, groups=None if groups is None else groups[rows]
        )
        return rows[~held], rows[held]

    if split is None:
        rest, test = np.arange(len(targets)), np.arange(0)
        if "test" in parts:
            rest, test = divide(rest, 0.2)
        train, validation = divide(rest, 0.125 if "test" in parts else 0.2)
    else:
        train, validation, test = (np.flatnonzero(split == code) for code in range(3))
        if len(train) and not len(validation):
            train, validation = divide(train, 0.2)
    train = shrink(train, targets, config)
    rows = {"train": train, "validation": validation, "test": test}
    for code, (part, chosen) in enumerate(rows.items()):
        if not len(chosen) and part in parts:
            why = (
                f"no row of {config.split!r} is {code}"
                if split is not None and part != "validation"
                else "there are too few samples"
            )
            raise InputError(
                f"the {part} split is empty: {why}; give more samples or another split column"
            )
    return rows


def shrink(train: np.ndarray, targets: np.ndarray, config: DataConfig) -> np.ndarray:
    """``config.train_fraction`` of the rows ``train``, stratified by class."""
    if config.train_fraction == 1 or not len(train):
        return train
    return train[~hold_out(targets[train], 1 - config.train_fraction, seed=config.split_seed)]


def check_training_split(
    samples: Samples, targets: np.ndarray, class_names: Sequence[str], train: np.ndarray
) -> None:
    """InputError unless training holds every class and every modality."""
    present = np.bincount(targets[train], minlength=len(class_names))
    for label in np.flatnonzero(present == 0).tolist():
        elsewhere = int((targets == label).sum())
        raise samples.error(
            f"class {label} ({class_names[label]}) has no training sample "
            f"({elsewhere} in all); move some to the training split or remove the class"
        )
    for column, name in enumerate(samples.modalities):
        if not samples.mask[train, column].any():
            called = f"mask_{name}" if samples.key("") == "x_" else f"mask: {name}"
            raise samples.error(
                f"{called}: missing in every training sample; leave {name} out with data.modalities"
            )


def check_as_trained(shapes: dict[str, Any], standardizer: Standardizer, origin: str) -> None:
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


def check_kinds(
    inputs: Mapping[str, Any], standardizer: Standardizer, error: Callable[[str], InputError]
) -> None:
    """InputError unless the numbers are of the types that ``standardizer`` was fitted on."""
    for name, values in inputs.items():
        try:
            standardizer.check_kind(name, values)
        except InputError as found:
            raise error(str(found)) from None


def not_standardised(standardize: bool | list[str], names: Sequence[str]) -> list[str]:
    """The modalities that ``data.standardize`` leaves as they are."""
    if isinstance(standardize, bool):
        return [] if standardize else list(names)
    for name in standardize:
        if name not in names:
            raise InputError(
                f"data.standardize: {name!r} is no modality in use; there are {', '.join(names)}"
            )
    return [name for name in names if name not in standardize]

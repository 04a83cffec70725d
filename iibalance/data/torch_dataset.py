"""Any ``torch.utils.data.Dataset`` of (inputs by modality, target) as a data set to train on.

One pass over the items learns their targets and what is missing, a second one the training
samples' statistics; after that a batch at a time is in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from iibalance.config import DataConfig
from iibalance.data.assemble import (
    check_as_trained,
    check_kinds,
    not_standardised,
    shrink,
    split_rows,
)
from iibalance.data.dataset import MultimodalData, Split
from iibalance.data.labels import encode_as_trained, encode_labels
from iibalance.data.layouts import choose_layouts
from iibalance.data.lazy import LazySplit, chunk_size
from iibalance.data.standardize import Standardizer
from iibalance.data.torch_items import DatasetReader, Scan
from iibalance.data.values import Values, each, shapes_of
from iibalance.errors import InputError, check_names

log = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")


def from_datasets(
    data: Dataset | Mapping[str, Dataset],
    config: DataConfig,
    standardizer: Standardizer | None = None,
    *,
    own: Collection[str] = (),
    classes: Sequence[str] | None = None,
) -> MultimodalData:
    """A data set from datasets whose items are ``(inputs, target)``.

    ``inputs`` maps modality names to arrays, tensors or dicts of fields; None, NaN alone, or no
    entry, where the sample lacks a modality. The modalities are those that the first training item
    names, and every item's shapes are one. A dataset may have an attribute ``groups`` [N].

    Args:
        data: one dataset to be split 70/10/20, or a dict of ``"train"``, ``"validation"`` (else
            20 % of the training samples) and ``"test"``.
        config: ``layouts``, ``standardize``, ``modalities``, ``split_seed`` and ``train_fraction``.
        standardizer, classes: of a trained model; else they are those of the training samples.
        own: modalities that an encoder of the user's own reads.

    Raises InputError, in one line, for items that are something else and for data that cannot be
    trained on.

    >>> class Clips(Dataset):
    ...     def __len__(self):
    ...         return 40
    ...     def __getitem__(self, row):
    ...         video = None if row % 7 == 0 else np.full((4, 4), row)
    ...         return {"audio": torch.full((3,), float(row)), "video": video}, row % 2
    >>> found = from_datasets(Clips(), DataConfig())
    >>> len(found.train), found.layouts, found.train.mask.sum(0).tolist()
    (28, {'audio': 'vector', 'video': 'image'}, [28, 25])
    """
    readers = _readers(data)
    asked = config.modality_list()
    names = asked or check_names(next(iter(readers.values())).item(0)[0])
    scans = {part: Scan(reader, names, asked is not None) for part, reader in readers.items()}
    known = next(iter(readers.values())).like
    for name in names:
        if name not in known:
            raise InputError(f"data: no item has {name}; there are {', '.join(known) or 'none'}")
    targets, class_names = _targets(scans, classes)
    samples = {name: each(lambda part: part[None], known[name]) for name in names}
    shapes = {name: shapes_of(values) for name, values in samples.items()}
    fitted = standardizer is not None
    if standardizer is None:
        layouts = choose_layouts(samples, config.layouts, InputError, "data: {}".format, own)
        off = not_standardised(config.standardize, names)
        standardizer = Standardizer(shapes, layouts, off=off)
    else:
        check_as_trained(shapes, standardizer, "data")
        check_kinds(samples, standardizer, InputError)
    splits = {}
    for part, (source, rows) in _rows(targets, scans, config).items():
        scan = scans[source]
        splits[part] = LazySplit(
            readers[source],
            torch.from_numpy(rows),
            torch.from_numpy(targets[source][rows]),
            scan.mask[rows],
            None if scan.groups is None else torch.from_numpy(scan.groups[rows]),
            standardizer,
        )
    _check(splits["train"], class_names, names)
    if not fitted:
        log.info("data: reading %d samples once more, for statistics", len(splits["train"]))
        try:
            standardizer.fit_batches(_raw(splits["train"]))
        except InputError as error:
            raise InputError(f"data: {error}") from None
    return MultimodalData(
        name="dataset",
        modalities=tuple(names),
        num_classes=len(class_names),
        class_names=class_names,
        **splits,
        standardizer=standardizer,
        shapes=dict(standardizer.shapes),
        layouts=dict(standardizer.layouts),
    )


def _readers(data: Dataset | Mapping[str, Dataset]) -> dict[str, DatasetReader]:
    """Part -> its reader, training first; one dataset for all parts is called ""."""
    like: dict[str, Values] = {}  # shared: all parts are of one form
    if not isinstance(data, Mapping):
        return {"": DatasetReader(data, "data", like)}
    for part in data:
        if part not in PARTS:
            raise InputError(f"data: {part!r} is none of {', '.join(PARTS)}")
    for part in ("train", "test"):
        if part not in data:
            raise InputError(
                f"data: there is no {part!r}; give at least 'train' and 'test', or one dataset "
                "that is split"
            )
    return {
        part: DatasetReader(data[part], f"data[{part!r}]", like) for part in PARTS if part in data
    }


def _targets(
    scans: Mapping[str, Scan], classes: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Part -> classes [N] of its samples, and the class names."""
    labels = [scan.labels for scan in scans.values()]
    if len({array.dtype.kind for array in labels}) > 1:
        kinds = ", ".join(f"{part}: {scan.labels.dtype}" for part, scan in scans.items())
        raise InputError(f"data: the targets differ in type ({kinds}); give labels of one kind")
    joined, called = np.concatenate(labels), "data: target"
    if classes is None:
        targets, class_names = encode_labels(joined, None, InputError, called)
    else:
        targets, class_names = encode_as_trained(joined, classes, InputError, called), list(classes)
    ends = np.cumsum([len(array) for array in labels])[:-1]
    return dict(zip(scans, np.split(targets, ends))), class_names


def _rows(
    targets: Mapping[str, np.ndarray], scans: Mapping[str, Scan], config: DataConfig
) -> dict[str, tuple[str, np.ndarray]]:
    """Split -> the dataset it is taken from, and which of its rows."""
    if "" in targets:
        rows = split_rows(targets[""], scans[""].groups, None, config)
        return {part: ("", chosen) for part, chosen in rows.items()}
    count = len(targets["train"])
    if "validation" in targets:
        made = {"train": shrink(np.arange(count), targets["train"], config)}
    else:
        everywhere = np.zeros(count, dtype=np.int64)
        made = split_rows(
            targets["train"], scans["train"].groups, everywhere, config, ("train", "validation")
        )
    found: dict[str, tuple[str, np.ndarray]]
    found = {part: ("train", made[part]) for part in ("train", "validation") if part in made}
    for part in ("validation", "test"):
        if part in targets:
            found[part] = (part, np.arange(len(targets[part])))
    return found


def _check(train: Split, class_names: Sequence[str], names: Sequence[str]) -> None:
    present = torch.bincount(train.targets, minlength=len(class_names))
    for label in (present == 0).nonzero().flatten().tolist():
        raise InputError(
            f"data: class {label} ({class_names[label]}) has no training sample; "
            "move some to the training split or remove the class"
        )
    for column, name in enumerate(names):
        if not train.mask[:, column].any():
            raise InputError(
                f"data: {name} is missing in every training sample; "
                "leave it out with data.modalities"
            )


def _raw(split: LazySplit) -> Iterator[tuple[dict[str, Values], Tensor]]:
    size = chunk_size(split.standardizer.shapes)
    for start in range(0, len(split), size):
        rows = split.rows[start : start + size]
        yield split.read(rows.tolist(), split.names), split.mask[start : start + size]

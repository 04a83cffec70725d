"""``load_data``: from options, samples or datasets to a data set ready to train on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from iibalance.config import DataConfig
from iibalance.data.assemble import assemble
from iibalance.data.dataset import MultimodalData
from iibalance.data.samples import Samples
from iibalance.data.sources import read_samples
from iibalance.data.standardize import Standardizer
from iibalance.data.torch_dataset import from_datasets
from iibalance.errors import InputError


def load_data(
    config: DataConfig | None = None,
    data: Any = None,
    *,
    standardizer: Standardizer | None = None,
    classes: Sequence[str] | None = None,
    own: Collection[str] = (),
    parts: Sequence[str] = ("train", "validation", "test"),
) -> MultimodalData:
    """Read, check, split and standardise.

    The standardisation is fitted on the training split. A model that is trained already has its
    own: give its ``standardizer`` and class names, and the splits are standardised by that one.

    Args:
        config: which data, and how to split and read them.
        data: instead of what ``config`` names: :class:`~iibalance.data.samples.Samples`, a
            ``torch.utils.data.Dataset`` whose items are (inputs by modality, target), or a dict of
            such datasets: ``{"train": ..., "validation": ..., "test": ...}``. Data that are ready
            already are given back.
        standardizer, classes: of a trained model.
        own: modalities that an encoder of the user's own reads.
        parts: the splits that are needed; without "test" no sample is kept for it.

    Raises InputError, in one line, for what cannot be used; with a ``standardizer``, also where the
    modalities or their shapes are not those it was fitted on.

    >>> data = load_data(DataConfig(name="digits"))
    >>> data.modalities, data.num_classes, data.shapes["shape"], data.layouts["shape"]
    (('pixels', 'fourier', 'shape'), 10, (7,), 'vector')
    >>> len(data.train), len(data.validation), len(data.test)
    (1078, 360, 359)
    """
    config = DataConfig() if config is None else config
    if isinstance(data, MultimodalData):
        return data
    if config.groups is not None and data is not None and getattr(data, "groups", None) is None:
        raise InputError(
            f"data.groups: {config.groups!r} names a column of a file, and data is given; "
            "give Samples(..., groups=...), or a dataset with an attribute groups"
        )
    if isinstance(data, torch.utils.data.Dataset) or (
        isinstance(data, Mapping)
        and any(isinstance(part, torch.utils.data.Dataset) for part in data.values())
    ):
        return from_datasets(data, config, standardizer, own=own, classes=classes)
    if data is None:
        data = read_samples(config)
    elif not isinstance(data, Samples):
        raise InputError(
            f"data: a {type(data).__name__} is no data set; give iibalance.Samples(inputs, targets)"
            ", or a torch Dataset"
        )
    elif config.modalities is not None:
        data = data.select(config.modality_list() or ())
    return assemble(data, config, standardizer, own=own, classes=classes, parts=parts)

"""Data: one source a file, all giving :class:`MultimodalData`. ``load_data(DataConfig())`` is the way in."""

from __future__ import annotations

from iibalance.config import DataConfig
from iibalance.data.assemble import assemble
from iibalance.data.corruption import corrupt, drop_modalities, parse_degrade, random_corruptions
from iibalance.data.dataset import (
    Batch,
    MultimodalData,
    Split,
    Standardizer,
    identity,
    infer_layout,
)
from iibalance.data.digits import read_digits
from iibalance.data.npz import read_inputs, read_npz
from iibalance.errors import InputError

__all__ = [
    "Batch",
    "DataConfig",
    "MultimodalData",
    "Split",
    "Standardizer",
    "corrupt",
    "drop_modalities",
    "identity",
    "infer_layout",
    "load_data",
    "parse_degrade",
    "random_corruptions",
    "read_inputs",
]

_SOURCES = {"digits": read_digits, "npz": read_npz}


def load_data(config: DataConfig) -> MultimodalData:
    """Read, check, split and standardise the data that ``config`` names. InputError, in one line, for what cannot be used.

    >>> data = load_data(DataConfig(name="digits"))
    >>> data.modalities, data.num_classes, data.shapes["shape"], data.layouts["shape"]
    (('pixels', 'fourier', 'shape'), 10, (7,), 'vector')
    >>> len(data.train), len(data.validation), len(data.test)
    (1078, 360, 359)
    """
    if config.name not in _SOURCES:
        raise InputError(f"data.name: {config.name!r} is none of {', '.join(_SOURCES)}")
    if not 0 < config.train_fraction <= 1:
        raise InputError(
            f"data.train_fraction: {config.train_fraction} is no share of the training samples; give more than 0, at most 1"
        )
    if not 0 <= config.split_seed < 2**32:
        raise InputError(
            f"data.split_seed: {config.split_seed} is no seed; give an integer from 0 to 2**32 - 1"
        )
    return assemble(_SOURCES[config.name](config), config)

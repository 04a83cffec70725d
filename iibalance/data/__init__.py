"""Data: every source gives the same :class:`~iibalance.data.dataset.MultimodalData`.

``load_data(DataConfig())`` is the way in. A source reads (``digits``, ``npz``), ``assemble``
checks, splits and standardises what it read, and ``dataset`` holds the result; ``corruption``
degrades batches of it. A new source is a file here with a function ``(DataConfig) -> RawData``, and
its line in ``_SOURCES``.

What may come in: config, errors and files. Nothing of nn, methods or training.
"""

from __future__ import annotations

from iibalance.config import DataConfig
from iibalance.data.assemble import assemble
from iibalance.data.dataset import MultimodalData
from iibalance.data.digits import read_digits
from iibalance.data.npz import read_npz
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError

_SOURCES = {"digits": read_digits, "npz": read_npz}


def load_data(config: DataConfig, *, standardizer: Standardizer | None = None) -> MultimodalData:
    """Read, check, split and standardise the data that ``config`` names.

    The standardisation is fitted on the training split. A model that is trained already has its
    own: give its ``standardizer``, and the splits are standardised by that one instead.

    Raises InputError, in one line, for what cannot be used; with a ``standardizer``, also where the
    modalities or their shapes are not those it was fitted on.

    >>> data = load_data(DataConfig(name="digits"))
    >>> data.modalities, data.num_classes, data.shapes["shape"], data.layouts["shape"]
    (('pixels', 'fourier', 'shape'), 10, (7,), 'vector')
    >>> len(data.train), len(data.validation), len(data.test)
    (1078, 360, 359)
    """
    if config.name not in _SOURCES:
        raise InputError(f"data.name: {config.name!r} is none of {', '.join(_SOURCES)}")
    return assemble(_SOURCES[config.name](config), config, standardizer)

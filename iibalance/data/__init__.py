"""Data: every source gives the same :class:`~iibalance.data.dataset.MultimodalData`.

``load_data(DataConfig())`` is the way in. A source reads files into ``Samples`` (``sources``; they
need no torch, so bad files are refused at once), ``assemble`` splits and standardises them, and
``dataset`` holds the result, or ``lazy`` where memory cannot; ``torch_dataset`` takes any torch
Dataset, whose items ``torch_items`` reads. ``arrays``, ``table`` and ``labels`` say what a user may
give as numbers, columns and classes. ``corruption`` degrades batches.

What may come in: config, errors and files. Nothing of nn, methods or training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iibalance.data.load import load_data as load_data


def __getattr__(name: str):
    # Reading files must not wait for torch, which load_data needs.
    if name == "load_data":
        from iibalance.data.load import load_data

        return load_data
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

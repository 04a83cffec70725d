"""Rows in chunks, so that work arrays of [rows, K] stay small whatever the batch.

A size that is only a symbol (``torch.export`` with a dynamic batch, ``torch.compile`` of a second
batch size) is not split: how often a loop over it runs would fix the batch.
"""

from __future__ import annotations

import sys

import torch

from iib_kernels.compat import symbolic

CHUNK_BYTES = 64 * 1024 * 1024  # of all the work arrays of one chunk together


def rows_per_chunk(columns: int, dtype: torch.dtype, arrays: int) -> int:
    """How many rows are processed at once; all of them where ``columns`` is a symbol.

    A row needs ``arrays`` work arrays of ``columns`` elements at a time.
    """
    if symbolic(columns):
        return sys.maxsize
    return max(1, CHUNK_BYTES // max(1, columns * dtype.itemsize * arrays))


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of at most ``size`` of ``total`` rows; one empty chunk for none.

    One of all rows where ``total`` is a symbol.
    """
    if symbolic(total):
        return [(0, total)]
    return [(start, min(start + size, total)) for start in range(0, max(total, 1), size)]

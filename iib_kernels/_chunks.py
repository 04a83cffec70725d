"""Rows in chunks, so that work arrays of [rows, K] stay small whatever the batch."""

from __future__ import annotations

import torch

CHUNK_BYTES = 64 * 1024 * 1024  # of all the work arrays of one chunk together


def rows_per_chunk(columns: int, dtype: torch.dtype, arrays: int) -> int:
    """How many rows are processed at once.

    A row needs ``arrays`` work arrays of ``columns`` elements at a time.
    """
    return max(1, CHUNK_BYTES // max(1, columns * dtype.itemsize * arrays))


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of at most ``size`` of ``total`` rows; one empty chunk for none."""
    return [(start, min(start + size, total)) for start in range(0, max(total, 1), size)]

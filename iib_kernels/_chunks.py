"""Rows in chunks, so that work arrays of [rows, K] stay small whatever the batch."""
from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK_ELEMENTS = 4 * 1024 * 1024  # of one [rows, K] array: 16 MiB in float32


def rows_per_chunk(columns: int) -> int:
    """How many rows of ``columns`` elements are processed at once."""
    return max(1, CHUNK_ELEMENTS // max(1, columns))


def row_chunks(rows: Tensor, columns: int) -> Iterator[Tensor]:
    """``rows`` [B, ...] in consecutive chunks (views); one empty chunk for B = 0."""
    return iter(rows.split(rows_per_chunk(columns)))

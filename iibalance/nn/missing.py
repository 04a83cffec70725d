"""Rows of missing modalities."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def fill_missing(values: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """``values`` (M of [B, ...] rows) with the rows of missing modalities 0, whatever they held.

    A missing row may hold anything, and NaN would pass through a gradient of 0. ``mask`` is
    [B, M] bool, True = present; None = nothing is missing, and the values are given back as they
    are.

    >>> import torch
    >>> audio, visual = torch.ones(2, 1), torch.full((2, 1), torch.nan)
    >>> fill_missing([audio, visual], torch.tensor([[True, False], [True, False]]))[1].tolist()
    [[0.0], [0.0]]
    """
    if mask is None:
        return list(values)
    return [rows.masked_fill(~mask[:, index, None], 0.0) for index, rows in enumerate(values)]

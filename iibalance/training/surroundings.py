"""What a run wants of the process while it lasts."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def surroundings(layouts: Mapping[str, str], device: torch.device) -> Iterator[None]:
    """What a run wants of the process while it lasts.

    One thread where all encoders are small: two mostly wait for each other then, 66 against 46 s of
    CPU time on digits. And Accelerate collects garbage after every training: going through all that
    was there before (scikit-learn, pandas) would take it 0.5 s each time.
    """
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    if device.type == "cpu" and set(layouts.values()) == {"vector"}:
        torch.set_num_threads(1)
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if not frozen:
            gc.unfreeze()

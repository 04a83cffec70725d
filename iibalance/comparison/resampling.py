"""Resampled splits: all samples of a data set divided anew, number r by seed r."""

from __future__ import annotations

import numpy as np

from iibalance.config import CompareConfig, DataConfig
from iibalance.data import load_data
from iibalance.data.dataset import MultimodalData
from iibalance.data.labels import encode_labels
from iibalance.data.samples import Samples
from iibalance.data.sources import read_samples
from iibalance.data.splits import hold_out
from iibalance.errors import InputError


def redrawn(samples: Samples, *, test: float, validation: float, seed: int) -> Samples:
    """The same samples with a new split, whatever their split column says.

    About the shares ``test`` and ``validation`` of all samples are held out, stratified by class;
    the rest is for training, and holds at least one sample of each class. With groups no group is
    in two of the three, so the shares can only be near.

    Raises InputError where groups do not allow it.

    >>> samples = Samples({"a": np.zeros((20, 1))}, [0, 1] * 10, groups=np.arange(20) // 2)
    >>> np.bincount(redrawn(samples, test=0.2, validation=0.2, seed=0).split).tolist()
    [12, 4, 4]
    """
    if samples.targets is None:
        raise samples.error("targets: there are none; give the class of each sample")
    targets, _ = encode_labels(samples.targets, samples.classes, samples.error, samples.target)
    groups, split = samples.groups, np.zeros(len(samples), dtype=np.int64)
    rows = np.arange(len(samples))
    for code, fraction in ((2, test), (1, validation / (1 - test))):
        own = None if groups is None else groups[rows]
        try:
            held = hold_out(targets[rows], fraction, seed=seed, groups=own)
        except InputError as error:
            advice = str(error).replace("give a split column, or no groups", "give no groups")
            raise samples.error(f"split {seed}: {advice}, or leave splits out") from None
        split[rows[held]] = code
        rows = rows[~held]
    found = samples[:]
    found.split = split
    return found


def load_split(config: CompareConfig, data: DataConfig) -> MultimodalData:
    """What ``data`` names, ready to train on, in the resampled split of its ``split_seed``."""
    samples = redrawn(read_samples(data), **shares(config), seed=data.split_seed)
    return load_data(data, samples)


def shares(config: CompareConfig) -> dict[str, float]:
    """What a resampled split is drawn by, besides its seed."""
    return {"test": config.test_fraction, "validation": config.validation_fraction}


def check_splits(config: CompareConfig, data: DataConfig) -> None:
    """InputError where one of the splits cannot be drawn: before anything is trained."""
    samples = read_samples(data)
    for seed in range(config.splits):
        redrawn(samples, **shares(config), seed=seed)

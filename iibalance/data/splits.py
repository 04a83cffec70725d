"""Which sample goes where: stratified, deterministic, and disjoint by group where asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from iibalance.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def hold_out(
    targets: np.ndarray, fraction: float, *, seed: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """Which samples to hold out: bool [N], True for about ``fraction`` of each class.

    At least one sample of each class stays False.

    With ``groups`` [N], no group is on both sides, so the share can only be near ``fraction``.
    Raises InputError where groups do not allow it.

    >>> targets = np.repeat([0, 1, 2], [50, 30, 1])
    >>> np.bincount(targets[hold_out(targets, 0.2)], minlength=3).tolist()
    [10, 6, 0]
    """
    if groups is not None:
        return _hold_out_groups(targets, fraction, seed, groups)
    order = np.random.default_rng(seed).permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]  # by class, shuffled within
    # Systematic sampling along that order: the overall share and that of each class are within one
    # sample of exact, however small a class.
    due = np.floor(np.arange(len(targets) + 1) * fraction + 0.5 + 1e-9)
    held = np.zeros(len(targets), dtype=bool)
    held[order] = due[1:] > due[:-1]
    for label in np.setdiff1d(np.unique(targets), targets[~held]):
        held[np.flatnonzero(targets == label)[0]] = False
    return held


def _hold_out_groups(
    targets: np.ndarray, fraction: float, seed: int, groups: np.ndarray
) -> np.ndarray:
    count = len(np.unique(groups))
    if count < 2:
        raise InputError(
            f"groups: {count} group cannot be divided between training and held out; "
            "give a split column, or no groups"
        )
    folds = max(2, min(round(1 / fraction), count, int(np.bincount(targets).max())))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # "The least populated class has only n members": checked below, by what matters.
        warnings.simplefilter("ignore", UserWarning)
        candidates = [held for _, held in splitter.split(targets, targets, groups)]
    labels = np.unique(targets)
    best = None
    for rows in candidates:
        held = np.zeros(len(targets), dtype=bool)
        held[rows] = True
        if held.any() and len(np.unique(targets[~held])) == len(labels):
            if best is None or abs(held.mean() - fraction) < abs(best.mean() - fraction):
                best = held
    if best is None:
        raise InputError(
            "groups: held-out groups would take every sample of some class with them; "
            "give a split column, or no groups"
        )
    return best


def make_folds(
    targets: Tensor,
    folds: int,
    *,
    groups: Tensor | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """Row numbers of each held-out fold; every row is in exactly one fold.

    Folds are stratified by class, and disjoint by ``groups`` [N] where they are given. ``names``
    [K] of the classes are for messages.

    >>> import torch
    >>> [len(fold) for fold in make_folds(torch.arange(12) % 2, 3)]
    [4, 4, 4]
    """
    if folds < 2:
        raise InputError(f"budgets.folds: {folds}; at least 2 are needed to hold samples out")
    if groups is None:
        labels, counts = np.unique(targets.numpy(), return_counts=True)
        what, there = "samples of every class", int(counts.min())
        rarest = int(labels[counts.argmin()])
        called = rarest if names is None else repr(names[rarest])
        found = f"class {called} has {there} in the training split"
    else:
        what, there = "groups", len(np.unique(groups))
        found = f"there are {there}"
    if there < folds:
        remedy = f"lower budgets.folds to {there}"
        if there < 2 and groups is None:
            remedy = "give more samples of this class, or leave it out"
        elif there < 2:
            remedy = "give no groups, or samples of more groups"
        raise InputError(f"budgets.folds: {folds} folds need as many {what}, {found}; {remedy}")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(folds, shuffle=True, random_state=seed % 2**32)
    labels, apart = targets.numpy(), None if groups is None else groups.numpy()
    return [held for _, held in splitter.split(labels, labels, apart)]

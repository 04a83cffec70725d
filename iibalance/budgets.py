"""Intrinsic Information Budgets (method page, section 1): how much of the label each modality can tell, estimated on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from iibalance.errors import InputError, check_names
from iibalance.files import read_json, write_json
from iibalance.metrics import fit_temperature

PRIOR_FLOOR = 1e-3


@dataclass(frozen=True)
class Budgets:
    """b_m = max(0, 1 - CE_m / H(Y)) of every modality, in [0, 1], with its standard error.

    ``values[m] * label_entropy`` nats is a lower bound on the information about the label that modality m delivers to this family of models (Barber &
    Agakov 2003; predictive V-information, Xu et al. 2020). Plain data: save and load it as JSON, or write your own with :meth:`given`.

    Source: the budgets of arXiv 2603.17347; this definition is this project's own formulation.

    >>> budgets = Budgets.given({"audio": 0.8, "visual": 0.2})
    >>> budgets.anchor, [round(value, 2) for value in budgets.prior], budgets.relative
    ('audio', [0.8, 0.2], [1.0, 0.25])
    """

    modalities: tuple[str, ...]
    values: tuple[float, ...]
    standard_errors: tuple[float, ...]
    label_entropy: float | None = None  #: H(Y) of the training labels, nats
    source: str = "given"
    prior_temperature: float = 1.0  #: T_pi

    def __post_init__(self):
        check_names(self.modalities)
        for name, value, error in zip(self.modalities, self.values, self.standard_errors):
            if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise InputError(f"budgets: {name} is {value!r}, expected a number in [0, 1]")
            if not (isinstance(error, (int, float)) and 0 <= error < math.inf):
                raise InputError(
                    f"budgets: the standard error of {name} is {error!r}, expected a number >= 0"
                )
        if not len(self.modalities) == len(self.values) == len(self.standard_errors):
            raise InputError(
                f"budgets: {len(self.modalities)} modalities, {len(self.values)} values and {len(self.standard_errors)} standard errors"
            )
        if not (
            self.label_entropy is None
            or isinstance(self.label_entropy, (int, float))
            and self.label_entropy > 0
        ):
            raise InputError(
                f"budgets: label_entropy is {self.label_entropy!r}, expected a number of nats > 0"
            )
        if not self.prior_temperature > 0:
            raise InputError(
                f"budgets: prior_temperature is {self.prior_temperature}, expected a number > 0"
            )

    @classmethod
    def given(cls, values: Mapping[str, float]) -> Budgets:
        """Bring your own: budgets by modality, taken as exact."""
        return cls(
            tuple(values), tuple(float(value) for value in values.values()), (0.0,) * len(values)
        )

    @property
    def anchor(self) -> str:
        """The modality with the largest budget (the first of equals)."""
        return self.modalities[max(range(len(self.values)), key=lambda index: self.values[index])]

    @property
    def relative(self) -> list[float]:
        """rho_m = b_m / b_anchor; 1 for all where every budget is 0."""
        top = max(self.values)
        return [value / top if top > 0 else 1.0 for value in self.values]

    @property
    def prior(self) -> list[float]:
        """pi_m, proportional to b_m ** (1 / T_pi), floored at 1e-3 before normalising; sums to 1."""
        weights = np.array(self.values, dtype=np.float64) ** (1 / self.prior_temperature)
        weights = (
            weights / weights.sum()
            if weights.sum() > 0
            else np.full(len(weights), 1 / len(weights))
        )
        weights = np.maximum(weights, PRIOR_FLOOR)
        return (weights / weights.sum()).tolist()

    @property
    def uninformative(self) -> list[str]:
        """Modalities whose budget is not above 0 by two standard errors."""
        return [
            name
            for name, value, error in zip(self.modalities, self.values, self.standard_errors)
            if value <= 2 * error
        ]

    def to_dict(self) -> dict:
        """What :meth:`save` writes: the fields, and the anchor and prior that follow from them."""
        return {
            **{
                key: list(value) if isinstance(value, tuple) else value
                for key, value in asdict(self).items()
            },
            "anchor": self.anchor,
            "prior": self.prior,
            "uninformative": self.uninformative,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Budgets:
        """Read what :meth:`save` wrote, or a plain ``{"audio": 0.8, "visual": 0.2}``; InputError naming what is wrong."""
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected an object with budgets by modality")
        try:
            if "modalities" not in content:
                return cls.given(content)
            if not isinstance(content["modalities"], list):
                raise InputError(f"modalities: {content['modalities']!r} is not a list of names")
            return cls(
                tuple(content["modalities"]),
                tuple(content["values"]),
                tuple(content["standard_errors"]),
                content.get("label_entropy"),
                content.get("source", "given"),
                content.get("prior_temperature", 1.0),
            )
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f'{path}: {error}; write budgets with Budgets.save, or as {{"modality": number in [0, 1]}}'
            ) from None

    def table(self) -> str:
        """A few lines for a person to read."""
        width = max(len(name) for name in (*self.modalities, "modality"))
        lines = [f"{'modality':<{width}}  budget  +- s.e.  prior"]
        for name, value, error, prior in zip(
            self.modalities, self.values, self.standard_errors, self.prior
        ):
            note = "  anchor" if name == self.anchor else ""
            note += "  no measurable information (kept)" if name in self.uninformative else ""
            lines.append(f"{name:<{width}}  {value:6.3f}  {error:7.3f}  {prior:5.3f}{note}")
        return "\n".join(lines)


def label_entropy(targets: Tensor, num_classes: int | None = None) -> float:
    """H(Y) in nats of the labels' frequencies; ValueError for a single class (there is nothing to tell).

    >>> round(label_entropy(torch.tensor([0, 1, 0, 1])), 4)
    0.6931
    """
    if len(targets) and targets.min() < 0:
        raise InputError(f"targets: hold {int(targets.min())}; class indices start at 0")
    p = torch.bincount(targets, minlength=num_classes or 0).double()
    p = p[p > 0] / p.sum()
    entropy = float(-(p * p.log()).sum())
    if len(p) < 2:
        raise InputError("targets: hold a single class; a budget needs at least two")
    return entropy


def budgets_from_logits(
    logits: Mapping[str, Tensor],
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: float | None = None,
    source: str = "given",
) -> Budgets:
    """Budgets from held-out logits, [N, K] a modality, of samples that their predictors have not seen.

    One temperature a modality is fitted first. The standard error is that of the mean of the per-sample losses over H(Y). ``mask`` [N, M] bool:
    only rows where a modality is present count for it; ``entropy`` is H(Y) of the training labels (of ``targets`` by default).

    >>> targets = torch.arange(1000) % 4
    >>> knows = 8.0 * torch.nn.functional.one_hot(targets, 4)
    >>> budgets = budgets_from_logits({"copy": knows, "noise": torch.zeros(1000, 4)}, targets)
    >>> [round(value, 2) for value in budgets.values]
    [1.0, 0.0]
    """
    entropy = label_entropy(targets) if entropy is None else entropy
    values, errors = [], []
    for index, (name, l) in enumerate(logits.items()):
        rows = slice(None) if mask is None else mask[:, index]
        l, y = l[rows].double(), targets[rows]
        if not len(y):
            raise InputError(f"mask: {name} is missing in every sample; leave it out")
        losses = torch.nn.functional.cross_entropy(l / fit_temperature(l, y), y, reduction="none")
        values.append(
            round(min(1.0, max(0.0, 1 - float(losses.mean()) / entropy)), 12)
        )  # what a CPU's rounding leaves of 0 is 0
        errors.append(
            float(losses.std(correction=1)) / math.sqrt(len(y)) / entropy if len(y) > 1 else 1.0
        )
    return Budgets(tuple(logits), tuple(values), tuple(errors), entropy, source)


def smooth_budgets(previous: Budgets | None, new: Budgets, momentum: float = 0.5) -> Budgets:
    """The ``online`` source's moving average: values and standard errors of ``previous`` and ``new`` mixed by ``momentum``.

    >>> smooth_budgets(Budgets.given({"a": 0.5}), Budgets.given({"a": 1.0}), momentum=0.8).values
    (0.6,)
    """
    if previous is None:
        return new
    if previous.modalities != new.modalities:
        raise InputError(
            f"previous: has the modalities {', '.join(previous.modalities)}, expected {', '.join(new.modalities)} in this order"
        )
    mix = lambda old, now: tuple(
        round(momentum * a + (1 - momentum) * b, 12) for a, b in zip(old, now)
    )
    return Budgets(
        new.modalities,
        mix(previous.values, new.values),
        mix(previous.standard_errors, new.standard_errors),
        new.label_entropy,
        new.source,
    )


def make_folds(
    targets: Tensor, folds: int, *, groups: Tensor | None = None, seed: int = 0
) -> list[np.ndarray]:
    """Row numbers of each held-out fold: stratified by class, disjoint by ``groups`` [N] where given, every row in exactly one fold.

    >>> [len(fold) for fold in make_folds(torch.arange(12) % 2, 3)]
    [4, 4, 4]
    """
    targets = targets.numpy()
    if folds < 2:
        raise InputError(f"budgets.folds: {folds}; at least 2 are needed to hold samples out")
    smallest = (
        int(np.unique(targets, return_counts=True)[1].min())
        if groups is None
        else len(np.unique(groups))
    )
    if smallest < folds:
        what = "samples of the rarest class" if groups is None else "groups"
        raise InputError(
            f"budgets.folds: {folds} folds need as many {what}, there are {smallest}; lower budgets.folds"
        )
    if groups is None:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
        return [held for _, held in splitter.split(targets, targets)]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    return [held for _, held in splitter.split(targets, targets, groups.numpy())]


def probe_logits(
    features: Mapping[str, Tensor],
    targets: Tensor,
    folds: Sequence[np.ndarray],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-fitted log-probabilities [N, K] of a linear probe (multinomial logistic regression on standardised features) a modality.

    No fold helps against features made by a network that was trained on the same labels: on public CMU-MOSI features this gave 0.54 for a modality
    that is at chance on new videos. Use raw inputs, features of a frozen network trained on other data, or the ``unimodal`` source.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    classes = int(targets.max()) + 1
    result = {}
    for index, (name, values) in enumerate(features.items()):
        x, y = values.flatten(1).double().numpy(), targets.numpy()
        out = np.full((len(y), classes), -30.0)
        present = np.ones(len(y), bool) if mask is None else mask[:, index].numpy()
        for held in folds:
            fit = present.copy()
            fit[held] = False
            if len(np.unique(y[fit])) < 2:
                raise InputError(
                    f"budgets: outside one fold {name} is present for fewer than two classes; lower budgets.folds"
                )
            held = held[present[held]]  # elsewhere may stand anything, NaN included
            with threadpool_limits(
                1, user_api="blas"
            ):  # on two shared cores 0.05 s a fit of 1,000 x 240; 3.7 s with OpenBLAS's two threads
                probe = make_pipeline(
                    StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)
                ).fit(x[fit], y[fit])
                if len(held):
                    out[np.ix_(held, probe.classes_)] = probe.predict_log_proba(x[held])
        result[name] = torch.from_numpy(np.maximum(out, -30.0))
    return result

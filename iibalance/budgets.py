"""Intrinsic Information Budgets (method page, section 1): their values and their formulas.

How much of the label each modality can tell, by held-out predictions. The trainings that make such
predictions are in :mod:`iibalance.training.budget_stage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iibalance.errors import InputError, check_names
from iibalance.files import read_json, write_json
from iibalance.metrics import fit_temperature

PRIOR_FLOOR = 1e-3


@dataclass(frozen=True)
class Budgets:
    """b_m = max(0, 1 - CE_m / H(Y)) of every modality, in [0, 1], with its standard error.

    ``values[m] * label_entropy`` nats is a lower bound on the information about the label that
    modality m delivers to this family of models (Barber & Agakov 2003; predictive V-information, Xu
    et al. 2020). Plain data: save and load it as JSON, or write your own with :meth:`given`.

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
    prior_softmax: float | None = None  #: the prior is softmax(b / this); None = proportional to b

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
                f"budgets: {len(self.modalities)} modalities, {len(self.values)} values and "
                f"{len(self.standard_errors)} standard errors"
            )
        entropy = self.label_entropy
        if not (entropy is None or isinstance(entropy, (int, float)) and entropy > 0):
            raise InputError(
                f"budgets: label_entropy is {entropy!r}, expected a number of nats > 0"
            )
        softmax = self.prior_softmax
        if not (softmax is None or isinstance(softmax, (int, float)) and softmax > 0):
            raise InputError(
                f"budgets: prior_softmax is {softmax!r}, expected a number above 0; "
                "leave it out for a prior proportional to the budgets"
            )

    @classmethod
    def given(cls, values: Mapping[str, float]) -> Budgets:
        """Bring your own: budgets by modality, taken as exact."""
        numbers = tuple(float(value) for value in values.values())
        return cls(tuple(values), numbers, (0.0,) * len(values))

    @property
    def anchor(self) -> str:
        """The modality with the largest budget (the first of equals)."""
        best = max(range(len(self.values)), key=self.values.__getitem__)
        return self.modalities[best]

    @property
    def relative(self) -> list[float]:
        """rho_m = b_m / b_anchor; 1 for all where every budget is 0."""
        top = max(self.values)
        return [value / top if top > 0 else 1.0 for value in self.values]

    @property
    def prior(self) -> list[float]:
        """pi_m, proportional to b_m, floored at 1e-3 before normalising; sums to 1.

        With ``prior_softmax`` it is softmax(b / prior_softmax).
        """
        weights = np.array(self.values, dtype=np.float64)
        if self.prior_softmax is not None:
            weights = np.exp((weights - weights.max()) / self.prior_softmax)
            return (weights / weights.sum()).tolist()
        total, count = weights.sum(), len(weights)
        weights = weights / total if total > 0 else np.full(count, 1 / count)
        weights = np.maximum(weights, PRIOR_FLOOR)
        return (weights / weights.sum()).tolist()

    @property
    def uninformative(self) -> list[str]:
        """Modalities whose budget is not above 0 by two standard errors."""
        rows = zip(self.modalities, self.values, self.standard_errors)
        return [name for name, value, error in rows if value <= 2 * error]

    def to_dict(self) -> dict:
        """What :meth:`save` writes: the fields, and the anchor and prior that follow from them."""
        fields = asdict(self)
        if self.prior_softmax is None:
            del fields["prior_softmax"]
        for key, value in fields.items():
            fields[key] = list(value) if isinstance(value, tuple) else value
        return {
            **fields,
            "anchor": self.anchor,
            "prior": self.prior,
            "uninformative": self.uninformative,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Budgets:
        """Read what :meth:`save` wrote, or a plain ``{"audio": 0.8, "visual": 0.2}``.

        Raises InputError naming what is wrong.
        """
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected an object with budgets by modality")
        try:
            return cls.from_dict(content)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: {error}; write budgets with Budgets.save, "
                'or as {"modality": number in [0, 1]}'
            ) from None

    @classmethod
    def from_dict(cls, content: Mapping) -> Budgets:
        """What :meth:`to_dict` gave, or budgets by modality."""
        if "modalities" not in content:
            return cls.given(content)
        if not isinstance(content["modalities"], list):
            raise InputError(f"modalities: {content['modalities']!r} is not a list of names")
        if content.get("prior_temperature", 1.0) != 1.0:
            raise InputError(
                f"prior_temperature is {content['prior_temperature']!r}, "
                "and there is none any more: the prior is proportional to the budgets"
            )
        return cls(
            tuple(content["modalities"]),
            tuple(content["values"]),
            tuple(content["standard_errors"]),
            content.get("label_entropy"),
            content.get("source", "given"),
            content.get("prior_softmax"),
        )

    def table(self) -> str:
        """A few lines for a person to read."""
        width = max(len(name) for name in (*self.modalities, "modality"))
        lines = [f"{'modality':<{width}}  budget  +- s.e.  prior"]
        rows = zip(self.modalities, self.values, self.standard_errors, self.prior)
        for name, value, error, prior in rows:
            note = "  anchor" if name == self.anchor else ""
            note += "  no measurable information (kept)" if name in self.uninformative else ""
            lines.append(f"{name:<{width}}  {value:6.3f}  {error:7.3f}  {prior:5.3f}{note}")
        return "\n".join(lines)


def label_entropy(targets: Tensor, num_classes: int | None = None) -> float:
    """H(Y) in nats of the labels' frequencies.

    Raises InputError for a single class: there is nothing to tell.

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
    """Budgets from held-out logits, [N, K] a modality, of samples their predictors have not seen.

    One temperature a modality is fitted first. The standard error is that of the mean of the
    per-sample losses over H(Y).

    Args:
        mask: [N, M] bool: only rows where a modality is present count for it.
        entropy: H(Y) of the training labels; of ``targets`` by default.

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
        scaled = l / fit_temperature(l, y)
        losses = torch.nn.functional.cross_entropy(scaled, y, reduction="none")
        value = min(1.0, max(0.0, 1 - float(losses.mean()) / entropy))
        values.append(round(value, 12))  # what a CPU's rounding leaves of 0 is 0
        errors.append(1.0)  # of one sample nothing is known
        if len(y) > 1:
            errors[-1] = float(losses.std(correction=1)) / math.sqrt(len(y)) / entropy
    return Budgets(tuple(logits), tuple(values), tuple(errors), entropy, source)


def smooth_budgets(previous: Budgets | None, new: Budgets, momentum: float = 0.5) -> Budgets:
    """The ``online`` source's moving average of values and standard errors.

    ``momentum`` is the share of ``previous`` that stays.

    >>> smooth_budgets(Budgets.given({"a": 0.5}), Budgets.given({"a": 1.0}), momentum=0.8).values
    (0.6,)
    """
    if previous is None:
        return new
    if previous.modalities != new.modalities:
        raise InputError(
            f"previous: has the modalities {', '.join(previous.modalities)}, "
            f"expected {', '.join(new.modalities)} in this order"
        )

    def mix(old: tuple[float, ...], now: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(round(momentum * a + (1 - momentum) * b, 12) for a, b in zip(old, now))

    return Budgets(
        new.modalities,
        mix(previous.values, new.values),
        mix(previous.standard_errors, new.standard_errors),
        new.label_entropy,
        new.source,
        new.prior_softmax,
    )

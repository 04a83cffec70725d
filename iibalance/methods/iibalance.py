"""The method this project is for (method page, all of it), and its ablations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iibalance.budgets import Budgets
from iibalance.config import RunConfig
from iibalance.data.dataset import Split
from iibalance.errors import InputError
from iibalance.methods.base import Method
from iibalance.methods.gradients import groups_by_modality
from iibalance.nn.calibration import HeldOut, calibrate, collect
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier


class IIBalance(Method):
    """Unimodal heads, EMA prototypes, budget-conditioned alignment, and a calibrated gate.

    The gate is fitted on held-out samples and corrupted copies of them. Each modality keeps its own
    best epoch: encoders share no weights, and what the fused loss ties together the calibration
    sets right again.

    The joint training goes on from the encoders trained alone: each weight matrix starts at
    ``warm_start`` times the trained one plus the rest of a new one (biases, norms, frozen weights,
    buffers and prototypes are the trained ones). 1 takes them whole. What is between is the blend
    of Ash and Adams, "On Warm-Starting Neural Network Training", NeurIPS 2020.

    Parameters: ``warm_start`` (1), in [0, 1]; 0 = new weights, and no encoder is trained alone for
    this method's sake.

    >>> IIBalance(warm_start=1.5)
    Traceback (most recent call last):
    iibalance.errors.InputError: method_options: warm_start is 1.5; give a share in [0, 1]
    """

    name = "iibalance"
    needs_budgets = True
    one_epoch = False
    defaults = {"warm_start": 1.0}

    def __init__(self, config: RunConfig | None = None, **options: float):
        super().__init__(config, **options)
        if self.options.warm_start > 1:
            raise InputError(
                f"method_options: warm_start is {self.options.warm_start}; give a share in [0, 1]"
            )

    def objective(self) -> dict[str, float]:
        """The weights of the objective, by name."""
        names = ("fused_weight", "alpha", "beta", "temperature", "warmup", "ramp")
        return {name: getattr(self.config.objective, name) for name in names}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        impl = self.config.kernels
        return IIBalanceHead(
            embedding_dims,
            num_classes,
            objective=IIBalanceLoss(**self.objective(), impl=impl),
            momentum=self.config.objective.momentum,
            impl=impl,
        )

    def clip_groups(self, model: nn.Module) -> list[list[Tensor]]:
        """By modality: a strong one's large gradient must not shorten a weak one's."""
        return [group["params"] for group in groups_by_modality(model)]

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        model.head.set_budgets(budgets)

    @property
    def starts_alone(self) -> bool:
        return self.options.warm_start > 0

    @torch.no_grad()
    def initialise(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        for index, name in enumerate(model.modalities):
            trained, head = alone[name], alone[name].head
            self._start(model.encoders[index], trained.encoders[0])
            self._start(model.head.classifiers[index], head.classifiers[0])
            for value, its in zip(model.head.prototypes.table(index), head.prototypes.table(0)):
                value.copy_(its)

    def _start(self, part: nn.Module, trained: nn.Module) -> None:
        """Move the values of ``part`` to those of ``trained``; of another kind, they stay new."""
        share, values = self.options.warm_start, dict(trained.state_dict())
        for name, value in (*part.named_parameters(), *part.named_buffers()):
            if name not in values or values[name].shape != value.shape:
                continue
            its = values[name]
            if share < 1 and value.requires_grad and value.dim() > 1:
                its = (1 - share) * value + share * its
            value.copy_(its)

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        held_out = collect(model, validation, self.config.calibration, seed=seed)
        self.fit_gate(model.head, out_of_fold, held_out)

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        """Fit the gate on held-out predictions; what the ablations change."""
        calibrate(head, out_of_fold, validation, self.config.calibration)

    def training_key(self) -> dict:
        # Ablations that differ in the gate alone share a training; a user's class does not.
        shared = type(self) in (IIBalance, *ABLATIONS)
        return {
            "method": "iibalance" if shared else self.name,
            "objective": self.objective(),
            "momentum": self.config.objective.momentum,
            **vars(self.options),
        }


class WithAlignment(IIBalance):
    """With a piece more: the budget-conditioned alignment (beta = 1), which the default leaves out.

    Resampled splits and two of three comparisons had it do nothing, or harm.
    """

    name = "iibalance_with_alignment"

    def objective(self) -> dict[str, float]:
        return super().objective() | {"beta": 1.0}


class NoPrototypes(IIBalance):
    """Ablation: neither prototype term in training, and no surprise in the gate."""

    name = "iibalance_no_prototypes"
    budget_alpha = 0.0

    def objective(self) -> dict[str, float]:
        return super().objective() | {"alpha": 0.0, "beta": 0.0}

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, surprise_scale=0.0)


class NoWarmStart(IIBalance):
    """Ablation: the joint training starts from new weights."""

    name = "iibalance_no_warm_start"
    defaults = {**IIBalance.defaults, "warm_start": 0.0}


class NoGate(IIBalance):
    """Ablation: temperatures alone are fitted, and every modality present is trusted wholly."""

    name = "iibalance_no_gate"

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, fit_gating=False)


class FixedGate(IIBalance):
    """Ablation: the gate is told of no surprise; a modality has one trust for all samples."""

    name = "iibalance_fixed_gate"

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, surprise_scale=0.0)


#: What is set beside the whole method; most lack a piece of it, and one has one more.
ABLATIONS = (WithAlignment, NoPrototypes, NoWarmStart, NoGate, FixedGate)

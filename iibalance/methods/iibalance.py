"""The method this project is for (method page, all of it), and its ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    The joint training starts between new weights and those that the budget stage trained for the
    first fold, each modality alone: every weight matrix is ``warm_start`` times the trained one
    plus the rest of a new one (biases, norms, frozen weights, buffers and prototypes are the
    trained ones). The blend is that of Ash and Adams, "On Warm-Starting Neural Network Training",
    NeurIPS 2020, who find that starting from trained weights alone generalises worse. Budgets that
    come from no training (given ones, ``probe``, ``online``) leave nothing to start from, and all
    weights are new.

    Parameters: ``warm_start`` (0.5), in [0, 1]; 0 = new weights.

    >>> IIBalance(warm_start=1.5)
    Traceback (most recent call last):
    iibalance.errors.InputError: method_options: warm_start is 1.5; give a share in [0, 1]
    """

    name = "iibalance"
    needs_budgets = True
    one_epoch = False
    defaults = {"warm_start": 0.5}

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

    @torch.no_grad()
    def initialise(
        self, model: MultimodalClassifier, folds: Sequence[MultimodalClassifier]
    ) -> None:
        share = self.options.warm_start
        if not share:
            return
        trained = folds[0].state_dict()
        ours = set().union(*(model.keys_of(index) for index in range(len(model.modalities))))
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if key not in ours or key not in trained or trained[key].shape != value.shape:
                continue  # a head of another kind keeps its new weights
            if value.requires_grad and value.dim() > 1:
                value.mul_(1 - share).add_(trained[key], alpha=share)
            else:
                value.copy_(trained[key])

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


class NoPrior(IIBalance):
    """Ablation: the budgets do not enter the fusion (they still condition the alignment)."""

    name = "iibalance_no_prior"

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, prior_strength=0.0)


class NoAlignment(IIBalance):
    """Ablation: beta = 0, the prototype contrastive loss alone."""

    name = "iibalance_no_alignment"

    def objective(self) -> dict[str, float]:
        return super().objective() | {"beta": 0.0}


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
    """Ablation: temperatures alone are fitted; every modality present has the same weight."""

    name = "iibalance_no_gate"

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, fit_gating=False)


class FixedGate(IIBalance):
    """Ablation: the weights are the budgets' prior, the same for every sample."""

    name = "iibalance_fixed_gate"

    def fit_gate(
        self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut
    ) -> None:
        options = {"fit_gating": False, "prior_strength": 1.0}
        calibrate(head, out_of_fold, validation, self.config.calibration, **options)


ABLATIONS = (NoPrior, NoAlignment, NoPrototypes, NoWarmStart, NoGate, FixedGate)

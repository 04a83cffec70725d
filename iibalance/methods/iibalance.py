"""The method this project is for (method page, all of it)."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iibalance.budgets import Budgets
from iibalance.calibration import HeldOut, calibrate, collect
from iibalance.data.base import Split
from iibalance.head import IIBalanceHead
from iibalance.methods.base import Method, groups_by_modality
from iibalance.model import MultimodalClassifier
from iibalance.objective import IIBalanceLoss


class IIBalance(Method):
    """Unimodal heads, EMA prototypes, budget-conditioned alignment, and a gate calibrated on held-out and corrupted samples."""

    name = "iibalance"
    needs_budgets = True
    search = {"objective.alpha": (1.0, 3.0, 0.3)}

    def objective(self) -> dict[str, float]:
        """The weights of the objective, by name."""
        o = self.config.objective
        return dict(fused_weight=o.fused_weight, alpha=o.alpha, beta=o.beta, temperature=o.temperature, warmup=o.warmup, ramp=o.ramp)

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        objective = IIBalanceLoss(**self.objective(), impl=self.config.kernels)
        return IIBalanceHead(
            embedding_dims, num_classes, objective=objective, gate_hidden=self.config.calibration.hidden, momentum=self.config.objective.momentum,
            impl=self.config.kernels,
        )

    def clip_groups(self, model: nn.Module) -> list[list[Tensor]]:
        """By modality: a strong one's large gradient must not shorten a weak one's."""
        return [group["params"] for group in groups_by_modality(model)]

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        model.head.set_budgets(budgets)

    @property
    def one_epoch(self) -> bool:
        """Each modality keeps its own best epoch: encoders share no weights, and what the fused loss ties together the calibration sets right again."""
        return False

    def calibrate(self, model: MultimodalClassifier, train: Split, validation: Split, out_of_fold: HeldOut | None, seed: int) -> None:
        self.fit_gate(model.head, out_of_fold, collect(model, validation, self.config.calibration, seed=seed))

    def fit_gate(self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut) -> None:
        """Fit the gate on held-out predictions; what the ablations change."""
        calibrate(head, out_of_fold, validation, self.config.calibration)

    def training_key(self) -> dict:
        return {"method": "iibalance", "objective": self.objective(), "momentum": self.config.objective.momentum}


class NoPrior(IIBalance):
    """Ablation: the budgets do not enter the fusion (they still condition the alignment)."""

    name = "iibalance_no_prior"
    tuned_as = "iibalance"

    def fit_gate(self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, prior_strength=0.0)


class NoAlignment(IIBalance):
    """Ablation: beta = 0, the prototype contrastive loss alone."""

    name = "iibalance_no_alignment"
    tuned_as = "iibalance"

    def objective(self) -> dict[str, float]:
        return super().objective() | {"beta": 0.0}


class NoPrototypes(IIBalance):
    """Ablation: neither prototype term in training, and no surprise in the gate."""

    name = "iibalance_no_prototypes"
    tuned_as = "iibalance"

    def objective(self) -> dict[str, float]:
        return super().objective() | {"alpha": 0.0, "beta": 0.0}

    def fit_gate(self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, surprise_scale=0.0)
        if head.gate.network is not None:  # these inputs were 0 while it was fitted
            count = len(head.modalities)
            with torch.no_grad():
                head.gate.network[0].weight[:, count:2 * count] = 0.0


class NoGate(IIBalance):
    """Ablation: temperatures alone are fitted; every modality present has the same weight."""

    name = "iibalance_no_gate"
    tuned_as = "iibalance"

    def fit_gate(self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, fit_gating=False)


class FixedGate(IIBalance):
    """Ablation: the weights are the budgets' prior, the same for every sample; temperatures are fitted."""

    name = "iibalance_fixed_gate"
    tuned_as = "iibalance"

    def fit_gate(self, head: IIBalanceHead, out_of_fold: HeldOut | None, validation: HeldOut) -> None:
        calibrate(head, out_of_fold, validation, self.config.calibration, fit_gating=False, prior_strength=1.0)


ABLATIONS = (NoPrior, NoAlignment, NoPrototypes, NoGate, FixedGate)

"""The method this project is for (method page, all of it)."""
from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from iibalance.budgets import Budgets
from iibalance.calibration import HeldOut, calibrate, collect
from iibalance.data.base import Split
from iibalance.head import IIBalanceHead
from iibalance.methods.base import Method
from iibalance.model import MultimodalClassifier
from iibalance.objective import IIBalanceLoss


class IIBalance(Method):
    """Unimodal heads, EMA prototypes, budget-conditioned alignment, and a gate calibrated on held-out and corrupted samples."""

    name = "iibalance"
    needs_budgets = True

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        o = self.config.objective
        objective = IIBalanceLoss(
            fused_weight=o.fused_weight, alpha=o.alpha, beta=o.beta, temperature=o.temperature, warmup=o.warmup, ramp=o.ramp, impl=self.config.kernels
        )
        return IIBalanceHead(
            embedding_dims, num_classes, objective=objective, gate_hidden=self.config.calibration.hidden, momentum=o.momentum, impl=self.config.kernels
        )

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        model.head.set_budgets(budgets)

    @property
    def one_epoch(self) -> bool:
        """Nothing but the detached alignment ties a modality's weights to the others', so each keeps its own best epoch; the fused loss ties them all."""
        return bool(self.config.objective.fused_weight)

    def calibrate(self, model: MultimodalClassifier, train: Split, validation: Split, out_of_fold: HeldOut | None, seed: int) -> None:
        calibrate(model.head, out_of_fold, collect(model, validation, self.config.calibration, seed=seed), self.config.calibration)

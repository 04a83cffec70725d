"""Encoders trained alone under IIBalance's gate: what the gate does without joint training."""

from __future__ import annotations

from collections.abc import Mapping

from iibalance.budgets import Budgets
from iibalance.data.dataset import Split
from iibalance.methods.ensemble import Ensemble
from iibalance.nn.calibration import HeldOut, calibrate, collect
from iibalance.nn.model import MultimodalClassifier


class GatedEnsemble(Ensemble):
    """The encoders trained alone under IIBalance's budgets and calibrated gate."""

    name = "ensemble_gated"
    needs_budgets = True
    # The out-of-fold models, on which the gate is fitted, are trained as those alone are.
    budget_alpha = 0.0

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        model.head.set_budgets(budgets)

    def assemble(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        super().assemble(model, alone)
        for index, name in enumerate(model.modalities):
            tables = model.head.prototypes.table(index), alone[name].head.prototypes.table(0)
            for kept, trained in zip(*tables):
                kept.copy_(trained)

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        held_out = collect(model, validation, self.config.calibration, seed=seed)
        calibrate(model.head, out_of_fold, held_out, self.config.calibration)

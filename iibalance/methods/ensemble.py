"""Encoders trained alone, calibrated and summed: what joint training must beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from iibalance.data.dataset import Split
from iibalance.methods.base import Method
from iibalance.methods.heads import fit_temperatures
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.model import MultimodalClassifier


class Ensemble(Method):
    """The encoders trained alone, each with its own temperature; their scaled logits are summed.

    The temperatures are fitted on validation data. A strong and simple baseline.
    """

    name = "ensemble"
    joint = False

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return IIBalanceHead(embedding_dims, num_classes, impl=self.config.kernels)

    def assemble(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        for index, name in enumerate(model.modalities):
            part = alone[name]
            model.encoders[index].load_state_dict(part.encoders[0].state_dict())
            model.head.classifiers[index].load_state_dict(part.head.classifiers[0].state_dict())

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        fit_temperatures(model, validation, fused=False)
        model.head.gate.log_temperature.copy_(model.head.gate.own_temperature.log())

"""Late fusion without budgets: joint sum, the best modality alone, and the ensemble of modalities trained alone."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from iibalance.calibration import HeldOut
from iibalance.data.base import Split
from iibalance.head import IIBalanceHead
from iibalance.methods.base import Method
from iibalance.model import MultimodalClassifier, embed_split
from iibalance.objective import IIBalanceLoss
from iibalance.temperature import fit_temperature, scaled


class Sum(Method):
    """Joint late fusion: one head a modality, trained by the cross-entropy of the summed logits alone; one temperature, fitted on validation data."""

    name = "sum"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        objective = IIBalanceLoss(fused_weight=1.0, unimodal_weight=0.0, alpha=0.0, beta=0.0, impl=self.config.kernels)
        return IIBalanceHead(embedding_dims, num_classes, objective=objective, gate_hidden=0, impl=self.config.kernels)

    @torch.no_grad()
    def calibrate(self, model: MultimodalClassifier, train: Split, validation: Split, out_of_fold: HeldOut | None, seed: int) -> None:
        gate = model.head.gate
        fused = model.head.fuse(embed_split(model, validation), validation.mask.to(gate.log_scale.device)).logits.cpu()
        gate.log_scale.sub_(torch.tensor(fit_temperature(fused, validation.targets)).log())
        _fit_own_temperatures(model, validation)  # for the heads' own figures only: the sum has the one temperature


class Ensemble(Method):
    """The encoders trained alone, each with a temperature fitted on validation data; their scaled logits are summed.

    A strong and simple baseline: what joint training must beat.
    """

    name = "ensemble"
    joint = False

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return IIBalanceHead(embedding_dims, num_classes, gate_hidden=0, impl=self.config.kernels)

    def assemble(self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]) -> None:
        for index, name in enumerate(model.modalities):
            model.encoders[index].load_state_dict(alone[name].encoders[0].state_dict())
            model.head.classifiers[index].load_state_dict(alone[name].head.classifiers[0].state_dict())

    @torch.no_grad()
    def calibrate(self, model: MultimodalClassifier, train: Split, validation: Split, out_of_fold: HeldOut | None, seed: int) -> None:
        _fit_own_temperatures(model, validation)
        model.head.gate.log_temperature.copy_(model.head.gate.own_temperature.log())


class Unimodal(Ensemble):
    """The encoders trained alone; the prediction is that of the modality with the lowest validation NLL among those that a sample has."""

    name = "unimodal"

    @torch.no_grad()
    def calibrate(self, model: MultimodalClassifier, train: Split, validation: Split, out_of_fold: HeldOut | None, seed: int) -> None:
        super().calibrate(model, train, validation, out_of_fold, seed)
        losses = []
        for index, logits in enumerate(model.head.heads(embed_split(model, validation))):
            present = validation.mask[:, index]
            logits, targets = logits.cpu()[present], validation.targets[present]
            losses.append(float(nn.functional.cross_entropy(scaled(logits, targets), targets)) if len(targets) else float("inf"))
        ranks = torch.tensor(losses).argsort().argsort().to(model.head.log_prior)
        model.head.log_prior.copy_(-50.0 * ranks)  # a prior so strong that the best modality present takes all the weight
        model.head.gate.prior_strength.fill_(1.0)


def _fit_own_temperatures(model: MultimodalClassifier, validation: Split) -> None:
    """The temperature that calibrates each head by itself, on the validation samples that have the modality."""
    for index, logits in enumerate(model.head.heads(embed_split(model, validation))):
        present = validation.mask[:, index]
        if present.any():
            model.head.gate.own_temperature[index] = fit_temperature(logits.cpu()[present], validation.targets[present])

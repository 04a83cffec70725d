"""Late fusion: joint sum, the best modality alone, and ensembles of modalities trained alone: summed, gated, weighted by entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import iib_kernels
from iibalance.budgets import Budgets
from iibalance.data.dataset import Split
from iibalance.methods.base import Method
from iibalance.metrics import fit_temperature, scaled
from iibalance.nn.calibration import HeldOut, calibrate, collect
from iibalance.nn.head import HeadOutput, IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss
from iibalance.nn.model import MultimodalClassifier, embed_split


class Sum(Method):
    """Joint late fusion: one head a modality, trained by the cross-entropy of the summed logits alone; one temperature, fitted on validation data."""

    name = "sum"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        objective = IIBalanceLoss(
            fused_weight=1.0, unimodal_weight=0.0, alpha=0.0, beta=0.0, impl=self.config.kernels
        )
        return IIBalanceHead(
            embedding_dims,
            num_classes,
            objective=objective,
            gate_hidden=0,
            impl=self.config.kernels,
        )

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        gate = model.head.gate
        fused = model.head.fuse(
            embed_split(model, validation), validation.mask.to(gate.log_scale.device)
        ).logits.cpu()
        gate.log_scale.sub_(torch.tensor(fit_temperature(fused, validation.targets)).log())
        _fit_own_temperatures(
            model, validation
        )  # for the heads' own figures only: the sum has the one temperature


class Ensemble(Method):
    """The encoders trained alone, each with a temperature fitted on validation data; their scaled logits are summed.

    A strong and simple baseline: what joint training must beat.
    """

    name = "ensemble"
    joint = False

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return IIBalanceHead(embedding_dims, num_classes, gate_hidden=0, impl=self.config.kernels)

    def assemble(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        for index, name in enumerate(model.modalities):
            model.encoders[index].load_state_dict(alone[name].encoders[0].state_dict())
            model.head.classifiers[index].load_state_dict(
                alone[name].head.classifiers[0].state_dict()
            )

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        _fit_own_temperatures(model, validation)
        model.head.gate.log_temperature.copy_(model.head.gate.own_temperature.log())


class Unimodal(Ensemble):
    """The encoders trained alone; the prediction is that of the modality with the lowest validation NLL among those that a sample has."""

    name = "unimodal"

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        super().calibrate(model, train, validation, out_of_fold, seed)
        losses = []
        for index, logits in enumerate(model.head.heads(embed_split(model, validation))):
            present = validation.mask[:, index]
            logits, targets = logits.cpu()[present], validation.targets[present]
            losses.append(
                float(nn.functional.cross_entropy(scaled(logits, targets), targets))
                if len(targets)
                else float("inf")
            )
        ranks = torch.tensor(losses).argsort().argsort().to(model.head.log_prior)
        model.head.log_prior.copy_(
            -50.0 * ranks
        )  # a prior so strong that the best modality present takes all the weight
        model.head.gate.prior_strength.fill_(1.0)


class GatedEnsemble(Ensemble):
    """The encoders trained alone under IIBalance's budgets and calibrated gate: what the gate does without joint training."""

    name = "ensemble_gated"
    needs_budgets = True

    budget_alpha = (
        0.0  # the out-of-fold models, on which the gate is fitted, are trained as those alone are
    )

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return IIBalanceHead(
            embedding_dims,
            num_classes,
            gate_hidden=self.config.calibration.hidden,
            impl=self.config.kernels,
        )

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        model.head.set_budgets(budgets)

    def assemble(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        super().assemble(model, alone)
        for index, name in enumerate(model.modalities):
            for key in ("prototypes", "counts"):
                getattr(model.head.prototypes, f"{key}_{index}").copy_(
                    getattr(alone[name].head.prototypes, f"{key}_0")
                )

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        calibrate(
            model.head,
            out_of_fold,
            collect(model, validation, self.config.calibration, seed=seed),
            self.config.calibration,
        )


class EntropyHead(IIBalanceHead):
    """Late fusion weighted by each prediction's entropy: f = scale sum_m w_m l_m, w = softmax_m(max_v H_v - H_m) over the modalities present."""

    def _fuse(
        self, logits: list[Tensor], embeddings: list[Tensor], mask: Tensor | None
    ) -> HeadOutput:
        # softmax_m(max H - H_m) = softmax_m(-H_m), and the kernel's uncertainty is H / log K
        fused = iib_kernels.gated_fusion(
            logits,
            uncertainty_weight=math.log(max(self.num_classes, 2)),
            scale=self.gate.log_scale.exp(),
            mask=mask,
            impl=self.gate.impl,
        )
        return HeadOutput(fused.logits, fused.weights, fused.uncertainty, self.gate.own(logits))


class MLA(Ensemble):
    """The encoders trained alone, weighted per sample by predictive entropy; one temperature.

    Zhang, Yoon, Bansal, Yao: "Multimodal Representation Learning by Alternating Unimodal Adaptation", CVPR 2024, equations 10 and 11: with H_m the entropy of modality m's
    prediction, f = sum_m w_m l_m, w = softmax_m(max_v H_v - H_m). The fusion at test alone: encoders and heads are trained separately, which is the limit of the paper's
    alternation without the shared head, and not its training.
    """

    name = "mla"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return EntropyHead(embedding_dims, num_classes, gate_hidden=0, impl=self.config.kernels)

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        gate = model.head.gate
        fused = model.head.fuse(
            embed_split(model, validation), validation.mask.to(gate.log_scale.device)
        ).logits.cpu()
        gate.log_scale.sub_(torch.tensor(fit_temperature(fused, validation.targets)).log())
        _fit_own_temperatures(model, validation)


def _fit_own_temperatures(model: MultimodalClassifier, validation: Split) -> None:
    """The temperature that calibrates each head by itself, on the validation samples that have the modality."""
    for index, logits in enumerate(model.head.heads(embed_split(model, validation))):
        present = validation.mask[:, index]
        if present.any():
            model.head.gate.own_temperature[index] = fit_temperature(
                logits.cpu()[present], validation.targets[present]
            )

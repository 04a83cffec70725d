"""MLA's fusion at test time: encoders trained alone, weighted per sample by entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

import iib_kernels
from iibalance.data.dataset import Split
from iibalance.methods.ensemble import Ensemble
from iibalance.methods.heads import fit_temperatures
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import HeadOutput, IIBalanceHead
from iibalance.nn.model import MultimodalClassifier


class EntropyHead(IIBalanceHead):
    """Late fusion weighted by each prediction's entropy.

    f = scale sum_m w_m l_m with w = softmax_m(max_v H_v - H_m) over the modalities present.
    """

    def _fuse(
        self, logits: list[Tensor], embeddings: list[Tensor], mask: Tensor | None
    ) -> HeadOutput:
        # softmax_m(max H - H_m) = softmax_m(-H_m), and the kernel's uncertainty is H / log K.
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

    Zhang, Yoon, Bansal, Yao: "Multimodal Representation Learning by Alternating Unimodal
    Adaptation", CVPR 2024, equations 10 and 11: with H_m the entropy of modality m's prediction,

        f = sum_m w_m l_m,  w = softmax_m(max_v H_v - H_m)

    The fusion at test alone: encoders and heads are trained separately, which is the limit of the
    paper's alternation without the shared head, and not its training.
    """

    name = "mla"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return EntropyHead(embedding_dims, num_classes, impl=self.config.kernels)

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        fit_temperatures(model, validation)

"""Joint late fusion: the sum of the modalities' logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from iibalance.methods.tempered import Tempered
from iibalance.nn.head import IIBalanceHead
from iibalance.nn.loss import IIBalanceLoss


class Sum(Tempered):
    """Joint late fusion: one head a modality, trained by the summed logits' cross-entropy alone.

    The sum has one temperature, fitted on validation data; the heads' own temperatures are for
    their own figures only.
    """

    name = "sum"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        impl = self.config.kernels
        objective = IIBalanceLoss(
            fused_weight=1.0, unimodal_weight=0.0, alpha=0.0, beta=0.0, impl=impl
        )
        return IIBalanceHead(embedding_dims, num_classes, objective=objective, impl=impl)

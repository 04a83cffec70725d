"""The best modality alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Split
from iibalance.methods.ensemble import Ensemble
from iibalance.metrics import scaled
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import HeadOutput, IIBalanceHead, uncertainties
from iibalance.nn.model import MultimodalClassifier, embed_split


class BestHead(IIBalanceHead):
    """The prediction of the best modality that a sample has; ``trust`` is 1 in it, 0 elsewhere."""

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int, **options):
        super().__init__(embedding_dims, num_classes, **options)
        #: [M] from 0, the best; each modality has a place of its own.
        self.register_buffer("place", torch.arange(len(self.modalities)))

    def _fuse(
        self, logits: list[Tensor], embeddings: list[Tensor], mask: Tensor | None
    ) -> HeadOutput:
        own = self.gate.own(logits)
        there = torch.ones_like(logits[0][:, :1]).expand(-1, len(own)) if mask is None else mask
        place = self.place.masked_fill(~there.bool(), len(own))
        best = F.one_hot(place.argmin(1), len(own)).to(own[0])  # [B, M]
        fused = (torch.stack(own, 1) * best[..., None]).sum(1)
        return HeadOutput(fused, None, uncertainties(own), own, trust=best)


class Unimodal(Ensemble):
    """The encoders trained alone; the prediction is that of the best one a sample has.

    Best is the lowest validation NLL.
    """

    name = "unimodal"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return BestHead(embedding_dims, num_classes, impl=self.config.kernels)

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
            losses.append(math.inf)
            if len(targets):
                losses[index] = float(F.cross_entropy(scaled(logits, targets), targets))
        model.head.place.copy_(torch.tensor(losses).argsort().argsort())

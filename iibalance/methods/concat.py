"""The plain baseline: one linear classifier on the concatenated embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from iibalance.data.dataset import Split
from iibalance.methods.heads import ConcatHead
from iibalance.methods.tempered import Tempered
from iibalance.nn.calibration import HeldOut
from iibalance.nn.model import MultimodalClassifier, embed_split


class Concat(Tempered):
    """Concatenated embeddings, one linear classifier, cross-entropy.

    One temperature is fitted on validation data.
    """

    name = "concat"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return ConcatHead(embedding_dims, num_classes)

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
        model.head.fit_probes(embed_split(model, train), train.targets, train.mask)

"""The best modality alone."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from iibalance.data.dataset import Split
from iibalance.methods.ensemble import Ensemble
from iibalance.metrics import scaled
from iibalance.nn.calibration import HeldOut
from iibalance.nn.model import MultimodalClassifier, embed_split


class Unimodal(Ensemble):
    """The encoders trained alone; the prediction is that of the best one a sample has.

    Best is the lowest validation NLL.
    """

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
            losses.append(math.inf)
            if len(targets):
                losses[index] = float(F.cross_entropy(scaled(logits, targets), targets))
        ranks = torch.tensor(losses).argsort().argsort().to(model.head.log_prior)
        # A prior so strong that the best modality present takes all the weight.
        model.head.log_prior.copy_(-50.0 * ranks)
        model.head.gate.prior_strength.fill_(1.0)

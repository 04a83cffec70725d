"""What Gradient-Blending and MMPareto share: the multitask head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from iibalance.data.dataset import Split
from iibalance.methods.base import Method
from iibalance.methods.heads import MultitaskHead, fit_temperatures
from iibalance.nn.calibration import HeldOut
from iibalance.nn.model import MultimodalClassifier


class Multitask(Method):
    """Base of the methods that train a :class:`~iibalance.methods.heads.MultitaskHead`."""

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return MultitaskHead(embedding_dims, num_classes)

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        fit_temperatures(model, validation)

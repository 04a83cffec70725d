"""What the methods share whose heads have no gate: temperatures, fitted on validation samples."""

from __future__ import annotations

from iibalance.data.dataset import Split
from iibalance.methods.base import Method
from iibalance.methods.heads import fit_temperatures
from iibalance.nn.calibration import HeldOut
from iibalance.nn.model import MultimodalClassifier


class Tempered(Method):
    """Base of methods that are calibrated by :func:`~iibalance.methods.heads.fit_temperatures`."""

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        fit_temperatures(model, validation)

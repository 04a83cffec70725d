"""What a training method is: a head, hooks around the loss and the step, and a calibration."""
from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from iibalance.budgets import Budgets
from iibalance.calibration import HeldOut
from iibalance.config import RunConfig
from iibalance.data.base import Batch, Split
from iibalance.model import MultimodalClassifier


class Method:
    """One way to train and fuse. Subclass it, override what differs, and register the class in ``iibalance.methods.METHODS``.

    A method is given named encoders and never looks at the names. ``joint`` methods train one model of all modalities with :meth:`loss` and the hooks;
    the others are put together from encoders that were trained alone (:meth:`assemble`).
    """

    name: ClassVar[str]
    joint: ClassVar[bool] = True
    needs_budgets: ClassVar[bool] = False

    def __init__(self, config: RunConfig):
        self.config = config

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        """The head over embeddings of these sizes: ``forward(embeddings, targets, mask=, progress=)`` and ``fuse(embeddings, mask)`` -> HeadOutput."""
        raise TypeError(f"{type(self).__name__}.head: a method must say what its head is")

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        """Called before training and whenever budgets change, where ``needs_budgets``."""

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        """What to differentiate, given the model's output for the batch; by default the head's own loss."""
        return output.loss

    def after_backward(self, model: nn.Module, batch: Batch, output) -> None:
        """Called between backward and the optimiser's step: gradients are in place and may be changed."""

    @property
    def one_epoch(self) -> bool:
        """Whether all weights are kept from one epoch; else each modality keeps its own best one."""
        return True

    def groups(self, model: MultimodalClassifier) -> dict[str, str]:
        """Weights (a regular expression over their names) -> the history's column whose minimum chooses their epoch."""
        if self.one_epoch:
            return {"": "validation.nll"}
        return {
            rf"encoders\.{index}\.|head\.classifiers\.{index}\.|head\.prototypes\.\w+_{index}$": f"validation.nll.{name}"
            for index, name in enumerate(model.modalities)
        }

    def assemble(self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]) -> None:
        """For methods that are not ``joint``: fill ``model`` from the models trained alone."""

    def calibrate(self, model: MultimodalClassifier, train: Split, validation: Split, out_of_fold: HeldOut | None, seed: int) -> None:
        """Stage 3, with the encoders frozen: fit temperatures, gates or probes on held-out samples."""

"""What a training method is: a head, hooks around a training's steps and epochs, a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from iibalance.budgets import Budgets, budgets_from_logits
from iibalance.config import RunConfig
from iibalance.data.dataset import Batch, Split
from iibalance.errors import InputError, as_sequence
from iibalance.methods.step import training_step
from iibalance.nn.calibration import HeldOut
from iibalance.nn.encoding import embedding_dims_of
from iibalance.nn.model import MultimodalClassifier


class Method:
    """One way to train and fuse. Subclass it and override what differs.

    Use a class of your own by ``--method my_file.py:MyMethod``, or any method in a loop of your
    own. A method is given named encoders and never looks at the names: modalities go by their
    order. ``joint`` methods train one model of all modalities with the hooks below; the others are
    put together from encoders that were trained alone (:meth:`assemble`).

    Args:
        config: of the run; its ``method_options`` are read as well.
        options: the method's own parameters, those in the class's ``defaults``.

    In a loop of your own, :meth:`build` makes the model and :meth:`step` does one step with every
    hook in its place:

    >>> from iibalance import make_method
    >>> method = make_method("ogm_ge", alpha=0.5)
    >>> encoders = {"audio": nn.Linear(5, 8), "video": nn.Linear(6, 4)}
    >>> model = method.build(encoders, num_classes=3)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.1)
    >>> inputs = {"audio": torch.randn(4, 5), "video": torch.randn(4, 6)}
    >>> batch = Batch(inputs, torch.tensor([0, 1, 2, 0]), None)
    >>> output = method.step(model, optimizer, batch, progress=0.0)
    """

    name: ClassVar[str]
    #: Whether one model of all modalities is trained; else encoders trained alone are assembled.
    joint: ClassVar[bool] = True
    #: Whether budgets are estimated first.
    needs_budgets: ClassVar[bool] = False
    #: How many modalities the published formula is for; None = any number.
    modalities: ClassVar[int | None] = None
    #: Whether several data-parallel processes compute what one would.
    processes: ClassVar[bool] = True
    #: Whether all weights are kept from one epoch; else each modality keeps its own best one.
    one_epoch: ClassVar[bool] = True
    #: The method's own parameters.
    defaults: ClassVar[dict[str, float]] = {}

    def __init__(self, config: RunConfig | None = None, **options: float):
        self.config = RunConfig() if config is None else config
        given = {**self.config.method_options, **options}
        for key, value in given.items():
            if key not in self.defaults:
                has = ", ".join(self.defaults) or "none"
                raise InputError(
                    f"method_options: {self.name} has no parameter {key!r}; it has {has}"
                )
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise InputError(f"method_options: {key} is {value!r}; give a finite number >= 0")
        self.options = SimpleNamespace(**{**self.defaults, **given})
        #: What must survive a checkpoint beside model and optimiser.
        self.state: dict[str, Tensor] = {}
        #: The training's validation split, for methods that look at it; None = there is none.
        self.validation: Split | None = None

    # The model.

    def build(
        self,
        encoders: Mapping[str, nn.Module],
        num_classes: int,
        *,
        embedding_dims: Mapping[str, int] | None = None,
    ) -> MultimodalClassifier:
        """A model of these encoders (modules [B, ...] -> [B, D_m]) with this method's head.

        ``embedding_dims``: as in :class:`~iibalance.nn.model.MultimodalClassifier`.
        """
        self.check(tuple(encoders))
        sizes = embedding_dims_of(encoders) if embedding_dims is None else embedding_dims
        sizes = dict(zip(encoders, as_sequence(sizes, tuple(encoders), "embedding_dims")))
        return MultimodalClassifier(encoders, head=self.head(sizes, num_classes))

    def check(self, modalities: tuple[str, ...]) -> None:
        """InputError where the method's formula is not defined for this many modalities."""
        if self.modalities is not None and len(modalities) != self.modalities:
            raise InputError(
                f"method: {self.name} is defined for {self.modalities} modalities, "
                f"the data has {len(modalities)} ({', '.join(modalities)}); "
                "choose them with data.modalities, or another method"
            )

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        """The head over embeddings of these sizes.

        It has ``forward(embeddings, targets, mask=, progress=)`` and ``fuse(embeddings, mask)``,
        both giving a :class:`~iibalance.nn.head.HeadOutput`.
        """
        raise TypeError(f"{type(self).__name__}.head: a method must say what its head is")

    # Before training.

    def measure_budgets(
        self,
        logits: Mapping[str, Tensor],
        targets: Tensor,
        *,
        mask: Tensor,
        entropy: float,
        source: str,
    ) -> Budgets:
        """Budgets from predictions for samples that their predictors have not seen.

        By default those of the method page, section 1.

        Args:
            logits: modality name -> [N, K].
            targets: [N].
            mask: [N, M] bool, True = present.
            entropy: H(Y) of the training labels.
            source: where the predictions are from, as in ``budgets.source``.
        """
        return budgets_from_logits(logits, targets, mask=mask, entropy=entropy, source=source)

    @property
    def prior_softmax(self) -> float | None:
        """The prior is softmax(budget / this); None = proportional to the budgets."""
        return None

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        """Called before training and whenever budgets change, where ``needs_budgets``."""

    @property
    def budget_alpha(self) -> float:
        """Weight of the prototype contrastive loss in the trainings of the budget stage."""
        return self.config.objective.alpha

    @property
    def starts_alone(self) -> bool:
        """Whether joint training starts from encoders trained alone, which are then trained."""
        return False

    def initialise(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        """Called once before joint training where :attr:`starts_alone`.

        It is given the new model and, by modality, the models of encoders trained alone. By default
        the new weights stay as they are.
        """

    def prepare(self, train: Callable, split: Split, seed: int) -> None:
        """Called once before joint training, for methods that must measure something first.

        ``train(name, loss, split, measure, share)`` trains a new model on ``split`` for ``share``
        of the epochs with ``loss(output)``, and returns ``measure(model)`` before and after.
        """

    # Training.

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """Groups for the optimiser.

        A group's ``scale`` multiplies the learning rate; :meth:`after_epoch` may move it.
        """
        params = [value for value in model.parameters() if value.requires_grad]
        return [{"params": params, "scale": 1.0}]

    def clip_groups(self, model: nn.Module) -> list[list[Tensor]]:
        """Parameters whose gradients are clipped together; all of them by default."""
        return [list(model.parameters())]

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        """Called before each epoch with the training split."""

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        """What to differentiate, given the model's output; by default the head's own loss."""
        return output.loss

    def backward(
        self,
        loss: Tensor,
        model: nn.Module,
        batch: Batch,
        output,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        """Differentiate ``loss``: fill the parameters' gradients, adding to those there are.

        ``backward`` scales for mixed precision.
        """
        backward(loss)

    def after_backward(self, model: nn.Module, batch: Batch, output) -> None:
        """Called between backward and the optimiser's step: gradients may be changed."""

    def after_step(self, model: nn.Module, batch: Batch, output) -> None:
        """Called after the optimiser's step."""

    def after_epoch(self, row: Mapping[str, float], optimizer: torch.optim.Optimizer) -> None:
        """Called after each epoch with its row of the history.

        It holds ``validation.accuracy.<modality>`` and so on, where there is a validation split.
        """

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        *,
        progress: float = 1.0,
        max_gradient_norm: float = 0.0,
    ):
        """One training step with every hook in its place, for a loop of your own.

        Returns the model's output. ``max_gradient_norm`` clips as training does
        (``training.max_gradient_norm``); 0 leaves the gradients.
        """
        output, _ = training_step(
            self, model, optimizer, batch, progress=progress, max_gradient_norm=max_gradient_norm
        )
        return output

    def training_key(self) -> dict:
        """What the trained weights depend on beside data, encoders and loop.

        Trainings of equal keys are shared in a comparison.
        """
        return {"method": self.name, "options": vars(self.options)}

    # After training.

    def assemble(
        self, model: MultimodalClassifier, alone: Mapping[str, MultimodalClassifier]
    ) -> None:
        """For methods that are not ``joint``: fill ``model`` from the models trained alone."""

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        """Stage 3, encoders frozen: fit temperatures, gates or probes on held-out samples."""

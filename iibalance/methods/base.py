"""What a training method is: a head, hooks around loss, backward, step and epoch, and a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iibalance.budgets import Budgets
from iibalance.config import RunConfig
from iibalance.data.dataset import Batch, Split
from iibalance.errors import InputError
from iibalance.nn.calibration import HeldOut
from iibalance.nn.model import MultimodalClassifier


class Method:
    """One way to train and fuse. Subclass it, override what differs, and use it by ``--method my_file.py:MyMethod`` or in a loop of your own.

    A method is given named encoders and never looks at the names: modalities go by their order. ``joint`` methods train one model of all modalities with
    the hooks below; the others are put together from encoders that were trained alone (:meth:`assemble`).

    Args:
        config: of the run; its ``method_options`` are read as well.
        options: the method's own parameters, those in the class's ``defaults``.

    In a loop of your own, :meth:`build` makes the model and :meth:`step` does one step with every hook in its place:

    >>> from iibalance import make_method
    >>> method = make_method("ogm_ge", alpha=0.5)
    >>> model = method.build({"audio": nn.Linear(5, 8), "video": nn.Linear(6, 4)}, num_classes=3)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(model), lr=0.1)
    >>> batch = Batch({"audio": torch.randn(4, 5), "video": torch.randn(4, 6)}, torch.tensor([0, 1, 2, 0]), None)
    >>> output = method.step(model, optimizer, batch, progress=0.0)
    """

    name: ClassVar[str]
    joint: ClassVar[bool] = True
    needs_budgets: ClassVar[bool] = False
    modalities: ClassVar[int | None] = (
        None  #: how many the published formula is for; None = any number
    )
    processes: ClassVar[bool] = (
        True  #: whether several data-parallel processes compute what one would
    )
    rate: float = 1.0  #: factor on the learning rate of the joint training and of the budget stage
    averaging: float = 0.0  #: share of the joint training over which the weights that are judged and kept are averaged; 0 = the weights as they are
    defaults: ClassVar[dict[str, float]] = {}  #: the method's own parameters
    search: ClassVar[
        dict[str, tuple[float, ...]]
    ] = {}  #: the main one of them and what a comparison tries; a dotted name is an option of the run

    tuned_as: ClassVar[str | None] = (
        None  #: a method whose settings a comparison gives to this one instead of tuning it
    )
    ablation_of: ClassVar[str | None] = (
        None  #: the method that this one lacks a piece of: it takes its settings too, is set beside it, and has no rank of its own
    )

    def __init__(self, config: RunConfig | None = None, **options: float):
        self.config = RunConfig() if config is None else config
        given = {**self.config.method_options, **options}
        for key, value in given.items():
            if key not in self.defaults:
                raise InputError(
                    f"method_options: {self.name} has no parameter {key!r}; it has {', '.join(self.defaults) or 'none'}"
                )
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value < 0
            ):
                raise InputError(f"method_options: {key} is {value!r}; give a finite number >= 0")
        self.options = SimpleNamespace(**{**self.defaults, **given})
        self.state: dict[
            str, Tensor
        ] = {}  #: what must survive a checkpoint beside model and optimiser

    def build(
        self,
        encoders: Mapping[str, nn.Module],
        num_classes: int,
        *,
        embedding_dims: Mapping[str, int] | None = None,
    ) -> MultimodalClassifier:
        """A model of these encoders (any modules that map [B, ...] to [B, D_m]) with this method's head. ``embedding_dims``: as in MultimodalClassifier."""
        self.check(tuple(encoders))
        sizes = MultimodalClassifier(
            encoders, num_classes, embedding_dims=embedding_dims, gate_hidden=0
        ).head.embedding_dims
        return MultimodalClassifier(encoders, head=self.head(sizes, num_classes))

    def check(self, modalities: tuple[str, ...]) -> None:
        """InputError where the method's formula is not defined for this many modalities."""
        if self.modalities is not None and len(modalities) != self.modalities:
            raise InputError(
                f"method: {self.name} is defined for {self.modalities} modalities, the data has {len(modalities)} ({', '.join(modalities)}); "
                "choose them with data.modalities, or another method"
            )

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        """The head over embeddings of these sizes: ``forward(embeddings, targets, mask=, progress=)`` and ``fuse(embeddings, mask)`` -> HeadOutput."""
        raise TypeError(f"{type(self).__name__}.head: a method must say what its head is")

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """Groups for the optimiser. A group's ``scale`` multiplies the learning rate; :meth:`after_epoch` may move it."""
        return [
            {"params": [value for value in model.parameters() if value.requires_grad], "scale": 1.0}
        ]

    def clip_groups(self, model: nn.Module) -> list[list[Tensor]]:
        """Parameters whose gradients are clipped together; all of them by default."""
        return [list(model.parameters())]

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        """Called before training and whenever budgets change, where ``needs_budgets``."""

    @property
    def budget_alpha(self) -> float:
        """Weight of the prototype contrastive loss in the trainings that the budgets come from, where ``needs_budgets``."""
        return self.config.objective.alpha

    def initialise(
        self, model: MultimodalClassifier, folds: Sequence[MultimodalClassifier]
    ) -> None:
        """Called once before joint training with the new model and those of the budget stage, where it trained any: for each fold, encoders and classifiers
        trained alone on the other folds. By default the new weights stay as they are."""

    def prepare(self, train: Callable, split: Split, seed: int) -> None:
        """Called once before joint training, for methods that must measure something first. ``train(name, loss, split, measure, share)`` trains a new
        model on ``split`` for ``share`` of the epochs with ``loss(output)``, and returns ``measure(model)`` before and after."""

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        """Called before each epoch with the training split."""

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        """What to differentiate, given the model's output for the batch; by default the head's own loss. ``progress`` in [0, 1]."""
        return output.loss

    def backward(
        self,
        loss: Tensor,
        model: nn.Module,
        batch: Batch,
        output,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        """Differentiate ``loss``: fill the gradients of the model's parameters (adding to those there are). ``backward`` scales for mixed precision."""
        backward(loss)

    def after_backward(self, model: nn.Module, batch: Batch, output) -> None:
        """Called between backward and the optimiser's step: gradients are in place and may be changed."""

    def after_step(self, model: nn.Module, batch: Batch, output) -> None:
        """Called after the optimiser's step."""

    def after_epoch(self, row: Mapping[str, float], optimizer: torch.optim.Optimizer) -> None:
        """Called after each epoch with its row of the history (``validation.accuracy.<modality>`` and so on, where there is a validation split)."""

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        *,
        progress: float = 1.0,
        max_gradient_norm: float = 0.0,
    ):
        """One training step with every hook in its place, for a loop of your own; returns the model's output. ``max_gradient_norm`` clips as training does
        (``training.max_gradient_norm``); 0 leaves the gradients."""
        output = model(batch.inputs, batch.targets, mask=batch.mask, progress=progress)
        self.backward(self.loss(output, model, batch, progress), model, batch, output)
        self.after_backward(model, batch, output)
        if max_gradient_norm:
            clip_gradients(self.clip_groups(model), max_gradient_norm)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * group.get("scale", 1.0)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        optimizer.zero_grad()
        self.after_step(model, batch, output)
        return output

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
        """Stage 3, with the encoders frozen: fit temperatures, gates or probes on held-out samples."""

    def training_key(self) -> dict:
        """What the trained weights depend on beside data, encoders and loop: trainings of equal keys are shared in a comparison."""
        return {"method": self.name, "options": vars(self.options)}


@torch.no_grad()
def clip_gradients(groups: Sequence[Sequence[Tensor]], norm: float) -> None:
    """Scale the gradients of each group of parameters down to ``norm`` where they are longer: ``clip_grad_norm_``, group by group.

    On the CPU all norms are taken in one pass and only what is too long is touched: 0.2 against 0.8 ms for six small encoders.
    """
    if any(value.device.type != "cpu" for values in groups for value in values):
        for values in groups:
            torch.nn.utils.clip_grad_norm_(values, norm)
        return
    groups = [[value.grad for value in values if value.grad is not None] for values in groups]
    flat = [grad for grads in groups for grad in grads]
    if not flat:
        return
    norms = (
        torch.stack(torch._foreach_norm(flat))
        .double()
        .square()
        .split([len(grads) for grads in groups])
    )
    for grads, squares in zip(groups, norms):
        length = math.sqrt(float(squares.sum()))
        if length > norm:
            torch._foreach_mul_(grads, norm / (length + 1e-6))


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of ``values`` over data-parallel processes: every rank must change its gradients alike."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def same_on_processes(values: Tensor) -> Tensor:
    """``values`` of the first process, on all of them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(values, 0)
    return values


def unwrap(model: nn.Module) -> nn.Module:
    """The MultimodalClassifier under DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def groups_by_modality(model: nn.Module) -> list[dict]:
    """Parameter groups for the optimiser: encoder and own classifier of each modality, and one group of the rest if there is any."""
    model = unwrap(model)
    groups, taken = [], set()
    for name, encoder, classifier in zip(model.modalities, model.encoders, model.head.classifiers):
        values = [
            value
            for part in (encoder, classifier)
            for value in part.parameters()
            if value.requires_grad
        ]
        taken |= {id(value) for value in values}
        groups.append({"params": values, "scale": 1.0, "modality": name})
    rest = [value for value in model.parameters() if value.requires_grad and id(value) not in taken]
    return groups + ([{"params": rest, "scale": 1.0}] if rest else [])

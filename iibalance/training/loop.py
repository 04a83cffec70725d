"""The training loop of every stage and method, on Accelerate.

Devices, processes, mixed precision, accumulation and checkpoints. Everything random in an epoch is
seeded from (seed, stage, epoch), so a resumed run needs no generator's state to repeat a whole one
bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from iibalance.config import TrainingConfig
from iibalance.data.corruption import drop_modalities
from iibalance.data.dataset import Split, identity
from iibalance.methods import Method
from iibalance.methods.step import training_step
from iibalance.nn.encoding import train_mode
from iibalance.nn.own_encoders import GroupMaker, with_own_groups, with_own_rates
from iibalance.training.checkpoint import Progress, write_checkpoint
from iibalance.training.evaluation import Outputs, predict_split, score
from iibalance.training.folder import RunFolder
from iibalance.training.sampling import EpochSampler, class_weights, derive_seed

logger = logging.getLogger(__name__)

WARMUP = 0.1  # share of the steps over which the learning rate rises

#: Called with each new row of the history, the model, its validation outputs and the rows before.
OnEpoch = Callable[[dict, nn.Module, "Outputs | None", list[dict]], "dict | None"]


def fit(
    model: nn.Module,
    train: Split,
    validation: Split | None,
    *,
    epochs: int,
    training: TrainingConfig,
    seed: int,
    accelerator: Accelerator,
    name: str = "training",
    folder: RunFolder | None = None,
    order: int = 0,
    method: Method | None = None,
    on_epoch: OnEpoch | None = None,
    keep_last: bool = False,
    parameter_groups: Mapping[str, GroupMaker] | None = None,
    class_names: Sequence[str] | None = None,
) -> list[dict]:
    """Train ``model`` in place and return its history, one row an epoch.

    With validation, training stops after ``training.patience`` epochs without a better validation
    NLL (after one temperature has been fitted) and the best epoch's weights are kept; where the
    method is not of ``one_epoch``, each modality keeps its own best one. Without validation all
    epochs run and the last weights are kept.

    Args:
        model: any module with ``forward(inputs, targets, mask=, progress=)`` returning an output
            with ``.loss``, and ``embed`` and ``head.fuse``.
        seed, name: everything random is derived from the two.
        folder: where checkpoints go; None = none. A checkpoint of this training that is there is
            continued, bit for bit.
        order: the place of this training among those of the same folder, from 0: checkpoints are
            named by it.
        method: a :class:`~iibalance.methods.base.Method`, whose hooks are called around loss,
            backward, step and epoch; None = the model's own loss.
        on_epoch: called with each new row, the model, its validation outputs and the rows before;
            what it returns is merged into the row.
        keep_last: write a checkpoint at the very end as well.
        parameter_groups: modality name -> groups of its encoder's parameters, as
            :func:`~iibalance.nn.own_encoders.with_own_groups` takes them.
        class_names: by which ``training.class_weight`` calls classes; their numbers by default.
    """
    method = Method() if method is None else method
    method.validation = validation
    progress = Progress(_kept_by(model, method), method)
    loop = _Loop(train, epochs, training, derive_seed(seed, name), accelerator, method)
    loop.parameter_groups, loop.class_names = parameter_groups or {}, class_names
    model = loop.prepare(model)
    module = accelerator.unwrap_model(model)
    held_weights = None
    if validation is not None:
        held_weights = class_weights(validation.targets, training.class_weight, class_names)
    say = speaker(name, train, training, accelerator)
    checkpoint = None if folder is None else folder.latest_checkpoint()
    if checkpoint is not None and checkpoint.name.startswith(f"stage-{order:03d}-"):
        accelerator.load_state(str(checkpoint))
        progress.load(checkpoint)
    past = f", goes on after epoch {progress.epoch}" if progress.epoch else ""
    say(f"{len(train)} samples{past}")
    saved = time.monotonic()
    with loop.bar(name, progress.epoch) as bar:
        while progress.epoch < epochs and not progress.stopped:
            started = time.monotonic()
            row = {"epoch": progress.epoch + 1, **loop.epoch(model, progress.epoch, bar)}
            outputs = None
            if validation is not None:
                outputs = predict_split(model, validation, accelerator)
                row |= score(outputs, validation, held_weights)
            if on_epoch is not None:
                row |= on_epoch(row, module, outputs, progress.history) or {}
            method.after_epoch(row, loop.optimizer)
            progress.record(row, module, training.patience)
            say(_in_words(row, epochs, time.monotonic() - started))
            if folder is None:
                continue
            waited = torch.tensor([time.monotonic() - saved], device=accelerator.device)
            waited = accelerator.gather(waited).max()
            finished = progress.epoch == epochs or progress.stopped
            if keep_last if finished else waited >= training.checkpoint_seconds:
                stage = f"stage-{order:03d}-epoch-{progress.epoch:05d}"
                write_checkpoint(folder, stage, accelerator, progress)
                saved = time.monotonic()
    if progress.stopped:
        say(f"stopped after epoch {progress.epoch}, none was better since {progress.best_epoch}")
    if progress.best_weights is not None:
        module.load_state_dict(progress.best_weights)
    accelerator.free_memory()
    return progress.history


def _kept_by(model: nn.Module, method: Method) -> dict[str, set[str]]:
    """Column of the history -> the weights that are kept from the epoch in which it is lowest."""
    if method.one_epoch:
        return {"validation.nll": set()}
    return {
        f"validation.nll.{name}": model.keys_of(index)
        for index, name in enumerate(model.modalities)
    }


def speaker(
    name: str, train: Split, training: TrainingConfig, accelerator: Accelerator
) -> Callable[[str], None]:
    """What tells the logger ``iibalance`` how the training called ``name`` goes.

    Only the main process says anything, and only where ``training.progress`` asks for it.
    """
    one = len(train.modalities) == 1  # alone-1 does not say which of them
    label = f"{name} ({train.modalities[0]})" if one else name
    if not training.progress or not accelerator.is_main_process:
        return lambda text: None
    return lambda text: logger.info("%s: %s", label, text)


def _in_words(row: dict, epochs: int, seconds: float) -> str:
    """An epoch's row of the history for a person who waits.

    >>> row = {"epoch": 3, "train.loss": 0.4123}
    >>> _in_words({**row, "validation.nll": 0.31, "validation.accuracy": 0.912}, 30, 2.06)
    'epoch 3/30  loss 0.412  validation NLL 0.310  accuracy 0.912  2.1 s'
    >>> _in_words(row, 30, 2.06)
    'epoch 3/30  loss 0.412  2.1 s'
    """
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['train.loss']:.3f}"]
    if "validation.nll" in row:
        parts.append(f"validation NLL {row['validation.nll']:.3f}")
        parts.append(f"accuracy {row['validation.accuracy']:.3f}")
    return "  ".join([*parts, f"{seconds:.1f} s"])


@dataclass
class _Loop:
    """The epochs of one training."""

    train: Split
    epochs: int
    training: TrainingConfig
    seed: int
    accelerator: Accelerator
    method: Method
    parameter_groups: Mapping[str, GroupMaker] = field(default_factory=dict)
    class_names: Sequence[str] | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make loader and optimiser; the model as the processes share it."""
        training, count = self.training, len(self.train)
        batch_size = training.batch_size or (32 if count < 1000 else 64)
        weights = class_weights(self.train.targets, training.class_weight, self.class_names)
        self.sampler = EpochSampler(count, batch_size, self.seed, weights)
        loader = DataLoader(
            self.train,
            batch_size=batch_size,
            sampler=self.sampler,
            collate_fn=identity,
            # Not kept over the epochs: new ones draw from the generator as no workers do, so their
            # number changes no result.
            num_workers=training.workers,
        )
        groups = with_own_rates(self.method.parameter_groups(model), model, training)
        optimizer = torch.optim.AdamW(
            with_own_groups(groups, model, self.parameter_groups),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.accelerator.gradient_accumulation_steps = training.gradient_accumulation
        model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        return model

    def bar(self, name: str, epoch: int) -> tqdm:
        """The progress bar of a training that has ``epoch`` epochs behind it."""
        steps = len(self.loader)
        shown = self.training.progress and self.accelerator.is_main_process
        return tqdm(
            total=self.epochs * steps,
            initial=epoch * steps,
            desc=name,
            unit="step",
            leave=False,
            disable=not shown or None,
        )

    def epoch(self, model: nn.Module, epoch: int, bar: tqdm) -> dict:
        """Train for one epoch; its row of the history."""
        training, accelerator, method = self.training, self.accelerator, self.method
        rank, steps = accelerator.process_index, len(self.loader)
        self.sampler.epoch = epoch
        torch.manual_seed(derive_seed(self.seed, "epoch", epoch, rank))
        method.before_epoch(model, self.train, epoch / self.epochs)
        train_mode(self.accelerator.unwrap_model(model))
        hiding = torch.Generator().manual_seed(derive_seed(self.seed, "dropout", epoch, rank))
        clip_groups = method.clip_groups(model)
        complete = not training.modality_dropout and bool(self.train.mask.all())
        loss_sum = right = count = 0.0
        for step, batch in enumerate(self.loader):
            progress = (epoch * steps + step) / (self.epochs * steps)
            rate = training.learning_rate * _rate(progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if complete:
                batch = batch._replace(mask=None)  # all there: nothing to mask, one pass less
            elif training.modality_dropout:
                mask = drop_modalities(batch.mask, training.modality_dropout, hiding)
                batch = batch._replace(mask=mask)
            output, loss = training_step(
                method,
                model,
                self.optimizer,
                batch,
                progress=progress,
                max_gradient_norm=training.max_gradient_norm,
                clip_groups=clip_groups,
                accelerator=accelerator,
            )
            size = len(batch.targets)
            accuracy = (output.logits.argmax(-1) == batch.targets).float().mean()
            loss_sum = loss_sum + size * loss.detach().double()
            right = right + size * accuracy.double()
            count += size
            bar.update()
        number = torch.tensor(float(count), dtype=torch.float64, device=accelerator.device)
        totals = accelerator.reduce(torch.stack([loss_sum, right, number]))
        loss, accuracy = (float(total / totals[-1]) for total in totals[:2])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training.learning_rate: the loss became {loss} in epoch {epoch + 1}; "
                f"lower it (in effect here: {training.learning_rate})"
            )
        bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}")
        return {"train.loss": loss, "train.accuracy": accuracy, "learning_rate": rate}


def _rate(progress: float) -> float:
    if progress < WARMUP:
        return max(progress, 0.01 * WARMUP) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))

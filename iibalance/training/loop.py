"""The training loop of every stage and method, on Accelerate.

Devices, processes, mixed precision, accumulation and checkpoints. Everything random in an epoch is
seeded from (seed, stage, epoch), so a resumed run needs no generator's state to repeat a whole one
bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

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
from iibalance.training.checkpoint import Progress, write_checkpoint
from iibalance.training.evaluation import Outputs, predict_split, score
from iibalance.training.folder import RunFolder
from iibalance.training.sampling import EpochSampler, derive_seed

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
    """
    method = Method() if method is None else method
    progress = Progress(_kept_by(model, method), method)
    loop = _Loop(train, epochs, training, derive_seed(seed, name), accelerator, method)
    model = loop.prepare(model)
    module = accelerator.unwrap_model(model)
    checkpoint = None if folder is None else folder.latest_checkpoint()
    if checkpoint is not None and checkpoint.name.startswith(f"stage-{order:03d}-"):
        accelerator.load_state(str(checkpoint))
        progress.load(checkpoint)
    saved = time.monotonic()
    with loop.bar(name, progress.epoch) as bar:
        while progress.epoch < epochs and not progress.stopped:
            row = {"epoch": progress.epoch + 1, **loop.epoch(model, progress.epoch, bar)}
            outputs = None
            if validation is not None:
                outputs = predict_split(model, validation, accelerator)
                row |= score(outputs, validation)
            if on_epoch is not None:
                row |= on_epoch(row, module, outputs, progress.history) or {}
            method.after_epoch(row, loop.optimizer)
            progress.record(row, module, training.patience)
            if folder is None:
                continue
            waited = torch.tensor([time.monotonic() - saved], device=accelerator.device)
            waited = accelerator.gather(waited).max()
            finished = progress.epoch == epochs or progress.stopped
            if keep_last if finished else waited >= training.checkpoint_seconds:
                stage = f"stage-{order:03d}-epoch-{progress.epoch:05d}"
                write_checkpoint(folder, stage, accelerator, progress)
                saved = time.monotonic()
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


@dataclass
class _Loop:
    """The epochs of one training."""

    train: Split
    epochs: int
    training: TrainingConfig
    seed: int
    accelerator: Accelerator
    method: Method

    def prepare(self, model: nn.Module) -> nn.Module:
        """Make loader and optimiser; the model as the processes share it."""
        training, count = self.training, len(self.train)
        batch_size = training.batch_size or (32 if count < 1000 else 64)
        self.sampler = EpochSampler(count, batch_size, self.seed)
        loader = DataLoader(
            self.train, batch_size=batch_size, sampler=self.sampler, collate_fn=identity
        )
        optimizer = torch.optim.AdamW(
            self.method.parameter_groups(model),
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
        model.train()
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

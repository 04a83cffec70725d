"""The training loop of every stage and method, on Accelerate: devices, processes, mixed precision, accumulation, checkpoints.

Everything random in an epoch is seeded from (seed, stage, epoch), so a resumed run needs no generator's state to repeat a whole one bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from iibalance.averaging import WeightAverage
from iibalance.config import TrainingConfig
from iibalance.data.corruption import drop_modalities
from iibalance.data.dataset import Split, identity
from iibalance.methods.base import Method, clip_gradients
from iibalance.metrics import classification_metrics, scaled
from iibalance.nn.model import evaluating
from iibalance.training.folder import RunFolder

WARMUP = 0.1  # share of the steps over which the learning rate rises


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: equal parts, equal seed.

    >>> derive_seed(0, "joint", 3) == derive_seed(0, "joint", 3) != derive_seed(0, "joint", 4)
    True
    """
    return (
        int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
    )


class EpochSampler(Sampler):
    """A seeded permutation of ``size`` samples, another one each epoch; the last sample is left out where it would make a batch of its own."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.count = (
            size - 1 if size % batch_size == 1 and size > 1 else size
        )  # batch normalisation cannot train on one sample
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return iter(torch.randperm(self.size, generator=generator)[: self.count].tolist())


class Outputs(NamedTuple):
    """A model's predictions for N samples, on the CPU in float32."""

    logits: Tensor  #: [N, K] fused
    modality_logits: Tensor  #: [N, M, K]; [N, 0, K] for a head without any
    weights: Tensor | None  #: [N, M]
    targets: Tensor  #: [N]


@torch.no_grad()
def predict_split(
    model: nn.Module, split: Split, accelerator: Accelerator, *, batch_size: int = 256
) -> Outputs:
    """Predictions for a whole split, in its order, shared out over the processes and gathered on all of them."""
    module, rows = accelerator.unwrap_model(model), []
    world, rank = accelerator.num_processes, accelerator.process_index
    share = math.ceil(len(split) / world)
    mine = [
        min(index, len(split) - 1) for index in range(rank * share, (rank + 1) * share)
    ]  # the last process repeats rows to fill up
    with evaluating(module):
        for start in range(0, len(mine), batch_size):
            batch = split.__getitems__(mine[start : start + batch_size])
            mask = batch.mask.to(accelerator.device)
            with accelerator.autocast():
                embeddings = module.embed(
                    {name: values.to(accelerator.device) for name, values in batch.inputs.items()}
                )
            out = module.head.fuse([embedding.float() for embedding in embeddings], mask)
            own = (
                torch.stack(out.modality_logits, 1).float()
                if out.modality_logits
                else out.logits.new_zeros(len(mask), 0, out.logits.shape[1])
            )
            rows.append(
                (out.logits.float(), own, None if out.weights is None else out.weights.float())
            )
    columns = [
        None if column[0] is None else accelerator.gather(torch.cat(column))[: len(split)].cpu()
        for column in zip(*rows)
    ]
    return Outputs(*columns, split.targets)


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
    on_epoch: Callable[[dict, nn.Module, Outputs | None, list[dict]], dict | None] | None = None,
    keep_last: bool = False,
    groups: Mapping[str, str] | None = None,
    rate: float = 1.0,
) -> list[dict]:
    """Train ``model`` in place and return its history, one row an epoch.

    Args:
        model: any module with ``forward(inputs, targets, mask=, progress=)`` returning an output with ``.loss``, and ``embed`` and ``head.fuse``.
        train, validation: splits. With validation, training stops after ``training.patience`` epochs without a better validation NLL (after one
            temperature has been fitted) and the best epoch's weights are kept; without, all epochs run and the last weights are kept.
        seed, name: everything random is derived from the two.
        folder: where checkpoints go; None = none. A checkpoint of this training that is there is continued, bit for bit.
        order: the place of this training among those of the same folder, from 0: checkpoints are named by it.
        method: a :class:`~iibalance.methods.base.Method`, whose hooks are called around loss, backward, step and epoch; None = the model's own loss. With its
            ``averaging`` the weights that are validated and kept are their :class:`~iibalance.averaging.WeightAverage`.
        on_epoch: called with each new row, the model, its validation outputs and the rows before; what it returns is merged into the row.
        groups: a regular expression over the names of weights -> the column of the history that they are judged by. Each group keeps the weights of its
            own best epoch; all by ``validation.nll`` by default.
        keep_last: write a checkpoint at the very end as well.
        rate: factor on ``training.learning_rate``.
    """
    seed, training = (
        derive_seed(seed, name),
        replace(training, learning_rate=rate * training.learning_rate),
    )
    batch_size = training.batch_size or (32 if len(train) < 1000 else 64)
    sampler = EpochSampler(len(train), batch_size, seed)
    loader = DataLoader(train, batch_size=batch_size, sampler=sampler, collate_fn=identity)
    method = Method() if method is None else method
    optimizer = torch.optim.AdamW(
        method.parameter_groups(model),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True,
    )
    accelerator.gradient_accumulation_steps = training.gradient_accumulation
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = len(loader)
    average = (
        WeightAverage(
            accelerator.unwrap_model(model),
            method.averaging * epochs * steps / training.gradient_accumulation,
        )
        if method.averaging
        else None
    )
    state = _State(groups or {"": "validation.nll"}, method, average)
    checkpoint = None if folder is None else folder.latest_checkpoint()
    if checkpoint is not None and checkpoint.name.startswith(f"stage-{order:03d}-"):
        accelerator.load_state(str(checkpoint))
        state.load(checkpoint)
    saved = time.monotonic()
    bar = tqdm(
        total=epochs * steps,
        initial=state.epoch * steps,
        desc=name,
        unit="step",
        leave=False,
        disable=not (training.progress and accelerator.is_main_process) or None,
    )
    while state.epoch < epochs and not state.stopped:
        sampler.epoch = state.epoch
        torch.manual_seed(derive_seed(seed, "epoch", state.epoch, accelerator.process_index))
        method.before_epoch(model, train, state.epoch / epochs)
        row = {
            "epoch": state.epoch + 1,
            **_train_epoch(
                model,
                loader,
                optimizer,
                accelerator,
                training,
                seed,
                state.epoch,
                epochs,
                method,
                average,
                bar,
            ),
        }
        outputs = None
        with nullcontext() if average is None else average.used():
            if validation is not None:
                outputs = predict_split(model, validation, accelerator)
                row |= _score(outputs, validation, accelerator.unwrap_model(model).modalities)
            if on_epoch is not None:
                row |= on_epoch(row, accelerator.unwrap_model(model), outputs, state.history) or {}
            method.after_epoch(row, optimizer)
            state.record(row, accelerator.unwrap_model(model), training.patience)
        finished = state.epoch == epochs or state.stopped
        if folder is not None:
            waited = accelerator.gather(
                torch.tensor([time.monotonic() - saved], device=accelerator.device)
            ).max()
            if keep_last if finished else waited >= training.checkpoint_seconds:
                _checkpoint(
                    folder, f"stage-{order:03d}-epoch-{state.epoch:05d}", accelerator, state
                )
                saved = time.monotonic()
    bar.close()
    module = accelerator.unwrap_model(model)
    if state.best_weights is not None:
        module.load_state_dict(state.best_weights)
    elif average is not None:
        average.apply()
    accelerator.free_memory()
    return state.history


class _State:
    """How far a training is: what a checkpoint holds beside weights and optimiser."""

    def __init__(
        self, groups: Mapping[str, str], method: Method, average: WeightAverage | None = None
    ):
        self.method, self.average = method, average
        self.epoch, self.history, self.stopped, self.best_weights = 0, [], False, None
        self.groups, self.best, self.best_epoch = (
            groups,
            {column: math.inf for column in groups.values()},
            0,
        )

    def record(self, row: dict, module: nn.Module, patience: int) -> None:
        self.epoch += 1
        self.history.append(row)
        better = [
            pattern
            for pattern, column in self.groups.items()
            if row.get(column, math.inf) < self.best[column]
        ]
        if better:
            state = module.state_dict()
            self.best_epoch = self.epoch
            self.best |= {self.groups[pattern]: row[self.groups[pattern]] for pattern in better}
            if (
                self.best_weights is None
            ):  # what belongs to no group follows its first epoch, then any group's best
                self.best_weights = {key: value.detach().clone() for key, value in state.items()}
            for key, value in state.items():
                pattern = next((pattern for pattern in self.groups if re.match(pattern, key)), None)
                if pattern is None or pattern in better:
                    self.best_weights[key] = value.detach().clone()
        self.stopped = bool(self.best_epoch) and self.epoch - self.best_epoch >= patience

    def save(self, path) -> None:
        best = {column: value for column, value in self.best.items() if value < math.inf}
        (path / "progress.json").write_text(
            json.dumps(
                {
                    "epoch": self.epoch,
                    "stopped": self.stopped,
                    "best": best,
                    "best_epoch": self.best_epoch,
                    "history": self.history,
                }
            )
        )
        if self.best_weights is not None:
            _write(path / "best.safetensors", self.best_weights)
        if self.method.state:
            _write(path / "method.safetensors", self.method.state)
        if self.average is not None:
            _write(path / "average.safetensors", self.average.state_dict())

    def load(self, path) -> None:
        progress = json.loads((path / "progress.json").read_text())
        self.epoch, self.best_epoch, self.history = (
            progress["epoch"],
            progress["best_epoch"],
            progress["history"],
        )
        self.stopped = progress["stopped"]
        self.best |= progress["best"]
        if (path / "best.safetensors").exists():
            self.best_weights = load_file(path / "best.safetensors")
        if (path / "method.safetensors").exists():
            self.method.state = load_file(path / "method.safetensors")
        if self.average is not None:
            self.average.load_state_dict(load_file(path / "average.safetensors"))


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, path)


def _checkpoint(folder: RunFolder, name: str, accelerator: Accelerator, state: _State) -> None:
    scratch = (
        folder.path / "checkpoints" / f".writing-{name}"
    )  # what the main process is given, for the others
    with folder.checkpoint(name) if accelerator.is_main_process else nullcontext(scratch) as path:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(path))
        if accelerator.is_main_process:
            state.save(path)
        accelerator.wait_for_everyone()


def _train_epoch(
    model, loader, optimizer, accelerator, training, seed, epoch, epochs, method, average, bar
) -> dict:
    model.train()
    generator = torch.Generator().manual_seed(
        derive_seed(seed, "dropout", epoch, accelerator.process_index)
    )
    sums, count, steps = {}, 0, len(loader)
    clip_groups = method.clip_groups(model)
    complete = not training.modality_dropout and bool(loader.dataset.mask.all())
    for step, batch in enumerate(loader):
        progress = (epoch * steps + step) / (epochs * steps)
        rate = training.learning_rate * _rate(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        if complete:
            batch = batch._replace(mask=None)  # all there: nothing to mask, and one pass less
        elif training.modality_dropout:
            batch = batch._replace(
                mask=drop_modalities(batch.mask, training.modality_dropout, generator)
            )
        with accelerator.accumulate(model):
            out = model(batch.inputs, batch.targets, mask=batch.mask, progress=progress)
            loss = method.loss(out, model, batch, progress)
            method.backward(loss, model, batch, out, accelerator.backward)
            if accelerator.sync_gradients:  # the gradient of the whole step, once
                method.after_backward(model, batch, out)
                if training.max_gradient_norm:
                    accelerator.unscale_gradients()
                    clip_gradients(clip_groups, training.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
        method.after_step(model, batch, out)
        if average is not None and accelerator.sync_gradients:
            average.update()
        size = len(batch.targets)
        values = {
            "train.loss": loss.detach(),
            "train.accuracy": (out.logits.argmax(-1) == batch.targets).float().mean(),
        }
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + size * value.double()
        count += size
        bar.update()
    totals = accelerator.reduce(
        torch.stack(
            [
                *sums.values(),
                torch.tensor(float(count), dtype=torch.float64, device=accelerator.device),
            ]
        )
    )
    row = {key: float(total / totals[-1]) for key, total in zip(sums, totals)}
    if not math.isfinite(row["train.loss"]):
        raise FloatingPointError(
            f"training.learning_rate: the loss became {row['train.loss']} in epoch {epoch + 1}; lower it (in effect here: {training.learning_rate})"
        )
    bar.set_postfix(epoch=epoch + 1, loss=f"{row['train.loss']:.3f}")
    return {**row, "learning_rate": rate}


def _score(outputs: Outputs, validation: Split, modalities: tuple[str, ...]) -> dict:
    """Validation figures of the fused prediction and of each modality's, each after one temperature fitted on the same samples."""
    row = {}
    columns = [("", outputs.logits, torch.ones_like(validation.mask[:, 0]))]
    columns += [
        (f".{name}", outputs.modality_logits[:, index], validation.mask[:, index])
        for index, name in enumerate(modalities)
        if outputs.modality_logits.shape[1]
    ]
    for suffix, logits, rows in columns:
        if rows.any():
            targets = outputs.targets[rows]
            metrics = classification_metrics(scaled(logits[rows], targets).log_softmax(-1), targets)
            row |= {
                f"validation.nll{suffix}": metrics["nll"],
                f"validation.accuracy{suffix}": metrics["accuracy"],
            }
    return row


def _rate(progress: float) -> float:
    if progress < WARMUP:
        return max(progress, 0.01 * WARMUP) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))

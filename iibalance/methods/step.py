"""One training step with every hook of a method in its place: the only one there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch
from iibalance.methods.gradients import clip_gradients

if TYPE_CHECKING:
    from accelerate import Accelerator


def training_step(
    method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    progress: float,
    max_gradient_norm: float = 0.0,
    clip_groups: Sequence[Sequence[Tensor]] | None = None,
    accelerator: Accelerator | None = None,
) -> tuple:
    """Loss, backward, clipping and the optimiser's step; returns (the model's output, the loss).

    Args:
        method: a :class:`~iibalance.methods.base.Method`, whose hooks are called.
        progress: share of the training that is done, in [0, 1].
        max_gradient_norm: gradients are clipped to it, each of ``clip_groups`` by itself; 0 = not.
        clip_groups: ``method.clip_groups(model)``, where it is at hand.
        accelerator: scales and accumulates gradients; None = plain PyTorch.
    """
    with nullcontext() if accelerator is None else accelerator.accumulate(model):
        output = model(batch.inputs, batch.targets, mask=batch.mask, progress=progress)
        loss = method.loss(output, model, batch, progress)
        backward = Tensor.backward if accelerator is None else accelerator.backward
        method.backward(loss, model, batch, output, backward)
        if accelerator is None or accelerator.sync_gradients:  # once for the whole step's gradient
            method.after_backward(model, batch, output)
            if max_gradient_norm:
                if accelerator is not None:
                    accelerator.unscale_gradients()
                groups = method.clip_groups(model) if clip_groups is None else clip_groups
                clip_gradients(groups, max_gradient_norm)
        with _scaled_rates(optimizer):
            optimizer.step()
        optimizer.zero_grad()
    method.after_step(model, batch, output)
    return output, loss


@contextmanager
def _scaled_rates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Each group's learning rate times its ``scale``, for one step."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate * group.get("scale", 1.0)
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate

"""Gradients of several modalities and processes: clipping, groups, and what ranks must share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def clip_gradients(groups: Sequence[Sequence[Tensor]], norm: float) -> None:
    """Scale the gradients of each group of parameters down to ``norm`` where they are longer.

    That is ``clip_grad_norm_``, group by group. On the CPU all norms are taken in one pass and only
    what is too long is touched: 0.2 against 0.8 ms for six small encoders.
    """
    if any(value.device.type != "cpu" for values in groups for value in values):
        for values in groups:
            nn.utils.clip_grad_norm_(values, norm)
        return
    groups = [[value.grad for value in values if value.grad is not None] for values in groups]
    flat = [grad for grads in groups for grad in grads]
    if not flat:
        return
    squares = torch.stack(torch._foreach_norm(flat)).double().square()
    for grads, part in zip(groups, squares.split([len(grads) for grads in groups])):
        length = math.sqrt(float(part.sum()))
        if length > norm:
            torch._foreach_mul_(grads, norm / (length + 1e-6))


def groups_by_modality(model: nn.Module) -> list[dict]:
    """Parameter groups for the optimiser: one a modality, and one of the rest if there is any.

    A modality's group holds its encoder and its own classifier.
    """
    model = unwrap(model)
    groups, taken = [], set()
    for name, *parts in zip(model.modalities, model.encoders, model.head.classifiers):
        values = [value for part in parts for value in part.parameters() if value.requires_grad]
        taken |= {id(value) for value in values}
        groups.append({"params": values, "scale": 1.0, "modality": name})
    rest = [value for value in model.parameters() if value.requires_grad and id(value) not in taken]
    return groups + ([{"params": rest, "scale": 1.0}] if rest else [])


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of ``values`` over data-parallel processes, which must change gradients alike."""
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

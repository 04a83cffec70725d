"""What the operations on a CPU share: where they apply, rows in chunks, softmax, labels.

Shapes: R rows of a chunk, K classes, M modalities. Everything inside stands modality first, [M, R]
and [M, R, K], so that one call serves all modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels._chunks import spans

WORK_ELEMENTS = 2**18  # of a work array [M, rows, K]: a few stay in the cache
# Of a batch [M, B, K] up to which forward keeps its work, three such arrays, for backward, which
# otherwise goes through the chunks again: 1.5 times as long in all at (4096, 1000, 3)
KEPT_ELEMENTS = 2**24
# Exponentials are most of the work with many classes, calls with few. One exponential and five
# calls, or two and two: at 1000 classes the former took 0.7 times as long, at 31 three times.
FEW_CLASSES = 128

_in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def takes(impl: str, *values: object) -> bool:
    """Whether the implementations here may take a call with these arguments.

    They may in plain eager mode with plain tensors on the CPU. Tracers, ``torch.func`` and
    forward-mode derivatives need operations that they can follow, which are the reference's.
    """
    if impl != "auto" or torch.compiler.is_compiling() or _in_transform():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return all(
        value.is_cpu and type(value) in (Tensor, torch.nn.Parameter)
        for value in values
        if isinstance(value, Tensor)
    )


def chunks(count: int, batch: int, classes: int) -> list[tuple[int, int]]:
    """(start, stop) of the rows that are worked on at once."""
    return spans(batch, max(1, WORK_ELEMENTS // (count * classes)))


def keeps(count: int, batch: int, classes: int) -> bool:
    """Whether forward keeps its work for backward."""
    return count * batch * classes <= KEPT_ELEMENTS


def part(value: Tensor | None, start: int, stop: int, dim: int = 0) -> Tensor | None:
    """Rows start to stop, without a call where they are all there are."""
    if value is None or (start == 0 and stop == value.shape[dim]):
        return value
    return value.narrow(dim, start, stop - start)


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """[M, B] of the chunks' [M, R]."""
    return parts[0] if len(parts) == 1 else None if parts[0] is None else torch.cat(parts, 1)


def log_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax and softmax over the last dimension, both [..., K]."""
    if scores.shape[-1] < FEW_CLASSES:
        log_p = scores.log_softmax(-1)
        return log_p, log_p.exp()
    p = scores.softmax(-1)
    # log p = score - logsumexp holds for the likeliest class too, whose p cannot underflow
    return scores - scores.amax(-1, True).sub_(p.amax(-1, True).log_()), p


class Labels(NamedTuple):
    """What there is to know about the M + 1 losses of each row, the fused logits' first."""

    index: Tensor  # [R, 1] target in [0, K), anything in rows that do not count
    counts: Tensor | None  # [M + 1, R] bool, which losses count; None where all do
    share: Tensor  # [M + 1, R] of each row's loss in what is returned
    weight: Tensor | None = None  # [K] of the classes
    smoothing: float = 0.0

    def rows(self, start: int, stop: int) -> Labels:
        """These of some rows."""
        if start == 0 and stop == len(self.index):
            return self
        return self._replace(
            index=self.index[start:stop],
            counts=part(self.counts, start, stop, 1),
            share=self.share[:, start:stop],
        )


def labels_of(
    targets: Tensor,
    mask: Tensor | None,
    count: int,
    dtype: torch.dtype,
    ignore_index: int = -100,
    reduction: str = "none",
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    complete: bool = False,
) -> Labels:
    """Labels of targets [B] and mask [B, M]; ``complete`` says that none is to be ignored.

    A mean's divisor is the number of rows that count, or the sum of their targets' weights; where
    it is 0 so is the mean.
    """
    size = (count + 1, len(targets))
    valid = None if complete and mask is None else targets != ignore_index
    if valid is None or (mask is None and valid.all()):
        counts, index = None, targets
    else:
        valid, index = valid.unsqueeze(0), torch.where(valid, targets, 0)
        each = valid.expand(count, -1) if mask is None else valid & mask.mT
        counts = torch.cat([valid, each])
    if reduction != "mean":
        share = targets.new_ones((), dtype=dtype) if counts is None else counts.to(dtype)
    elif counts is None and weight is None:
        share = targets.new_full((), 1 / max(1, len(targets)), dtype=dtype)
    else:
        share = targets.new_ones(size, dtype=dtype) if counts is None else counts.to(dtype)
        total = (share if weight is None else share * weight[index]).sum(1, keepdim=True)
        share = share / torch.where(total == 0, 1.0, total)
    return Labels(index.unsqueeze(1), counts, share.expand(size), weight, smoothing)


class CrossEntropy(NamedTuple):
    """Cross-entropies of rows of scores, and how each is made of -log p.

    loss = hit (-log p_y) + every sum_k weight_k (-log p_k), the sum over the classes that are not
    ruled out; ``mass`` is the sum of all these coefficients.
    """

    loss: Tensor  # [..., R]
    hit: Tensor | float  # [R]
    every: Tensor | float  # [..., R]
    mass: Tensor | float  # [..., R]


def cross_entropy(log_p: Tensor, labels: Labels, ruled_out: Tensor | None) -> CrossEntropy:
    """Cross-entropy for log_p [..., R, K] that are 0 where ``ruled_out``; inf where a target is."""
    _, _, _, weight, smoothing = labels
    index = labels.index.expand(*log_p.shape[:-1], 1)
    loss = log_p.gather(-1, index).squeeze(-1).neg_()
    if ruled_out is not None:
        loss.masked_fill_(ruled_out.gather(-1, index).squeeze(-1), torch.inf)
    if weight is None and not smoothing:
        return CrossEntropy(loss, 1.0, 0.0, 1.0)
    hit = 1.0 - smoothing
    if weight is not None:
        hit = hit * weight[labels.index.squeeze(1)]
    loss *= hit
    if not smoothing:
        return CrossEntropy(loss, hit, 0.0, hit)
    if ruled_out is None:
        every = smoothing / log_p.shape[-1]
        total = log_p.shape[-1] if weight is None else weight.sum()
    else:
        possible = (~ruled_out).to(log_p.dtype)
        every = smoothing / possible.sum(-1)
        total = (possible if weight is None else possible * weight).sum(-1)
    loss -= every * (log_p if weight is None else log_p * weight).sum(-1)
    return CrossEntropy(loss, hit, every, hit + every * total)


def add_target_gradient(
    gradient: Tensor, upstream: Tensor, terms: CrossEntropy, labels: Labels
) -> Tensor:
    """Adds, in place, what a cross-entropy's gradient by its scores has besides mass * p.

    Args:
        gradient: [..., R, K].
        upstream: [..., R], of each row's loss.
    """
    index = labels.index.expand(*upstream.shape, 1)
    if labels.smoothing:
        every = (upstream * terms.every).unsqueeze(-1)
        gradient.sub_(every if labels.weight is None else every * labels.weight)
    plain = isinstance(terms.hit, float) and terms.hit == 1
    hit = -upstream if plain else upstream * -terms.hit
    return gradient.scatter_add_(-1, index, hit.unsqueeze(-1))


def by_reference(
    function: Callable[[Sequence[Tensor | None]], Sequence[Tensor]],
    inputs: Sequence[Tensor | float | None],
    upstream: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(inputs)`` that can be differentiated again, by autograd.

    For backward with ``create_graph=True``, where what is written out by hand would be taken for a
    constant.
    """
    # Views: autograd would give a tensor that comes twice the sum of its gradients twice
    inputs = [value.view_as(value) if isinstance(value, Tensor) else value for value in inputs]
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    outputs = [
        (output, gradient)
        for output, gradient in zip(function(inputs), upstream)
        if gradient is not None and output.requires_grad
    ]
    if not outputs:
        return (None,) * len(inputs)
    found, given = zip(*outputs)
    gradients = iter(
        torch.autograd.grad(found, wanted, given, create_graph=True, allow_unused=True)
    )
    return tuple(
        next(gradients) if isinstance(value, Tensor) and value.requires_grad else None
        for value in inputs
    )

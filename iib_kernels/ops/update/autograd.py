"""The kernels of the prototypes' update as operators and an autograd Function.

Method page, section 2.
"""

from __future__ import annotations

import torch

from iib_kernels._registration import LIBRARY, register
from iib_kernels._runtime import compute_dtype
from iib_kernels.ops.update.launch import move, sum_classes


def _update(prototypes, counts, features, targets, *constants):
    """A copy of the table, moved."""
    moved, total = outputs = _update_fake(prototypes, counts)
    moved.copy_(prototypes)
    total.copy_(counts)
    move([moved], [total], [features], targets, None, *constants)
    return outputs


def _update_fake(prototypes, counts, *_):
    return prototypes.new_empty(prototypes.shape), counts.new_empty(counts.shape, dtype=torch.int64)


def _sums(features, targets, num_classes, *constants):
    outputs = _sums_fake(features, targets, num_classes)
    sum_classes(features, targets, *constants, *outputs)
    return outputs


def _sums_fake(features, targets, num_classes, *_):
    sums = features.new_empty(num_classes, features.shape[1], dtype=compute_dtype(features))
    return sums, features.new_empty(num_classes, dtype=torch.int64)


SNAPSHOT = register(
    "snapshot(Tensor values) -> Tensor", lambda values: values.clone(), torch.empty_like
)
UPDATE = register(
    "update_prototypes(Tensor prototypes, Tensor counts, Tensor features, Tensor targets, "
    "float momentum, bool cosine, int ignore_index) -> (Tensor, Tensor)",
    _update,
    _update_fake,
)
MOVE = register(
    "update_prototypes_(Tensor(a!)[] prototypes, Tensor(b!)[] counts, Tensor[] features, "
    "Tensor targets, Tensor? mask, float momentum, bool cosine, int ignore_index) -> ()",
    move,
    lambda *_: None,
)
CLASS_SUMS = register(
    "class_sums(Tensor features, Tensor targets, int num_classes, bool cosine, int ignore_index) "
    "-> (Tensor, Tensor)",
    _sums,
    _sums_fake,
)


def _in_place(keys, prototypes, counts, *rest) -> None:
    """Tell autograd that the tables change: backward through what read them before then raises."""
    torch.autograd.graph.increment_version([*prototypes, *counts])
    MOVE.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, prototypes, counts, *rest)


LIBRARY.impl("update_prototypes_", _in_place, "ADInplaceOrView", with_keyset=True)


class UpdatePrototypesFunction(torch.autograd.Function):
    """The kernel of :func:`~iib_kernels.update_prototypes`, which checks, for autograd.

    Takes prototypes [K, D], counts [K], features [B, D], targets [B], momentum, cosine and
    ignore_index. Gives new prototypes and counts, which carry no gradient.
    """

    @staticmethod
    def forward(prototypes, counts, features, targets, momentum, cosine, ignore_index):
        return UPDATE(prototypes, counts, features, targets, momentum, cosine, ignore_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx, *_):
        return (None,) * 7

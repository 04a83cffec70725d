"""The kernel of the prototypes' update as operators and an autograd Function.

One kernel gives class sums, or, where prototypes are given, their moving average
(method page, section 2).
"""

from __future__ import annotations

import torch

from iib_kernels import _tuning
from iib_kernels._registration import register
from iib_kernels._runtime import accumulator, compute_dtype, on_device, scalar


def _launch(
    prototypes,
    counts,
    features,
    targets,
    momentum,
    cosine,
    ignore_index,
    prototypes_out,
    counts_out,
) -> None:
    """Fill both outputs: class sums and how many there are, or, given prototypes, the new ones."""
    from iib_kernels.ops.update.kernels import prototype_update

    (batch, width), classes = features.shape, counts_out.shape[0]
    move = prototypes is not None
    dtype = compute_dtype(features, prototypes) if move else compute_dtype(features)
    if not classes:
        return

    def launch(config: _tuning.Launch) -> None:
        prototype_update[(classes,)](
            prototypes,
            *(prototypes.stride() if move else (0, 0)),
            counts,
            counts.stride(0) if move else 0,
            features,
            *features.stride(),
            targets,
            targets.stride(0),
            ignore_index,
            scalar(momentum, dtype, features.device),
            prototypes_out,
            counts_out,
            batch,
            width,
            MOVE=move,
            COSINE=cosine,
            NUMBER_POINTER=dtype == torch.float64,
            ACC=accumulator(dtype),
            ONE_BLOCK=width <= config.blocks["BLOCK_D"],
            **config.options(),
        )

    with on_device(features):
        key = ("update", batch, width, classes, features.dtype)
        _tuning.run(key, _tuning.update(width), launch)


def _update(*arguments):
    outputs = _update_fake(*arguments)
    _launch(*arguments, *outputs)
    return outputs


def _update_fake(prototypes, counts, *_):
    return prototypes.new_empty(prototypes.shape), counts.new_empty(counts.shape, dtype=torch.int64)


def _sums(features, targets, num_classes, cosine, ignore_index):
    outputs = _sums_fake(features, targets, num_classes)
    _launch(None, None, features, targets, 0.0, cosine, ignore_index, *outputs)
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
CLASS_SUMS = register(
    "class_sums(Tensor features, Tensor targets, int num_classes, bool cosine, int ignore_index) "
    "-> (Tensor, Tensor)",
    _sums,
    _sums_fake,
)


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

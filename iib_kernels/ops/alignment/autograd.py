"""The alignment kernels as an operator and an autograd Function (method page, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._registration import register
from iib_kernels._runtime import (
    accumulator,
    compute_dtype,
    dot_options,
    first_order,
    on_device,
    scalar,
    slope_precision,
    uniform_dtype,
)


class Inputs(NamedTuple):
    """What forward and backward both take, in the order of their schemas."""

    features: Sequence[Tensor]  # M of [B, D_m]
    prototypes: Sequence[Tensor]  # M of [K, D_m]
    targets: Tensor  # [B]
    budgets: Tensor  # [M]
    temperature: float
    cosine: bool
    seen: Sequence[Tensor]  # M of [K], or none
    mask: Tensor | None  # [B, M]
    ignore_index: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return compute_dtype(*self.features)

    @property
    def batch(self) -> int:
        return self.targets.shape[0]

    @property
    def classes(self) -> int:
        return self.prototypes[0].shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """D_m of every modality."""
        return tuple(values.shape[1] for values in self.features)

    @property
    def itemsize(self) -> int:
        """Bytes of the widest element."""
        return max(value.dtype.itemsize for value in (*self.features, *self.prototypes))

    @property
    def tiled(self) -> bool:
        """Whether the classes need several blocks, and forward keeps its sums for backward."""
        return self.classes > _tuning.ALIGNMENT_CLASSES

    @property
    def size(self) -> tuple:
        """What block sizes depend on, and the key under which they are remembered."""
        count, kind = len(self.features), self.features[0].dtype
        return self.batch, self.classes, max(self.widths), count, kind


# ----- Launchers


def _arguments(inputs: Inputs) -> list:
    """The arguments that all three kernels begin with."""
    strides = lambda values, place: tuple(value.stride(place) for value in values)
    targets, mask = inputs.targets, inputs.mask
    return [
        tuple(inputs.features),
        strides(inputs.features, 0),
        strides(inputs.features, 1),
        tuple(inputs.prototypes),
        strides(inputs.prototypes, 0),
        strides(inputs.prototypes, 1),
        inputs.widths,
        targets,
        targets.stride(0),
        inputs.ignore_index,
        inputs.budgets,
        inputs.budgets.stride(0),
        scalar(inputs.temperature, inputs.dtype, targets.device),
        tuple(value.contiguous() for value in inputs.seen) or None,
        mask,
        *((0, 0) if mask is None else mask.stride()),
    ]


def _options(inputs: Inputs) -> dict:
    """Constant arguments common to the kernels."""
    return {
        "M": len(inputs.features),
        "COSINE": inputs.cosine,
        "SEEN": bool(inputs.seen),
        "NUMBER_POINTER": inputs.dtype == torch.float64,
        "ACC": accumulator(inputs.dtype),
        **dot_options(*inputs.features, *inputs.prototypes),
    }


def _block_launches(inputs: Inputs) -> list[_tuning.Launch]:
    """Block sizes of the kernels that hold all modalities' scores at once."""
    width, count = max(inputs.widths), len(inputs.features)
    return _tuning.alignment(inputs.classes, width, count, inputs.itemsize)


def _forward(*arguments):
    from iib_kernels.ops.alignment.kernels import alignment_forward

    inputs = Inputs(*arguments)
    *results, statistics = outputs = _forward_fake(*arguments)
    if not inputs.batch:
        return outputs

    def launch(config: _tuning.Launch) -> None:
        alignment_forward[(-(-inputs.batch // config.blocks["BLOCK_B"]),)](
            *_arguments(inputs),
            *results,
            statistics if inputs.tiled else None,
            inputs.batch,
            inputs.classes,
            **_options(inputs),
            **config.options(),
        )

    with on_device(inputs.targets):
        _tuning.run(("alignment", *inputs.size), _block_launches(inputs), launch)
    return outputs


def _forward_fake(*arguments):
    inputs = Inputs(*arguments)
    like, dtype = inputs.features[0].new_empty, inputs.dtype
    size = (inputs.batch, len(inputs.features))
    contrastive, alignment, confidence = (like(size, dtype=dtype) for _ in range(3))
    counts = like(size, dtype=torch.bool)
    statistics = like(inputs.batch if inputs.tiled else 0, 2 * size[1], dtype=dtype)
    return contrastive, alignment, confidence, counts, statistics


def _backward(*arguments):
    from iib_kernels.ops.alignment.kernels_backward import (
        alignment_backward_block,
        alignment_backward_tiled,
    )

    *arguments, confidence, statistics, grad_contrastive, grad_alignment = arguments
    inputs = Inputs(*arguments)
    kinds = [values.dtype for values in inputs.features]
    if inputs.tiled:  # its programs choose a modality on the device
        inputs = inputs._replace(
            features=uniform_dtype(inputs.features), prototypes=uniform_dtype(inputs.prototypes)
        )
    gradients = [values.new_empty(values.shape) for values in inputs.features]
    if not inputs.batch:
        return [gradient.to(kind) for gradient, kind in zip(gradients, kinds)]
    upstream = []
    for value in (grad_contrastive, grad_alignment):
        upstream += [value, *((0, 0) if value is None else value.stride())]
    shared = _arguments(inputs)
    rest = (*upstream, tuple(gradients), inputs.batch, inputs.classes)
    options = {
        **_options(inputs),
        "SLOPE_PRECISION": slope_precision(*inputs.features, *inputs.prototypes),
    }

    def launch_block(config: _tuning.Launch) -> None:
        alignment_backward_block[(-(-inputs.batch // config.blocks["BLOCK_B"]),)](
            *shared, *rest, **options, **config.options()
        )

    def launch_tiled(config: _tuning.Launch) -> None:
        rows = -(-inputs.batch // config.blocks["BLOCK_B"])
        chunks = -(-max(inputs.widths) // config.blocks["CHUNK"])
        alignment_backward_tiled[(rows, len(inputs.features), chunks)](
            *shared, confidence, statistics, *rest, **options, **config.options()
        )

    with on_device(inputs.targets):
        if inputs.tiled:
            launches = _tuning.alignment_tiled(max(inputs.widths), inputs.itemsize)
            _tuning.run(("alignment_backward_tiled", *inputs.size), launches, launch_tiled)
        else:
            key = ("alignment_backward", *inputs.size)
            _tuning.run(key, _block_launches(inputs), launch_block)
    return [gradient.to(kind) for gradient, kind in zip(gradients, kinds)]


def _backward_fake(features, *_):
    return [values.new_empty(values.shape) for values in features]


# ----- Operators

_INPUTS = (
    "Tensor[] features, Tensor[] prototypes, Tensor targets, Tensor budgets, float temperature, "
    "bool cosine, Tensor[] seen, Tensor? mask, int ignore_index"
)
ALIGNMENT_LOSS = register(
    f"alignment_loss({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
ALIGNMENT_LOSS_BACKWARD = register(
    f"alignment_loss_backward({_INPUTS}, Tensor confidence, Tensor statistics, "
    "Tensor? grad_contrastive, Tensor? grad_alignment) -> Tensor[]",
    _backward,
    _backward_fake,
)


# ----- Autograd Function


def _inputs(constants, targets, budgets, mask, values) -> tuple:
    """Arguments of the operators, from the Function's: its tensors come in one row."""
    temperature, cosine, ignore_index, count = constants
    features, prototypes, seen = values[:count], values[count : 2 * count], values[2 * count :]
    return features, prototypes, targets, budgets, temperature, cosine, seen, mask, ignore_index


def _call_backward(constants, targets, budgets, mask, *tensors):
    """The backward operator; its gradients in one tuple.

    ``tensors`` are confidence, statistics and the two upstream gradients, then features, prototypes
    and seen. They arrive flat because autograd sees only tensors that are arguments themselves.
    """
    inputs = _inputs(constants, targets, budgets, mask, tensors[4:])
    return tuple(ALIGNMENT_LOSS_BACKWARD(*inputs, *tensors[:4]))


class AlignmentLossFunction(torch.autograd.Function):
    """The kernels of :func:`~iib_kernels.alignment_loss`, which checks the arguments, for autograd.

    Takes temperature, cosine, ignore_index, M, targets [B], budgets [M], mask [B, M], M features, M
    prototypes, and M ``seen`` or none. Gives C, A, q(y) and which rows count, each [B, M], and what
    backward needs.
    """

    @staticmethod
    def forward(temperature, cosine, ignore_index, count, targets, budgets, mask, *values):
        constants = temperature, cosine, ignore_index, count
        return ALIGNMENT_LOSS(*_inputs(constants, targets, budgets, mask, values))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *ctx.constants, targets, budgets, mask = inputs[:7]
        _, _, confidence, counts, statistics = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(confidence, counts, statistics)
        ctx.save_for_backward(targets, budgets, mask, confidence, statistics, *inputs[7:])

    @staticmethod
    def backward(ctx, grad_contrastive, grad_alignment, *_):
        gradients = ()
        if grad_contrastive is not None or grad_alignment is not None:
            saved = ctx.saved_tensors
            gradients = first_order(
                "alignment_loss",
                _call_backward,
                ctx.constants,
                *saved[:5],
                grad_contrastive,
                grad_alignment,
                *saved[5:],
            )
        needed = [
            value if need else None for value, need in zip(gradients, ctx.needs_input_grad[7:])
        ]
        without = len(ctx.needs_input_grad) - 7 - len(needed)  # prototypes and seen
        return (None,) * 7 + (*needed,) + (None,) * without

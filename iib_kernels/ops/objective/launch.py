"""Launches of the objective's kernels: what they are given, block sizes, and the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._runtime import (
    accumulator,
    compute_dtype,
    dot_options,
    on_device,
    scalar,
    uniform_dtype,
)
from iib_kernels.ops.arguments import contiguous, tickets
from iib_kernels.ops.fusion.arguments import (
    Gating,
    Labels,
    Parameters,
    gate_argument,
    plan_argument,
    rows_argument,
    targets_argument,
)

CLASSES = 128  # up to this many classes one launch does everything
WIDTH = 1024  # and features of up to this many components
PROGRAMS = 4  # on a multiprocessor, at most


class Arguments(NamedTuple):
    """What the operator takes, in the order of its schema."""

    logits: Sequence[Tensor]  # M of [B, K]
    targets: Tensor  # [B]
    features: Sequence[Tensor]  # M of [B, D_m], or none
    prototypes: Sequence[Tensor]  # M of [K, D_m], or none
    budgets: Tensor | None  # [M], with features
    log_prior: Tensor | None  # [M]
    gate_logits: Tensor | None  # [B, M]
    temperature: Tensor | None  # [M] or []
    uncertainty_weight: Tensor | None  # [M] or []
    scale: Tensor | None  # []
    seen: Sequence[Tensor]  # M of [K] bool or counts, or none
    mask: Tensor | None  # [B, M]
    class_weight: Tensor | None  # [K]
    numbers: Sequence[float]  # see Numbers
    present: bool  # the scale is the number of modalities that are there
    cosine: bool
    unit: bool  # prototypes have unit length
    ignore_index: int
    grad: bool  # whether gradients are asked for


class Numbers(NamedTuple):
    """The scalars among the arguments, in the order of ``Arguments.numbers``."""

    fused: float
    unimodal: float
    contrastive: float
    alignment: float
    prototype_temperature: float
    label_smoothing: float
    temperature: float  # this and the next two: where there is no tensor
    uncertainty_weight: float
    scale: float


class Outputs(NamedTuple):
    """What the operator gives."""

    loss: Tensor  # []
    parts: Tensor  # [3 M + 1]: fused, unimodal, contrastive, alignment
    weights: Tensor  # [B, M]
    gradients: list[Tensor]  # M by logits and M by features, where asked for


def fits(classes: int, widths: Sequence[int]) -> bool:
    """Whether one launch does everything."""
    return classes <= CLASSES and max(widths, default=0) <= WIDTH


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are kept in until the factor from above is known.

    float16 has no room for gradients before a GradScaler has scaled them.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def outputs(arguments: Arguments) -> Outputs:
    """Uninitialised outputs."""
    logits, features = arguments.logits, arguments.features
    count, dtype = len(logits), compute_dtype(*logits, *features)
    like = logits[0].new_empty
    differentiated = [*logits, *features] if arguments.grad else []
    gradients = [
        value.new_empty(value.shape, dtype=gradient_dtype(value.dtype)) for value in differentiated
    ]
    return Outputs(
        like((), dtype=dtype),
        like(3 * count + 1, dtype=dtype),
        like((len(arguments.targets), count), dtype=dtype),
        gradients,
    )


def grid_limit(device: torch.device) -> int:
    """Programs of one launch at most: enough to fill the device."""
    return PROGRAMS * _tuning.processors(device)


def rows_of(values: Tensor) -> Tensor:
    """The tensor with its components side by side, which the kernels take for granted."""
    return values if values.shape[1] == 1 or values.stride(1) == 1 else values.contiguous()


def _candidates(arguments: Arguments) -> list[_tuning.Launch]:
    """Rows and classes of a block, and warps; the first is taken where nothing is timed."""
    classes, count = arguments.logits[0].shape[1], len(arguments.logits)
    columns = _tuning.tile(classes, CLASSES)
    itemsize = max(value.dtype.itemsize for value in (*arguments.features, *arguments.logits))
    warps = 8 if columns * count > 128 or itemsize > 2 else 4
    # One stage: more of them cost registers that spill from three modalities of 128 classes on
    pairs = [(16, warps), (16, 12 - warps), (32, 8)]
    # With many classes the others spill a hundred registers (three of 128 classes, sm_90)
    pairs = pairs[:1] if columns * count > 128 else pairs
    return [_tuning.Launch({"BLOCK_B": rows, "BLOCK_K": columns}, w, 1) for rows, w in pairs]


def _labels(arguments: Arguments, numbers: Numbers):
    """What the fusion's launches take cross-entropies of."""
    targets, ignored = arguments.targets, arguments.ignore_index
    return Labels(targets, ignored, arguments.class_weight, numbers.label_smoothing)


def _gating(arguments: Arguments, numbers: Numbers):
    """What the fusion's launches make weights of."""
    tensors = arguments.temperature, arguments.uncertainty_weight, arguments.scale
    # Without a scale it is the number of modalities present
    given = numbers[6:8] if arguments.present else numbers[6:]
    parameters = Parameters(*tensors, given, arguments.mask)
    return Gating(parameters, arguments.log_prior, arguments.gate_logits)


def _weights(numbers: Numbers, dtype: torch.dtype, device: torch.device):
    """The kernels' Weights."""
    from iib_kernels.ops.objective.kernels import Weights

    return Weights(*(scalar(value, dtype, device) for value in numbers[:4]))


def _prototypes(arguments: Arguments, dtype: torch.dtype) -> tuple:
    """Tables of the prototype losses, and how they are computed; None and None without features."""
    if not arguments.features:
        return None, None
    from iib_kernels.ops.objective.prototypes import How, Tables

    features = [rows_of(value) for value in uniform_dtype(arguments.features)]
    prototypes = [rows_of(value) for value in uniform_dtype(arguments.prototypes)]
    numbers = Numbers(*arguments.numbers)
    tables = Tables(
        tuple(features),
        tuple(prototypes),
        tuple(value.contiguous() for value in arguments.seen) or None,
        arguments.budgets.contiguous(),
        scalar(numbers.prototype_temperature, dtype, features[0].device),
    )
    widths = tuple(value.shape[1] for value in features)
    itemsize = max(value.dtype.itemsize for value in features)
    options = dot_options(*features)
    how = How(
        widths,
        tuple(value.stride(0) for value in features),
        tuple(value.stride(0) for value in prototypes),
        arguments.cosine,
        arguments.unit,
        options["UPCAST"],
        options["PRECISION"],
        _tuning.tile(max(widths), {2: 64, 4: 32}.get(itemsize, 16)),
        dtype == torch.float64,
    )
    return tables, how


def run(arguments: Arguments) -> Outputs:
    """The objective: in one launch where it fits."""
    filled = outputs(arguments)
    logits, features = arguments.logits, arguments.features
    if filled.loss.dtype == torch.float64:  # of one of them at least: all are computed in it
        logits, features = ([value.double() for value in group] for group in (logits, features))
        arguments = arguments._replace(logits=logits, features=features)
    widths = [value.shape[1] for value in features]
    if fits(logits[0].shape[1], widths):
        return _run_small(arguments, filled)
    return _run_large(arguments, filled)


def _run_small(arguments: Arguments, filled: Outputs) -> Outputs:
    from iib_kernels.ops.objective import kernels

    batch, count = filled.weights.shape
    logits = [rows_of(value) for value in arguments.logits]
    dtype, device = filled.loss.dtype, filled.loss.device
    numbers = Numbers(*arguments.numbers)
    labels, gating = _labels(arguments, numbers), _gating(arguments, numbers)
    classes, parts = logits[0].shape[1], 3 * count + 1
    with on_device(logits[0]):
        tables, how = _prototypes(arguments, dtype)
        inputs = (
            rows_argument(logits),
            gate_argument(gating, dtype, device),
            targets_argument(labels, dtype, device),
            tables,
            _weights(numbers, dtype, device),
        )

        def launch(config: _tuning.Launch) -> None:
            rows, columns = config.blocks["BLOCK_B"], config.blocks["BLOCK_K"]
            programs = max(1, min(-(-batch // rows), grid_limit(device)))
            kernels.objective_small[(programs,)](
                *inputs,
                kernels.Outputs(
                    filled.loss,
                    filled.parts,
                    filled.weights,
                    tuple(filled.gradients[:count]) or None,
                    tuple(filled.gradients[count:]) or None,
                    filled.loss.new_empty(programs, parts),
                    tickets(device),
                ),
                batch,
                plan_argument(classes, count, dtype, False, rows, columns),
                PROTOTYPES=how,
                NUMBER_POINTER=dtype == torch.float64,
                J=_tuning.power_of_two(parts),
                BLOCK_P=32,
                **config.compiler(),
            )

        widths = tuple(value.shape[1] for value in arguments.features)
        types = tuple(value.dtype for value in (*logits, *arguments.features))
        size = batch, classes, count, widths, types, arguments.grad
        _tuning.run(("objective", *size), _candidates(arguments), launch)
    return filled


def _run_large(arguments: Arguments, filled: Outputs) -> Outputs:
    """The cross-entropies in one launch, the prototype losses in those of ops/alignment."""
    from iib_kernels.ops.alignment import launch as alignment
    from iib_kernels.ops.fusion import launch as fusion
    from iib_kernels.ops.objective import large

    batch, count = filled.weights.shape
    dtype, device = filled.loss.dtype, filled.loss.device
    numbers = Numbers(*arguments.numbers)
    weights = _weights(numbers, dtype, device)
    labels, gating = _labels(arguments, numbers), _gating(arguments, numbers)
    divisors, factors = filled.parts.new_empty(2, 3 * count + 1).unbind()
    shared = {
        "M": count,
        "NUMBER_POINTER": dtype == torch.float64,
        "ACC": accumulator(dtype),
        "J": _tuning.power_of_two(3 * count + 1),
    }
    with on_device(factors):
        large.prepare[(1,)](
            targets_argument(labels, dtype, device),
            contiguous(arguments.mask),
            tuple(value.contiguous() for value in arguments.seen) or None,
            weights,
            divisors,
            factors,
            batch,
            K=arguments.logits[0].shape[1],
            **shared,
        )
    entropies = fusion.objective(
        arguments.logits, labels, gating, factors[: count + 1], filled.gradients[:count]
    )
    contrastive = pulled = None
    if arguments.features:
        inputs = alignment.Inputs(
            arguments.features,
            arguments.prototypes,
            arguments.targets,
            arguments.budgets,
            numbers.prototype_temperature,
            arguments.cosine,
            arguments.seen,
            arguments.mask,
            arguments.ignore_index,
        )
        if arguments.grad:
            shares = factors[count + 1 :].view(2, count)
            gradients = filled.gradients[count:]
            _, results = alignment.losses_and_gradients(inputs, shares, gradients, "sum")
        else:
            results = alignment.forward(inputs, False, "sum")
        contrastive, pulled = results.contrastive, results.alignment
    with on_device(factors):
        large.conclude[(1,)](
            entropies.losses,
            contrastive,
            pulled,
            divisors,
            weights,
            filled.parts,
            filled.loss,
            len(entropies.losses),
            BLOCK=256,
            **shared,
        )
    return filled._replace(weights=entropies.weights)


def scale_gradients(
    gradients: Sequence[Tensor], factor: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients times a factor [], in the dtypes of what they are by; one launch."""
    from iib_kernels.ops.objective.scaling import scale_all

    scaled = [value.new_empty(value.shape) for value in inputs]
    widths = tuple(value.shape[1] for value in gradients)
    batch = len(gradients[0])
    if batch:
        blocks = -(-batch * max(widths) // 1024)
        with on_device(factor):
            scale_all[(blocks, len(widths))](
                tuple(gradients), factor, tuple(scaled), batch, WIDTHS=widths, BLOCK=1024
            )
    return scaled

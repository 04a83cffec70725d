"""Launches of the fusion kernels: what is allocated, block sizes and grids.

Rows of up to :data:`MOST_CLASSES` classes stay in registers if those of all modalities fit there;
the others are streamed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._runtime import compute_dtype, interpreting, on_device
from iib_kernels.ops.arguments import reduction_argument
from iib_kernels.ops.fusion.arguments import (
    Gating,
    Labels,
    Parameters,
    gate_argument,
    plan_argument,
    rows_argument,
    statistics_argument,
    targets_argument,
    upstream_argument,
)

MOST_CLASSES = 4096  # of a row in registers
MOST_ELEMENTS = 8192  # of all modalities of a row, in float32; half of it in float64
STREAMED = 1024  # classes of a block of a streamed row


class Needs(NamedTuple):
    """Which gradients backward is asked for."""

    logits: bool
    parameters: bool
    gate_dtype: torch.dtype | None  # of the gate's gradient; None: not asked for
    values: bool = False


class Gradients(NamedTuple):
    """What backward gives; empty where it was not asked for."""

    logits: list[Tensor]  # M of [B, K]
    gate: Tensor  # [B, M]
    parameters: Tensor  # [3 M + 1]: log_prior, uncertainty_weight and temperature, then the scale
    values: list[Tensor]  # M of [B, D]


class Objective(NamedTuple):
    """What :func:`objective` gives."""

    grad_logits: list[Tensor]  # M of [B, K]
    weights: Tensor  # [B, M]
    losses: Tensor  # [programs, 1 + M]: sums of the fused and the unimodal cross-entropies
    grad_gate: Tensor | None  # [B, M]
    grad_parameters: Tensor | None  # [programs, 3 M + 1], see :class:`Gradients`


# ----- Sizes


def sizes(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """Rows B, classes K and modalities M."""
    return (*logits[0].shape, len(logits))


def in_registers(classes: int, modalities: int, dtype: torch.dtype) -> bool:
    """Whether rows of all modalities stay in registers, computed in ``dtype``."""
    elements = _tuning.power_of_two(classes) * modalities
    wide = dtype == torch.float64
    return classes <= MOST_CLASSES and elements <= MOST_ELEMENTS // (2 if wide else 1)


@functools.lru_cache(256)
def _candidates(
    name: str,
    classes: int,
    count: int,
    dtype: torch.dtype,
    itemsize: int,
    registers: bool,
    smoothed: bool,
) -> list[_tuning.Launch]:
    """Rows and classes of a tile, and warps; the first is taken where nothing is timed.

    Computed in ``dtype``, of logits of up to ``itemsize`` bytes, in ``registers`` or streamed.
    """
    if not registers:
        block = STREAMED // 2 if smoothed or count > 3 else STREAMED
        return [_tuning.Launch({"BLOCK_K": block}, warps) for warps in (4, 8)]
    forward = name in ("fusion", "cross_entropy", "values")
    tiles = (count if forward else count + 1) * (2 if dtype == torch.float64 else 1)
    columns = _tuning.power_of_two(classes)
    # Elements a lane: fewer where there are gradients or sums of smoothing, and where so many warps
    # share a row that registers would not hold a second one
    lane = (64 if forward else 48) // (2 if smoothed else 1)
    lane = lane if columns * tiles <= 4 * 32 * lane else lane // 2
    most = 16 if count <= 4 else 8
    warps = min(most, _tuning.power_of_two(-(-columns * tiles // (32 * lane))))
    rows = 1
    if warps == 1:
        # A lane takes as many classes as one load can; where lanes are left, they take further rows
        vector = min(columns, math.gcd(classes, 16 // itemsize))
        at_once = max(1, 32 * vector // columns)
        times = min(4 if forward else 2, lane // 2 // (max(vector, columns // 32) * tiles))
        rows = max(1, at_once * (times & -2 or times))
        rows = min(rows, 8 if name.startswith("values") else 32)  # values are wide as well
    pairs = ((rows, warps), (max(1, rows // 2), warps * 2))
    return [_tuning.Launch({"BLOCK_B": b, "BLOCK_K": columns}, w) for b, w in pairs]


def _registers(warps: int, streamed: bool, modalities: int) -> int:
    """Registers a thread may use: so many that a multiprocessor holds twelve warps or more.

    The many sums of many modalities would not fit into them.
    """
    if modalities > 3 and (streamed or warps > 4):
        return 255
    return 168 if warps <= 4 else 128


def programs_of(config: _tuning.Launch, batch: int, device: torch.device) -> int:
    """As many as run at once, each of which walks over the batch; interpreted, three."""
    blocks = -(-batch // config.blocks.get("BLOCK_B", 1))
    if device.type != "cuda":
        return min(blocks, 3)
    return min(blocks, _tuning.processors(device) * max(1, 16 // config.num_warps))


def _launch(
    name: str,
    logits: Sequence[Tensor],
    arguments: Callable[[int], tuple],
    values: Sequence[Tensor] = (),
    smoothed: bool = False,
) -> None:
    """Launch a kernel by its name, in the form for rows in registers or in the streamed one.

    ``arguments(programs)`` gives its arguments, from the logits up to the batch.
    """
    batch, classes, count = sizes(logits)
    dtype, device = compute_dtype(*logits, *values), logits[0].device
    itemsize = max([rows.dtype.itemsize for rows in logits])
    registers = in_registers(classes, count, dtype)
    kernel = _kernel(name, registers)

    def launch(config: _tuning.Launch) -> None:
        programs = programs_of(config, batch, device)
        options = {**config.compiler(), "enable_fp_fusion": False}
        if "maxnreg" in options:
            options["maxnreg"] = _registers(config.num_warps, not registers, count)
        components = (values[0].shape[1], _components(values, config)) if values else ()
        plan = plan_argument(
            classes,
            count,
            dtype,
            is_joint(config),
            config.blocks.get("BLOCK_B", 1),
            config.blocks["BLOCK_K"],
            *components,
        )
        kernel[(programs,)](*arguments(programs), batch, plan, **options)

    with on_device(logits[0]):
        _tuning.run(
            ("fusion", name, batch, classes, count, dtype, smoothed),
            _candidates(name, classes, count, dtype, itemsize, registers, smoothed),
            launch,
        )


def is_joint(config: _tuning.Launch) -> bool:
    """Whether the reductions of a round are one: where several warps share a row.

    The interpreter takes such a reduction element by element.
    """
    return config.num_warps > 1 and not interpreting()


def _components(values: Sequence[Tensor], config: _tuning.Launch) -> int:
    """Components of a block of values: 16 bytes or more a lane."""
    rows = config.blocks.get("BLOCK_B", 1)
    most = max(16, 512 * config.num_warps // rows)
    return min(_tuning.power_of_two(values[0].shape[1]), most)


@functools.cache
def _kernel(name: str, registers: bool):
    """The kernel of that name and form."""
    from iib_kernels.ops.fusion import (
        objective,
        objective_streamed,
        rows,
        rows_cross_entropy,
        streamed,
        streamed_cross_entropy,
        values,
    )

    in_rows = {
        "fusion": rows.fusion_rows,
        "fusion_backward": rows.fusion_rows_backward,
        "values": values.values_rows,
        "values_backward": values.values_rows_backward,
        "cross_entropy": rows_cross_entropy.cross_entropy_rows,
        "cross_entropy_backward": rows_cross_entropy.cross_entropy_rows_backward,
        "objective": objective.objective_rows,
    }
    in_streams = {
        "fusion": streamed.fusion_streamed,
        "fusion_backward": streamed.fusion_streamed_backward,
        "values": values.values_streamed,
        "values_backward": values.values_streamed_backward,
        "cross_entropy": streamed_cross_entropy.cross_entropy_streamed,
        "cross_entropy_backward": streamed_cross_entropy.cross_entropy_streamed_backward,
        "objective": objective_streamed.objective_streamed,
    }
    return (in_rows if registers else in_streams)[name]


# ----- Launches


def statistics(
    logits: Sequence[Tensor], values: Sequence[Tensor] = (), labels: Labels | None = None
) -> Tensor:
    """What forward keeps for backward, uninitialised: a table for streamed rows, else empty."""
    batch, classes, count = sizes(logits)
    dtype = compute_dtype(*logits, *values)
    columns = 3 * count
    if in_registers(classes, count, dtype):
        columns = 0
    elif labels is not None:
        columns = 6 * count + 4 if labels.smoothing else 4 * count + 2
    return logits[0].new_empty((batch, columns), dtype=dtype)


def fusion(
    logits: Sequence[Tensor],
    values: Sequence[Tensor],
    gating: Gating,
    fused: Tensor,
    weights: Tensor,
    uncertainty: Tensor,
    kept: Tensor,
) -> None:
    """Fill the fused logits (or values), weights, uncertainty and statistics."""
    from iib_kernels.ops.fusion.loading import Fusion

    gate = gate_argument(gating, weights.dtype, weights.device)
    given = (rows_argument(values),) if values else ()
    outputs = Fusion(fused, weights, uncertainty, statistics_argument(kept))
    arguments = lambda programs: (rows_argument(logits), gate, *given, outputs)
    _launch("values" if values else "fusion", logits, arguments, values)


def fusion_backward(
    logits: Sequence[Tensor],
    values: Sequence[Tensor],
    parameters: Parameters,
    weights: Tensor,
    kept: Tensor,
    upstream: Sequence[Tensor | None],
    needs: Needs,
) -> Gradients:
    """Gradients from those of the fused logits (or values) [B, K], weights and uncertainty."""
    gradients, partial = _gradients(logits, needs, values)
    if not len(weights):
        return gradients
    from iib_kernels.ops.fusion.loading import Kept

    by_fused, by_weights, by_uncertainty = upstream
    gate = gate_argument(Gating(parameters), weights.dtype, weights.device)
    given = (rows_argument(values),) if values else ()
    given += (
        Kept(weights, statistics_argument(kept)),
        upstream_argument(by_fused, None, None, by_weights, by_uncertainty, None),
    )
    arguments = lambda programs: (rows_argument(logits), gate, *given, partial(programs))
    _launch("values_backward" if values else "fusion_backward", logits, arguments, values)
    return partial.summed()


def cross_entropy(
    logits: Sequence[Tensor],
    labels: Labels,
    gating: Gating,
    reduction: str,
    fused: Tensor,
    unimodal: Tensor,
    weights: Tensor,
    kept: Tensor,
    divisors: Tensor,
) -> None:
    """Fill the cross-entropies [B] and [B, M] or, reduced, [] and [M], with what means are divided
    by [1 + M]; and the weights and statistics.
    """
    from iib_kernels.ops.fusion.loading import CrossEntropies

    device = weights.device
    gate = gate_argument(gating, weights.dtype, device)
    targets = targets_argument(labels, weights.dtype, device)
    apart = reduction == "none"
    losses = (fused, unimodal) if apart else (None, None)
    outputs = CrossEntropies(*losses, weights, statistics_argument(kept))

    def arguments(programs: int) -> tuple:
        means = None
        if not apart:
            means = reduction_argument(reduction, programs, (fused, unimodal), divisors)
        return rows_argument(logits), gate, targets, outputs, means

    _launch("cross_entropy", logits, arguments, smoothed=bool(labels.smoothing))


def cross_entropy_backward(
    logits: Sequence[Tensor],
    labels: Labels,
    parameters: Parameters,
    weights: Tensor,
    kept: Tensor,
    divisors: Tensor,
    upstream: Sequence[Tensor | None],
    needs: Needs,
) -> Gradients:
    """Gradients from those of the cross-entropies, [B] and [B, M], and of the weights.

    Reduced ones have ``divisors``, and gradients [] and [M].
    """
    gradients, partial = _gradients(logits, needs)
    if not len(weights):
        return gradients
    from iib_kernels.ops.fusion.loading import Kept

    device = weights.device
    gate = gate_argument(Gating(parameters), weights.dtype, device)
    targets = targets_argument(labels, weights.dtype, device)
    reduced = divisors if len(divisors) else None
    given = (
        Kept(weights, statistics_argument(kept)),
        upstream_argument(None, *upstream, None, reduced),
    )
    arguments = lambda programs: (rows_argument(logits), gate, targets, *given, partial(programs))
    _launch("cross_entropy_backward", logits, arguments, smoothed=bool(labels.smoothing))
    return partial.summed()


def objective(
    logits: Sequence[Tensor],
    labels: Labels,
    gating: Gating,
    factors: Tensor,
    gradients: Sequence[Tensor] | None = None,
    *,
    need_gate: bool = False,
    need_parameters: bool = False,
) -> Objective:
    """Cross-entropies and, in the same launch, their gradients.

    ``factors`` [1 + M]: what each counted row's cross-entropy weighs in the objective (its weight
    over the number of rows that count), of the fused logits and of each modality. ``gradients``:
    where those by the logits go, in any dtypes; tensors like the logits by default.
    """
    from iib_kernels.ops.fusion.loading import Grads

    batch, _, count = sizes(logits)
    dtype, device = compute_dtype(*logits), logits[0].device
    like = functools.partial(logits[0].new_empty, dtype=dtype)
    grads = list(gradients or [rows.new_empty(rows.shape) for rows in logits])
    weights = like(batch, count)
    gate = like(batch, count) if need_gate else None
    if not batch:
        partial = like(0, 3 * count + 1) if need_parameters else None
        return Objective(grads, weights, like(0, count + 1), gate, partial)
    gating, targets = gate_argument(gating, dtype, device), targets_argument(labels, dtype, device)
    losses = partial = None

    def arguments(programs: int) -> tuple:
        nonlocal losses, partial
        losses = like(programs, count + 1)
        partial = like(programs, 3 * count + 1) if need_parameters else None
        given = (rows_argument(logits), gating, targets, factors.contiguous(), weights, losses)
        return *given, Grads(tuple(grads), None, gate, partial)

    _launch("objective", logits, arguments, smoothed=bool(labels.smoothing))
    return Objective(grads, weights, losses, gate, partial)


# ----- Gradients


def empty_gradients(
    logits: Sequence[Tensor], needs: Needs, values: Sequence[Tensor] = ()
) -> Gradients:
    """:class:`Gradients`, uninitialised."""
    batch, _, count = sizes(logits)
    dtype = compute_dtype(*logits, *values)
    like = logits[0].new_empty
    return Gradients(
        [rows.new_empty(rows.shape) for rows in logits] if needs.logits else [],
        like((0,) if needs.gate_dtype is None else (batch, count), dtype=needs.gate_dtype or dtype),
        like(3 * count + 1 if needs.parameters else 0, dtype=dtype),
        [rows.new_empty(rows.shape) for rows in values] if needs.values else [],
    )


class _Partial:
    """Gradients with each program's share of those by the parameters, [programs, 3 M + 1]."""

    def __init__(self, gradients: Gradients, needs: Needs) -> None:
        self.gradients, self.needs, self.table = gradients, needs, None

    def __call__(self, programs: int):
        """Grads (loading.py) for so many programs."""
        from iib_kernels.ops.fusion.loading import Grads

        logits, gate, parameters, values = self.gradients
        if self.needs.parameters:
            self.table = parameters.new_empty(programs, len(parameters))
        gate = None if self.needs.gate_dtype is None else gate
        return Grads(tuple(logits) or None, tuple(values) or None, gate, self.table)

    def summed(self) -> Gradients:
        """The gradients with the programs' shares added up."""
        if self.table is None:
            return self.gradients
        return self.gradients._replace(parameters=self.table.sum(0))


def _gradients(
    logits: Sequence[Tensor], needs: Needs, values: Sequence[Tensor] = ()
) -> tuple[Gradients, _Partial]:
    """Empty gradients (complete where there is no row), and the same for the kernel."""
    gradients = empty_gradients(logits, needs, values)
    if not len(logits[0]):
        gradients.parameters.zero_()
    return gradients, _Partial(gradients, needs)

"""Launches of the trusted fusion: what is allocated, block sizes and grids.

Rows that the gated fusion keeps in registers stay there here too; the others are streamed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._runtime import compute_dtype, on_device
from iib_kernels.ops.fusion import launch as fusion
from iib_kernels.ops.fusion.arguments import (
    Gating,
    Parameters,
    gate_argument,
    plan_argument,
    rows_argument,
)
from iib_kernels.ops.fusion.launch import Needs, in_registers, sizes

LANE = 48  # elements of all tiles of a row that a lane holds


class Trust(NamedTuple):
    """What the modalities' predictions are fused by, in the order of the operators' schemas."""

    logits: Tensor | None  # [M] or [B, M]
    temperature: Tensor | None  # [M] or []
    scale: Tensor | None  # []
    numbers: Sequence[float]  # what stands for these two where they are None
    mask: Tensor | None  # [B, M]


class Gradients(NamedTuple):
    """What backward gives; empty where it was not asked for."""

    logits: list[Tensor]  # M of [B, K]
    trust: Tensor  # [B, M]
    parameters: Tensor  # [2 M + 1]: the trust's logits and temperatures, then the scale


def _gate(trust: Trust, dtype: torch.dtype, device: torch.device):
    """Gate (fusion/loading.py): the trust's logits stand where the prior or the gate would."""
    temperature, scale = trust.numbers
    parameters = Parameters(
        trust.temperature, None, trust.scale, (temperature, 1.0, scale), trust.mask
    )
    shared = trust.logits is not None and trust.logits.dim() == 1
    given = (trust.logits, None) if shared else (None, trust.logits)
    return gate_argument(Gating(parameters, *given), dtype, device)


# ----- Sizes


@functools.lru_cache(256)
def _candidates(
    classes: int, tiles: int, dtype: torch.dtype, itemsize: int, registers: bool
) -> list[_tuning.Launch]:
    """Rows and classes of a tile, and warps; the first is taken where nothing is timed.

    A row takes that many ``tiles`` at once, of logits of up to ``itemsize`` bytes.
    """
    tiles *= 2 if dtype == torch.float64 else 1
    if not registers:
        block = fusion.STREAMED // (2 if tiles > 7 else 1)
        every = (8, 16) if tiles > 10 else (4, 8)  # six modalities would spill with four
        return [_tuning.Launch({"BLOCK_K": block}, warps) for warps in every]
    columns = _tuning.power_of_two(classes)
    warps = min(16, _tuning.power_of_two(-(-columns * tiles // (32 * LANE))))
    rows = 1
    if warps == 1:
        # A lane takes as many classes as one load can; where lanes are left, they take further rows
        vector = min(columns, math.gcd(classes, 16 // itemsize))
        at_once = max(1, 32 * vector // columns)
        times = max(1, min(4, LANE // 2 // (max(vector, columns // 32) * tiles)))
        rows = min(32, at_once * _tuning.power_of_two(times))
    pairs = ((rows, warps), (max(1, rows // 2), warps * 2))
    return [_tuning.Launch({"BLOCK_B": b, "BLOCK_K": columns}, w) for b, w in pairs]


def _launch(name: str, logits: Sequence[Tensor], arguments: Callable[[int], tuple]) -> None:
    """Launch a kernel by its name, in the form for rows in registers or in the streamed one.

    ``arguments(programs)`` gives its arguments, from the logits up to the batch.
    """
    batch, classes, count = sizes(logits)
    dtype, device = compute_dtype(*logits), logits[0].device
    itemsize = max(rows.dtype.itemsize for rows in logits)
    registers = in_registers(classes, count, dtype)
    kernel = _kernel(name, registers)

    def launch(config: _tuning.Launch) -> None:
        programs = fusion.programs_of(config, batch, device)
        options = {**config.compiler(), "enable_fp_fusion": False}
        plan = plan_argument(
            classes,
            count,
            dtype,
            fusion.is_joint(config),
            config.blocks.get("BLOCK_B", 1),
            config.blocks["BLOCK_K"],
        )
        kernel[(programs,)](*arguments(programs), batch, plan, **options)

    # Forward in registers no longer needs the logits where it has the shares
    tiles = count + 2 if name == "forward" and registers else 2 * count + 2
    with on_device(logits[0]):
        _tuning.run(
            ("trust", name, batch, classes, count, dtype),
            _candidates(classes, tiles, dtype, itemsize, registers),
            launch,
        )


@functools.cache
def _kernel(name: str, registers: bool):
    """The kernel of that name and form."""
    from iib_kernels.ops.trust import kernels, streamed

    if registers:
        forms = {"forward": kernels.trusted_rows, "backward": kernels.trusted_rows_backward}
    else:
        forms = {"forward": streamed.trusted_streamed}
        forms["backward"] = streamed.trusted_streamed_backward
    return forms[name]


# ----- Launches


def statistics(logits: Sequence[Tensor]) -> Tensor:
    """What forward keeps for backward, uninitialised: a table for streamed rows, else empty."""
    batch, classes, count = sizes(logits)
    dtype = compute_dtype(*logits)
    columns = 0 if in_registers(classes, count, dtype) else 2 * count
    return logits[0].new_empty((batch, columns), dtype=dtype)


def forward(
    logits: Sequence[Tensor], trust: Trust, fused: Tensor, posterior: Tensor, kept: Tensor
) -> None:
    """Fill the fused logits [B, K], the trust that they leave [B, M], and the statistics."""
    from iib_kernels.ops.trust.kernels import Outputs

    gate = _gate(trust, posterior.dtype, posterior.device)
    outputs = Outputs(fused, posterior, kept if kept.shape[1] else None)
    _launch("forward", logits, lambda programs: (rows_argument(logits), gate, outputs))


def backward(
    logits: Sequence[Tensor], trust: Trust, kept: Tensor, grad: Tensor, needs: Needs
) -> Gradients:
    """Gradients from that of the fused logits [B, K]."""
    found, dtype = empty_gradients(logits, needs), compute_dtype(*logits)
    if not len(grad):
        found.parameters.zero_()
        return found
    from iib_kernels.ops.fusion.loading import Grads

    gate = _gate(trust, dtype, grad.device)
    by_trust = None if needs.gate_dtype is None else found.trust
    partial = None

    def arguments(programs: int) -> tuple:
        nonlocal partial
        if needs.parameters:
            partial = found.parameters.new_empty(programs, len(found.parameters))
        grads = Grads(tuple(found.logits) or None, None, by_trust, partial)
        table = (kept,) if kept.shape[1] else ()
        return rows_argument(logits), gate, *table, rows_argument([grad]), grads

    _launch("backward", logits, arguments)
    return found if partial is None else found._replace(parameters=partial.sum(0))


def empty_gradients(logits: Sequence[Tensor], needs: Needs) -> Gradients:
    """:class:`Gradients`, uninitialised."""
    batch, _, count = sizes(logits)
    dtype, like = compute_dtype(*logits), logits[0].new_empty
    return Gradients(
        [rows.new_empty(rows.shape) for rows in logits] if needs.logits else [],
        like((0,) if needs.gate_dtype is None else (batch, count), dtype=needs.gate_dtype or dtype),
        like(2 * count + 1 if needs.parameters else 0, dtype=dtype),
    )

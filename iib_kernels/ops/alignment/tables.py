"""Prototypes laid out for the products: the kernel that does it, and what reads them.

Once a call, the prototypes of all modalities are written into one array [M, classes, width]: in the
type that is multiplied, padded with zeros to whole tiles, zero where a class was not seen. So the
products over many classes load whole tiles, 16 bytes at a time, whatever the prototypes' strides
and types. Lengths are taken on the way.

In half types a row is divided by the power of two next below its length (for the cosine), which
changes no digit and keeps weights in range. Its other scales undo that.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.tiles import (
    NO_DIRECTION,
    load_scalar,
    load_tile,
    seen_classes,
)


class Tables(NamedTuple):
    """All modalities' prototypes, as `lay_out` writes them."""

    ptr: tl.tensor  # [M, classes, width]
    scales: tl.tensor  # [M, 3, classes]; of one modality, see :class:`Scales`
    classes: tl.tensor  # K, padded
    width: tl.tensor  # the largest D_m, padded


class Scales(NamedTuple):
    """Of a block of classes, [K] each. With the row p of a table, p * `unit` is the prototype that
    distances are taken to: of unit length for the cosine, else as given.
    """

    unit: tl.tensor
    length: tl.tensor  # 1 / unit
    bias: tl.tensor  # its square / tau; infinite for a class not seen, or beyond the last


@triton.jit
def load_scales(tables, m, offs_k):
    """Scales of classes of modality m."""
    ptrs = tables.scales + m * (3 * tables.classes) + offs_k
    unit = tl.load(ptrs)
    length = tl.load(ptrs + tables.classes)
    return Scales(unit, length, tl.load(ptrs + 2 * tables.classes))


@triton.jit
def table_ptrs(tables, m, offs_k, offs_d):
    """Pointers [K, D] to any rows of the table of modality m."""
    row_ptrs = tables.ptr + m.to(tl.int64) * tables.classes * tables.width
    return row_ptrs + offs_k[:, None].to(tl.int64) * tables.width + offs_d[None, :]


@triton.jit
def load_block(tables, m, start, first, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_K rows of the table of modality m from `start`, in BLOCK_D components from `first`.

    Only their place is counted in 64 bits: as many pointers would take registers that sums need.
    """
    place = (m.to(tl.int64) * tables.classes + start) * tables.width + first
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(tables.ptr + place + offs_k[:, None] * tables.width + offs_d[None, :])


@triton.jit
def _power_of_two(length):
    """The power of two next below a float32."""
    return (length.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def lay_out(
    prototypes,
    widths,
    seen_ptrs,
    temperature,
    tables,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_K rows of one modality's table, and their scales."""
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < tables.width
    inverse_temperature = 1.0 / load_scalar(temperature, ACC == tl.float64, ACC)

    # Types may differ from modality to modality, so no pointer is selected
    rows = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    mask_k = offs_k < 0
    for i in tl.static_range(M):
        if m == i:
            mask_k = seen_classes(
                None if seen_ptrs is None else seen_ptrs[i], offs_k, offs_k < classes
            )
            rows = load_tile(prototypes[i], offs_k, mask_k, offs_d, offs_d < widths[i]).to(ACC)
    squares = tl.sum(rows * rows, 1)
    unit = tl.full((BLOCK_K,), 1.0, ACC)
    length = unit
    if COSINE:
        short = squares <= NO_DIRECTION
        length = tl.sqrt(tl.where(short, 1.0, squares))
        if SCALED:
            power = _power_of_two(length)
            rows = rows * (1.0 / power)[:, None]
            length = length / power
        rows = tl.where(short[:, None], 0.0, rows)
        unit = 1.0 / length
        squares = tl.where(short, 0.0, 1.0)
        squares = tl.where(length == length, squares, length)  # NaN stays NaN
    # Infinity is for classes that are out
    bias = squares * inverse_temperature
    bias = tl.where(bias == float("inf"), 1e38, bias)
    bias = tl.where(mask_k, bias, float("inf"))
    scale_ptrs = tables.scales + m * (3 * tables.classes) + offs_k
    inside = offs_k < tables.classes
    tl.store(scale_ptrs, unit, mask=inside)
    tl.store(scale_ptrs + tables.classes, length, mask=inside)
    tl.store(scale_ptrs + 2 * tables.classes, bias, mask=inside)
    tl.store(
        table_ptrs(tables, m, offs_k, offs_d),
        rows.to(tables.ptr.dtype.element_ty),
        mask=inside[:, None] & mask_d[None, :],
    )

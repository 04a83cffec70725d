"""Launches of the distances: block sizes, and which of three ways.

- Up to LARGE multiplications: one launch forward, which takes lengths on the way, and one backward.
- More, in half precision or TF32: lengths first, then tiles of products alone. Float32 prototypes
  beside half features are copied in half on the way (of unit length for the cosine), and rows that
  are not aligned to 16 bytes are copied to where they are.
- More, in IEEE float32 or float64: PyTorch's product into the output, and one launch that makes
  distances of it in place. Triton's own products of these types are several times slower, and what
  is read and written twice, [B, K], is little beside D multiplications an element.

Backward of large ones is a library product in every type, from unit rows, and one launch over the
gradient's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels import _runtime
from iib_kernels._runtime import (
    accumulator,
    compute_dtype,
    dot_options,
    interpreting,
    on_device,
    slope_precision,
)
from iib_kernels._tuning import Launch, depth, power_of_two, tile
from iib_kernels.ops.arguments import matrix

HALF = (torch.float16, torch.bfloat16)
LARGE = 1 << 28  # multiplications of a forward product; from 0.1 to 1 ms of a GPU's float32
MEASURED = 1024  # components of rows at a time where lengths are taken


# ----- Block sizes


def forward_blocks(
    batch: int, classes: int, width: int, dtype: torch.dtype, large: bool, narrow: bool = False
) -> Launch:
    """Rows and classes of one tile, and the components of one step of its product.

    ``large``: of products alone. ``narrow``: some rows are not aligned, and their many small loads
    take registers.
    """
    if dtype in HALF:  # 64 rows or more are warp-group products on Hopper
        if large:
            return Launch(
                _tile(128, tile(classes, 128), tile(width, 64)), 8, 2 if _runtime.hip() else 3
            )
        # One tile holds up to 128 classes, and features are read once; beyond, small tiles of many
        columns = tile(classes, 128 if classes <= 128 else 64)
        if narrow:
            return Launch(_tile(64, columns, 64 if columns <= 32 else 32), 8)
        return Launch(
            _tile(64, columns, tile(width, 64)),
            8 if columns > 64 else 4,
            2 if _runtime.hip() else 3,
        )
    rows = tile(batch, 64 if batch >= 1024 and dtype == torch.float32 else 16)
    columns = tile(classes, 32 if dtype == torch.float64 else 64 if _runtime.hip() else 128)
    blocks = _tile(rows, columns, depth(width, dtype.itemsize))
    return Launch(blocks, 8 if rows * columns > 2048 else 4)


def _tile(rows: int, columns: int, step: int) -> dict[str, int]:
    return {"BLOCK_B": rows, "BLOCK_K": columns, "BLOCK_D": step}


def backward_blocks(batch: int, classes: int, width: int, dtype: torch.dtype) -> Launch:
    """Rows and classes of a tile of the distances' gradient, and CHUNK components at a time."""
    wide = dtype == torch.float64
    blocks = {
        "BLOCK_B": tile(batch, 16 if wide else 32),
        "BLOCK_K": tile(classes, 32 if wide or _runtime.hip() else 128),
        "CHUNK": tile(width, 32 if wide else 64),
    }
    return Launch(blocks, 8)


def row_blocks(width: int) -> Launch:
    """Rows of several matrices, MEASURED components at a time."""
    components = power_of_two(min(width, MEASURED))
    return Launch({"BLOCK_X": max(1, min(64, 4096 // components)), "BLOCK_D": components})


def _blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


# ----- What the launches are given


def product(total: torch.dtype) -> dict:
    """How tiles are multiplied, with sums of ``total``."""
    upcast = interpreting() or total == torch.float64
    precision = dot_options()["PRECISION"]
    return {"ACC": accumulator(total), "UPCAST": upcast, "PRECISION": precision}


def is_large(batch: int, classes: int, width: int) -> bool:
    return batch * classes * width >= LARGE


def by_library(features: Tensor) -> bool:
    """Whether a large product of these is better left to PyTorch."""
    return features.dtype not in HALF and dot_options()["PRECISION"] == "ieee"


def measure(
    matrices: Sequence[Tensor],
    squares: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    units: Sequence[bool],
    dtype: torch.dtype,
) -> None:
    """Fill squared lengths and copies, where there is a place for them, of several matrices."""
    from iib_kernels.ops.distance.lengths import measure_rows

    config = row_blocks(max(values.shape[1] for values in matrices))
    most = max(values.shape[0] for values in matrices)
    measure_rows[(_blocks(most, config.blocks["BLOCK_X"]), len(matrices))](
        tuple(matrix(values) for values in matrices),
        tuple(values.shape[0] for values in matrices),
        tuple(squares),
        tuple(None if copy is None else matrix(copy) for copy in copies),
        N=len(matrices),
        WIDTHS=tuple(
            (values.shape[1], (values if copy is None else copy).shape[1])
            for values, copy in zip(matrices, copies)
        ),
        UNITS=tuple(units),
        ACC=accumulator(dtype),
        **config.options(),
    )


def is_narrow(values: Tensor) -> bool:
    """Whether rows do not begin and end at 16 bytes, so that no load takes so many of one."""
    row, column = values.stride()
    size = values.element_size()
    if column != 1:
        return row != 1
    return bool(row * size % 16 or values.shape[1] * size % 16 or values.data_ptr() % 16)


def place_of_copy(values: Tensor, kind: torch.dtype) -> Tensor | None:
    """A place for a copy of aligned rows of ``kind``, or None where the values are that already.

    Rows are as long as loads of 16 bytes need them: a width that is none needs a copy of features
    and of prototypes, which then agree.
    """
    aligned = 16 // kind.itemsize
    if values.dtype == kind and not is_narrow(values):
        return None
    rows, width = values.shape
    return values.new_empty(rows, -(-width // aligned) * aligned, dtype=kind)


# ----- Forward


def forward(features, prototypes, cosine, distance, squares, other_squares, exact) -> None:
    """Fill distances [B, K], and what backward needs where there is a place for it."""
    batch, classes = distance.shape
    width = features.shape[1]
    with on_device(features):
        if is_large(batch, classes, width):
            _forward_large(features, prototypes, cosine, distance, squares, other_squares)
            return
        from iib_kernels.ops.distance.kernels import Squares, distance_forward

        dtype = compute_dtype(features, prototypes)
        kind = features.dtype if dtype != torch.float64 else dtype
        narrow = is_narrow(features) or is_narrow(prototypes)
        config = forward_blocks(batch, classes, width, kind, False, narrow)
        rows, columns = config.blocks["BLOCK_B"], config.blocks["BLOCK_K"]
        distance_forward[(_blocks(batch, rows), _blocks(classes, columns))](
            matrix(features),
            matrix(prototypes),
            distance,
            exact if exact.numel() else None,
            Squares(squares, other_squares) if squares.numel() else None,
            batch,
            CLASSES=classes,
            WIDTH=width,
            COSINE=cosine,
            **product(dtype),
            **config.options(),
        )


def _forward_large(features, prototypes, cosine, distance, squares, other_squares) -> None:
    from iib_kernels.ops.distance import kernels

    (batch, width), classes = features.shape, prototypes.shape[0]
    dtype = compute_dtype(features, prototypes)
    if not squares.numel():
        squares, other_squares = (features.new_empty(n, dtype=dtype) for n in (batch, classes))
    if by_library(features):
        measure([features, prototypes], [squares, other_squares], [None] * 2, (False, False), dtype)
        table = prototypes.to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            torch.mm(features, table.T, out=distance)
        rows, columns = 32, tile(classes, 128)
        kernels.distance_from_products[(_blocks(batch, rows), _blocks(classes, columns))](
            distance,
            kernels.Squares(squares, other_squares),
            batch,
            CLASSES=classes,
            COSINE=cosine,
            **Launch({"BLOCK_B": rows, "BLOCK_K": columns}).options(),
        )
        return
    copies = [place_of_copy(values, features.dtype) for values in (features, prototypes)]
    units = False, cosine and prototypes.dtype != features.dtype
    measure([features, prototypes], [squares, other_squares], copies, units, dtype)
    config = forward_blocks(batch, classes, width, features.dtype, True)
    rows, columns = config.blocks["BLOCK_B"], config.blocks["BLOCK_K"]
    kernels.distance_forward_large[(_blocks(batch, rows), _blocks(classes, columns))](
        matrix(features if copies[0] is None else copies[0]),
        matrix(prototypes if copies[1] is None else copies[1]),
        distance,
        kernels.Squares(squares, other_squares),
        batch,
        CLASSES=classes,
        WIDTH=width if copies[0] is None else copies[0].shape[1],
        COSINE=cosine,
        UNIT=units[1],
        **product(dtype),
        **config.options(),
    )


# ----- Backward


def backward(features, prototypes, cosine, squares, other_squares, distance, grad, outputs) -> None:
    """Fill the gradients of features and prototypes that have a place among the outputs."""
    (batch, width), classes = features.shape, prototypes.shape[0]
    with on_device(features):
        if is_large(batch, classes, width):
            sides = (features, squares), (prototypes, other_squares)
            _backward_large(sides, cosine, grad, outputs)
            return
        from iib_kernels.ops.distance.kernels_backward import Side, distance_backward

        dtype = compute_dtype(features, prototypes)
        config = backward_blocks(batch, classes, width, dtype)
        rows, columns, chunk = (config.blocks[name] for name in ("BLOCK_B", "BLOCK_K", "CHUNK"))
        need_features, need_prototypes = (output is not None for output in outputs)
        row_programs = _blocks(batch, rows) if need_features else 0
        class_programs = _blocks(classes, columns) if need_prototypes else 0
        # One block of classes is read once and serves all components; several are shared among
        # programs
        whole = classes <= columns and not need_prototypes
        span = _blocks(width, chunk) * chunk if whole else chunk
        side = lambda values, lengths, output: Side(
            *matrix(values), lengths if cosine else None, output
        )
        distance_backward[(row_programs + class_programs, _blocks(width, span))](
            side(features, squares, outputs[0]),
            side(prototypes, other_squares, outputs[1]),
            matrix(grad),
            distance,
            batch,
            classes,
            row_programs,
            span,
            WIDTH=width,
            COSINE=cosine,
            ACC=accumulator(dtype),
            PRECISION=_slope(features, prototypes),
            ONE_ROW_BLOCK=batch <= rows,
            ONE_CLASS_BLOCK=classes <= columns,
            **config.options(),
        )


def _slope(features: Tensor, prototypes: Tensor) -> str:
    """Precision of products with the upstream gradient: TF32 where a side is of half precision."""
    if not _runtime.hip() and (features.dtype in HALF or prototypes.dtype in HALF):
        return "tf32"
    return slope_precision(features, prototypes)


def _backward_large(sides, cosine, grad, outputs) -> None:
    """Pull by a library product of the upstream gradient and unit rows, then one launch a side."""
    from iib_kernels.ops.distance.kernels_backward import gradient_from_pull

    dtype = compute_dtype(sides[0][0], sides[1][0])
    kind = grad.dtype if dtype != torch.float64 else dtype
    for index, output in enumerate(outputs):
        if output is None:
            continue
        (x, x_squares), (y, _) = sides if index == 0 else sides[::-1]
        upstream = grad if index == 0 else grad.T
        copy = y.new_empty(y.shape, dtype=kind)
        measure([y], [None], [copy], (cosine,), dtype)
        pulled = multiply(upstream.to(kind), copy, dtype)
        config = row_blocks(x.shape[1])
        gradient_from_pull[(_blocks(len(x), config.blocks["BLOCK_X"]),)](
            matrix(x),
            x_squares if cosine else None,
            pulled,
            None if cosine else upstream.sum(1, dtype=dtype),
            output,
            len(x),
            WIDTH=x.shape[1],
            ACC=accumulator(dtype),
            **config.options(),
        )


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in ``dtype``, whatever autocast says; half factors on their own units."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype != dtype and a.is_cuda and not _runtime.hip():
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.to(dtype), b.to(dtype))

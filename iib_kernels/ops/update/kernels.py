"""The prototypes' moving average, and the class sums it is made of (method page, section 2)."""

import triton
import triton.language as tl

from iib_kernels.ops.tiles import Matrix, inverse_length, load_scalar, load_tile


@triton.jit
def _row_squares(
    x, offs_b, mask_b, width, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    """|x|^2 [B] of rows that fit no single block of components."""
    squares = tl.zeros((BLOCK_B,), ACC)
    for start in range(0, width, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        values = load_tile(x, offs_b, mask_b, offs_d, offs_d < width).to(ACC)
        squares += tl.sum(values * values, 1)
    return squares


@triton.jit
def _class_sum(
    features,
    targets_ptr,
    targets_stride,
    ignore_index,
    class_index,
    batch,
    width,
    offs_d,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum [D] of one class's embeddings in these components, and how many there are.

    Rows are added in their order, so that the result is repeatable bit by bit. With COSINE each is
    at unit length.
    """
    mask_d = offs_d < width
    total = tl.zeros((BLOCK_D,), ACC)
    count = tl.full((), 0, tl.int64)
    for outer in range(0, batch, SEARCH):
        # Of SEARCH targets at once: does the class occur at all? Most often not, and no row is read
        offs_s = (outer + tl.arange(0, SEARCH)).to(tl.int64)
        mask_s = offs_s < batch
        labels = tl.load(targets_ptr + offs_s * targets_stride, mask=mask_s, other=0).to(tl.int64)
        members = ((labels == class_index) & mask_s).to(tl.int64)
        found = tl.where(class_index == ignore_index, 0, tl.sum(members, 0))
        count += found
        if found > 0:
            for inner in range(0, SEARCH, BLOCK_B):
                offs_b = (outer + inner + tl.arange(0, BLOCK_B)).to(tl.int64)
                mask_b = offs_b < batch
                labels_b = tl.load(targets_ptr + offs_b * targets_stride, mask=mask_b, other=0)
                member = (labels_b.to(tl.int64) == class_index) & mask_b
                values = load_tile(features, offs_b, member, offs_d, mask_d).to(ACC)  # [B, D]
                if COSINE:
                    if ONE_BLOCK:
                        squares = tl.sum(values * values, 1)
                    else:
                        squares = _row_squares(
                            features, offs_b, member, width, ACC, BLOCK_B, BLOCK_D
                        )
                    values = values * inverse_length(squares)[:, None]
                total += tl.sum(values, 0)
    return total, count


@triton.jit
def prototype_update(
    prototypes_ptr,
    prototypes_stride_k,
    prototypes_stride_d,
    counts_ptr,
    counts_stride,
    features_ptr,
    features_stride_b,
    features_stride_d,
    targets_ptr,
    targets_stride,
    ignore_index,
    momentum,
    prototypes_out_ptr,
    counts_out_ptr,
    batch,
    width,
    MOVE: tl.constexpr,
    COSINE: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One class a program; only rows of the class are read.

    With MOVE: its prototype after the moving average, and its new count. Without: the sum of its
    embeddings in the batch, and their number.
    """
    class_index = tl.program_id(0).to(tl.int64)
    features = Matrix(features_ptr, features_stride_b, features_stride_d)
    mu = tl.full((), 0.0, ACC)
    old_count = tl.full((), 0, tl.int64)
    if MOVE:
        mu = load_scalar(momentum, NUMBER_POINTER, ACC)
        old_count = tl.load(counts_ptr + class_index * counts_stride).to(tl.int64)

    # The cosine's prototype is scaled to unit length. Where its components fit no single block, a
    # first sweep over them takes the length and a second one stores.
    square = tl.full((), 0.0, ACC)
    count = tl.full((), 0, tl.int64)
    for sweep in tl.static_range(1 if ONE_BLOCK or not (COSINE and MOVE) else 2):
        for start in range(0, width, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < width
            total, count = _class_sum(
                features,
                targets_ptr,
                targets_stride,
                ignore_index,
                class_index,
                batch,
                width,
                offs_d,
                COSINE,
                ACC,
                ONE_BLOCK,
                SEARCH,
                BLOCK_B,
                BLOCK_D,
            )
            out_ptrs = prototypes_out_ptr + class_index * width + offs_d
            if MOVE:
                old_ptrs = (
                    prototypes_ptr
                    + class_index * prototypes_stride_k
                    + offs_d * prototypes_stride_d
                )
                old = tl.load(old_ptrs, mask=mask_d, other=0.0)
                mean = total / tl.maximum(count, 1).to(ACC)
                moved = tl.where(old_count > 0, mu * old.to(ACC) + (1.0 - mu) * mean, mean)
                if ONE_BLOCK or not COSINE:
                    if COSINE:
                        moved = moved * inverse_length(tl.sum(moved * moved, 0))
                    tl.store(out_ptrs, tl.where(count > 0, moved.to(old.dtype), old), mask=mask_d)
                elif sweep == 0:
                    square += tl.sum(moved * moved, 0)
                else:
                    moved = (moved * inverse_length(square)).to(old.dtype)
                    tl.store(out_ptrs, tl.where(count > 0, moved, old), mask=mask_d)
            else:
                tl.store(out_ptrs, total, mask=mask_d)
    tl.store(counts_out_ptr + class_index, old_count + count)

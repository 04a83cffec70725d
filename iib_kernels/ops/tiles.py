"""What the kernels share: matrices, tiles of them, inner products, and lengths of rows.

Every name here works inside `@triton.jit` functions only. Indices of rows and columns (`offs_*`)
are int64, so that an offset of a large matrix does not overflow; `mask_*` says which of them exist.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Where a running maximum begins. Finite, because -inf - -inf would be NaN.
FLOOR = tl.constexpr(-1e38)

# |x|^2 of a row up to this length has no direction: the cosine treats it as the zero vector.
NO_DIRECTION = tl.constexpr(1e-24)


class Matrix(NamedTuple):
    """A matrix in memory: its pointer (None where it was not given) and strides in elements."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_col: tl.tensor


class Product(NamedTuple):
    """How a product of tiles is computed; constants only."""

    ACC: tl.constexpr  # type of the sums
    UPCAST: tl.constexpr  # whether the factors are converted to ACC first
    PRECISION: tl.constexpr  # of float32 factors: "ieee" or "tf32"
    BLOCK_D: tl.constexpr  # components of one step


@triton.jit
def load_tile(x, offs_row, mask_row, offs_col, mask_col):
    """[rows, columns] of a Matrix, 0 outside of the masks."""
    offsets = offs_row[:, None] * x.stride_row + offs_col[None, :] * x.stride_col
    return tl.load(x.ptr + offsets, mask=mask_row[:, None] & mask_col[None, :], other=0.0)


@triton.jit
def store_tile(ptr, width, offs_row, mask_row, offs_col, mask_col, values):
    """Write [rows, columns] into a contiguous matrix of `width` columns."""
    ptrs = ptr + offs_row[:, None] * width + offs_col[None, :]
    tl.store(ptrs, values, mask=mask_row[:, None] & mask_col[None, :])


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """total + a @ b."""
    if ACC == tl.float64:
        # Triton compiles a float64 dot for some GPUs only
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def inner_products(x, offs_x, mask_x, y, offs_y, mask_y, width, HOW: tl.constexpr):
    """x . y [X, Y], |x|^2 [X] and |y|^2 [Y] of rows of two matrices. HOW: a Product.

    Each component is read once, and serves the products and both lengths.
    """
    dots = tl.zeros((offs_x.shape[0], offs_y.shape[0]), HOW.ACC)
    xx = tl.zeros((offs_x.shape[0],), HOW.ACC)
    yy = tl.zeros((offs_y.shape[0],), HOW.ACC)
    for start in range(0, width, HOW.BLOCK_D):
        offs_d = (start + tl.arange(0, HOW.BLOCK_D)).to(tl.int64)
        mask_d = offs_d < width
        a = load_tile(x, offs_x, mask_x, offs_d, mask_d)  # [X, D]
        b = load_tile(y, offs_y, mask_y, offs_d, mask_d)  # [Y, D]
        a_acc = a.to(HOW.ACC)
        b_acc = b.to(HOW.ACC)
        xx += tl.sum(a_acc * a_acc, 1)
        yy += tl.sum(b_acc * b_acc, 1)
        if HOW.UPCAST:
            dots = multiply(a_acc, tl.trans(b_acc), dots, HOW.PRECISION, HOW.ACC)
        else:
            # Half features are multiplied in their type even where prototypes are float32
            dots = multiply(a, tl.trans(b.to(a.dtype)), dots, HOW.PRECISION, HOW.ACC)
    return dots, xx, yy


@triton.jit
def inverse_length(squares):
    """1 / |x| from |x|^2; 0 for a row without a direction. NaN stays NaN."""
    short = squares <= NO_DIRECTION
    return tl.where(short, 0.0, 1.0 / tl.sqrt(tl.where(short, 1.0, squares)))


@triton.jit
def unit_squares(squares):
    """|x|^2 of the row at unit length: 1, or 0 for a row without a direction."""
    return tl.where(squares <= NO_DIRECTION, 0.0, 1.0)


@triton.jit
def squared_distance(dots, xx, yy, COSINE: tl.constexpr):
    """|x - y|^2 [X, Y], at least 0. With COSINE, of rows at unit length (zero rows stay zero)."""
    if COSINE:
        distance = unit_squares(xx)[:, None] + unit_squares(yy)[None, :]
        distance -= 2.0 * dots * inverse_length(xx)[:, None] * inverse_length(yy)[None, :]
    else:
        distance = xx[:, None] + yy[None, :] - 2.0 * dots
    # Not tl.maximum, which on a GPU drops NaN
    return tl.where(distance < 0.0, 0.0, distance)


@triton.jit
def select(values, index, COUNT: tl.constexpr):
    """Entry `index`, known only on the device, of a tuple of scalars, pointers or blocks."""
    selected = values[0]
    for i in tl.static_range(1, COUNT):
        selected = tl.where(index == i, values[i], selected)
    return selected


@triton.jit
def seen_classes(seen_ptr, offs_k, mask_k):
    """Which classes a modality has seen, [K] bool; with `seen_ptr` None, all there are."""
    if seen_ptr is None:
        return mask_k
    else:
        return tl.load(seen_ptr + offs_k, mask=mask_k, other=0) != 0


@triton.jit
def load_scalar(value, POINTER: tl.constexpr, ACC: tl.constexpr):
    """A scalar argument: a number, or a pointer to one where float32 would lose digits."""
    if POINTER:
        return tl.load(value).to(ACC)
    else:
        return tl.full((), value, ACC)


@triton.jit
def valid_targets(targets_ptr, stride, ignore_index, offs_b, mask_b, classes):
    """Class indices [B], 0 where they do not count, and which count [B].

    A target counts if it is neither ignored nor out of range; nothing is read by one that does not.
    Out of range is an error of the caller's: with TRITON_DEBUG=1 a device assertion says so.
    """
    targets = tl.load(targets_ptr + offs_b * stride, mask=mask_b, other=0).to(tl.int64)
    known = (targets >= 0) & (targets < classes)
    tl.device_assert(
        known | (targets == ignore_index), "targets: class index out of range", mask=mask_b
    )
    valid = mask_b & known & (targets != ignore_index)
    return tl.where(valid, targets, 0), valid

"""What the kernels share: tiles of inner products, and lengths of rows."""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, row, row_stride, row_inside, column, column_stride, column_inside):
    """[rows, columns] of a matrix with any strides; 0 outside. Row and column indices are int64, so that no offset overflows."""
    offsets = row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(pointer + offsets, mask=row_inside[:, None] & column_inside[None, :], other=0.0)


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """total + a @ b. In float64, which Triton's products compile for some GPUs only, by sums of products."""
    if ACC == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def products(
    x,
    x_stride,
    x_step,
    x_row,
    x_inside,
    y,
    y_stride,
    y_step,
    y_row,
    y_inside,
    width,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x . y [X, Y], |x|^2 [X] and |y|^2 [Y] of rows of two matrices, each component read once."""
    dots = tl.zeros((BLOCK_X, BLOCK_Y), ACC)
    xx = tl.zeros((BLOCK_X,), ACC)
    yy = tl.zeros((BLOCK_Y,), ACC)
    for start in range(0, width, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        a = load_tile(x, x_row, x_stride, x_inside, column, x_step, column < width)
        b = load_tile(y, y_row, y_stride, y_inside, column, y_step, column < width)
        wide_a = a.to(ACC)
        wide_b = b.to(ACC)
        xx += tl.sum(wide_a * wide_a, 1)
        yy += tl.sum(wide_b * wide_b, 1)
        if UPCAST:
            dots = multiply(wide_a, tl.trans(wide_b), dots, PRECISION, ACC)
        else:
            dots = multiply(a, tl.trans(b), dots, PRECISION, ACC)
    return dots, xx, yy


@triton.jit
def inverse_length(squares):
    """1 / |x| of a row from |x|^2, 0 for one without a direction (NaN stays NaN)."""
    short = squares <= 1e-24
    return tl.where(short, 0.0, 1.0 / tl.sqrt(tl.where(short, 1.0, squares)))


@triton.jit
def squared_distance(dots, xx, yy, COSINE: tl.constexpr):
    """|x - y|^2 [X, Y], clamped at 0, of the rows or of the rows at unit length (zero rows stay zero)."""
    if COSINE:
        distance = (
            tl.where(xx <= 1e-24, 0.0, 1.0)[:, None] + tl.where(yy <= 1e-24, 0.0, 1.0)[None, :]
        )
        distance -= 2.0 * dots * inverse_length(xx)[:, None] * inverse_length(yy)[None, :]
    else:
        distance = xx[:, None] + yy[None, :] - 2.0 * dots
    return tl.where(distance < 0.0, 0.0, distance)  # not maximum, which on a GPU drops NaN


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """Entry `index`, known only on the device, of a tuple of scalars or pointers of one type."""
    chosen = values[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def seen_classes(seen, column, inside):
    """Which classes a modality has seen, [columns] bool; with `seen` None, all there are."""
    if seen is None:
        return inside
    else:
        return tl.load(seen + column, mask=inside, other=0) != 0


@triton.jit
def number(value, POINTER: tl.constexpr, ACC: tl.constexpr):
    """A scalar argument: a number, or (for float64, which arguments do not carry) a pointer to one."""
    if POINTER:
        return tl.load(value).to(ACC)
    else:
        return tl.full((), value, ACC)


@triton.jit
def valid_targets(targets, stride, ignored, row, inside, classes):
    """Class indices [rows] (0 where they do not count) and which count: neither ignored nor out of range, which nothing is read by.

    Out of range is an error of the caller's: with TRITON_DEBUG=1 a device assertion says so.
    """
    target = tl.load(targets + row * stride, mask=inside, other=0).to(tl.int64)
    known = (target >= 0) & (target < classes)
    tl.device_assert(known | (target == ignored), "targets: class index out of range", mask=inside)
    counts = inside & known & (target != ignored)
    return tl.where(counts, target, 0), counts

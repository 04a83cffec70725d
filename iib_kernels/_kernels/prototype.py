"""Distances to prototypes, the nearest one, and the prototypes' moving average (method page, section 2)."""

import triton
import triton.language as tl

from iib_kernels._kernels.tiles import (
    inverse_length,
    load_tile,
    multiply,
    number,
    pick,
    products,
    seen_classes,
    squared_distance,
)


@triton.jit
def distance_forward(
    features,
    feature_stride,
    feature_step,
    prototypes,
    prototype_stride,
    prototype_step,
    distance_out,
    exact_out,
    squares_out,
    prototype_squares_out,
    batch,
    classes,
    width,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of squared distances. For backward: as they were before rounding to half precision, and each row's and column's squared length."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < batch
    within = column < classes
    dots, zz, pp = products(
        features,
        feature_stride,
        feature_step,
        row,
        inside,
        prototypes,
        prototype_stride,
        prototype_step,
        column,
        within,
        width,
        ACC,
        UPCAST,
        PRECISION,
        BLOCK_B,
        BLOCK_K,
        BLOCK_D,
    )
    distance = squared_distance(dots, zz, pp, COSINE)
    place = row[:, None] * classes + column[None, :]
    tl.store(distance_out + place, distance, mask=inside[:, None] & within[None, :])
    if exact_out is not None:
        tl.store(exact_out + place, distance, mask=inside[:, None] & within[None, :])
    if squares_out is not None:
        if tl.program_id(1) == 0:
            tl.store(squares_out + row, zz, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(prototype_squares_out + column, pp, mask=within)


@triton.jit
def _distance_slopes(
    x,
    x_stride,
    x_step,
    x_squares,
    count,
    y,
    y_stride,
    y_step,
    y_squares,
    others,
    width,
    grad,
    grad_stride,
    grad_step,
    distance,
    distance_stride,
    distance_step,
    output,
    block,
    first,
    last,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradient of BLOCK_X rows of x in components `first` to `last`, by the gradient [X, Y] of their distances to the rows of y."""
    row = block.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = row < count
    inverse = tl.full((BLOCK_X,), 1.0, ACC)
    if COSINE:
        inverse = inverse_length(tl.load(x_squares + row, mask=inside, other=0.0))
    slopes = tl.zeros((BLOCK_X, BLOCK_Y), ACC)
    along = tl.zeros((BLOCK_X,), ACC)
    for start in range(0, others, BLOCK_Y):
        other = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
        there = other < others
        slopes = load_tile(grad, row, grad_stride, inside, other, grad_step, there).to(ACC)
        if COSINE:
            # sum_k g_k cos(x, y_k): the part of the gradient along x, which the normalisation takes out
            apart = load_tile(
                distance, row, distance_stride, inside, other, distance_step, there
            ).to(ACC)
            yy = tl.load(y_squares + other, mask=there, other=0.0)
            xx = tl.load(x_squares + row, mask=inside, other=0.0)
            cosines = 0.5 * (
                tl.where(xx <= 1e-24, 0.0, 1.0)[:, None]
                + tl.where(yy <= 1e-24, 0.0, 1.0)[None, :]
                - apart
            )
            along += tl.sum(slopes * cosines, 1)
            slopes = slopes * inverse_length(yy)[None, :]
        else:
            along += tl.sum(slopes, 1)
    for begin in range(first, last, CHUNK):
        component = (begin + tl.arange(0, CHUNK)).to(tl.int64)
        within = component < width
        pulled = tl.zeros((BLOCK_X, CHUNK), ACC)
        for start in range(0, others, BLOCK_Y):
            other = (start + tl.arange(0, BLOCK_Y)).to(tl.int64)
            there = other < others
            if not ONE_BLOCK:
                slopes = load_tile(grad, row, grad_stride, inside, other, grad_step, there).to(ACC)
                if COSINE:
                    slopes = (
                        slopes
                        * inverse_length(tl.load(y_squares + other, mask=there, other=0.0))[None, :]
                    )
            values = load_tile(y, other, y_stride, there, component, y_step, within).to(ACC)
            pulled = multiply(slopes, values, pulled, PRECISION, ACC)
        own = load_tile(x, row, x_stride, inside, component, x_step, within).to(ACC)
        change = (2.0 * inverse)[:, None] * (own * (along * inverse)[:, None] - pulled)
        tl.store(
            output + row[:, None] * width + component[None, :],
            change,
            mask=inside[:, None] & within[None, :],
        )


@triton.jit
def distance_backward(
    features,
    feature_stride,
    feature_step,
    squares,
    prototypes,
    prototype_stride,
    prototype_step,
    prototype_squares,
    grad,
    grad_stride,
    grad_step,
    distance,
    grad_features,
    grad_prototypes,
    batch,
    classes,
    width,
    row_programs,
    span,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_ROW_BLOCK: tl.constexpr,
    ONE_CLASS_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs 0 .. row_programs - 1 give the gradients of the features, the others those of the prototypes, each in `span` components."""
    program = tl.program_id(0)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, width)
    if program < row_programs:
        if grad_features is not None:
            _distance_slopes(
                features,
                feature_stride,
                feature_step,
                squares,
                batch,
                prototypes,
                prototype_stride,
                prototype_step,
                prototype_squares,
                classes,
                width,
                grad,
                grad_stride,
                grad_step,
                distance,
                classes,
                1,
                grad_features,
                program,
                first,
                last,
                COSINE,
                ACC,
                PRECISION,
                ONE_CLASS_BLOCK,
                BLOCK_B,
                BLOCK_K,
                CHUNK,
            )
    else:
        if grad_prototypes is not None:
            _distance_slopes(
                prototypes,
                prototype_stride,
                prototype_step,
                prototype_squares,
                classes,
                features,
                feature_stride,
                feature_step,
                squares,
                batch,
                width,
                grad,
                grad_step,
                grad_stride,
                distance,
                1,
                classes,
                grad_prototypes,
                program - row_programs,
                first,
                last,
                COSINE,
                ACC,
                PRECISION,
                ONE_ROW_BLOCK,
                BLOCK_K,
                BLOCK_B,
                CHUNK,
            )


@triton.jit
def _member_sum(
    features,
    feature_stride,
    feature_step,
    targets,
    target_stride,
    ignored,
    own,
    batch,
    width,
    begin,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of one class's embeddings (at unit length for the cosine) in BLOCK_D components, in the order of the rows; and how many."""
    component = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
    total = tl.zeros((BLOCK_D,), ACC)
    count = tl.full((), 0, tl.int64)
    for outer in range(0, batch, SEARCH):
        candidate = (outer + tl.arange(0, SEARCH)).to(tl.int64)
        label = tl.load(targets + candidate * target_stride, mask=candidate < batch, other=0).to(
            tl.int64
        )
        found = tl.where(
            own == ignored, 0, tl.sum(((label == own) & (candidate < batch)).to(tl.int64), 0)
        )
        count += found
        if found > 0:
            for inner in range(0, SEARCH, BLOCK_B):
                row = (outer + inner + tl.arange(0, BLOCK_B)).to(tl.int64)
                class_of_row = tl.load(targets + row * target_stride, mask=row < batch, other=0).to(
                    tl.int64
                )
                member = (class_of_row == own) & (row < batch)
                values = load_tile(
                    features,
                    row,
                    feature_stride,
                    member,
                    component,
                    feature_step,
                    component < width,
                ).to(ACC)
                if COSINE:
                    if ONE_BLOCK:
                        squares = tl.sum(values * values, 1)
                    else:
                        squares = tl.zeros((BLOCK_B,), ACC)
                        for start in range(0, width, BLOCK_D):
                            part = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
                            piece = load_tile(
                                features,
                                row,
                                feature_stride,
                                member,
                                part,
                                feature_step,
                                part < width,
                            ).to(ACC)
                            squares += tl.sum(piece * piece, 1)
                    values = values * inverse_length(squares)[:, None]
                total += tl.sum(values, 0)
    return total, count


@triton.jit
def prototype_update(
    prototypes,
    prototype_stride,
    prototype_step,
    counts,
    count_stride,
    features,
    feature_stride,
    feature_step,
    targets,
    target_stride,
    ignored,
    momentum,
    prototypes_out,
    counts_out,
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
    """One class: the sum of its embeddings and their number (MOVE false), or its prototype after the moving average and its new count.

    Only rows of the class are read. Where the components fit no single block, a first sweep takes the length of the moved prototype.
    """
    own = tl.program_id(0).to(tl.int64)
    momentum_value = tl.full((), 0.0, ACC)
    before = tl.full((), 0, tl.int64)
    if MOVE:
        momentum_value = number(momentum, NUMBER_POINTER, ACC)
        before = tl.load(counts + own * count_stride).to(tl.int64)
    length = tl.full((), 0.0, ACC)
    count = tl.full((), 0, tl.int64)
    for sweep in tl.static_range(1 if ONE_BLOCK or not (COSINE and MOVE) else 2):
        for begin in range(0, width, BLOCK_D):
            total, count = _member_sum(
                features,
                feature_stride,
                feature_step,
                targets,
                target_stride,
                ignored,
                own,
                batch,
                width,
                begin,
                COSINE,
                ACC,
                ONE_BLOCK,
                SEARCH,
                BLOCK_B,
                BLOCK_D,
            )
            component = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)
            within = component < width
            place = prototypes_out + own * width + component
            if MOVE:
                old = tl.load(
                    prototypes + own * prototype_stride + component * prototype_step,
                    mask=within,
                    other=0.0,
                )
                mean = total / tl.maximum(count, 1).to(ACC)
                moved = tl.where(
                    before > 0, momentum_value * old.to(ACC) + (1.0 - momentum_value) * mean, mean
                )
                if ONE_BLOCK or not COSINE:
                    if COSINE:
                        moved = moved * inverse_length(tl.sum(moved * moved, 0))
                    tl.store(place, tl.where(count > 0, moved.to(old.dtype), old), mask=within)
                else:
                    if sweep == 0:
                        length += tl.sum(moved * moved, 0)
                    else:
                        tl.store(
                            place,
                            tl.where(
                                count > 0, (moved * inverse_length(length)).to(old.dtype), old
                            ),
                            mask=within,
                        )
            else:
                tl.store(place, total, mask=within)
    tl.store(counts_out + own, before + count)


@triton.jit
def nearest_forward(
    features,
    feature_strides,
    feature_steps,
    prototypes,
    prototype_strides,
    prototype_steps,
    widths,
    seen,
    distance_out,
    index_out,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared distance to the nearest prototype of a seen class, and which: BLOCK_B rows of one modality, with a running minimum over the classes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    m = tl.program_id(1)
    own_seen = None
    if SEEN:
        own_seen = pick(seen, m, M)
    best = tl.full((BLOCK_B,), float("inf"), ACC)
    winner = tl.full((BLOCK_B,), -1, tl.int64)
    for start in range(0, classes, BLOCK_K):
        column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        known = seen_classes(own_seen, column, column < classes)
        dots, zz, pp = products(
            pick(features, m, M),
            pick(feature_strides, m, M),
            pick(feature_steps, m, M),
            row,
            inside,
            pick(prototypes, m, M),
            pick(prototype_strides, m, M),
            pick(prototype_steps, m, M),
            column,
            known,
            pick(widths, m, M),
            ACC,
            UPCAST,
            PRECISION,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
        )
        distance = squared_distance(dots, zz, pp, COSINE)
        distance = tl.where(
            distance == distance, distance, -1.0
        )  # NaN comes first, as in torch.min
        distance = tl.where(known[None, :], distance, float("inf"))
        nearest = tl.min(distance, 1)
        place = tl.min(
            tl.where(
                known[None, :] & (distance == nearest[:, None]),
                column[None, :],
                9223372036854775807,
            ),
            1,
        )
        closer = (nearest < best) | ((winner < 0) & (place < classes))
        winner = tl.where(closer, place, winner)
        best = tl.where(closer, nearest, best)
    best = tl.where(best < 0.0, float("nan"), best)
    tl.store(distance_out + row * M + m, tl.where(winner < 0, 0.0, best), mask=inside)
    tl.store(index_out + row * M + m, winner, mask=inside)


@triton.jit
def nearest_backward(
    features,
    feature_strides,
    feature_steps,
    prototypes,
    prototype_strides,
    prototype_steps,
    widths,
    index,
    grad_distance,
    grad_stride,
    grad_step,
    grad_features,
    batch,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the features through the winning prototypes, BLOCK_B rows of one modality."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    m = tl.program_id(1)
    width = pick(widths, m, M)
    own_features = pick(features, m, M)
    stride = pick(feature_strides, m, M)
    step = pick(feature_steps, m, M)
    own_prototypes = pick(prototypes, m, M)
    prototype_stride = pick(prototype_strides, m, M)
    prototype_step = pick(prototype_steps, m, M)
    output = pick(grad_features, m, M)
    winner = tl.load(index + row * M + m, mask=inside, other=-1)
    there = winner >= 0
    upstream = tl.load(grad_distance + row * grad_stride + m * grad_step, mask=there, other=0.0).to(
        ACC
    )
    inverse = tl.full((BLOCK_B,), 1.0, ACC)
    prototype_inverse = tl.full((BLOCK_B,), 1.0, ACC)
    along = tl.full((BLOCK_B,), 1.0, ACC)
    if ONE_BLOCK:
        component = tl.arange(0, BLOCK_D).to(tl.int64)
        within = component < width
        values = load_tile(own_features, row, stride, there, component, step, within).to(ACC)
        table = load_tile(
            own_prototypes, winner, prototype_stride, there, component, prototype_step, within
        ).to(ACC)
        if COSINE:
            inverse = inverse_length(tl.sum(values * values, 1))
            prototype_inverse = inverse_length(tl.sum(table * table, 1))
            along = tl.sum(values * table, 1) * inverse * prototype_inverse
        change = (2.0 * upstream * inverse)[:, None] * (
            values * (along * inverse)[:, None] - table * prototype_inverse[:, None]
        )
        tl.store(
            output + row[:, None] * width + component[None, :],
            change,
            mask=inside[:, None] & within[None, :],
        )
    else:
        if COSINE:
            zz = tl.zeros((BLOCK_B,), ACC)
            pp = tl.zeros((BLOCK_B,), ACC)
            dots = tl.zeros((BLOCK_B,), ACC)
            for start in range(0, width, BLOCK_D):
                component = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
                values = load_tile(
                    own_features, row, stride, there, component, step, component < width
                ).to(ACC)
                table = load_tile(
                    own_prototypes,
                    winner,
                    prototype_stride,
                    there,
                    component,
                    prototype_step,
                    component < width,
                ).to(ACC)
                zz += tl.sum(values * values, 1)
                pp += tl.sum(table * table, 1)
                dots += tl.sum(values * table, 1)
            inverse = inverse_length(zz)
            prototype_inverse = inverse_length(pp)
            along = dots * inverse * prototype_inverse
        for start in range(0, width, BLOCK_D):
            component = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            within = component < width
            values = load_tile(own_features, row, stride, there, component, step, within).to(ACC)
            table = load_tile(
                own_prototypes, winner, prototype_stride, there, component, prototype_step, within
            ).to(ACC)
            change = (2.0 * upstream * inverse)[:, None] * (
                values * (along * inverse)[:, None] - table * prototype_inverse[:, None]
            )
            tl.store(
                output + row[:, None] * width + component[None, :],
                change,
                mask=inside[:, None] & within[None, :],
            )

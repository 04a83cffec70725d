"""Prototype contrast and relative alignment of all modalities (method page, section 3).

Scores are s_m(i, k) = -d2_m(i, k) / tau. Tiles of [BLOCK_B, BLOCK_K] scores of all modalities live in registers; nothing of size [B, K] is stored.
"""

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
    valid_targets,
)

FLOOR = tl.constexpr(-1e38)  # where a running maximum begins: finite, so that differences of it are


@triton.jit
def _anchor(budgets, budget_stride, M: tl.constexpr, ACC: tl.constexpr):
    """The anchor, its budget: argmax of the budgets, the first of equals."""
    anchor = tl.full((), 0, tl.int32)
    top = tl.load(budgets).to(ACC)
    for m in tl.static_range(1, M):
        value = tl.load(budgets + m * budget_stride).to(ACC)
        anchor = tl.where(value > top, m, anchor)
        top = tl.where(value > top, value, top)
    return anchor, top


@triton.jit
def _relative(budgets, budget_stride, m, top, ACC: tl.constexpr):
    """rho_m = b_m / b_a, 1 where no budget is above 0."""
    return tl.where(
        top > 0, tl.load(budgets + m * budget_stride).to(ACC) / tl.where(top > 0, top, 1.0), 1.0
    )


@triton.jit
def _apart(row, anchor, m):
    """Whether modality m is not the anchor, for each row (a block: some interpreters lose the type of a block of bools combined with one)."""
    return row * 0 + anchor != m


@triton.jit
def _counted(target, valid, mask, mask_stride, mask_step, seen, row, inside, m):
    """In which rows of a valid target the modality is present, and which of them count for it: those whose class it has seen."""
    present = valid
    if mask is not None:
        present = valid & (
            tl.load(mask + row * mask_stride + m * mask_step, mask=inside, other=0) != 0
        )
    counts = present
    if seen is not None:
        counts = present & (tl.load(seen + target, mask=present, other=0) != 0)
    return present, counts


@triton.jit
def _scores(
    features,
    feature_stride,
    feature_step,
    row,
    present,
    prototypes,
    prototype_stride,
    prototype_step,
    column,
    known,
    width,
    sharpness,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """-d2 / tau [rows, columns], -inf for classes not seen; |z|^2 [rows] and |p|^2 [columns]."""
    dots, zz, pp = products(
        features,
        feature_stride,
        feature_step,
        row,
        present,
        prototypes,
        prototype_stride,
        prototype_step,
        column,
        known,
        width,
        ACC,
        UPCAST,
        PRECISION,
        BLOCK_B,
        BLOCK_K,
        BLOCK_D,
    )
    scores = -squared_distance(dots, zz, pp, COSINE) * sharpness
    return tl.where(known[None, :], scores, float("-inf")), zz, pp


@triton.jit
def alignment_forward(
    features,
    feature_strides,
    feature_steps,
    prototypes,
    prototype_strides,
    prototype_steps,
    widths,
    targets,
    target_stride,
    ignored,
    budgets,
    budget_stride,
    temperature,
    seen,
    mask,
    mask_stride,
    mask_step,
    contrastive_out,
    alignment_out,
    confidence_out,
    counts_out,
    statistics_out,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """C, A, q(y) and which rows count, each [B, M], of BLOCK_B rows: one sweep over the classes, with running maxima and sums.

    `statistics_out` [B, 2 M], if given, keeps for backward each modality's log-sum-exp of the scores and the share of q_a on classes that it has seen.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    sharpness = 1.0 / number(temperature, NUMBER_POINTER, ACC)
    anchor, top_budget = _anchor(budgets, budget_stride, M, ACC)

    presents = ()
    counts = ()
    tops = ()
    totals = ()
    owns = ()
    moments = ()
    shares = ()
    target, valid = valid_targets(targets, target_stride, ignored, row, inside, classes)
    for m in tl.static_range(M):
        present, counted = _counted(
            target, valid, mask, mask_stride, mask_step, seen[m] if SEEN else None, row, inside, m
        )
        presents = presents + (present,)
        counts = counts + (counted,)
        tops = tops + (tl.full((BLOCK_B,), FLOOR, ACC),)
        totals = totals + (tl.zeros((BLOCK_B,), ACC),)
        owns = owns + (tl.zeros((BLOCK_B,), ACC),)
        moments = moments + (tl.zeros((BLOCK_B,), ACC),)
        shares = shares + (tl.zeros((BLOCK_B,), ACC),)

    for start in range(0, classes, BLOCK_K):
        column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        scores = ()
        for m in tl.static_range(M):
            known = seen_classes(seen[m] if SEEN else None, column, column < classes)
            score, zz, pp = _scores(
                features[m],
                feature_strides[m],
                feature_steps[m],
                row,
                presents[m],
                prototypes[m],
                prototype_strides[m],
                prototype_steps[m],
                column,
                known,
                widths[m],
                sharpness,
                COSINE,
                ACC,
                UPCAST,
                PRECISION,
                BLOCK_B,
                BLOCK_K,
                BLOCK_D,
            )
            scores = scores + (score,)
        of_anchor = scores[0]
        old_top = tops[0]
        for m in tl.static_range(1, M):
            of_anchor = tl.where(anchor == m, scores[m], of_anchor)
            old_top = tl.where(anchor == m, tops[m], old_top)
        new_top = tl.maximum(old_top, tl.max(of_anchor, 1))
        evidence = tl.exp(of_anchor - new_top[:, None])
        keep = tl.exp(old_top - new_top)
        new_tops = ()
        new_totals = ()
        new_owns = ()
        new_moments = ()
        new_shares = ()
        for m in tl.static_range(M):
            top = tl.maximum(tops[m], tl.max(scores[m], 1))
            new_tops = new_tops + (top,)
            new_totals = new_totals + (
                totals[m] * tl.exp(tops[m] - top) + tl.sum(tl.exp(scores[m] - top[:, None]), 1),
            )
            new_owns = new_owns + (
                owns[m] + tl.sum(tl.where(column[None, :] == target[:, None], scores[m], 0.0), 1),
            )
            both = (scores[m] > float("-inf")) & (of_anchor > float("-inf"))
            difference = tl.where(both, of_anchor - scores[m], 0.0)
            new_moments = new_moments + (
                moments[m] * keep + tl.sum(tl.where(both, evidence, 0.0) * difference, 1),
            )
            new_shares = new_shares + (shares[m] * keep + tl.sum(tl.where(both, evidence, 0.0), 1),)
        tops = new_tops
        totals = new_totals
        owns = new_owns
        moments = new_moments
        shares = new_shares

    log_totals = ()
    confidences = ()
    for m in tl.static_range(M):
        log_total = tl.log(totals[m]) + tops[m]
        log_totals = log_totals + (log_total,)
        confidences = confidences + (tl.where(counts[m], tl.exp(owns[m] - log_total), 0.0),)
    anchor_total = totals[0]
    anchor_log_total = log_totals[0]
    anchor_confidence = confidences[0]
    anchor_counts = counts[0]
    for m in tl.static_range(1, M):
        anchor_total = tl.where(anchor == m, totals[m], anchor_total)
        anchor_log_total = tl.where(anchor == m, log_totals[m], anchor_log_total)
        anchor_confidence = tl.where(anchor == m, confidences[m], anchor_confidence)
        anchor_counts = tl.where(anchor == m, counts[m], anchor_counts)
    for m in tl.static_range(M):
        share = shares[m] / anchor_total
        divergence = moments[m] / anchor_total + share * (log_totals[m] - anchor_log_total)
        deviation = (
            _relative(budgets, budget_stride, m, top_budget, ACC) * anchor_confidence
            - confidences[m]
        )
        deviation = tl.where(deviation < 0.0, 0.0, deviation)
        aligned = counts[m] & anchor_counts & _apart(row, anchor, m)
        place = row * M + m
        tl.store(
            contrastive_out + place, tl.where(counts[m], log_totals[m] - owns[m], 0.0), mask=inside
        )
        tl.store(alignment_out + place, tl.where(aligned, deviation * divergence, 0.0), mask=inside)
        tl.store(confidence_out + place, confidences[m], mask=inside)
        tl.store(counts_out + place, counts[m], mask=inside)
        if statistics_out is not None:
            tl.store(statistics_out + row * (2 * M) + m, log_totals[m], mask=inside)
            tl.store(statistics_out + row * (2 * M) + M + m, share, mask=inside)


@triton.jit
def _slope(
    scores, log_total, anchor_scores, anchor_log_total, share, contrast, align, target, column
):
    """Gradient of the loss by one modality's scores, [rows, columns]: q (c + a sum q_a) - a q_a - c 1_y, with q_a on the classes it has seen."""
    posterior = tl.exp(scores - log_total[:, None])
    evidence = tl.where(
        (scores > float("-inf")) & (align != 0.0)[:, None],
        tl.exp(anchor_scores - anchor_log_total[:, None]),
        0.0,
    )
    share = tl.where(align == 0.0, 0.0, share)
    slope = posterior * (contrast + align * share)[:, None] - align[:, None] * evidence
    slope -= tl.where(column[None, :] == target[:, None], contrast[:, None], 0.0)
    idle = (contrast == 0.0) & (
        align == 0.0
    )  # what stands in a row that does not count must not become NaN
    return tl.where(idle[:, None], 0.0, slope)


@triton.jit
def _row_slopes(
    m,
    anchor,
    top_budget,
    budgets,
    budget_stride,
    confidence,
    anchor_confidence,
    counted,
    anchor_counted,
    grad_contrastive,
    contrastive_stride,
    contrastive_step,
    grad_alignment,
    alignment_stride,
    alignment_step,
    row,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Upstream gradients of one modality's rows: of C, and of its divergence (with the deviation), 0 where they do not count."""
    contrast = tl.zeros((BLOCK_B,), ACC)
    align = tl.zeros((BLOCK_B,), ACC)
    if grad_contrastive is not None:
        contrast = tl.load(
            grad_contrastive + row * contrastive_stride + m * contrastive_step,
            mask=counted,
            other=0.0,
        ).to(ACC)
    if grad_alignment is not None:
        aligned = counted & anchor_counted & _apart(row, anchor, m)
        deviation = (
            _relative(budgets, budget_stride, m, top_budget, ACC) * anchor_confidence - confidence
        )
        deviation = tl.where(deviation < 0.0, 0.0, deviation)
        align = (
            tl.load(
                grad_alignment + row * alignment_stride + m * alignment_step,
                mask=aligned,
                other=0.0,
            ).to(ACC)
            * deviation
        )
        align = tl.where(aligned, align, 0.0)
    return contrast, align


@triton.jit
def _finish(accumulated, values, along, zz, sharpness, COSINE: tl.constexpr):
    """Gradient of rows from sum_k slope_k p_k: d2's share of -2, and for the cosine the part across the row, over its length."""
    if COSINE:
        inverse = inverse_length(zz)
        return (
            2.0 * sharpness * inverse[:, None] * (accumulated - values * (inverse * along)[:, None])
        )
    else:
        return 2.0 * sharpness * accumulated


@triton.jit
def alignment_backward_block(
    features,
    feature_strides,
    feature_steps,
    prototypes,
    prototype_strides,
    prototype_steps,
    widths,
    targets,
    target_stride,
    ignored,
    budgets,
    budget_stride,
    temperature,
    seen,
    mask,
    mask_stride,
    mask_step,
    grad_contrastive,
    contrastive_stride,
    contrastive_step,
    grad_alignment,
    alignment_stride,
    alignment_step,
    grad_features,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOPE_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the features where all classes fit one block: scores of all modalities once, then each gradient block by block of its components."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    column = tl.arange(0, BLOCK_K).to(tl.int64)
    sharpness = 1.0 / number(temperature, NUMBER_POINTER, ACC)
    anchor, top_budget = _anchor(budgets, budget_stride, M, ACC)

    scores = ()
    squares = ()
    prototype_squares = ()
    presents = ()
    counts = ()
    log_totals = ()
    confidences = ()
    target, valid = valid_targets(targets, target_stride, ignored, row, inside, classes)
    for m in tl.static_range(M):
        present, counted = _counted(
            target, valid, mask, mask_stride, mask_step, seen[m] if SEEN else None, row, inside, m
        )
        known = seen_classes(seen[m] if SEEN else None, column, column < classes)
        score, zz, pp = _scores(
            features[m],
            feature_strides[m],
            feature_steps[m],
            row,
            present,
            prototypes[m],
            prototype_strides[m],
            prototype_steps[m],
            column,
            known,
            widths[m],
            sharpness,
            COSINE,
            ACC,
            UPCAST,
            PRECISION,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
        )
        top = tl.max(score, 1)
        top = tl.where(top < FLOOR, FLOOR, top)
        log_total = tl.log(tl.sum(tl.exp(score - top[:, None]), 1)) + top
        own = tl.sum(tl.where(column[None, :] == target[:, None], score, 0.0), 1)
        scores = scores + (score,)
        squares = squares + (zz,)
        prototype_squares = prototype_squares + (pp,)
        presents = presents + (present,)
        counts = counts + (counted,)
        log_totals = log_totals + (log_total,)
        confidences = confidences + (tl.where(counted, tl.exp(own - log_total), 0.0),)
    anchor_scores = scores[0]
    anchor_log_total = log_totals[0]
    anchor_confidence = confidences[0]
    anchor_counts = counts[0]
    for m in tl.static_range(1, M):
        anchor_scores = tl.where(anchor == m, scores[m], anchor_scores)
        anchor_log_total = tl.where(anchor == m, log_totals[m], anchor_log_total)
        anchor_confidence = tl.where(anchor == m, confidences[m], anchor_confidence)
        anchor_counts = tl.where(anchor == m, counts[m], anchor_counts)

    for m in tl.static_range(M):
        contrast, align = _row_slopes(
            m,
            anchor,
            top_budget,
            budgets,
            budget_stride,
            confidences[m],
            anchor_confidence,
            counts[m],
            anchor_counts,
            grad_contrastive,
            contrastive_stride,
            contrastive_step,
            grad_alignment,
            alignment_stride,
            alignment_step,
            row,
            ACC,
            BLOCK_B,
        )
        share = tl.sum(
            tl.where(
                scores[m] > float("-inf"), tl.exp(anchor_scores - anchor_log_total[:, None]), 0.0
            ),
            1,
        )
        slope = _slope(
            scores[m],
            log_totals[m],
            anchor_scores,
            anchor_log_total,
            share,
            contrast,
            align,
            target,
            column,
        )
        known = seen_classes(seen[m] if SEEN else None, column, column < classes)
        along = tl.zeros((BLOCK_B,), ACC)
        if COSINE:
            lengths = (
                tl.where(prototype_squares[m] <= 1e-24, 0.0, 1.0)[None, :]
                + tl.where(squares[m] <= 1e-24, 0.0, 1.0)[:, None]
            )
            cosines = 0.5 * (lengths + tl.where(known[None, :], scores[m], 0.0) / sharpness)
            along = tl.sum(slope * cosines, 1)
            weights = slope * inverse_length(prototype_squares[m])[None, :]
        else:
            weights = slope
            along = tl.sum(slope, 1)
        for start in range(0, widths[m], BLOCK_D):
            component = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            within = component < widths[m]
            table = load_tile(
                prototypes[m],
                column,
                prototype_strides[m],
                known,
                component,
                prototype_steps[m],
                within,
            )
            change = multiply(
                weights, table.to(ACC), tl.zeros((BLOCK_B, BLOCK_D), ACC), SLOPE_PRECISION, ACC
            )
            if COSINE:
                values = load_tile(
                    features[m],
                    row,
                    feature_strides[m],
                    counts[m],
                    component,
                    feature_steps[m],
                    within,
                ).to(ACC)
                change = _finish(change, values, along, squares[m], sharpness, COSINE)
            else:
                change = _finish(change, change, along, squares[m], sharpness, COSINE)
            tl.store(
                grad_features[m] + row[:, None] * widths[m] + component[None, :],
                change,
                mask=inside[:, None] & within[None, :],
            )


@triton.jit
def alignment_backward_tiled(
    features,
    feature_strides,
    feature_steps,
    prototypes,
    prototype_strides,
    prototype_steps,
    widths,
    targets,
    target_stride,
    ignored,
    budgets,
    budget_stride,
    temperature,
    seen,
    mask,
    mask_stride,
    mask_step,
    confidence,
    statistics,
    grad_contrastive,
    contrastive_stride,
    contrastive_step,
    grad_alignment,
    alignment_stride,
    alignment_step,
    grad_features,
    batch,
    classes,
    M: tl.constexpr,
    COSINE: tl.constexpr,
    SEEN: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOPE_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gradients of BLOCK_B rows of one modality in CHUNK components, over blocks of classes, from the sums that forward kept."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    m = tl.program_id(1)
    component = (tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    sharpness = 1.0 / number(temperature, NUMBER_POINTER, ACC)
    anchor, top_budget = _anchor(budgets, budget_stride, M, ACC)
    width = pick(widths, m, M)
    within = component < width
    own_features = pick(features, m, M)
    own_stride = pick(feature_strides, m, M)
    own_step = pick(feature_steps, m, M)
    own_prototypes = pick(prototypes, m, M)
    own_prototype_stride = pick(prototype_strides, m, M)
    own_prototype_step = pick(prototype_steps, m, M)
    anchor_width = pick(widths, anchor, M)
    anchor_features = pick(features, anchor, M)
    anchor_stride = pick(feature_strides, anchor, M)
    anchor_step = pick(feature_steps, anchor, M)
    anchor_prototypes = pick(prototypes, anchor, M)
    anchor_prototype_stride = pick(prototype_strides, anchor, M)
    anchor_prototype_step = pick(prototype_steps, anchor, M)
    if SEEN:
        own_seen = pick(seen, m, M)
        anchor_seen = pick(seen, anchor, M)
    else:
        own_seen = None
        anchor_seen = None

    target, valid = valid_targets(targets, target_stride, ignored, row, inside, classes)
    present, counted = _counted(
        target, valid, mask, mask_stride, mask_step, own_seen, row, inside, m
    )
    anchor_present, anchor_counted = _counted(
        target, valid, mask, mask_stride, mask_step, anchor_seen, row, inside, anchor
    )
    contrast, align = _row_slopes(
        m,
        anchor,
        top_budget,
        budgets,
        budget_stride,
        tl.load(confidence + row * M + m, mask=inside, other=0.0),
        tl.load(confidence + row * M + anchor, mask=inside, other=0.0),
        counted,
        anchor_counted,
        grad_contrastive,
        contrastive_stride,
        contrastive_step,
        grad_alignment,
        alignment_stride,
        alignment_step,
        row,
        ACC,
        BLOCK_B,
    )
    log_total = tl.load(statistics + row * (2 * M) + m, mask=inside, other=0.0)
    anchor_log_total = tl.load(statistics + row * (2 * M) + anchor, mask=inside, other=0.0)
    share = tl.load(statistics + row * (2 * M) + M + m, mask=inside, other=0.0)

    accumulated = tl.zeros((BLOCK_B, CHUNK), ACC)
    along = tl.zeros((BLOCK_B,), ACC)
    squares = tl.zeros((BLOCK_B,), ACC)
    for start in range(0, classes, BLOCK_K):
        column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        known = seen_classes(own_seen, column, column < classes)
        scores, squares, prototype_squares = _scores(
            own_features,
            own_stride,
            own_step,
            row,
            present,
            own_prototypes,
            own_prototype_stride,
            own_prototype_step,
            column,
            known,
            width,
            sharpness,
            COSINE,
            ACC,
            UPCAST,
            PRECISION,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
        )
        anchor_scores = scores
        if m != anchor:
            anchor_known = seen_classes(anchor_seen, column, column < classes)
            anchor_scores, unused, unused_too = _scores(
                anchor_features,
                anchor_stride,
                anchor_step,
                row,
                anchor_present,
                anchor_prototypes,
                anchor_prototype_stride,
                anchor_prototype_step,
                column,
                anchor_known,
                anchor_width,
                sharpness,
                COSINE,
                ACC,
                UPCAST,
                PRECISION,
                BLOCK_B,
                BLOCK_K,
                BLOCK_D,
            )
        slope = _slope(
            scores,
            log_total,
            anchor_scores,
            anchor_log_total,
            share,
            contrast,
            align,
            target,
            column,
        )
        if COSINE:
            lengths = (
                tl.where(prototype_squares <= 1e-24, 0.0, 1.0)[None, :]
                + tl.where(squares <= 1e-24, 0.0, 1.0)[:, None]
            )
            along += tl.sum(
                slope * 0.5 * (lengths + tl.where(known[None, :], scores, 0.0) / sharpness), 1
            )
            slope = slope * inverse_length(prototype_squares)[None, :]
        table = load_tile(
            own_prototypes,
            column,
            own_prototype_stride,
            known,
            component,
            own_prototype_step,
            within,
        )
        accumulated = multiply(slope, table.to(ACC), accumulated, SLOPE_PRECISION, ACC)
    values = accumulated
    if COSINE:
        values = load_tile(own_features, row, own_stride, counted, component, own_step, within).to(
            ACC
        )
    change = _finish(accumulated, values, along, squares, sharpness, COSINE)
    output = pick(grad_features, m, M)
    tl.store(
        output + row[:, None] * width + component[None, :],
        change,
        mask=inside[:, None] & within[None, :],
    )

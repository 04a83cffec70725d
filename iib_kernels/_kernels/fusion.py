"""Gated fusion and its cross-entropies (method page, sections 4 and 5).

One program holds BLOCK_B rows. Up to ONE_BLOCK classes the logits of all modalities stay in registers: read once. Beyond, they are read twice: for each
modality's softmax and entropy, then for the sum.
"""

import triton
import triton.language as tl

from iib_kernels._kernels.tiles import load_tile, valid_targets

FLOOR = tl.constexpr(-1e38)  # where a running maximum begins: finite, so that differences of it are


@triton.jit
def _parameter(pointer, stride, index, number, ACC: tl.constexpr):
    """Entry `index` of a parameter, or the number that was given in its place."""
    if pointer is None:
        return tl.full((), number, ACC)
    else:
        return tl.load(pointer + index * stride).to(ACC)


@triton.jit
def _available(mask, mask_stride, mask_step, row, inside, index):
    """Which rows of a modality are there, [rows] bool."""
    if mask is None:
        return inside
    else:
        return tl.load(mask + row * mask_stride + index * mask_step, mask=inside, other=0) != 0


@triton.jit
def _scaled(logits, row, stride, available, column, step, inside, temperature, ACC: tl.constexpr):
    """Temperature-scaled logits, 0 where ruled out (-inf), where absent and beyond the classes; and which are ruled out."""
    raw = load_tile(logits, row, stride, available, column, step, inside).to(ACC)
    ruled_out = raw == float("-inf")
    return tl.where(ruled_out, 0.0, raw) / temperature, ruled_out


@triton.jit
def _softmax(finite, excluded):
    """exp(t - max) (0 where excluded), its sum, t - max (0 where excluded) and the maximum, over classes."""
    top = tl.max(tl.where(excluded, float("-inf"), finite), 1)
    shifted = tl.where(excluded, 0.0, finite - top[:, None])
    mass = tl.where(excluded, 0.0, tl.exp(shifted))
    return mass, tl.sum(mass, 1), shifted, top


@triton.jit
def _merge(top, total, moment, finite, excluded):
    """Running maximum, sum of exp and sum of exp * (t - maximum) after one more block of classes."""
    new = tl.maximum(top, tl.max(tl.where(excluded, float("-inf"), finite), 1))
    shifted = tl.where(excluded, 0.0, finite - new[:, None])
    mass = tl.where(excluded, 0.0, tl.exp(shifted))
    keep = tl.exp(top - new)
    moment = keep * (moment + (top - new) * total) + tl.sum(mass * shifted, 1)
    return new, keep * total + tl.sum(mass, 1), moment


@triton.jit
def _gate(
    uncertainty,
    available,
    log_prior,
    prior_stride,
    gate,
    gate_stride,
    gate_step,
    kappa,
    kappa_stride,
    kappa_number,
    row,
    inside,
    M: tl.constexpr,
    ACC: tl.constexpr,
):
    """Softmax over the modalities present of their scores: M weights [rows]."""
    scores = ()
    for m in tl.static_range(M):
        score = -_parameter(kappa, kappa_stride, m, kappa_number, ACC) * uncertainty[m]
        if log_prior is not None:
            score += tl.load(log_prior + m * prior_stride).to(ACC)
        if gate is not None:
            score += tl.load(gate + row * gate_stride + m * gate_step, mask=inside, other=0.0).to(
                ACC
            )
        scores = scores + (tl.where(available[m], score, float("-inf")),)
    top = scores[0]
    for m in tl.static_range(1, M):
        top = tl.maximum(top, scores[m])
    total = tl.zeros_like(top)
    masses = ()
    for m in tl.static_range(M):
        mass = tl.exp(scores[m] - top)
        total += mass
        masses = masses + (mass,)
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (masses[m] / total,)
    return weights


@triton.jit
def _fuse(finite, ruled_out, weights, scale, M: tl.constexpr):
    """scale * sum_m w_m t_m, and where it is ruled out: by a modality with any say."""
    fused = weights[0][:, None] * finite[0]
    never = ruled_out[0] & (weights[0] > 0)[:, None]
    for m in tl.static_range(1, M):
        fused += weights[m][:, None] * finite[m]
        never = never | (ruled_out[m] & (weights[m] > 0)[:, None])
    return scale * fused, never


@triton.jit
def fusion_forward(
    logits,
    strides,
    steps,
    log_prior,
    prior_stride,
    gate,
    gate_stride,
    gate_step,
    temperature,
    temperature_stride,
    temperature_number,
    kappa,
    kappa_stride,
    kappa_number,
    scale,
    scale_number,
    mask,
    mask_stride,
    mask_step,
    targets,
    target_stride,
    ignored,
    fused_out,
    weights_out,
    uncertainty_out,
    nll_out,
    unimodal_out,
    counts_out,
    statistics_out,
    batch,
    classes,
    M: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of M modalities -> weights and uncertainty, with the fused logits or (targets given) with all cross-entropies.

    `statistics_out` [B, 3 M + 2] keeps, where the classes do not fit one block, what backward would need a reading for: the log of the sum of exp(t - max)
    of every modality, its uncertainty, that log of the fused logits, and the maxima. The two parts are apart because their sum would lose digits.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    gamma = _parameter(scale, 0, 0, scale_number, ACC)
    log_classes = tl.where(classes == 1, 1.0, tl.log(tl.full((), classes, ACC)))
    if targets is not None:
        target, counted = valid_targets(targets, target_stride, ignored, row, inside, classes)
        tl.store(counts_out + row * (M + 1), counted, mask=inside)
    available = ()
    for m in tl.static_range(M):
        present = _available(mask, mask_stride, mask_step, row, inside, m)
        available = available + (present,)
        if targets is not None:
            tl.store(counts_out + row * (M + 1) + m + 1, counted & present, mask=inside)

    finite = ()
    ruled_out = ()
    uncertainty = ()
    if ONE_BLOCK:
        column = tl.arange(0, BLOCK_K).to(tl.int64)
        beyond = (column >= classes)[None, :]
        for m in tl.static_range(M):
            t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
            values, out = _scaled(
                logits[m], row, strides[m], available[m], column, steps[m], column < classes, t, ACC
            )
            finite = finite + (values,)
            ruled_out = ruled_out + (out,)
            mass, total, shifted, top = _softmax(values, out | beyond)
            entropy = tl.log(total) - tl.sum(mass * shifted, 1) / total
            uncertainty = uncertainty + (tl.where(classes == 1, 0.0, entropy / log_classes),)
            if targets is not None:
                mine = column[None, :] == target[:, None]
                own = tl.sum(tl.where(mine, tl.where(out, float("-inf"), values), 0.0), 1)
                loss = tl.where(counted & available[m], tl.log(total) + (top - own), 0.0)
                tl.store(unimodal_out + row * M + m, loss, mask=inside)
    else:
        for m in tl.static_range(M):
            t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
            top = tl.full((BLOCK_B,), FLOOR, ACC)
            total = tl.zeros((BLOCK_B,), ACC)
            moment = tl.zeros((BLOCK_B,), ACC)
            own = tl.zeros((BLOCK_B,), ACC)
            for start in range(0, classes, BLOCK_K):
                column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                values, out = _scaled(
                    logits[m],
                    row,
                    strides[m],
                    available[m],
                    column,
                    steps[m],
                    column < classes,
                    t,
                    ACC,
                )
                top, total, moment = _merge(
                    top, total, moment, values, out | (column >= classes)[None, :]
                )
                if targets is not None:
                    mine = column[None, :] == target[:, None]
                    own += tl.sum(tl.where(mine, tl.where(out, float("-inf"), values), 0.0), 1)
            entropy = (tl.log(total) - moment / total) / log_classes
            uncertainty = uncertainty + (entropy,)
            tl.store(statistics_out + row * (3 * M + 2) + m, tl.log(total), mask=inside)
            tl.store(statistics_out + row * (3 * M + 2) + 2 * M + 1 + m, top, mask=inside)
            tl.store(statistics_out + row * (3 * M + 2) + M + m, entropy, mask=inside)
            if targets is not None:
                tl.store(
                    unimodal_out + row * M + m,
                    tl.where(counted & available[m], tl.log(total) + (top - own), 0.0),
                    mask=inside,
                )

    weights = _gate(
        uncertainty,
        available,
        log_prior,
        prior_stride,
        gate,
        gate_stride,
        gate_step,
        kappa,
        kappa_stride,
        kappa_number,
        row,
        inside,
        M,
        ACC,
    )
    for m in tl.static_range(M):
        tl.store(weights_out + row * M + m, weights[m], mask=inside)
        if uncertainty_out is not None:
            tl.store(uncertainty_out + row * M + m, uncertainty[m], mask=inside)

    if ONE_BLOCK:
        fused, never = _fuse(finite, ruled_out, weights, gamma, M)
        if targets is None:
            tl.store(
                fused_out + row[:, None] * classes + column[None, :],
                tl.where(never, float("-inf"), fused),
                mask=inside[:, None] & (column < classes)[None, :],
            )
        else:
            mass, total, shifted, top = _softmax(fused, never | beyond)
            mine = column[None, :] == target[:, None]
            own = tl.sum(tl.where(mine, tl.where(never, float("-inf"), fused), 0.0), 1)
            tl.store(
                nll_out + row, tl.where(counted, tl.log(total) + (top - own), 0.0), mask=inside
            )
    else:
        top = tl.full((BLOCK_B,), FLOOR, ACC)
        total = tl.zeros((BLOCK_B,), ACC)
        moment = tl.zeros((BLOCK_B,), ACC)
        own = tl.zeros((BLOCK_B,), ACC)
        for start in range(0, classes, BLOCK_K):
            column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            tile = ()
            outs = ()
            for m in tl.static_range(M):
                t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
                values, out = _scaled(
                    logits[m],
                    row,
                    strides[m],
                    available[m],
                    column,
                    steps[m],
                    column < classes,
                    t,
                    ACC,
                )
                tile = tile + (values,)
                outs = outs + (out,)
            fused, never = _fuse(tile, outs, weights, gamma, M)
            if targets is None:
                tl.store(
                    fused_out + row[:, None] * classes + column[None, :],
                    tl.where(never, float("-inf"), fused),
                    mask=inside[:, None] & (column < classes)[None, :],
                )
            else:
                top, total, moment = _merge(
                    top, total, moment, fused, never | (column >= classes)[None, :]
                )
                mine = column[None, :] == target[:, None]
                own += tl.sum(tl.where(mine, tl.where(never, float("-inf"), fused), 0.0), 1)
        if targets is None:  # every element of an output is written
            tl.store(
                statistics_out + row * (3 * M + 2) + 2 * M, tl.zeros((BLOCK_B,), ACC), mask=inside
            )
            tl.store(
                statistics_out + row * (3 * M + 2) + 3 * M + 1,
                tl.zeros((BLOCK_B,), ACC),
                mask=inside,
            )
        else:
            tl.store(
                nll_out + row, tl.where(counted, tl.log(total) + (top - own), 0.0), mask=inside
            )
            tl.store(statistics_out + row * (3 * M + 2) + 2 * M, tl.log(total), mask=inside)
            tl.store(statistics_out + row * (3 * M + 2) + 3 * M + 1, top, mask=inside)


@triton.jit
def _output_slope(
    shifted,
    never,
    beyond,
    log_total,
    target,
    column,
    row,
    inside,
    grad_fused,
    grad_fused_stride,
    grad_fused_step,
    grad_nll,
    classes,
    CROSS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of the fused logits, [rows, columns], 0 where they are ruled out, from the logits less their maximum."""
    if CROSS_ENTROPY:
        probability = tl.where(never | beyond, 0.0, tl.exp(shifted - log_total[:, None]))
        slope = grad_nll[:, None] * (
            probability - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
        )
        slope = tl.where(
            grad_nll[:, None] == 0.0, 0.0, slope
        )  # rows that do not count may hold anything
        slope = tl.where(beyond, 0.0, slope)
    else:
        if grad_fused is None:
            slope = tl.zeros_like(shifted)
        else:
            slope = load_tile(
                grad_fused,
                row,
                grad_fused_stride,
                inside,
                column,
                grad_fused_step,
                column < classes,
            ).to(ACC)
    return tl.where(never, 0.0, slope)


@triton.jit
def _logit_slope(
    shifted,
    ruled_out,
    beyond,
    log_total,
    entropy,
    slope,
    weight,
    gamma,
    grad_entropy,
    grad_unimodal,
    target,
    column,
    CROSS_ENTROPY: tl.constexpr,
):
    """Gradient of one modality's scaled logits (given less their maximum) from the sum, from its entropy (nats) and from its own cross-entropy."""
    excluded = ruled_out | beyond
    log_probability = tl.where(excluded, 0.0, shifted - log_total[:, None])
    probability = tl.where(excluded, 0.0, tl.exp(log_probability))
    result = (gamma * weight)[:, None] * slope
    result -= (
        tl.where(grad_entropy == 0.0, 0.0, grad_entropy)[:, None]
        * probability
        * (log_probability + entropy[:, None])
    )
    if CROSS_ENTROPY:
        own = grad_unimodal[:, None] * (
            probability - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
        )
        result += tl.where(grad_unimodal[:, None] == 0.0, 0.0, own)
    return tl.where(excluded, 0.0, result)


@triton.jit
def fusion_backward(
    logits,
    strides,
    steps,
    temperature,
    temperature_stride,
    temperature_number,
    kappa,
    kappa_stride,
    kappa_number,
    scale,
    scale_number,
    mask,
    mask_stride,
    mask_step,
    targets,
    target_stride,
    ignored,
    weights,
    statistics,
    grad_fused,
    grad_fused_stride,
    grad_fused_step,
    grad_weights,
    grad_weights_stride,
    grad_weights_step,
    grad_uncertainty,
    grad_uncertainty_stride,
    grad_uncertainty_step,
    grad_nll,
    grad_nll_stride,
    grad_unimodal,
    grad_unimodal_stride,
    grad_unimodal_step,
    grad_logits,
    grad_gate,
    partial,
    batch,
    classes,
    M: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the logits (`grad_logits`: M pointers, or None), of the gate's logits and, summed over each program's rows, of the parameters.

    `partial` [programs, 3 M + 1]: log_prior, uncertainty_weight and temperature of each modality, and scale.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = row < batch
    gamma = _parameter(scale, 0, 0, scale_number, ACC)
    log_classes = tl.where(classes == 1, 1.0, tl.log(tl.full((), classes, ACC)))
    target = tl.zeros((BLOCK_B,), tl.int64)
    nll_slope = tl.zeros((BLOCK_B,), ACC)
    counted = inside
    active = inside
    if CROSS_ENTROPY:
        target, counted = valid_targets(targets, target_stride, ignored, row, inside, classes)
        if grad_weights is None:
            active = counted  # nothing comes from the other rows, whatever stands in them
        if grad_nll is not None:
            nll_slope = tl.load(grad_nll + row * grad_nll_stride, mask=counted, other=0.0).to(ACC)

    available = ()
    weight = ()
    unimodal_slope = ()
    finite = ()
    ruled_out = ()
    log_totals = ()
    shifts = ()
    entropies = ()
    for m in tl.static_range(M):
        present = _available(mask, mask_stride, mask_step, row, inside, m)
        available = available + (present,)
        weight = weight + (tl.load(weights + row * M + m, mask=inside, other=0.0),)
        own_slope = tl.zeros((BLOCK_B,), ACC)
        if grad_unimodal is not None:
            own_slope = tl.load(
                grad_unimodal + row * grad_unimodal_stride + m * grad_unimodal_step,
                mask=counted & present,
                other=0.0,
            ).to(ACC)
        unimodal_slope = unimodal_slope + (own_slope,)

    # The gradient of the fused logits, and its product with each modality's logits
    aligned = ()
    if ONE_BLOCK:
        column = tl.arange(0, BLOCK_K).to(tl.int64)
        beyond = (column >= classes)[None, :]
        for m in tl.static_range(M):
            t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
            values, out = _scaled(
                logits[m], row, strides[m], available[m], column, steps[m], column < classes, t, ACC
            )
            finite = finite + (values,)
            ruled_out = ruled_out + (out,)
            mass, total, shifted, top = _softmax(values, out | beyond)
            log_totals = log_totals + (tl.log(total),)
            shifts = shifts + (top,)
            entropies = entropies + (tl.log(total) - tl.sum(mass * shifted, 1) / total,)
        fused, never = _fuse(finite, ruled_out, weight, gamma, M)
        fused_total = tl.zeros((BLOCK_B,), ACC)
        fused_top = tl.zeros((BLOCK_B,), ACC)
        if CROSS_ENTROPY:
            mass, total, shifted, top = _softmax(fused, never | beyond)
            fused_total = tl.log(total)
            fused_top = top
        slope = _output_slope(
            fused - fused_top[:, None],
            never,
            beyond,
            fused_total,
            target,
            column,
            row,
            inside,
            grad_fused,
            grad_fused_stride,
            grad_fused_step,
            nll_slope,
            classes,
            CROSS_ENTROPY,
            ACC,
        )
        for m in tl.static_range(M):
            aligned = aligned + (tl.sum(slope * finite[m], 1),)
    else:
        fused_total = tl.zeros((BLOCK_B,), ACC)
        fused_top = tl.zeros((BLOCK_B,), ACC)
        if CROSS_ENTROPY:
            fused_total = tl.load(statistics + row * (3 * M + 2) + 2 * M, mask=inside, other=0.0)
            fused_top = tl.load(statistics + row * (3 * M + 2) + 3 * M + 1, mask=inside, other=0.0)
        for m in tl.static_range(M):
            shifts = shifts + (
                tl.load(statistics + row * (3 * M + 2) + 2 * M + 1 + m, mask=inside, other=0.0),
            )
            log_totals = log_totals + (
                tl.load(statistics + row * (3 * M + 2) + m, mask=inside, other=0.0),
            )
            entropies = entropies + (
                tl.load(statistics + row * (3 * M + 2) + M + m, mask=inside, other=0.0)
                * log_classes,
            )
            aligned = aligned + (tl.zeros((BLOCK_B,), ACC),)
        for start in range(0, classes, BLOCK_K):
            column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            tile = ()
            outs = ()
            for m in tl.static_range(M):
                t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
                values, out = _scaled(
                    logits[m],
                    row,
                    strides[m],
                    available[m],
                    column,
                    steps[m],
                    column < classes,
                    t,
                    ACC,
                )
                tile = tile + (values,)
                outs = outs + (out,)
            fused, never = _fuse(tile, outs, weight, gamma, M)
            slope = _output_slope(
                fused - fused_top[:, None],
                never,
                (column >= classes)[None, :],
                fused_total,
                target,
                column,
                row,
                inside,
                grad_fused,
                grad_fused_stride,
                grad_fused_step,
                nll_slope,
                classes,
                CROSS_ENTROPY,
                ACC,
            )
            sums = ()
            for m in tl.static_range(M):
                sums = sums + (aligned[m] + tl.sum(slope * tile[m], 1),)
            aligned = sums

    # Through the softmax over modalities
    weight_slopes = ()
    mean_slope = tl.zeros((BLOCK_B,), ACC)
    scale_slope = tl.zeros((BLOCK_B,), ACC)
    for m in tl.static_range(M):
        change = gamma * aligned[m]
        if grad_weights is not None:
            change += tl.load(
                grad_weights + row * grad_weights_stride + m * grad_weights_step,
                mask=inside,
                other=0.0,
            ).to(ACC)
        weight_slopes = weight_slopes + (change,)
        mean_slope += weight[m] * change
        scale_slope += weight[m] * aligned[m]
    entropy_slopes = ()
    for m in tl.static_range(M):
        score_slope = tl.where(active, weight[m] * (weight_slopes[m] - mean_slope), 0.0)
        if grad_gate is not None:
            tl.store(grad_gate + row * M + m, score_slope, mask=inside)
        change = -_parameter(kappa, kappa_stride, m, kappa_number, ACC) * score_slope
        if grad_uncertainty is not None:
            change += tl.load(
                grad_uncertainty + row * grad_uncertainty_stride + m * grad_uncertainty_step,
                mask=inside,
                other=0.0,
            ).to(ACC)
        uncertainty = tl.where(classes == 1, 0.0, entropies[m] / log_classes)
        entropy_slopes = entropy_slopes + (tl.where(classes == 1, 0.0, change / log_classes),)
        if partial is not None:
            tl.store(partial + program * (3 * M + 1) + m, tl.sum(score_slope, 0))
            tl.store(
                partial + program * (3 * M + 1) + M + m,
                tl.sum(tl.where(active, -uncertainty * score_slope, 0.0), 0),
            )
    if partial is not None:
        tl.store(
            partial + program * (3 * M + 1) + 3 * M, tl.sum(tl.where(active, scale_slope, 0.0), 0)
        )

    # To the logits
    if ONE_BLOCK:
        for m in tl.static_range(M):
            t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
            change = _logit_slope(
                finite[m] - shifts[m][:, None],
                ruled_out[m],
                beyond,
                log_totals[m],
                entropies[m],
                slope,
                weight[m],
                gamma,
                entropy_slopes[m],
                unimodal_slope[m],
                target,
                column,
                CROSS_ENTROPY,
            )
            change = tl.where((available[m] & active)[:, None], change, 0.0) / t
            if grad_logits is not None:
                tl.store(
                    grad_logits[m] + row[:, None] * classes + column[None, :],
                    change,
                    mask=inside[:, None] & (column < classes)[None, :],
                )
            if partial is not None:
                tl.store(
                    partial + program * (3 * M + 1) + 2 * M + m,
                    -tl.sum(tl.where(active, tl.sum(change * finite[m], 1), 0.0), 0),
                )
    else:
        sharpness = ()
        for m in tl.static_range(M):
            sharpness = sharpness + (tl.zeros((BLOCK_B,), ACC),)
        for start in range(0, classes, BLOCK_K):
            column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            beyond = (column >= classes)[None, :]
            tile = ()
            outs = ()
            for m in tl.static_range(M):
                t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
                values, out = _scaled(
                    logits[m],
                    row,
                    strides[m],
                    available[m],
                    column,
                    steps[m],
                    column < classes,
                    t,
                    ACC,
                )
                tile = tile + (values,)
                outs = outs + (out,)
            fused, never = _fuse(tile, outs, weight, gamma, M)
            slope = _output_slope(
                fused - fused_top[:, None],
                never,
                beyond,
                fused_total,
                target,
                column,
                row,
                inside,
                grad_fused,
                grad_fused_stride,
                grad_fused_step,
                nll_slope,
                classes,
                CROSS_ENTROPY,
                ACC,
            )
            sums = ()
            for m in tl.static_range(M):
                t = _parameter(temperature, temperature_stride, m, temperature_number, ACC)
                tile_slope = _logit_slope(
                    tile[m] - shifts[m][:, None],
                    outs[m],
                    beyond,
                    log_totals[m],
                    entropies[m],
                    slope,
                    weight[m],
                    gamma,
                    entropy_slopes[m],
                    unimodal_slope[m],
                    target,
                    column,
                    CROSS_ENTROPY,
                )
                tile_slope = tl.where((available[m] & active)[:, None], tile_slope, 0.0) / t
                sums = sums + (sharpness[m] - tl.sum(tile_slope * tile[m], 1),)
                if grad_logits is not None:
                    tl.store(
                        grad_logits[m] + row[:, None] * classes + column[None, :],
                        tile_slope,
                        mask=inside[:, None] & (column < classes)[None, :],
                    )
            sharpness = sums
        if partial is not None:
            for m in tl.static_range(M):
                tl.store(
                    partial + program * (3 * M + 1) + 2 * M + m,
                    tl.sum(tl.where(active, sharpness[m], 0.0), 0),
                )

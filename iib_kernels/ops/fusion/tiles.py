"""Fusion and its cross-entropies on tiles in registers (method page, sections 4 and 5).

Nothing here knows pointers, except `load_` functions of loading.py, so that any kernel may use it.
A tile t [B, K] holds a modality's logits over its temperature. -inf stands for a class that is
ruled out and for the padding behind the last class; where a modality is absent, t is 0 in every
class. Tuples have an entry a modality; what is [B] belongs to the rows of the tile. What was not
given is an empty tuple, and what may not be given a tuple of one: Triton 3.6 returns no None.

With JOINT (several warps share a row) the reductions of a round are one, since each costs the warps
two barriers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NEVER = tl.constexpr(float("-inf"))


class Softmaxes(NamedTuple):
    """The softmax of every modality: tuples of [B].

    The log and the maximum are kept apart because their sum, the lse, would lose digits.
    """

    maximum: tl.tuple
    log_sum: tl.tuple  # log of sum exp(t - maximum)
    entropy: tl.tuple  # in nats


class Labels(NamedTuple):
    """What cross-entropies are taken of.

    A row's target distribution is `true` at its target and, with smoothing, the classes' weights
    times `smoothing` over the number of classes that are not ruled out.
    """

    targets: tl.tensor  # [B], 0 where the row does not count
    counted: tl.tensor  # [B]
    true: tl.tensor  # [B] (1 - smoothing) * weight of the target's class
    smoothing: tl.tuple  # one [], or none
    class_weight: tl.tuple  # one [1, K], or none


class Smooths(NamedTuple):
    """The smoothed parts of rows' target distributions: a tuple of [B], of one entry a tile.

    Without smoothing the tuples are empty.
    """

    share: tl.tuple  # smoothing / number of classes that are not ruled out
    mass: tl.tuple  # share * sum of these classes' weights
    moment: tl.tuple  # share * sum of weight * (t - shift)
    shift: tl.tuple  # the target's logit, or 0 where that is -inf


class GateGradients(NamedTuple):
    """Gradients that pass the softmax over the modalities, [B] each; tuples by modality."""

    score: tl.tuple  # by log-prior and the gate's logits
    kappa: tl.tuple
    entropy: tl.tuple
    scale: tl.tensor


@triton.jit
def with_class_weight(labels, class_weight):
    """Labels with the class weights [1, K] of another block of classes."""
    return Labels(labels.targets, labels.counted, labels.true, labels.smoothing, class_weight)


# ----- Reductions of several tiles


@triton.jit
def _max2(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def _max3(a0, a1, a2, b0, b1, b2):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2)


@triton.jit
def _max4(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _reduce_each(tiles, MAXIMUM: tl.constexpr, JOINT: tl.constexpr):
    """The maximum or the sum [B] of each tile [B, K]."""
    found = ()
    for i in tl.static_range(0, len(tiles), 4 if JOINT else 1):
        if JOINT and len(tiles) - i >= 4:
            four = (tiles[i], tiles[i + 1], tiles[i + 2], tiles[i + 3])
            a, b, c, d = tl.reduce(four, 1, _max4 if MAXIMUM else _add4)
            found = found + (a, b, c, d)
        elif JOINT and len(tiles) - i == 3:
            three = (tiles[i], tiles[i + 1], tiles[i + 2])
            a, b, c = tl.reduce(three, 1, _max3 if MAXIMUM else _add3)
            found = found + (a, b, c)
        elif JOINT and len(tiles) - i == 2:
            a, b = tl.reduce((tiles[i], tiles[i + 1]), 1, _max2 if MAXIMUM else _add2)
            found = found + (a, b)
        elif MAXIMUM:
            found = found + (tl.max(tiles[i], 1),)
        else:
            found = found + (tl.sum(tiles[i], 1),)
    return found


@triton.jit
def row_maxima(tiles, JOINT: tl.constexpr):
    """The maximum [B] of each tile [B, K]."""
    return _reduce_each(tiles, True, JOINT)


@triton.jit
def row_sums(tiles, JOINT: tl.constexpr):
    """The sum [B] of each tile [B, K]."""
    return _reduce_each(tiles, False, JOINT)


@triton.jit
def add_each(sums, tiles):
    """Running sums, after one more tile each."""
    found = ()
    for i in tl.static_range(len(sums)):
        found = found + (sums[i] + tiles[i],)
    return found


# ----- Forward


@triton.jit
def finite(t):
    """The tile with 0 in place of -inf: a weight of 0 times -inf would be NaN."""
    return tl.where(t == NEVER, 0.0, t)


@triton.jit
def softmaxes(t, JOINT: tl.constexpr):
    """Softmaxes of all modalities' tiles, in two rounds of reductions."""
    maximum = row_maxima(t, JOINT)
    tiles = ()
    for m in tl.static_range(len(t)):
        shifted = t[m] - maximum[m][:, None]
        mass = tl.exp(shifted)
        tiles = tiles + (mass, mass * tl.where(t[m] == NEVER, 0.0, shifted))
    sums = row_sums(tiles, JOINT)
    log_sum = ()
    entropy = ()
    for m in tl.static_range(len(t)):
        log_sum = log_sum + (tl.log(sums[2 * m]),)
        entropy = entropy + (tl.log(sums[2 * m]) - sums[2 * m + 1] / sums[2 * m],)
    return Softmaxes(maximum, log_sum, entropy)


@triton.jit
def uncertainties(entropy, K: tl.constexpr):
    """Entropies over the log of the number of classes, [B] each; 0 for a single class."""
    found = ()
    for m in tl.static_range(len(entropy)):
        if K == 1:
            found = found + (tl.zeros_like(entropy[m]),)
        else:
            found = found + (entropy[m] / tl.log(tl.full((), K, entropy[m].dtype)),)
    return found


@triton.jit
def gate_weights(scores, kappa, uncertainty, available):
    """Softmax over the modalities present of scores - kappa u, [B] each. `scores`: prior + gate."""
    masked = ()
    for m in tl.static_range(len(scores)):
        score = scores[m] - kappa[m] * uncertainty[m]
        masked = masked + (tl.where(available[m], score, NEVER),)
    maximum = masked[0]
    for m in tl.static_range(1, len(scores)):
        maximum = tl.maximum(maximum, masked[m])
    total = tl.zeros_like(maximum)
    for m in tl.static_range(len(scores)):
        total += tl.exp(masked[m] - maximum)
    weights = ()
    for m in tl.static_range(len(scores)):
        weights = weights + (tl.exp(masked[m] - maximum) / total,)
    return weights


@triton.jit
def fuse(t, weights, gamma):
    """gamma sum_m w_m t_m [B, K]; -inf where a modality with any weight rules the class out."""
    fused = tl.zeros_like(t[0])
    for m in tl.static_range(len(t)):
        said = tl.where((weights[m] == 0.0)[:, None], 0.0, t[m])
        fused = tl.fma(said, tl.broadcast_to(weights[m][:, None], said.shape), fused)
    rows = tl.zeros_like(weights[0]) + gamma  # gamma may be one a row
    return tl.where(fused == NEVER, NEVER, rows[:, None] * fused)  # whatever gamma's sign


@triton.jit
def fuse_rows(t, weights, gamma):
    """`fuse` of one logit a row, [B]; to the last bit what `fuse` gives."""
    fused = tl.zeros_like(t[0])
    for m in tl.static_range(len(t)):
        fused = tl.fma(tl.where(weights[m] == 0.0, 0.0, t[m]), weights[m], fused)
    return tl.where(fused == NEVER, NEVER, gamma * fused)


# ----- Cross-entropies of a tile


@triton.jit
def target_logits(t, is_target, JOINT: tl.constexpr):
    """Each modality's logit [B] of the target, among tiles of all classes; -inf if ruled out."""
    tiles = ()
    for m in tl.static_range(len(t)):
        tiles = tiles + (tl.where(is_target, t[m], 0.0),)
    return row_sums(tiles, JOINT)


@triton.jit
def smooth_parts(t, true_logits, labels):
    """The Smooths of tiles [B, K] of all classes, by their target's logits [B]."""
    sums = ()
    shifts = ()
    if len(labels.smoothing) > 0:
        for i in tl.static_range(len(t)):
            shift = finite(true_logits[i])
            count, mass, moment = smooth_tiles(t[i], shift, labels)
            sums = sums + (tl.sum(count, 1), tl.sum(mass, 1), tl.sum(moment, 1))
            shifts = shifts + (shift,)
    return smooths_of(sums, shifts, labels)


@triton.jit
def smooth_tiles(t, shift, labels):
    """What is summed over the classes for Smooths: three tiles [B, K]."""
    possible = t != NEVER
    count = tl.where(possible, 1.0, 0.0).to(t.dtype)
    mass = count
    if len(labels.class_weight) > 0:
        mass = count * labels.class_weight[0]
    return count, mass, mass * tl.where(possible, t - shift[:, None], 0.0)


@triton.jit
def smooths_of(sums, shifts, labels):
    """Smooths of three sums [B] and one shift [B] a tile."""
    share = ()
    mass = ()
    moment = ()
    for i in tl.static_range(len(shifts)):
        part = labels.smoothing[0] / sums[3 * i]
        share = share + (part,)
        mass = mass + (part * sums[3 * i + 1],)
        moment = moment + (part * sums[3 * i + 2],)
    return Smooths(share, mass, moment, shifts)


@triton.jit
def cross_entropy(maximum, log_sum, true_logit, smooths, i, labels):
    """Cross-entropy [B] of rows of logits by their softmax and entry i of the Smooths; 0 where a
    row does not count.

    Not (log + maximum) - logit: where logits are large, that sum would lose the log's digits.
    """
    loss = labels.true * (log_sum + (maximum - true_logit))
    if len(smooths.share) > 0:
        loss += smooths.mass[i] * (log_sum + (maximum - smooths.shift[i])) - smooths.moment[i]
    return tl.where(labels.counted, loss, 0.0)


@triton.jit
def cross_entropy_slope(t, maximum, log_sum, smooths, i, labels, is_target):
    """The cross-entropy's gradient [B, K] by the tile t; 0 where t is -inf."""
    true = tl.where(is_target, labels.true[:, None], 0.0)
    p = tl.exp((t - maximum[:, None]) - log_sum[:, None])
    if len(smooths.share) == 0:
        slope = labels.true[:, None] * p - true
    else:
        slope = (labels.true + smooths.mass[i])[:, None] * p - true
        if len(labels.class_weight) == 0:
            slope -= smooths.share[i][:, None]
        else:
            slope -= smooths.share[i][:, None] * labels.class_weight[0]
    return tl.where(t == NEVER, 0.0, slope)


@triton.jit
def own_cross_entropies(softmax, true_logits, smooths, labels, available):
    """Cross-entropy [B] of each modality's own logits. `smooths`: their Smooths."""
    losses = ()
    for m in tl.static_range(len(true_logits)):
        loss = cross_entropy(
            softmax.maximum[m], softmax.log_sum[m], true_logits[m], smooths, m, labels
        )
        losses = losses + (tl.where(available[m], loss, 0.0),)
    return losses


@triton.jit
def own_slope(t, m, softmax, smooths, labels, is_target):
    """Gradient [B, K] of modality m's own cross-entropy by its tile."""
    return cross_entropy_slope(
        t[m], softmax.maximum[m], softmax.log_sum[m], smooths, m, labels, is_target
    )


@triton.jit
def fused_cross_entropy(t, weights, gamma, true_logits, labels, is_target):
    """Cross-entropy [B] of the fused logits, and its gradient [B, K] by them."""
    fused = fuse(t, weights, gamma)
    maximum = tl.max(fused, 1)
    log_sum = tl.log(tl.sum(tl.exp(fused - maximum[:, None]), 1))
    true_logit = fuse_rows(true_logits, weights, gamma)
    smooths = smooth_parts((fused,), (true_logit,), labels)
    loss = cross_entropy(maximum, log_sum, true_logit, smooths, 0, labels)
    return loss, cross_entropy_slope(fused, maximum, log_sum, smooths, 0, labels, is_target)


# ----- Backward


@triton.jit
def products(grad, t, JOINT: tl.constexpr):
    """sum_k grad_k t_m(k) [B] of every modality; grad [B, K] by the fused logits."""
    tiles = ()
    for m in tl.static_range(len(t)):
        tiles = tiles + (grad * finite(t[m]),)
    return row_sums(tiles, JOINT)


@triton.jit
def gate_gradients(
    product, weights, grad_weights, grad_uncertainty, uncertainty, numbers, active, K: tl.constexpr
):
    """Through the softmax over the modalities, in the rows that are `active` [B].

    `product` comes from `products`. `grad_weights` and `grad_uncertainty`, tuples of [B] or empty,
    come from what used these outputs.
    """
    by_weights = ()
    mean = tl.zeros_like(product[0])  # of the weights' gradients, under the weights
    scale = tl.zeros_like(product[0])
    for m in tl.static_range(len(weights)):
        by_weight = numbers.gamma * product[m]
        if len(grad_weights) > 0:
            by_weight += grad_weights[m]
        by_weights = by_weights + (by_weight,)
        mean += weights[m] * by_weight
        scale += weights[m] * product[m]
    by_score = ()
    by_kappa = ()
    by_entropy = ()
    for m in tl.static_range(len(weights)):
        score = tl.where(active, weights[m] * (by_weights[m] - mean), 0.0)
        slope = -numbers.kappa[m] * score
        if len(grad_uncertainty) > 0:
            slope += grad_uncertainty[m]
        if K == 1:
            slope = tl.zeros_like(slope)
        else:
            slope = slope / tl.log(tl.full((), K, slope.dtype))
        by_score = by_score + (score,)
        by_kappa = by_kappa + (tl.where(active, -uncertainty[m] * score, 0.0),)
        by_entropy = by_entropy + (slope,)
    return GateGradients(by_score, by_kappa, by_entropy, tl.where(active, scale, 0.0))


@triton.jit
def logit_slope(t, m, softmax, back, weights, gamma, grad):
    """Gradient [B, K] by modality m's tile: through the sum, and through its entropy.

    `grad` [B, K] comes by the fused logits (None: they are not used), `back` are GateGradients. 0
    where t is -inf.
    """
    log_p = (t[m] - softmax.maximum[m][:, None]) - softmax.log_sum[m][:, None]
    # An entropy that nothing asks for may be NaN
    entropy = tl.where(back.entropy[m] == 0.0, 0.0, softmax.entropy[m])
    slope = -back.entropy[m][:, None] * (tl.exp(log_p) * (log_p + entropy[:, None]))
    if grad is not None:
        slope += (gamma * weights[m])[:, None] * grad
    return tl.where(t[m] == NEVER, 0.0, slope)

"""What streamed kernels share: passes over the classes of rows that registers cannot hold.

A program takes a row and walks over its classes in blocks of BLOCK_K. Sums run in every lane apart,
each with the maximum it has seen itself, and come together at the end of a pass: within it, no warp
waits for another.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.fusion.loading import load_class_weight, load_scaled
from iib_kernels.ops.fusion.tiles import (
    NEVER,
    Softmaxes,
    add_each,
    finite,
    fuse,
    row_maxima,
    row_sums,
    smooth_tiles,
    smooths_of,
    with_class_weight,
)
from iib_kernels.ops.tiles import FLOOR


class Fused(NamedTuple):
    """The cross-entropy of a row's fused logits, by its sums; [B] each."""

    maximum: tl.tensor
    log_sum: tl.tensor
    product: tl.tuple  # its gradient times t, summed over the classes: one a modality
    smooths: tl.tuple  # Smooths of each modality's own cross-entropy and, last, of this one


@triton.jit
def stream_softmaxes(logits, numbers, block, plan):
    """Softmaxes of all modalities, in one pass."""
    zero = tl.zeros((block.offs.shape[0], plan.BLOCK_K), plan.ACC)
    maximum = (zero + FLOOR,) * plan.M
    total = (zero,) * plan.M
    moment = (zero,) * plan.M  # sum exp(t - maximum) (t - maximum)
    for start in range(0, plan.K, plan.BLOCK_K):
        offs_k = start + tl.arange(0, plan.BLOCK_K)
        t = load_scaled(logits, numbers, block, offs_k, plan)
        new_maximum = ()
        new_total = ()
        new_moment = ()
        for m in tl.static_range(plan.M):
            new = tl.maximum(maximum[m], t[m])
            rescale = tl.exp(maximum[m] - new)
            mass = tl.exp(t[m] - new)
            moved = moment[m] + (maximum[m] - new) * total[m]
            new_maximum = new_maximum + (new,)
            new_total = new_total + (rescale * total[m] + mass,)
            shifted = tl.where(t[m] == NEVER, 0.0, t[m] - new)
            new_moment = new_moment + (rescale * moved + mass * shifted,)
        maximum = new_maximum
        total = new_total
        moment = new_moment
    whole = row_maxima(maximum, plan.JOINT)
    tiles = ()
    for m in tl.static_range(plan.M):
        below = maximum[m] - whole[m][:, None]
        rescale = tl.exp(below)
        tiles = tiles + (rescale * total[m], rescale * (moment[m] + below * total[m]))
    sums = row_sums(tiles, plan.JOINT)
    log_sum = ()
    entropy = ()
    for m in tl.static_range(plan.M):
        log_sum = log_sum + (tl.log(sums[2 * m]),)
        entropy = entropy + (tl.log(sums[2 * m]) - sums[2 * m + 1] / sums[2 * m],)
    return Softmaxes(whole, log_sum, entropy)


@triton.jit
def stream_fused(
    logits, targets, numbers, weights, true_logits, fused_true_logit, labels, block, plan
):
    """The Fused of a row, in one pass.

    A cross-entropy's gradient over all classes sums to 0. So its products with t are those with
    t - shift: taken near the target, they lose no digits. (A target that is ruled out is not in
    the gradient, which then does not sum to 0; nothing is shifted.)
    """
    zero = tl.zeros((block.offs.shape[0], plan.BLOCK_K), plan.ACC)
    fused_shift = tl.where(fused_true_logit == NEVER, 0.0, fused_true_logit)
    shifts = ()
    for m in tl.static_range(plan.M):
        shift = tl.where(fused_true_logit == NEVER, 0.0, finite(true_logits[m]))
        shifts = shifts + (shift,)
    maximum = zero + FLOOR
    total = zero
    moment = (zero,) * plan.M  # sum exp(f - maximum) (t - shift)
    smooth = (zero,) * (4 * plan.M + 3)  # 3 of the fused logits, M products with t, 3 a modality
    for start in range(0, plan.K, plan.BLOCK_K):
        offs_k = start + tl.arange(0, plan.BLOCK_K)
        t = load_scaled(logits, numbers, block, offs_k, plan)
        fused = fuse(t, weights, numbers.gamma)
        new = tl.maximum(maximum, fused)
        rescale = tl.exp(maximum - new)
        mass = tl.exp(fused - new)
        maximum = new
        total = rescale * total + mass
        new_moment = ()
        for m in tl.static_range(plan.M):
            shifted = finite(t[m]) - shifts[m][:, None]
            new_moment = new_moment + (rescale * moment[m] + mass * shifted,)
        moment = new_moment
        if len(labels.smoothing) > 0:
            here = with_class_weight(labels, load_class_weight(targets, offs_k, plan))
            tiles = smooth_tiles(fused, fused_shift, here)
            for m in tl.static_range(plan.M):
                tiles = tiles + (tiles[1] * (finite(t[m]) - shifts[m][:, None]),)
            for m in tl.static_range(plan.M):
                tiles = tiles + smooth_tiles(t[m], finite(true_logits[m]), here)
            smooth = add_each(smooth, tiles)
    whole = tl.max(maximum, 1)
    rescale = tl.exp(maximum - whole[:, None])
    tiles = (rescale * total,)
    for m in tl.static_range(plan.M):
        tiles = tiles + (rescale * moment[m],)
    sums = row_sums(tiles, plan.JOINT)
    product = ()
    own = ()
    own_shifts = ()
    if len(labels.smoothing) > 0:
        s = row_sums(smooth, plan.JOINT)
        for m in tl.static_range(plan.M):
            own = own + (s[plan.M + 3 + 3 * m], s[plan.M + 4 + 3 * m], s[plan.M + 5 + 3 * m])
            own_shifts = own_shifts + (finite(true_logits[m]),)
        own = own + (s[0], s[1], s[2])
        own_shifts = own_shifts + (fused_shift,)
    smooths = smooths_of(own, own_shifts, labels)
    if len(labels.smoothing) == 0:
        for m in tl.static_range(plan.M):
            product = product + (labels.true * sums[m + 1] / sums[0],)
    else:
        for m in tl.static_range(plan.M):
            mean = (labels.true + smooths.mass[plan.M]) * sums[m + 1] / sums[0]
            product = product + (mean - smooths.share[plan.M] * s[3 + m],)
    return Fused(whole, tl.log(sums[0]), product, smooths)

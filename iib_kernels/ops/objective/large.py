"""The objective of many classes: what stands around the launches of its two halves.

The fusion's half (ops/fusion) and the prototypes' half (ops/alignment) give losses and gradients as
they go, because they are told beforehand what each row weighs. `prepare` finds that out; `conclude`
adds up what they leave. Both are one program.
"""

import triton
import triton.language as tl

from iib_kernels.ops.means import column_totals
from iib_kernels.ops.objective.batch import count_batch, load_weights


@triton.jit(do_not_specialize=["batch"])
def prepare(
    targets,
    mask_ptr,
    seen_ptrs,
    weights,
    divisors_ptr,
    factors_ptr,
    batch,
    K: tl.constexpr,
    M: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    J: tl.constexpr,
):
    """What each part's mean is divided by, and what a row's loss weighs, [3 M + 1] each."""
    divisors = count_batch(targets, mask_ptr, seen_ptrs, batch, K, M, J, ACC)
    factors = load_weights(weights, M, J, NUMBER_POINTER, ACC) / divisors
    offs_j = tl.arange(0, J)
    tl.store(divisors_ptr + offs_j, divisors, mask=offs_j < 3 * M + 1)
    tl.store(factors_ptr + offs_j, factors, mask=offs_j < 3 * M + 1)


@triton.jit
def _beside(line, ptr, first, M: tl.constexpr):
    """The line [J] with M sums, at the places from `first` on."""
    places = tl.arange(0, line.shape[0]) - first
    values = tl.load(ptr + places, mask=(places >= 0) & (places < M), other=0.0)
    return line + values.to(line.dtype)


@triton.jit(do_not_specialize=["programs"])
def conclude(
    losses_ptr,
    contrastive_ptr,
    alignment_ptr,
    divisors_ptr,
    weights,
    parts_ptr,
    loss_ptr,
    programs,
    M: tl.constexpr,
    NUMBER_POINTER: tl.constexpr,
    ACC: tl.constexpr,
    J: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts' means, [3 M + 1], and the objective, []: from sums of the cross-entropies
    [programs, 1 + M], and of the prototype losses [M] each, or None.
    """
    offs_j = tl.arange(0, J)
    sums = column_totals(losses_ptr, programs, M + 1, offs_j, offs_j < M + 1, ACC, BLOCK)
    if contrastive_ptr is not None:
        sums = _beside(sums, contrastive_ptr, M + 1, M)
        sums = _beside(sums, alignment_ptr, 2 * M + 1, M)
    means = sums / tl.load(divisors_ptr + offs_j, mask=offs_j < 3 * M + 1, other=1.0)
    tl.store(parts_ptr + offs_j, means, mask=offs_j < 3 * M + 1)
    factors = load_weights(weights, M, J, NUMBER_POINTER, ACC)
    tl.store(loss_ptr, tl.sum(tl.where(factors == 0.0, 0.0, factors * means), 0))

"""The objective of many classes: what stands around the launches of its two halves.

The fusion's half (ops/fusion) and the prototypes' half (ops/alignment) give losses and gradients as
they go, because they are told beforehand what each row weighs. `prepare` finds that out; `conclude`
adds up what they leave. Both are one program.
"""

import triton
import triton.language as tl

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
def _column_sums(
    ptr, rows, columns: tl.constexpr, first, J: tl.constexpr, ACC, BLOCK: tl.constexpr
):
    """Sums of a contiguous [rows, columns], at the places [J] from `first` on."""
    places = tl.arange(0, J) - first
    inside = (places >= 0) & (places < columns)
    total = tl.zeros((J,), ACC)
    for start in range(0, rows, BLOCK):
        offs = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = (offs < rows)[:, None] & inside[None, :]
        values = tl.load(ptr + offs[:, None] * columns + places[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(ACC), 0)
    return total


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
    sums = _column_sums(losses_ptr, programs, M + 1, 0, J, ACC, BLOCK)
    if contrastive_ptr is not None:
        sums += _column_sums(contrastive_ptr, 1, M, M + 1, J, ACC, 1)
        sums += _column_sums(alignment_ptr, 1, M, 2 * M + 1, J, ACC, 1)
    offs_j = tl.arange(0, J)
    means = sums / tl.load(divisors_ptr + offs_j, mask=offs_j < 3 * M + 1, other=1.0)
    tl.store(parts_ptr + offs_j, means, mask=offs_j < 3 * M + 1)
    factors = load_weights(weights, M, J, NUMBER_POINTER, ACC)
    tl.store(loss_ptr, tl.sum(tl.where(factors == 0.0, 0.0, factors * means), 0))

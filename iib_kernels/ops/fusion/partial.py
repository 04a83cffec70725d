"""Gradients of the fusion's parameters: sums over a program's rows, one line a program.

A line of `partial` [programs, 3 M + 1] holds M gradients each of log-prior, kappa and temperature,
then that of the scale. What stands in the lines is added up after the launch: in one order, so
that results repeat bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def zero_partial(partial_ptr, plan):
    """The sums [B] to begin with; none where nobody asks for them."""
    if partial_ptr is None:
        return ()
    else:
        return (tl.zeros((plan.BLOCK_B,), plan.ACC),) * (3 * plan.M + 1)


@triton.jit
def add_partial(partial_ptr, partial, back, by_temperature):
    """The sums after these rows: `back` are GateGradients, `by_temperature` M of [B] or empty."""
    if partial_ptr is None:
        return ()
    else:
        M: tl.constexpr = len(back.score)
        found = ()
        for m in tl.static_range(M):
            found = found + (partial[m] + back.score[m],)
        for m in tl.static_range(M):
            found = found + (partial[M + m] + back.kappa[m],)
        for m in tl.static_range(M):
            if len(by_temperature) > 0:
                found = found + (partial[2 * M + m] + by_temperature[m],)
            else:
                found = found + (partial[2 * M + m],)
        return found + (partial[3 * M] + back.scale,)


@triton.jit
def store_sums(ptr, sums):
    """Write the totals of sums [B] into this program's line of [programs, number of sums]."""
    line = tl.program_id(0).to(tl.int64) * len(sums)
    for i in tl.static_range(len(sums)):
        tl.store(ptr + line + i, tl.sum(sums[i], 0))


@triton.jit
def store_partial(partial_ptr, partial):
    """Write this program's line of the parameters' gradients."""
    if partial_ptr is not None:
        store_sums(partial_ptr, partial)

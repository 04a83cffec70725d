"""Trusted fusion of rows that stay in registers: the logits of all modalities are read once.

A program takes BLOCK_B rows at a time and walks over the batch. What the kernels are given and how
they read it is the gated fusion's (fusion/loading.py): a Gate whose `logits_ptr` [B, M], or whose
`log_prior_ptr` [M], is the trust's logits v. With neither, every modality is trusted wholly.

With p the softmax of a tile t, a modality says log(r p + (1 - r) / K), and its share
rho = r p / (r p + (1 - r) / K) is how much of that it tells itself. Gradients follow from shares:
d said_k / d t_j = rho_k (delta_kj - p_j), and d said_k / d v = rho_k - r.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.fusion import loading
from iib_kernels.ops.fusion.partial import store_sums
from iib_kernels.ops.fusion.tiles import NEVER, add_each, finite, row_maxima, row_sums
from iib_kernels.ops.tiles import FLOOR


class Outputs(NamedTuple):
    """Where the fused rows go, and what they come from."""

    fused_ptr: tl.tensor  # [B, K]
    trust_ptr: tl.tensor  # [B, M]
    statistics_ptr: tl.tensor  # [B, 2 M] of streamed rows


class Experts(NamedTuple):
    """What a row's modalities say is made of: tuples of [B].

    The log and the maximum of a softmax are kept apart because their sum would lose digits. Where
    every modality is trusted wholly, the other two are empty.
    """

    maximum: tl.tuple
    log_sum: tl.tuple  # log of sum exp(t - maximum)
    sure: tl.tuple  # log r
    doubt: tl.tuple  # log((1 - r) / K)


# ----- Forward


@triton.jit
def log_sigmoid(v):
    """log(1 / (1 + exp(-v))) without overflow."""
    return tl.minimum(v, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(v)))


@triton.jit
def experts_of(maximum, total, gate, block, plan):
    """Experts by each modality's maximum and its sum of exp(t - maximum), [B] each."""
    log_sum = ()
    for m in tl.static_range(plan.M):
        log_sum = log_sum + (tl.log(total[m]),)
    return doubted(maximum, log_sum, gate, block, plan)


@triton.jit
def doubted(maximum, log_sum, gate, block, plan):
    """The Experts of these softmaxes, with the trust's logits read.

    Where a modality is missing they may be NaN: whoever uses them asks whether it is there.
    """
    sure = ()
    doubt = ()
    if gate.log_prior_ptr is not None or gate.logits_ptr is not None:
        v = loading.load_scores(gate, block, plan)
        classes = tl.log(tl.full((), plan.K, plan.ACC))
        for m in tl.static_range(plan.M):
            sure = sure + (log_sigmoid(v[m]),)
            doubt = doubt + (log_sigmoid(-v[m]) - classes,)
    return Experts(maximum, log_sum, sure, doubt)


@triton.jit
def softmaxes(t, gate, block, plan):
    """The Experts of tiles of all classes, in two rounds of reductions."""
    maximum = row_maxima(t, plan.JOINT)
    tiles = ()
    for m in tl.static_range(plan.M):
        tiles = tiles + (tl.exp(t[m] - maximum[m][:, None]),)
    return experts_of(maximum, row_sums(tiles, plan.JOINT), gate, block, plan)


@triton.jit
def log_softmax(t, experts, m):
    """log p [B, K] of modality m's tile."""
    return (t - experts.maximum[m][:, None]) - experts.log_sum[m][:, None]


@triton.jit
def listen(t, experts, available):
    """The sum [B, K] of what the modalities that are there say, and their shares, M of [B, K].

    No shares where every modality is trusted wholly: they are 1. The padding behind the last class
    is -inf there, and else a doubt, which nothing may use; nor a missing modality's shares.
    """
    total = tl.zeros_like(t[0])
    shares = ()
    for m in tl.static_range(len(t)):
        told = log_softmax(t[m], experts, m)
        if len(experts.sure) == 0:
            said = told
        else:
            told += experts.sure[m][:, None]
            doubt = tl.broadcast_to(experts.doubt[m][:, None], told.shape)
            # log(exp(told) + exp(doubt)); a class that is ruled out is -inf in `told` alone
            ratio = tl.exp(-tl.abs(told - doubt))
            said = tl.where(told > doubt, told, doubt) + tl.log(1.0 + ratio)
            shares = shares + (tl.where(told > doubt, 1.0, ratio) / (1.0 + ratio),)
        total += tl.where(available[m][:, None], said, 0.0)
    return total, shares


@triton.jit
def scaled(total, gamma, mask_k):
    """The fused logits; -inf where a class is ruled out, whatever gamma's sign, and behind K."""
    return tl.where((total == NEVER) | (mask_k[None, :] == 0), NEVER, gamma * total)


@triton.jit
def trusts(total, sums, available):
    """Each modality's trust [B] of sums over the classes: of exp(f), and of that times the shares.

    Where all classes are ruled out there is no fused prediction, and no trust.
    """
    M: tl.constexpr = len(available)
    found = ()
    for m in tl.static_range(M):
        if len(sums) == 0:
            trust = tl.where(total > 0.0, 1.0, 0.0).to(total.dtype)
        else:
            trust = tl.where(total > 0.0, sums[m] / tl.where(total > 0.0, total, 1.0), 0.0)
            trust = tl.where(trust > 1.0, 1.0, trust)  # a mean of shares, but for its rounding
        found = found + (tl.where(available[m], trust, 0.0),)
    return found


@triton.jit(do_not_specialize=["batch"])
def trusted_rows(logits, gate, outputs, batch, plan: tl.constexpr):
    """Fused logits [B, K] and trust [B, M]. `logits`: Rows, `gate`: a Gate, `outputs`: Outputs."""
    numbers = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        experts = softmaxes(t, gate, block, plan)
        total, shares = listen(t, experts, block.available)
        fused = scaled(total, numbers.gamma, offs_k < plan.K)
        loading.store_rows((outputs.fused_ptr,), 0, block, offs_k, fused, plan.K)
        highest = tl.maximum(tl.max(fused, 1), FLOOR)
        mass = tl.exp(fused - highest[:, None])
        tiles = ()
        for m in tl.static_range(len(shares)):
            tiles = tiles + (mass * shares[m],)
        trust = trusts(tl.sum(mass, 1), row_sums(tiles, plan.JOINT), block.available)
        loading.store_each(outputs.trust_ptr, block, trust)


# ----- Backward


@triton.jit
def zero_sums(partial_ptr, plan):
    """The parameters' gradients to begin with, 2 M + 1 of [B]; none where nobody asks for them."""
    if partial_ptr is None:
        return ()
    else:
        return (tl.zeros((plan.BLOCK_B,), plan.ACC),) * (2 * plan.M + 1)


@triton.jit
def load_gradient(upstream, total, block, offs_k, plan):
    """Upstream gradient [B, K]; 0 where the fused logits are ruled out. `upstream`: Rows."""
    grad = loading.load_matrix(
        upstream, 0, block.offs, block.mask, offs_k, offs_k < plan.K, plan.ACC
    )
    return tl.where(total == NEVER, 0.0, grad)


@triton.jit
def products(grad, total, shares):
    """What backward sums over the classes: gradient times fused logits, gradient, and gradient
    times each share, if there are any.
    """
    tiles = (grad * finite(total), grad)
    for m in tl.static_range(len(shares)):
        tiles = tiles + (grad * shares[m],)
    return tiles


@triton.jit
def share_sum(sums, m):
    """sum_k rho_k grad_k [B] of modality m, by sums of `products`."""
    if len(sums) == 2:
        return sums[1]
    else:
        return sums[m + 2]


@triton.jit
def slope_of(t, m, grad, shares, sums, experts, numbers, available):
    """Gradient [B, K] by modality m's logits; 0 where they are -inf."""
    slope = grad
    if len(shares) > 0:
        slope = grad * shares[m]
    slope -= tl.exp(log_softmax(t, experts, m)) * share_sum(sums, m)[:, None]
    return tl.where(available[m][:, None], slope * (numbers.gamma * numbers.inverse[m]), 0.0)


@triton.jit
def trust_gradients(sums, experts, gamma, available):
    """Gradients [B] by the trust's logits, sum_k (rho_k - r) grad_k of each modality."""
    M: tl.constexpr = len(available)
    found = ()
    for m in tl.static_range(M):
        slope = tl.zeros_like(sums[1])
        if len(experts.sure) > 0:
            slope += gamma * (sums[m + 2] - tl.exp(experts.sure[m]) * sums[1])
        found = found + (tl.where(available[m], slope, 0.0),)
    return found


@triton.jit
def below_maximum(t, experts, m):
    """t - maximum [B, K]: since a gradient by t sums to 0, its product with t is that with this,
    which loses no digits of large logits. 0 where t is -inf.
    """
    return tl.where(t == NEVER, 0.0, t - experts.maximum[m][:, None])


@triton.jit(do_not_specialize=["batch"])
def trusted_rows_backward(logits, gate, upstream, grads, batch, plan: tl.constexpr):
    """The Grads of these rows, from those of the fused logits. `upstream`: Rows of [B, K].

    A line of `grads.partial_ptr` [programs, 2 M + 1] holds M gradients each of the trust's logits
    and the temperatures, then that of the scale.
    """
    numbers = loading.load_numbers(gate, plan)
    offs_k = tl.arange(0, plan.BLOCK_K)
    partial = zero_sums(grads.partial_ptr, plan)
    for number in range(tl.program_id(0), tl.cdiv(batch, plan.BLOCK_B), tl.num_programs(0)):
        block = loading.load_block(gate, number, batch, plan)
        t = loading.load_scaled(logits, numbers, block, offs_k, plan)
        experts = softmaxes(t, gate, block, plan)
        total, shares = listen(t, experts, block.available)
        grad = load_gradient(upstream, total, block, offs_k, plan)
        sums = row_sums(products(grad, total, shares), plan.JOINT)
        by_trust = trust_gradients(sums, experts, numbers.gamma, block.available)
        loading.store_each(grads.gate_ptr, block, by_trust)
        by_temperature = ()
        for m in tl.static_range(plan.M):
            slope = slope_of(t[m], m, grad, shares, sums, experts, numbers, block.available)
            loading.store_rows(grads.logits_ptrs, m, block, offs_k, slope, plan.K)
            along = tl.zeros_like(sums[0])
            if grads.partial_ptr is not None and gate.temperature.ptr is not None:
                along = -tl.sum(slope * below_maximum(t[m], experts, m), 1)
            by_temperature = by_temperature + (along,)
        partial = add_each(partial, by_trust + by_temperature + (sums[0],))
    if grads.partial_ptr is not None:
        store_sums(grads.partial_ptr, partial)

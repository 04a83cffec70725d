"""Gated fusion and its cross-entropies (method page, sections 4 and 5).

Each modality's logits are divided by its temperature. Its uncertainty is the entropy of their
softmax, over the log of the number of classes. A softmax over the modalities that are present turns
uncertainties, log-prior and the gate's logits into weights, and the fused logits are the weighted
sum, times a scale.

One program holds BLOCK_B rows. With ONE_BLOCK (one block holds all classes) the logits of all
modalities stay in registers and are read once. Otherwise they are read twice: for each modality's
softmax, which the weights need, and for the sum.

A logit of -inf rules its class out. It is computed as 0 with a mask beside it, so that a weight of
0 times -inf is not NaN.

This file holds the forward kernel and what backward shares with it; kernels_backward.py holds
backward. What forward keeps for backward where the classes need several blocks stands in the
columns of `statistics` [B, 3 M + 2]:

    0 to M - 1          log of the sum of exp(t - max) of each modality's logits t
    M to 2 M - 1        each modality's uncertainty
    2 M                 that log of the fused logits
    2 M + 1 to 3 M      each modality's maximum
    3 M + 1             the maximum of the fused logits

The log and the maximum are kept apart because their sum, the lse, would lose digits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.tiles import FLOOR, Matrix, load_tile, store_tile, valid_targets


class Parameter(NamedTuple):
    """A parameter with one entry a modality (stride 0: one for all), or a number in its place."""

    ptr: tl.tensor
    stride: tl.tensor
    number: tl.tensor  # taken where `ptr` is None


class Logits(NamedTuple):
    """The logits [B, K] of all modalities: tuples of pointers and strides, and the temperature."""

    ptrs: tl.tuple
    strides_b: tl.tuple
    strides_k: tl.tuple
    temperature: Parameter


@triton.jit
def load_parameter(parameter, m, ACC: tl.constexpr):
    """Entry m of a Parameter."""
    if parameter.ptr is None:
        return tl.full((), parameter.number, ACC)
    else:
        return tl.load(parameter.ptr + m * parameter.stride).to(ACC)


@triton.jit
def load_availability(modality_mask, offs_b, mask_b, m):
    """The rows [B] in which modality m is there; without a mask, all."""
    if modality_mask.ptr is None:
        return mask_b
    else:
        ptrs = modality_mask.ptr + offs_b * modality_mask.stride_row + m * modality_mask.stride_col
        return tl.load(ptrs, mask=mask_b, other=0) != 0


@triton.jit
def load_scaled(logits, m, temperature, offs_b, available, offs_k, mask_k, ACC: tl.constexpr):
    """One modality's logits over their temperature [B, K], and which classes are ruled out [B, K].

    The logits are 0 where ruled out, where the modality is absent, and outside of the classes.
    """
    matrix = Matrix(logits.ptrs[m], logits.strides_b[m], logits.strides_k[m])
    raw = load_tile(matrix, offs_b, available, offs_k, mask_k).to(ACC)
    ruled_out = raw == float("-inf")
    return tl.where(ruled_out, 0.0, raw) / temperature, ruled_out


@triton.jit
def load_all_scaled(logits, offs_b, available, offs_k, mask_k, M: tl.constexpr, ACC: tl.constexpr):
    """`load_scaled` of every modality: two tuples of [B, K]."""
    scaled = ()
    ruled_out = ()
    for m in tl.static_range(M):
        temperature = load_parameter(logits.temperature, m, ACC)
        scaled_m, ruled_out_m = load_scaled(
            logits, m, temperature, offs_b, available[m], offs_k, mask_k, ACC
        )
        scaled = scaled + (scaled_m,)
        ruled_out = ruled_out + (ruled_out_m,)
    return scaled, ruled_out


@triton.jit
def softmax_sums(logits, excluded):
    """Of one block of logits t [B, K]: the maximum, sum exp(t - max), sum exp(t - max) (t - max).

    The entropy of the softmax is log(second) - third / second.
    """
    maximum = tl.max(tl.where(excluded, float("-inf"), logits), 1)
    shifted = tl.where(excluded, 0.0, logits - maximum[:, None])
    mass = tl.where(excluded, 0.0, tl.exp(shifted))
    return maximum, tl.sum(mass, 1), tl.sum(mass * shifted, 1)


@triton.jit
def _merge_softmax_sums(maximum, total, moment, logits, excluded):
    """`softmax_sums` of all blocks so far, after one more."""
    new = tl.maximum(maximum, tl.max(tl.where(excluded, float("-inf"), logits), 1))
    shifted = tl.where(excluded, 0.0, logits - new[:, None])
    mass = tl.where(excluded, 0.0, tl.exp(shifted))
    rescale = tl.exp(maximum - new)
    moment = rescale * (moment + (maximum - new) * total) + tl.sum(mass * shifted, 1)
    return new, rescale * total + tl.sum(mass, 1), moment


@triton.jit
def _target_logit(logits, ruled_out, is_target):
    """The logit [B] of the target, 0 where this block of classes does not hold it."""
    return tl.sum(tl.where(is_target, tl.where(ruled_out, float("-inf"), logits), 0.0), 1)


@triton.jit
def _cross_entropy(maximum, total, target_logit, counted):
    """lse - target's logit [B], 0 where it does not count.

    Not (log + maximum) - logit: where logits are large, that sum would lose the log's digits.
    """
    return tl.where(counted, tl.log(total) + (maximum - target_logit), 0.0)


@triton.jit
def _gate(
    uncertainty,
    available,
    log_prior_ptr,
    log_prior_stride,
    gate,
    kappa,
    offs_b,
    mask_b,
    M: tl.constexpr,
    ACC: tl.constexpr,
):
    """The weights, M times [B]: softmax over the modalities present of prior + gate - kappa u."""
    scores = ()
    for m in tl.static_range(M):
        score = -load_parameter(kappa, m, ACC) * uncertainty[m]
        if log_prior_ptr is not None:
            score += tl.load(log_prior_ptr + m * log_prior_stride).to(ACC)
        if gate.ptr is not None:
            ptrs = gate.ptr + offs_b * gate.stride_row + m * gate.stride_col
            score += tl.load(ptrs, mask=mask_b, other=0.0).to(ACC)
        scores = scores + (tl.where(available[m], score, float("-inf")),)
    maximum = scores[0]
    for m in tl.static_range(1, M):
        maximum = tl.maximum(maximum, scores[m])
    total = tl.zeros_like(maximum)
    masses = ()
    for m in tl.static_range(M):
        mass = tl.exp(scores[m] - maximum)
        total += mass
        masses = masses + (mass,)
    weights = ()
    for m in tl.static_range(M):
        weights = weights + (masses[m] / total,)
    return weights


@triton.jit
def fuse(scaled, ruled_out, weights, gamma, M: tl.constexpr):
    """gamma sum_m w_m t_m [B, K], and where it is ruled out: by a modality with any weight."""
    fused = weights[0][:, None] * scaled[0]
    fused_ruled_out = ruled_out[0] & (weights[0] > 0)[:, None]
    for m in tl.static_range(1, M):
        fused += weights[m][:, None] * scaled[m]
        fused_ruled_out = fused_ruled_out | (ruled_out[m] & (weights[m] > 0)[:, None])
    return gamma * fused, fused_ruled_out


@triton.jit
def fusion_forward(
    logits_ptrs,
    logits_strides_b,
    logits_strides_k,
    log_prior_ptr,
    log_prior_stride,
    gate_ptr,
    gate_stride_b,
    gate_stride_m,
    temperature_ptr,
    temperature_stride,
    temperature_number,
    kappa_ptr,
    kappa_stride,
    kappa_number,
    scale_ptr,
    scale_number,
    mask_ptr,
    mask_stride_b,
    mask_stride_m,
    targets_ptr,
    targets_stride,
    ignore_index,
    fused_out_ptr,
    weights_out_ptr,
    uncertainty_out_ptr,
    nll_out_ptr,
    unimodal_out_ptr,
    counts_out_ptr,
    statistics_out_ptr,
    batch,
    classes,
    M: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights and uncertainty of BLOCK_B rows, and with them one of two results.

    Without targets: the fused logits. With targets: the cross-entropy of the fused logits (`nll`)
    and of each modality's own (`unimodal`), and which rows count for each.
    """
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    temperature = Parameter(temperature_ptr, temperature_stride, temperature_number)
    logits = Logits(logits_ptrs, logits_strides_b, logits_strides_k, temperature)
    gate = Matrix(gate_ptr, gate_stride_b, gate_stride_m)
    kappa = Parameter(kappa_ptr, kappa_stride, kappa_number)
    modality_mask = Matrix(mask_ptr, mask_stride_b, mask_stride_m)
    gamma = load_parameter(Parameter(scale_ptr, 0, scale_number), 0, ACC)
    log_classes = tl.where(classes == 1, 1.0, tl.log(tl.full((), classes, ACC)))
    statistics_ptrs = statistics_out_ptr + offs_b * (3 * M + 2)

    if targets_ptr is not None:
        targets, counted = valid_targets(
            targets_ptr, targets_stride, ignore_index, offs_b, mask_b, classes
        )
        tl.store(counts_out_ptr + offs_b * (M + 1), counted, mask=mask_b)
    available = ()
    for m in tl.static_range(M):
        available_m = load_availability(modality_mask, offs_b, mask_b, m)
        available = available + (available_m,)
        if targets_ptr is not None:
            counts_ptrs = counts_out_ptr + offs_b * (M + 1) + m + 1
            tl.store(counts_ptrs, counted & available_m, mask=mask_b)

    # Each modality's softmax: its uncertainty and its own cross-entropy
    scaled = ()
    ruled_out = ()
    uncertainty = ()
    for m in tl.static_range(M):
        t = load_parameter(temperature, m, ACC)
        if ONE_BLOCK:
            offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
            scaled_m, ruled_out_m = load_scaled(
                logits, m, t, offs_b, available[m], offs_k, offs_k < classes, ACC
            )
            scaled = scaled + (scaled_m,)
            ruled_out = ruled_out + (ruled_out_m,)
            excluded = ruled_out_m | (offs_k >= classes)[None, :]
            maximum, total, moment = softmax_sums(scaled_m, excluded)
            if targets_ptr is not None:
                is_target = offs_k[None, :] == targets[:, None]  # [B, K]
                target_logit = _target_logit(scaled_m, ruled_out_m, is_target)
        else:
            maximum = tl.full((BLOCK_B,), FLOOR, ACC)
            total = tl.zeros((BLOCK_B,), ACC)
            moment = tl.zeros((BLOCK_B,), ACC)
            target_logit = tl.zeros((BLOCK_B,), ACC)
            for start in range(0, classes, BLOCK_K):
                offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                scaled_m, ruled_out_m = load_scaled(
                    logits, m, t, offs_b, available[m], offs_k, offs_k < classes, ACC
                )
                excluded = ruled_out_m | (offs_k >= classes)[None, :]
                maximum, total, moment = _merge_softmax_sums(
                    maximum, total, moment, scaled_m, excluded
                )
                if targets_ptr is not None:
                    is_target = offs_k[None, :] == targets[:, None]
                    target_logit += _target_logit(scaled_m, ruled_out_m, is_target)
        uncertainty_m = (tl.log(total) - moment / total) / log_classes
        if ONE_BLOCK:
            # Only here can there be a single class, whose uncertainty is 0
            uncertainty_m = tl.where(classes == 1, 0.0, uncertainty_m)
        else:
            tl.store(statistics_ptrs + m, tl.log(total), mask=mask_b)
            tl.store(statistics_ptrs + 2 * M + 1 + m, maximum, mask=mask_b)
            tl.store(statistics_ptrs + M + m, uncertainty_m, mask=mask_b)
        uncertainty = uncertainty + (uncertainty_m,)
        if targets_ptr is not None:
            nll = _cross_entropy(maximum, total, target_logit, counted & available[m])
            tl.store(unimodal_out_ptr + offs_b * M + m, nll, mask=mask_b)

    weights = _gate(
        uncertainty,
        available,
        log_prior_ptr,
        log_prior_stride,
        gate,
        kappa,
        offs_b,
        mask_b,
        M,
        ACC,
    )
    for m in tl.static_range(M):
        tl.store(weights_out_ptr + offs_b * M + m, weights[m], mask=mask_b)
        if uncertainty_out_ptr is not None:
            tl.store(uncertainty_out_ptr + offs_b * M + m, uncertainty[m], mask=mask_b)

    # The fused logits, or their cross-entropy
    if ONE_BLOCK:
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < classes
        fused, fused_ruled_out = fuse(scaled, ruled_out, weights, gamma, M)
        if targets_ptr is None:
            fused = tl.where(fused_ruled_out, float("-inf"), fused)
            store_tile(fused_out_ptr, classes, offs_b, mask_b, offs_k, mask_k, fused)
        else:
            maximum, total, moment = softmax_sums(
                fused, fused_ruled_out | (offs_k >= classes)[None, :]
            )
            is_target = offs_k[None, :] == targets[:, None]
            target_logit = _target_logit(fused, fused_ruled_out, is_target)
            nll = _cross_entropy(maximum, total, target_logit, counted)
            tl.store(nll_out_ptr + offs_b, nll, mask=mask_b)
    else:
        maximum = tl.full((BLOCK_B,), FLOOR, ACC)
        total = tl.zeros((BLOCK_B,), ACC)
        moment = tl.zeros((BLOCK_B,), ACC)
        target_logit = tl.zeros((BLOCK_B,), ACC)
        for start in range(0, classes, BLOCK_K):
            offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < classes
            tiles, tiles_ruled_out = load_all_scaled(
                logits, offs_b, available, offs_k, mask_k, M, ACC
            )
            fused, fused_ruled_out = fuse(tiles, tiles_ruled_out, weights, gamma, M)
            if targets_ptr is None:
                fused = tl.where(fused_ruled_out, float("-inf"), fused)
                store_tile(fused_out_ptr, classes, offs_b, mask_b, offs_k, mask_k, fused)
            else:
                excluded = fused_ruled_out | (offs_k >= classes)[None, :]
                maximum, total, moment = _merge_softmax_sums(
                    maximum, total, moment, fused, excluded
                )
                is_target = offs_k[None, :] == targets[:, None]
                target_logit += _target_logit(fused, fused_ruled_out, is_target)
        if targets_ptr is None:
            # Backward reads neither, but every element of an output is written
            zeros = tl.zeros((BLOCK_B,), ACC)
            tl.store(statistics_ptrs + 2 * M, zeros, mask=mask_b)
            tl.store(statistics_ptrs + 3 * M + 1, zeros, mask=mask_b)
        else:
            nll = _cross_entropy(maximum, total, target_logit, counted)
            tl.store(nll_out_ptr + offs_b, nll, mask=mask_b)
            tl.store(statistics_ptrs + 2 * M, tl.log(total), mask=mask_b)
            tl.store(statistics_ptrs + 3 * M + 1, maximum, mask=mask_b)

"""Gradients of gated fusion and of its cross-entropies (method page, sections 4 and 5).

Upstream gradients come by the fused logits or the cross-entropies, by the weights and by the
uncertainties. They go back in three steps:

    1.  to the fused logits, and from there to each modality's weight: sum_k grad_k t_m(k)
    2.  through the softmax over the modalities to log-prior, gate, kappa and uncertainties
    3.  to each modality's logits t_m: through the sum, through the entropy, and from its own
        cross-entropy

Steps 1 and 3 need the logits. With ONE_BLOCK they stay in registers and are read once; otherwise
they are read once for each step, with the softmaxes' sums from the statistics that forward kept
(their layout stands at the head of kernels.py).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.fusion.kernels import (
    Logits,
    Parameter,
    fuse,
    load_all_scaled,
    load_availability,
    load_parameter,
    load_scaled,
    softmax_sums,
)
from iib_kernels.ops.tiles import Matrix, load_tile, store_tile, valid_targets


class Rows(NamedTuple):
    """The rows of a program, [B] each."""

    offs: tl.tensor
    mask: tl.tensor
    available: tl.tuple  # in which rows each modality is there
    targets: tl.tensor


class Softmax(NamedTuple):
    """A softmax over all classes, by its sums, [B] each."""

    maximum: tl.tensor
    log_sum: tl.tensor  # log of sum exp(t - maximum)


@triton.jit
def _fused_gradient(
    fused,
    fused_ruled_out,
    softmax,
    rows,
    offs_k,
    classes,
    grad_fused,
    grad_nll,
    CROSS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient [B, K] by a tile of the fused logits, 0 where they are ruled out.

    With CROSS_ENTROPY it comes from `grad_nll` [B], otherwise from the Matrix `grad_fused`.
    """
    if CROSS_ENTROPY:
        padding = (offs_k >= classes)[None, :]
        shifted = fused - softmax.maximum[:, None]
        q = tl.where(fused_ruled_out | padding, 0.0, tl.exp(shifted - softmax.log_sum[:, None]))
        is_target = offs_k[None, :] == rows.targets[:, None]
        grad = grad_nll[:, None] * (q - tl.where(is_target, 1.0, 0.0))
        # Rows that do not count may hold anything
        grad = tl.where(grad_nll[:, None] == 0.0, 0.0, grad)
        grad = tl.where(padding, 0.0, grad)
    else:
        if grad_fused.ptr is None:
            grad = tl.zeros_like(fused)
        else:
            grad = load_tile(grad_fused, rows.offs, rows.mask, offs_k, offs_k < classes).to(ACC)
    return tl.where(fused_ruled_out, 0.0, grad)


@triton.jit
def _fused_gradient_again(
    logits,
    weights,
    gamma,
    softmax,
    rows,
    offs_k,
    classes,
    grad_fused,
    grad_nll,
    M: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
):
    """`_fused_gradient` of one block of classes, from the logits in memory.

    Returns each modality's tile, which of its classes are ruled out, and the gradient [B, K].
    """
    scaled, ruled_out = load_all_scaled(
        logits, rows.offs, rows.available, offs_k, offs_k < classes, M, ACC
    )
    fused, fused_ruled_out = fuse(scaled, ruled_out, weights, gamma, M)
    grad = _fused_gradient(
        fused,
        fused_ruled_out,
        softmax,
        rows,
        offs_k,
        classes,
        grad_fused,
        grad_nll,
        CROSS_ENTROPY,
        ACC,
    )
    return scaled, ruled_out, grad


@triton.jit
def _logit_gradient(
    scaled,
    ruled_out,
    softmax,
    entropy,
    weight,
    gamma,
    grad,
    grad_entropy,
    grad_unimodal,
    rows,
    offs_k,
    classes,
    CROSS_ENTROPY: tl.constexpr,
):
    """Gradient [B, K] by a tile of one modality's scaled logits.

    Through the sum (`grad` [B, K], by the fused logits), through the entropy in nats
    (`grad_entropy` [B]) and from the modality's own cross-entropy (`grad_unimodal` [B]).
    """
    excluded = ruled_out | (offs_k >= classes)[None, :]
    shifted = scaled - softmax.maximum[:, None]
    log_q = tl.where(excluded, 0.0, shifted - softmax.log_sum[:, None])
    q = tl.where(excluded, 0.0, tl.exp(log_q))
    grad_scaled = (gamma * weight)[:, None] * grad
    # An entropy that nothing asks for may be NaN
    grad_entropy = tl.where(grad_entropy == 0.0, 0.0, grad_entropy)
    grad_scaled -= grad_entropy[:, None] * q * (log_q + entropy[:, None])
    if CROSS_ENTROPY:
        is_target = offs_k[None, :] == rows.targets[:, None]
        grad_own = grad_unimodal[:, None] * (q - tl.where(is_target, 1.0, 0.0))
        grad_scaled += tl.where(grad_unimodal[:, None] == 0.0, 0.0, grad_own)
    return tl.where(excluded, 0.0, grad_scaled)


@triton.jit
def fusion_backward(
    logits_ptrs,
    logits_strides_b,
    logits_strides_k,
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
    weights_ptr,
    statistics_ptr,
    grad_fused_ptr,
    grad_fused_stride_b,
    grad_fused_stride_k,
    grad_weights_ptr,
    grad_weights_stride_b,
    grad_weights_stride_m,
    grad_uncertainty_ptr,
    grad_uncertainty_stride_b,
    grad_uncertainty_stride_m,
    grad_nll_ptr,
    grad_nll_stride,
    grad_unimodal_ptr,
    grad_unimodal_stride_b,
    grad_unimodal_stride_m,
    grad_logits_ptrs,
    grad_gate_ptr,
    partial_ptr,
    batch,
    classes,
    M: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients by the logits (`grad_logits_ptrs`: M pointers, or None), by the gate's logits and,
    summed over each program's rows, by the parameters.

    `partial_ptr` [programs, 3 M + 1]: M each of log_prior, uncertainty_weight (kappa) and
    temperature, then the scale.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs_b = pid * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < batch
    temperature = Parameter(temperature_ptr, temperature_stride, temperature_number)
    logits = Logits(logits_ptrs, logits_strides_b, logits_strides_k, temperature)
    kappa = Parameter(kappa_ptr, kappa_stride, kappa_number)
    modality_mask = Matrix(mask_ptr, mask_stride_b, mask_stride_m)
    grad_fused = Matrix(grad_fused_ptr, grad_fused_stride_b, grad_fused_stride_k)
    gamma = load_parameter(Parameter(scale_ptr, 0, scale_number), 0, ACC)
    log_classes = tl.where(classes == 1, 1.0, tl.log(tl.full((), classes, ACC)))

    targets = tl.zeros((BLOCK_B,), tl.int64)
    grad_nll = tl.zeros((BLOCK_B,), ACC)
    counted = mask_b
    active = mask_b  # the rows from which anything flows back
    if CROSS_ENTROPY:
        targets, counted = valid_targets(
            targets_ptr, targets_stride, ignore_index, offs_b, mask_b, classes
        )
        if grad_weights_ptr is None:
            active = counted
        if grad_nll_ptr is not None:
            grad_nll_ptrs = grad_nll_ptr + offs_b * grad_nll_stride
            grad_nll = tl.load(grad_nll_ptrs, mask=counted, other=0.0).to(ACC)

    available = ()
    weights = ()
    grad_unimodal = ()
    for m in tl.static_range(M):
        available_m = load_availability(modality_mask, offs_b, mask_b, m)
        available = available + (available_m,)
        weights = weights + (tl.load(weights_ptr + offs_b * M + m, mask=mask_b, other=0.0),)
        grad_unimodal_m = tl.zeros((BLOCK_B,), ACC)
        if grad_unimodal_ptr is not None:
            ptrs = grad_unimodal_ptr + offs_b * grad_unimodal_stride_b + m * grad_unimodal_stride_m
            grad_unimodal_m = tl.load(ptrs, mask=counted & available_m, other=0.0).to(ACC)
        grad_unimodal = grad_unimodal + (grad_unimodal_m,)
    rows = Rows(offs_b, mask_b, available, targets)

    # 1. The gradient by the fused logits, and its products with each modality's logits
    softmaxes = ()
    entropies = ()  # in nats
    products = ()  # sum_k grad_k t_m(k)
    fused_softmax = Softmax(tl.zeros((BLOCK_B,), ACC), tl.zeros((BLOCK_B,), ACC))
    if ONE_BLOCK:
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        padding = (offs_k >= classes)[None, :]
        scaled = ()
        ruled_out = ()
        for m in tl.static_range(M):
            t = load_parameter(temperature, m, ACC)
            scaled_m, ruled_out_m = load_scaled(
                logits, m, t, offs_b, available[m], offs_k, offs_k < classes, ACC
            )
            maximum, total, moment = softmax_sums(scaled_m, ruled_out_m | padding)
            scaled = scaled + (scaled_m,)
            ruled_out = ruled_out + (ruled_out_m,)
            softmaxes = softmaxes + (Softmax(maximum, tl.log(total)),)
            entropies = entropies + (tl.log(total) - moment / total,)
        fused, fused_ruled_out = fuse(scaled, ruled_out, weights, gamma, M)
        if CROSS_ENTROPY:
            maximum, total, moment = softmax_sums(fused, fused_ruled_out | padding)
            fused_softmax = Softmax(maximum, tl.log(total))
        grad = _fused_gradient(
            fused,
            fused_ruled_out,
            fused_softmax,
            rows,
            offs_k,
            classes,
            grad_fused,
            grad_nll,
            CROSS_ENTROPY,
            ACC,
        )
        for m in tl.static_range(M):
            products = products + (tl.sum(grad * scaled[m], 1),)
    else:
        statistics_ptrs = statistics_ptr + offs_b * (3 * M + 2)
        if CROSS_ENTROPY:
            log_sum = tl.load(statistics_ptrs + 2 * M, mask=mask_b, other=0.0)
            maximum = tl.load(statistics_ptrs + 3 * M + 1, mask=mask_b, other=0.0)
            fused_softmax = Softmax(maximum, log_sum)
        for m in tl.static_range(M):
            maximum = tl.load(statistics_ptrs + 2 * M + 1 + m, mask=mask_b, other=0.0)
            log_sum = tl.load(statistics_ptrs + m, mask=mask_b, other=0.0)
            uncertainty = tl.load(statistics_ptrs + M + m, mask=mask_b, other=0.0)
            softmaxes = softmaxes + (Softmax(maximum, log_sum),)
            entropies = entropies + (uncertainty * log_classes,)
            products = products + (tl.zeros((BLOCK_B,), ACC),)
        for start in range(0, classes, BLOCK_K):
            offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            tiles, tiles_ruled_out, grad = _fused_gradient_again(
                logits,
                weights,
                gamma,
                fused_softmax,
                rows,
                offs_k,
                classes,
                grad_fused,
                grad_nll,
                M,
                CROSS_ENTROPY,
                ACC,
            )
            new_products = ()
            for m in tl.static_range(M):
                new_products = new_products + (products[m] + tl.sum(grad * tiles[m], 1),)
            products = new_products

    # 2. Through the softmax over the modalities
    grad_weights = ()
    mean = tl.zeros((BLOCK_B,), ACC)  # of the weights' gradients, under the weights
    grad_scale = tl.zeros((BLOCK_B,), ACC)
    for m in tl.static_range(M):
        grad_weight = gamma * products[m]
        if grad_weights_ptr is not None:
            ptrs = grad_weights_ptr + offs_b * grad_weights_stride_b + m * grad_weights_stride_m
            grad_weight += tl.load(ptrs, mask=mask_b, other=0.0).to(ACC)
        grad_weights = grad_weights + (grad_weight,)
        mean += weights[m] * grad_weight
        grad_scale += weights[m] * products[m]
    partial_ptrs = partial_ptr + pid * (3 * M + 1) if partial_ptr is not None else None
    grad_entropies = ()
    for m in tl.static_range(M):
        grad_score = tl.where(active, weights[m] * (grad_weights[m] - mean), 0.0)
        if grad_gate_ptr is not None:
            tl.store(grad_gate_ptr + offs_b * M + m, grad_score, mask=mask_b)
        grad_uncertainty = -load_parameter(kappa, m, ACC) * grad_score
        if grad_uncertainty_ptr is not None:
            row_ptrs = grad_uncertainty_ptr + offs_b * grad_uncertainty_stride_b
            ptrs = row_ptrs + m * grad_uncertainty_stride_m
            grad_uncertainty += tl.load(ptrs, mask=mask_b, other=0.0).to(ACC)
        grad_entropy = tl.where(classes == 1, 0.0, grad_uncertainty / log_classes)
        grad_entropies = grad_entropies + (grad_entropy,)
        if partial_ptr is not None:
            uncertainty = tl.where(classes == 1, 0.0, entropies[m] / log_classes)
            grad_kappa = tl.where(active, -uncertainty * grad_score, 0.0)
            tl.store(partial_ptrs + m, tl.sum(grad_score, 0))
            tl.store(partial_ptrs + M + m, tl.sum(grad_kappa, 0))
    if partial_ptr is not None:
        tl.store(partial_ptrs + 3 * M, tl.sum(tl.where(active, grad_scale, 0.0), 0))

    # 3. To the logits, and with t = logits / temperature to the temperature
    if ONE_BLOCK:
        for m in tl.static_range(M):
            t = load_parameter(temperature, m, ACC)
            grad_scaled = _logit_gradient(
                scaled[m],
                ruled_out[m],
                softmaxes[m],
                entropies[m],
                weights[m],
                gamma,
                grad,
                grad_entropies[m],
                grad_unimodal[m],
                rows,
                offs_k,
                classes,
                CROSS_ENTROPY,
            )
            grad_logits = tl.where((available[m] & active)[:, None], grad_scaled, 0.0) / t
            if grad_logits_ptrs is not None:
                mask_k = offs_k < classes
                store_tile(
                    grad_logits_ptrs[m], classes, offs_b, mask_b, offs_k, mask_k, grad_logits
                )
            if partial_ptr is not None:
                grad_temperature = tl.where(active, tl.sum(grad_logits * scaled[m], 1), 0.0)
                tl.store(partial_ptrs + 2 * M + m, -tl.sum(grad_temperature, 0))
    else:
        grad_temperatures = ()
        for _ in tl.static_range(M):
            grad_temperatures = grad_temperatures + (tl.zeros((BLOCK_B,), ACC),)
        for start in range(0, classes, BLOCK_K):
            offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < classes
            tiles, tiles_ruled_out, grad = _fused_gradient_again(
                logits,
                weights,
                gamma,
                fused_softmax,
                rows,
                offs_k,
                classes,
                grad_fused,
                grad_nll,
                M,
                CROSS_ENTROPY,
                ACC,
            )
            new_grad_temperatures = ()
            for m in tl.static_range(M):
                t = load_parameter(temperature, m, ACC)
                grad_scaled = _logit_gradient(
                    tiles[m],
                    tiles_ruled_out[m],
                    softmaxes[m],
                    entropies[m],
                    weights[m],
                    gamma,
                    grad,
                    grad_entropies[m],
                    grad_unimodal[m],
                    rows,
                    offs_k,
                    classes,
                    CROSS_ENTROPY,
                )
                grad_logits = tl.where((available[m] & active)[:, None], grad_scaled, 0.0) / t
                grad_temperature = grad_temperatures[m] - tl.sum(grad_logits * tiles[m], 1)
                new_grad_temperatures = new_grad_temperatures + (grad_temperature,)
                if grad_logits_ptrs is not None:
                    store_tile(
                        grad_logits_ptrs[m], classes, offs_b, mask_b, offs_k, mask_k, grad_logits
                    )
            grad_temperatures = new_grad_temperatures
        if partial_ptr is not None:
            for m in tl.static_range(M):
                grad_temperature = tl.where(active, grad_temperatures[m], 0.0)
                tl.store(partial_ptrs + 2 * M + m, tl.sum(grad_temperature, 0))

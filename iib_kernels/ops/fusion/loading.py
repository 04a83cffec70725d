"""What the fusion kernels are given, and how they read it.

Named tuples of pointers (None: not given), strides and numbers, and the functions that make tiles
of them (tiles.py).

Strides of the logits and numbers that are 1 come as constants where they belong to the model and
not to the batch: then the compiler knows how rows are aligned, and loads 16 bytes at a time.
Everything else is contiguous.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from iib_kernels.ops.fusion.tiles import NEVER, Labels
from iib_kernels.ops.tiles import valid_targets


class Parameter(NamedTuple):
    """A parameter with one entry a modality (stride 0: one for all), or a number in its place."""

    ptr: tl.tensor
    stride: tl.tensor
    number: tl.tensor  # taken where `ptr` is None


class Rows(NamedTuple):
    """A matrix [B, columns] of every modality: tuples of pointers and strides."""

    ptrs: tl.tuple
    strides_b: tl.tuple
    strides_k: tl.tuple


class Gate(NamedTuple):
    """What turns softmaxes into weights, and the parameters beside."""

    log_prior_ptr: tl.tensor  # [M]
    logits_ptr: tl.tensor  # [B, M]
    mask_ptr: tl.tensor  # [B, M]
    temperature: Parameter
    kappa: Parameter
    scale: Parameter  # neither pointer nor number: the modalities that are there, see row_numbers


class Numbers(NamedTuple):
    """The parameters of a Gate in registers; tuples of []."""

    inverse: tl.tuple  # 1 / temperature
    kappa: tl.tuple
    gamma: tl.tensor


class Targets(NamedTuple):
    """The classes that cross-entropies are taken of."""

    ptr: tl.tensor  # [B]
    ignore_index: tl.tensor
    class_weight_ptr: tl.tensor  # [K]
    smoothing: Parameter  # neither pointer nor number: none


class Upstream(NamedTuple):
    """Gradients of a kernel's outputs; None for one that was not used or that it has not."""

    fused: Rows  # of one matrix [B, K], or [B, D] of values
    nll_ptr: tl.tensor  # [B]
    unimodal_ptr: tl.tensor  # [B, M]
    weights_ptr: tl.tensor  # [B, M]
    uncertainty_ptr: tl.tensor  # [B, M]
    divisors_ptr: tl.tensor  # [1 + M] of means, whose gradients are [] and [M]


class Fusion(NamedTuple):
    """Where the fused rows go, and what they come from."""

    fused_ptr: tl.tensor  # [B, K], or [B, D] of values
    weights_ptr: tl.tensor  # [B, M]
    uncertainty_ptr: tl.tensor  # [B, M]
    statistics_ptr: tl.tensor  # of streamed rows


class CrossEntropies(NamedTuple):
    """Where the cross-entropies go, unless their means do, and what they come from."""

    nll_ptr: tl.tensor  # [B] of the fused logits
    unimodal_ptr: tl.tensor  # [B, M] of each modality's own
    weights_ptr: tl.tensor  # [B, M]
    statistics_ptr: tl.tensor  # of streamed rows


class Kept(NamedTuple):
    """What forward keeps for backward."""

    weights_ptr: tl.tensor  # [B, M]
    statistics_ptr: tl.tensor  # of streamed rows


class Grads(NamedTuple):
    """Where gradients go; None for one that is not asked for."""

    logits_ptrs: tl.tuple  # M of [B, K]
    values_ptrs: tl.tuple  # M of [B, D]
    gate_ptr: tl.tensor  # [B, M]
    partial_ptr: tl.tensor  # [programs, 3 M + 1], see partial.py


@dataclass(frozen=True, eq=False)
class Plan:
    """What a launch knows before it runs; constants only.

    One object for all launches that are alike (launch.plan_argument): compared by identity, which
    costs a launch less than eight constants.
    """

    K: tl.constexpr  # classes
    M: tl.constexpr  # modalities
    ACC: tl.constexpr  # type that everything is computed in
    JOINT: tl.constexpr  # whether a round's reductions are one, see tiles.py
    BLOCK_B: tl.constexpr  # rows of a block: 1 where they are streamed
    BLOCK_K: tl.constexpr  # classes of a block: all of them, unless they are streamed
    D: tl.constexpr  # components of the values, if there are any
    BLOCK_D: tl.constexpr  # components of a block


class Block(NamedTuple):
    """The rows a program holds, [B] each."""

    offs: tl.tensor
    mask: tl.tensor
    available: tl.tuple  # in which rows each modality is there


@triton.jit
def load_parameter(parameter, m, ACC: tl.constexpr):
    """Entry m of a Parameter."""
    if parameter.ptr is None:
        return tl.full((), parameter.number, ACC)
    else:
        return tl.load(parameter.ptr + m * parameter.stride).to(ACC)


@triton.jit
def load_numbers(gate, plan):
    """The Numbers of a Gate."""
    inverse = ()
    kappa = ()
    for m in tl.static_range(plan.M):
        inverse = inverse + (1.0 / load_parameter(gate.temperature, m, plan.ACC),)
        kappa = kappa + (load_parameter(gate.kappa, m, plan.ACC),)
    gamma = tl.full((), 1.0, plan.ACC)
    if gate.scale.ptr is not None or gate.scale.number is not None:
        gamma = load_parameter(gate.scale, 0, plan.ACC)
    return Numbers(inverse, kappa, gamma)


@triton.jit
def load_block(gate, number, batch, plan):
    """The Block of that number; without a mask, every modality is there."""
    offs_b = (number * plan.BLOCK_B + tl.arange(0, plan.BLOCK_B)).to(tl.int64)
    mask_b = offs_b < batch
    available = ()
    for m in tl.static_range(plan.M):
        if gate.mask_ptr is None:
            available = available + (mask_b,)
        else:
            present = tl.load(gate.mask_ptr + offs_b * plan.M + m, mask=mask_b, other=0) != 0
            available = available + (present,)
    return Block(offs_b, mask_b, available)


@triton.jit
def row_numbers(numbers, gate, block):
    """The Numbers of a Block. Without a scale, gamma [B] counts the modalities that are there."""
    if gate.scale.ptr is None and gate.scale.number is None:
        gamma = tl.zeros((block.offs.shape[0],), numbers.gamma.dtype)
        for m in tl.static_range(len(block.available)):
            gamma += tl.where(block.available[m], 1.0, 0.0)
        return Numbers(numbers.inverse, numbers.kappa, gamma)
    else:
        return numbers


@triton.jit
def load_scores(gate, block, plan):
    """log-prior + gate logits of each modality, [B]; 0 where neither was given."""
    scores = ()
    for m in tl.static_range(plan.M):
        score = tl.zeros((block.offs.shape[0],), plan.ACC)
        if gate.log_prior_ptr is not None:
            score += tl.load(gate.log_prior_ptr + m).to(plan.ACC)
        if gate.logits_ptr is not None:
            ptrs = gate.logits_ptr + block.offs * plan.M + m
            score += tl.load(ptrs, mask=block.mask, other=0.0).to(plan.ACC)
        scores = scores + (score,)
    return scores


@triton.jit
def load_each(ptr, offs_b, mask_b, plan):
    """The columns [B] of a contiguous [B, M], 0 outside of the mask; or none."""
    if ptr is None:
        return ()
    else:
        found = ()
        for m in tl.static_range(plan.M):
            found = found + (
                tl.load(ptr + offs_b * plan.M + m, mask=mask_b, other=0.0).to(plan.ACC),
            )
        return found


@triton.jit
def store_each(ptr, block, values):
    """Write M of [B] into the columns of a contiguous [B, M], if there is one."""
    if ptr is not None:
        M: tl.constexpr = len(values)
        for m in tl.static_range(M):
            tl.store(ptr + block.offs * M + m, values[m], mask=block.mask)


@triton.jit
def load_matrix(rows, m, offs_b, mask_b, offs_k, mask_k, ACC: tl.constexpr):
    """One modality's [B, K] of Rows, 0 outside of the masks."""
    columns = offs_k.to(tl.int64)[None, :] * rows.strides_k[m]
    offsets = offs_b[:, None] * rows.strides_b[m] + columns
    mask = mask_b[:, None] & mask_k[None, :]
    return tl.load(rows.ptrs[m] + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_scaled(logits, numbers, block, offs_k, plan):
    """Each modality's logits over their temperature: a tuple of tiles t (see tiles.py)."""
    found = ()
    for m in tl.static_range(plan.M):
        raw = load_matrix(
            logits, m, block.offs, block.available[m], offs_k, offs_k < plan.K, plan.ACC
        )
        found = found + (tl.where((offs_k < plan.K)[None, :], raw * numbers.inverse[m], NEVER),)
    return found


@triton.jit
def load_target_logits(logits, numbers, block, labels, plan):
    """Each modality's scaled logit [B] of the target; 0 where it does not count."""
    found = ()
    for m in tl.static_range(plan.M):
        column = labels.targets.to(tl.int64) * logits.strides_k[m]
        offsets = block.offs * logits.strides_b[m] + column
        mask = labels.counted & block.available[m]
        raw = tl.load(logits.ptrs[m] + offsets, mask=mask, other=0.0).to(plan.ACC)
        found = found + (raw * numbers.inverse[m],)
    return found


@triton.jit
def load_class_weight(targets, offs_k, plan):
    """The classes' weights [1, K], in a tuple of one; or none."""
    if targets.class_weight_ptr is None:
        return ()
    else:
        weight = tl.load(targets.class_weight_ptr + offs_k, mask=offs_k < plan.K, other=0.0)
        return (weight.to(plan.ACC)[None, :],)


@triton.jit
def load_labels(targets, class_weight, block, plan):
    """The Labels of these rows; `class_weight` as loaded."""
    index = targets.ignore_index
    indices, counted = valid_targets(targets.ptr, 1, index, block.offs, block.mask, plan.K)
    true = tl.full((block.offs.shape[0],), 1.0, plan.ACC)
    if targets.class_weight_ptr is not None:
        true = tl.load(targets.class_weight_ptr + indices, mask=counted, other=0.0).to(plan.ACC)
    smoothing = ()
    if targets.smoothing.ptr is not None or targets.smoothing.number is not None:
        smoothing = (load_parameter(targets.smoothing, 0, plan.ACC),)
        true = true * (1.0 - smoothing[0])
    return Labels(indices.to(tl.int32), counted, true, smoothing, class_weight)


@triton.jit
def store_rows(ptrs, m, block, offs_k, values, K: tl.constexpr):
    """Write [B, K] into contiguous matrix m of K columns, if there are any."""
    if ptrs is not None:
        mask = block.mask[:, None] & (offs_k < K)[None, :]
        tl.store(ptrs[m] + block.offs[:, None] * K + offs_k[None, :], values, mask=mask)


@triton.jit
def counted_weights(targets, labels, block, plan):
    """What rows count for in the means of the cross-entropies, 1 + M of [B]."""
    weight = tl.where(labels.counted, 1.0, 0.0).to(plan.ACC)
    if targets.class_weight_ptr is not None:
        ptrs = targets.class_weight_ptr + labels.targets
        weight = tl.load(ptrs, mask=labels.counted, other=0.0).to(plan.ACC)
    found = (weight,)
    for m in tl.static_range(plan.M):
        found = found + (tl.where(block.available[m], weight, 0.0),)
    return found


@triton.jit
def load_loss_gradients(ptr, first, upstream, block, counted, COUNT: tl.constexpr, plan):
    """Gradients of COUNT cross-entropies of each row, [B]; 0 where it does not count; or none.

    From those of the rows [B, COUNT], or of the means [COUNT], whose divisors begin at `first`.
    """
    if ptr is None:
        return ()
    else:
        found = ()
        for i in tl.static_range(COUNT):
            if upstream.divisors_ptr is None:
                ptrs = ptr + block.offs * COUNT + i
                grad = tl.load(ptrs, mask=counted, other=0.0).to(plan.ACC)
            else:
                mean = tl.load(ptr + i).to(plan.ACC) / tl.load(upstream.divisors_ptr + first + i)
                grad = tl.where(counted, mean, 0.0)
            found = found + (grad,)
        return found

"""The equations in plain PyTorch: what every faster implementation is tested against.

They are those of the method page, section 2 to section 4, this project's own formulation of arXiv
2603.17347.

Functions here check nothing and process everything at once, in the dtype of their inputs; the
public functions of this package add argument checks, dtype rules and bounded memory.

Shapes: B samples, K classes, M modalities; features[m] is [B, D_m], prototypes[m] [K, D_m] and
logits[m] [..., K].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EPS = 1e-12  # of L2 normalisation: a row no longer than this has no direction and becomes zero
NEVER = -torch.inf


def normalize(rows: Tensor) -> Tensor:
    """Rows [..., D] at unit length; a zero row stays zero and gets no gradient.

    ``F.normalize`` gives such a row 1e12 times the upstream gradient.
    """
    squares = rows.square().sum(-1, keepdim=True)
    short = squares <= EPS**2  # false for NaN, which stays NaN
    return torch.where(short, 0.0, rows / torch.where(short, 1.0, squares).sqrt())


def prototype_distance(features: Tensor, prototypes: Tensor, metric: str = "cosine") -> Tensor:
    """d2(i, k) = |z_i|^2 + |p_k|^2 - 2 z_i . p_k, clamped at 0; [B, K] (method page, section 2).

    Rows are normalised first for ``"cosine"``.
    """
    if metric == "cosine":
        features, prototypes = normalize(features), normalize(prototypes)
    squares = features.square().sum(-1, keepdim=True) + prototypes.square().sum(-1)
    return (squares - 2 * features @ prototypes.mT).clamp_min(0)


def prototype_log_posterior(
    features: Tensor,
    prototypes: Tensor,
    temperature: float = 0.2,
    metric: str = "cosine",
    seen: Tensor | None = None,
) -> Tensor:
    """log q(i, .) = log_softmax_k(-d2(i, k) / tau) over the seen classes, [B, K]; -inf elsewhere.

    See method page, section 2.
    """
    scores = -prototype_distance(features, prototypes, metric) / temperature
    if seen is not None:
        # With no class seen the rows do not count: any finite numbers will do
        scores = scores.masked_fill(~seen & seen.any(), NEVER)
    return scores.log_softmax(-1)


def nearest_prototype(
    features: Tensor, prototypes: Tensor, metric: str = "cosine", seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest seen prototype and its class, [B] and [B].

    0 and -1 where no class has been seen.
    """
    distance = prototype_distance(features, prototypes, metric)
    if seen is None:
        return distance.min(-1)
    nearest, index = distance.masked_fill(~seen & seen.any(), torch.inf).min(-1)
    return torch.where(seen.any(), nearest, 0.0), torch.where(seen.any(), index, -1)


def alignment_loss(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    targets: Tensor,
    budgets: Tensor,
    temperature: float = 0.2,
    metric: str = "cosine",
    seen: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contrastive C_m(i), alignment A_m(i) and confidence q_m(i, y_i), each [B, M], per sample; and
    which of them count, [B, M] bool (method page, section 3).

    A row counts for modality m where its target is not ignored, the modality is present and the
    target's class has been seen by it; alignment counts where the row counts for the anchor too.
    """
    count = len(features)
    anchor, relative = anchor_and_relative(budgets)
    valid = targets != ignore_index
    y = torch.where(valid, targets, 0)
    log_q = torch.stack(
        [
            prototype_log_posterior(f, p, temperature, metric, None if seen is None else seen[m])
            for m, (f, p) in enumerate(zip(features, prototypes))
        ]
    )  # [M, B, K]
    counts = valid[:, None].expand(-1, count) if mask is None else valid[:, None] & mask
    if seen is not None:
        counts = counts & torch.stack([s[y] for s in seen], 1)
    log_true = log_q.gather(2, y.expand(count, -1)[..., None]).squeeze(2).T
    log_true = torch.where(counts, log_true, 0.0)  # [B, M]
    confidence = torch.where(counts, log_true.exp(), 0.0)
    # log_q[anchor] would read the anchor on the host
    log_anchor = log_q.index_select(0, anchor[None]).squeeze(0).detach()  # [B, K]
    q_anchor = log_anchor.exp()
    # A class that either of the two has not seen carries no evidence to compare: it is left out
    both = (log_q > NEVER) & (log_anchor > NEVER)
    difference = torch.where(both, log_anchor, 0.0) - torch.where(both, log_q, 0.0)
    divergence = (torch.where(both, q_anchor, 0.0) * difference).sum(-1).T  # KL(q_a || q_m), [B, M]
    alignment = torch.where(
        aligned(counts, anchor), deviation(confidence, relative, anchor) * divergence, 0.0
    )
    return -log_true, alignment, confidence, counts


def anchor_and_relative(budgets: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor argmax_m b_m, [] int64, and rho_m = b_m / b_a, [M]; all 1 if all budgets are 0."""
    top = budgets.max()
    return budgets.argmax(), torch.where(top > 0, budgets / torch.where(top > 0, top, 1), 1.0)


def deviation(confidence: Tensor, relative: Tensor, anchor: Tensor) -> Tensor:
    """delta_m(i) = max(0, rho_m q_a(i, y_i) - q_m(i, y_i)), [B, M], without gradient."""
    confidence = confidence.detach()
    return (
        relative * confidence.gather(1, anchor.expand(confidence.shape[0], 1)) - confidence
    ).clamp_min(0)


def aligned(counts: Tensor, anchor: Tensor) -> Tensor:
    """Which rows of which modality are drawn towards the anchor, [B, M] bool.

    Those where both count, and never the anchor's own.
    """
    return (
        counts
        & counts.gather(1, anchor.expand(counts.shape[0], 1))
        & (torch.arange(counts.shape[1], device=counts.device) != anchor)
    )


def gated_fusion(
    logits: Sequence[Tensor],
    log_prior: Tensor | None = None,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    values: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused logits f [..., K], weights w [..., M], uncertainty u [..., M] and scaled logits t
    [..., M, K] (method page, section 4).

    With ``values``, M of [..., D], in place of f their sum under the same weights,
    scale * sum_m w_m v_m [..., D].
    """
    stacked = torch.stack(list(logits), -2)
    if mask is not None:  # a missing modality's row may hold anything
        stacked = torch.where(mask[..., None], stacked, 0.0)
    count, classes = stacked.shape[-2:]

    def per_modality(value: Tensor | float) -> Tensor:
        # new_full, not as_tensor, which on a GPU copies from the host: that synchronises and
        # cannot be captured in a graph
        return (value if isinstance(value, Tensor) else stacked.new_full((), value)).expand(count)

    # Not a quotient: its gradient by T takes logits / T^2, which overflows before the logits do
    inverse = 1 / per_modality(temperature)[:, None]
    scaled = (stacked * inverse).detach()
    ruled_out, spoilt = scaled == NEVER, ~(scaled < torch.inf)  # spoilt: NaN, +inf or overflow
    # Both are kept out of every product: 0 * inf would be NaN in a gradient, that of a row which a
    # loss ignores too
    left_out = ruled_out | spoilt
    finite = torch.where(left_out, 0.0, stacked) * inverse
    t = torch.where(left_out, scaled, finite)
    uncertainty = torch.zeros_like(t[..., 0])
    if classes > 1:
        uncertainty = entropy(stacked, inverse, left_out) / math.log(classes)
        uncertainty = uncertainty.masked_fill(spoilt.any(-1), 0.0)
    score = -per_modality(uncertainty_weight) * uncertainty
    if log_prior is not None:
        score = score + log_prior
    if gate_logits is not None:
        score = score + gate_logits
    if mask is not None:
        score = score.masked_fill(~mask, NEVER)
    weights = score.softmax(-1)
    if values is not None:
        rows = torch.stack(list(values), -2)
        if mask is not None:
            rows = torch.where(mask[..., None], rows, 0.0)
        return scale * (weights[..., None] * rows).sum(-2), weights, uncertainty, t
    fused = scale * (weights[..., None] * finite).sum(-2)
    # Added as a constant: values show what is spoilt, and gradients pass as they come
    fused = fused + torch.where(spoilt, scaled, 0.0).sum(-2)
    # A class is ruled out by any modality that has a say
    fused = fused.masked_fill((ruled_out & (weights[..., None] > 0)).any(-2), NEVER)
    return fused, weights, uncertainty, t


def trusted_fusion(
    logits: Sequence[Tensor],
    trust_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused logits f [..., K] and trust [..., M] (method page, section 4).

    Without ``trust_logits`` every modality is trusted wholly, and f is the sum of log p_m.
    """
    count, classes = len(logits), logits[0].shape[-1]
    stacked = torch.stack(list(logits), -2)
    if mask is not None:  # a missing modality's row may hold anything
        stacked = torch.where(mask[..., None], stacked, 0.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(count)[:, None]
    ruled_out = stacked == NEVER  # kept out of every product: 0 * inf is NaN in a gradient
    t = (torch.where(ruled_out, 0.0, stacked) / temperature).masked_fill(ruled_out, NEVER)
    log_p = t.log_softmax(-1).masked_fill(ruled_out, 0.0)
    if trust_logits is None:
        said, share = log_p, torch.ones_like(log_p)
    else:
        trust_logits = trust_logits.expand(stacked.shape[:-1])
        if mask is not None:
            trust_logits = torch.where(mask, trust_logits, 0.0)
        told = (log_p + logsigmoid(trust_logits)[..., None]).masked_fill(ruled_out, NEVER)
        doubt = (logsigmoid(-trust_logits) - math.log(classes))[..., None]
        said = torch.logaddexp(told, doubt.expand_as(told))
        share = (told - said).detach().exp()
    if mask is not None:
        said = torch.where(mask[..., None], said, 0.0)
    fused = scale * said.sum(-2)
    if trust_logits is None:  # else a doubt is left
        fused = fused.masked_fill(ruled_out.any(-2), NEVER)
    # What the fused prediction makes of each modality: a class that it rules out does not count
    belief = fused.detach().softmax(-1)[..., None, :]
    trust = torch.where(belief > 0, belief * share, 0.0).sum(-1).clamp_max(1)
    return fused, trust if mask is None else trust * mask


def entropy(logits: Tensor, inverse: Tensor, left_out: Tensor) -> Tensor:
    """H(softmax(t)) of t = logits * inverse over the last dimension without the classes that are
    ``left_out``, nats; 0 where all are.

    H = log Z - sum_k e_k d_k / Z with d_k = t_k - max_k t_k <= 0, e_k = exp(d_k) and Z their sum.
    Not of t itself: logits of 1e30 would meet gradients of that size in products, and overflow.
    """
    logits_max = torch.where(left_out, NEVER, logits.detach()).amax(-1, keepdim=True)
    d = logits - logits_max
    # Beyond this e_k underflows, and the slope of e_k d_k would be 0 * inf
    possible = (d * inverse).detach() > math.log(torch.finfo(logits.dtype).tiny)
    possible = possible & ~left_out
    d = torch.where(possible, d, 0.0) * inverse
    e = torch.where(possible, d.exp(), 0.0)
    total = e.sum(-1).clamp_min(1)
    return total.log() - (e * d).sum(-1) / total


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    counts: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits [..., K] where ``counts`` [...], 0 elsewhere, whatever stands there.

    As ``F.cross_entropy``: (1 - eps) c_y (-log p_y) + eps mean_k c_k (-log p_k), with c the
    classes' ``weight`` [K] (1 without) and eps the ``label_smoothing``. The mean is over the
    classes that are not ruled out by -inf.
    """
    safe = torch.where(counts[..., None], logits, 0.0)
    index = torch.where(counts, targets, 0)
    lse = safe.logsumexp(-1)
    nll = lse - safe.gather(-1, index[..., None]).squeeze(-1)
    if weight is not None:
        nll = weight[index] * nll
    if label_smoothing:
        possible = safe > NEVER
        share = possible.to(safe.dtype) / possible.sum(-1, keepdim=True)
        share = share if weight is None else share * weight
        every = (share * (lse[..., None] - torch.where(possible, safe, 0.0))).sum(-1)
        nll = (1 - label_smoothing) * nll + label_smoothing * every
    return torch.where(counts, nll, 0.0)


def class_sums(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    metric: str = "cosine",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Sum of each class's embeddings [K, D], normalised for ``"cosine"``, and their number [K]."""
    member = targets == torch.arange(num_classes, device=targets.device)[:, None]  # [K, B]
    member = member & (targets != ignore_index)
    rows = normalize(features) if metric == "cosine" else features
    rows = torch.where(member.any(0)[:, None], rows, 0.0)  # an ignored row may hold anything
    return member.to(rows.dtype) @ rows, member.sum(1)


def ema_from_sums(
    prototypes: Tensor,
    counts: Tensor,
    sums: Tensor,
    batch_counts: Tensor,
    momentum: float = 0.9,
    metric: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """New prototypes and counts (method page, section 2).

    p <- normalise(mu p + (1 - mu) mean) for classes in the batch; the mean itself the first time.
    """
    mean = sums / batch_counts.clamp_min(1)[:, None]
    moved = torch.where((counts > 0)[:, None], momentum * prototypes + (1 - momentum) * mean, mean)
    if metric == "cosine":
        moved = normalize(moved)
    return torch.where((batch_counts > 0)[:, None], moved, prototypes), counts + batch_counts

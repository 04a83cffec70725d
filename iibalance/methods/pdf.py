"""PDF: predictive dynamic fusion by collaborative belief."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.methods.heads import (
    Losses,
    SeparateHead,
    classify,
    own_cross_entropies,
    tempered,
)
from iibalance.methods.tempered import Tempered
from iibalance.nn.head import Embeddings, HeadOutput


class CoBeliefHead(SeparateHead):
    """One classifier an embedding, and a small network that foretells how right it will be.

    The prediction is sum_m w_m l_m; see :class:`PDF` for the weights.

    Args:
        unimodal: weight of the modalities' own cross-entropies.

    >>> head = CoBeliefHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> weights = head([torch.randn(2, 4), torch.randn(2, 2)]).weights
    >>> torch.allclose(weights.sum(1), torch.ones(2))
    True
    """

    def __init__(
        self, embedding_dims: Mapping[str, int], num_classes: int, *, unimodal: float = 1.0
    ):
        super().__init__(embedding_dims, num_classes)
        self.predictors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(size, 2 * size),
                nn.ReLU(),
                nn.Linear(2 * size, size),
                nn.ReLU(),
                nn.Linear(size, 1),
            )
            for size in embedding_dims.values()
        )
        self.unimodal = unimodal

    def log_confidence(self, embeddings: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """log p [B, M], the predicted probabilities of the true class; 0 where missing.

        Nothing goes back to the embeddings.
        """
        scores = [net(values.detach()) for net, values in zip(self.predictors, embeddings)]
        # Not log(sigmoid): it is finite for every score.
        values = F.logsigmoid(torch.cat(scores, 1).float())
        return values if mask is None else values.masked_fill(~mask, 0.0)

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool), by calibrated beliefs."""
        embeddings = self.present(embeddings, mask)
        logits = classify(self.classifiers, embeddings, mask)
        belief = co_belief(self.log_confidence(embeddings, mask))
        weights = shares(belief * relative_calibration(logits, mask), mask)
        return HeadOutput(
            weighted(weights, logits) / self.log_temperature.exp(),
            weights,
            None,
            tempered(logits, self.own_temperature),
        )

    def losses(self, embeddings: list[Tensor], targets: Tensor, mask: Tensor | None) -> HeadOutput:
        """Fused and own cross-entropies, and how far the predictors are from the truth."""
        logits = classify(self.classifiers, embeddings, mask)
        log_confidence = self.log_confidence(embeddings, mask)
        weights = shares(co_belief(log_confidence), mask).detach()
        fused = weighted(weights, logits)
        parts = Losses(
            F.cross_entropy(fused.float(), targets), own_cross_entropies(logits, targets, mask)
        )
        total = parts.fused + self.unimodal * parts.unimodal.sum()
        rows = targets.clamp_min(0)[:, None]
        for index, values in enumerate(logits):
            truth = values.detach().float().softmax(-1).gather(1, rows).squeeze(1)
            wrong = (log_confidence[:, index].exp() - truth).abs()
            valid = targets != -100
            valid = valid if mask is None else valid & mask[:, index]
            total = total + wrong.masked_fill(~valid, 0.0).sum() / valid.sum().clamp_min(1)
        return HeadOutput(fused, weights, None, tuple(logits), total, parts)


def co_belief(log_confidence: Tensor) -> Tensor:
    """Mono- and holo-confidence together, [B, M], from log p [B, M] (0 where missing).

    >>> co_belief(torch.tensor([[0.5, 0.25]]).log())  # 0.5 + 2/3, 0.25 + 1/3
    tensor([[1.1667, 0.5833]])
    """
    total = log_confidence.sum(1, keepdim=True)
    return log_confidence.exp() + (total - log_confidence) / total.clamp_max(-1e-8)


def relative_calibration(logits: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """k [B, M], below 1 where a prediction is more uniform than the others are on average."""
    classes = logits[0].shape[-1]
    spread = [(values.float().softmax(-1) - 1 / classes).abs().mean(-1) for values in logits]
    spread = torch.stack(spread, 1)
    if mask is None:
        mask = torch.ones_like(spread, dtype=torch.bool)
    spread = spread.masked_fill(~mask, 0.0)
    others = spread.sum(1, keepdim=True) - spread
    count = (mask.sum(1, keepdim=True) - 1).clamp_min(1)
    return (spread * count / others.clamp_min(1e-12)).clamp_max(1.0)


def shares(belief: Tensor, mask: Tensor | None) -> Tensor:
    """softmax_m of the beliefs [B, M] over the modalities present; 0 where missing."""
    return (belief if mask is None else belief.masked_fill(~mask, -torch.inf)).softmax(1)


def weighted(weights: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """sum_m w_m l_m [B, K]."""
    return sum(weights[:, index, None] * values for index, values in enumerate(logits))


class PDF(Tempered):
    """Late fusion whose weights come from the predicted probability of the true class.

    Cao, Xia, Ding, Zhang, Hu: "Predictive Dynamic Fusion", ICML 2024. For any number of modalities.
    A small network tells from z_m, through which nothing goes back, how much probability p_m
    modality m will give the true class. With the modalities' own logits l_m,

        mono_m = p_m,  holo_m = sum_(j != m) log p_j / sum_j log p_j
        belief_m = mono_m + holo_m,  w = softmax_m(belief_m),  f = sum_m w_m l_m
        L = CE(f) + unimodal sum_m CE(l_m) + sum_m |p_m - softmax(l_m)[y]|

    where w and the truth in the last term are constants. Predictions are fused by calibrated
    beliefs, w = softmax_m(k_m belief_m). A modality whose prediction is closer to uniform than the
    others' is uncertain, and what it believes counts less:

        D_m = mean_k |softmax(l_m)_k - 1 / K|
        k_m = min(1, D_m / mean_(j != m) D_j)

    Missing modalities have weight 0 and stand in no sum.

    Written after the authors' code, as no more than the paper's beginning could be had. That code
    is for two modalities; the sums over more of them are those of the re-implementation by Rheude,
    Eils, Wild (arXiv 2512.22991), which for two are the code's. As in the code, calibration is for
    predicting alone, and all terms of the loss weigh 1; ``unimodal`` is a weight that the
    re-implementation tunes.

    The code's network has three linear layers with nothing between them, which is one linear map;
    here and in the re-implementation there are ReLUs. Where a confidence reaches 0 or 1 the code
    may divide by 0; here its logarithm is taken from the score before the sigmoid.

    Parameters: ``unimodal`` (1).

    The second modality is the likelier to be right, and has the higher belief:

    >>> belief = co_belief(torch.tensor([[0.4, 0.9]]).log())
    >>> shares(belief, None)
    tensor([[0.2152, 0.7848]])
    """

    name = "pdf"
    defaults = {"unimodal": 1.0}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return CoBeliefHead(embedding_dims, num_classes, unimodal=self.options.unimodal)

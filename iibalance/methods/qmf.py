"""QMF: quality-aware multimodal fusion by energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Batch, Split
from iibalance.methods.heads import (
    Losses,
    SeparateHead,
    own_cross_entropies,
    tempered,
)
from iibalance.methods.tempered import Tempered
from iibalance.nn.head import Embeddings, HeadOutput


class EnergyHead(SeparateHead):
    """One classifier an embedding, fused by energy.

    The prediction is sum_m c_m l_m with the confidence c_m = logsumexp(l_m) / 10, not
    differentiated through.

    >>> head = EnergyHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head([torch.zeros(2, 4), torch.zeros(2, 2)], torch.tensor([1, 0])).weights.shape
    torch.Size([2, 2])
    """

    @staticmethod
    def confidence(logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """c [B, M], 0 where the modality is missing."""
        values = torch.stack([part.float().logsumexp(-1) for part in logits], 1) / 10
        return values if mask is None else values.masked_fill(~mask, 0.0)

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool).

        ``weights`` are the confidences over their sum.
        """
        logits = self.heads(embeddings, mask)
        confidence = self.confidence(logits, mask)
        fused = sum(confidence[:, index, None] * values for index, values in enumerate(logits))
        weights = confidence.clamp_min(0) + (1e-12 if mask is None else 1e-12 * mask)
        return HeadOutput(
            fused / self.log_temperature.exp(),
            weights / weights.sum(1, keepdim=True),
            None,
            tempered(logits, self.own_temperature),
        )

    def losses(self, embeddings: list[Tensor], targets: Tensor, mask: Tensor | None) -> HeadOutput:
        """The sum of fused and own cross-entropies.

        ``weights`` are the confidences, with their graph.
        """
        logits = self.heads(embeddings, mask)
        confidence = self.confidence(logits, mask)
        fixed = confidence.detach()
        fused = sum(fixed[:, index, None] * values for index, values in enumerate(logits))
        loss = F.cross_entropy(fused.float(), targets)
        parts = Losses(loss, own_cross_entropies(logits, targets, mask))
        total = parts.fused + parts.unimodal.sum()
        return HeadOutput(fused, confidence, None, tuple(logits), total, parts)


class QMF(Tempered):
    """Energy-weighted late fusion whose confidences are ranked by how well a sample was learnt.

    Zhang, Wu, Zhang, Hu, Fu, Zhou, Peng: "Provable Dynamic Fusion for Low-Quality Multimodal Data",
    ICML 2023, equations 9 to 15. For any number of modalities.

    The history kappa_m,i is the mean of sample i's own cross-entropies in modality m over the
    epochs so far, scaled to [0, 1] over the training split. With the confidences c_m of
    :class:`EnergyHead` and the pairs (i, j) of neighbours in the batch:

        L = CE(sum_m c_m l_m) + sum_m CE(l_m) + weight sum_m mean_ij R_m,ij
        R_m,ij = max(0, g (c_m,i - c_m,j) + |kappa_m,i - kappa_m,j|)
        g = sign(kappa_m,i - kappa_m,j)

    So the sample of a pair that is learnt worse is to have the lower confidence, by the difference
    of the histories. Pairs of equal history contribute nothing.

    Parameters: ``weight`` (0.1).

    The first sample is learnt worse by 0.7 and yet more confident by 0.8:

    >>> QMF.ranking(torch.tensor([1.0, 0.2]), torch.tensor([0.8, 0.1]))
    tensor(1.5000)
    """

    name = "qmf"
    processes = False  # a sample's history would be spread over the processes
    defaults = {"weight": 0.1}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return EnergyHead(embedding_dims, num_classes)

    @staticmethod
    def ranking(confidence: Tensor, history: Tensor) -> Tensor:
        """The ranking loss of one modality, from its samples' confidences and histories, [B] each.

        The pairs are neighbours in the batch, and the last with the first.
        """
        gap = history - history.roll(-1)
        terms = (gap.sign() * (confidence - confidence.roll(-1)) + gap.abs()).clamp_min(0)
        return terms.masked_fill(gap == 0, 0.0).mean()

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        if "sum" not in self.state:
            self.state |= {
                "sum": torch.zeros(train.mask.shape),
                "count": torch.zeros(train.mask.shape),
            }

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        if "sum" not in self.state or batch.index is None:
            raise ValueError(
                "qmf: needs each sample's history; call before_epoch(model, train, progress) "
                "before each epoch, and give batches with their index"
            )
        sums, count, index = self.state["sum"], self.state["count"], batch.index.cpu()
        seen = count > 0
        history = sums / count.clamp_min(1)
        low = history.masked_fill(~seen, torch.inf).min(0).values
        high = history.masked_fill(~seen, -torch.inf).max(0).values
        scaled = torch.where(seen, (history - low) / (high - low).clamp_min(1e-12), 0.0)
        history = scaled[index].to(output.weights)  # [B, M]
        mask = batch.mask
        if mask is None:
            mask = torch.ones_like(output.weights, dtype=torch.bool)
        loss = output.loss
        for m, logits in enumerate(output.modality_logits):
            rows = mask[:, m] & (batch.targets != -100)
            if int(rows.sum()) > 1:
                loss = loss + self.options.weight * self.ranking(
                    output.weights[rows, m], history[rows, m]
                )
            with torch.no_grad():
                rows = rows.cpu()
                own = F.cross_entropy(logits.float(), batch.targets, reduction="none").cpu()
                sums[index[rows], m] += own[rows]
                count[index[rows], m] += 1
        return loss

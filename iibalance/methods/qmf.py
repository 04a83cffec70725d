"""QMF: quality-aware multimodal fusion by energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Batch, Split
from iibalance.errors import as_sequence, check_names
from iibalance.methods.base import Method
from iibalance.methods.concat import present_only
from iibalance.methods.heads import Losses, own_cross_entropies
from iibalance.metrics import fit_temperature
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import HeadOutput
from iibalance.nn.model import MultimodalClassifier, embed_split


class EnergyHead(nn.Module):
    """One classifier an embedding; the prediction is sum_m c_m l_m with the confidence c_m = logsumexp(l_m) / 10, not differentiated through.

    >>> head = EnergyHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head([torch.zeros(2, 4), torch.zeros(2, 2)], torch.tensor([1, 0])).weights.shape
    torch.Size([2, 2])
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__()
        self.modalities, self.embedding_dims, self.num_classes = (
            check_names(embedding_dims),
            dict(embedding_dims),
            num_classes,
        )
        self.classifiers = nn.ModuleList(
            nn.Linear(size, num_classes) for size in embedding_dims.values()
        )
        self.register_buffer("log_temperature", torch.zeros(()))
        self.register_buffer("own_temperature", torch.ones(len(embedding_dims)))

    def heads(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None = None
    ) -> list[Tensor]:
        """Each modality's own logits before any temperature, M of [B, K]; rows of a missing modality are 0."""
        embeddings = present_only(as_sequence(embeddings, self.modalities, "embeddings"), mask)
        return present_only(
            [classifier(values) for classifier, values in zip(self.classifiers, embeddings)], mask
        )

    @staticmethod
    def confidence(logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """c [B, M], 0 where the modality is missing."""
        values = torch.stack([part.float().logsumexp(-1) for part in logits], 1) / 10
        return values if mask is None else values.masked_fill(~mask, 0.0)

    def fuse(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None = None
    ) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool); ``weights`` are the confidences over their sum."""
        logits = self.heads(embeddings, mask)
        confidence = self.confidence(logits, mask)
        fused = (
            sum(confidence[:, index, None] * values for index, values in enumerate(logits))
            / self.log_temperature.exp()
        )
        weights = confidence.clamp_min(0) + (1e-12 if mask is None else 1e-12 * mask)
        own = tuple(
            values / temperature for values, temperature in zip(logits, self.own_temperature)
        )
        return HeadOutput(fused, weights / weights.sum(1, keepdim=True), None, own)

    def forward(
        self,
        embeddings: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """As :class:`~iibalance.nn.head.IIBalanceHead`; the loss is the fused and the own cross-entropies' sum, ``weights`` are the confidences with their graph."""
        if targets is None:
            return self.fuse(embeddings, mask)
        logits = self.heads(embeddings, mask)
        confidence = self.confidence(logits, mask)
        fused = sum(
            confidence[:, index, None].detach() * values for index, values in enumerate(logits)
        )
        losses = Losses(
            F.cross_entropy(fused.float(), targets), own_cross_entropies(logits, targets, mask)
        )
        return HeadOutput(
            fused, confidence, None, tuple(logits), losses.fused + losses.unimodal.sum(), losses
        )


class QMF(Method):
    """Energy-weighted late fusion whose confidences are ranked by how well each sample has been learnt.

    Zhang, Wu, Zhang, Hu, Fu, Zhou, Peng: "Provable Dynamic Fusion for Low-Quality Multimodal Data", ICML 2023, equations 9 to 15. With kappa_m,i the mean of sample i's own
    cross-entropies in modality m over the epochs so far, scaled to [0, 1] over the training split, and pairs (i, j) of neighbours in the batch,

        L = CE(sum_m c_m l_m) + sum_m CE(l_m) + weight sum_m mean_ij max(0, g (c_m,i - c_m,j) + |kappa_m,i - kappa_m,j|)

    with g = sign(kappa_i - kappa_j): a sample that is learnt worse is to have the lower confidence. Pairs of equal kappa contribute nothing. Any number of modalities.

    Parameters: ``weight`` (0.1).

    >>> QMF.ranking(torch.tensor([1.0, 0.2]), torch.tensor([0.8, 0.1]))  # the first is learnt worse and yet more confident: 0.8 and 0.7 are missing
    tensor(1.5000)
    """

    name = "qmf"
    processes = False  # a sample's history would be spread over the processes
    defaults = {"weight": 0.1}
    search = {"weight": (0.1, 0.03, 0.5)}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return EnergyHead(embedding_dims, num_classes)

    @staticmethod
    def ranking(confidence: Tensor, history: Tensor) -> Tensor:
        """The ranking loss of one modality's confidences [B] given its samples' histories [B], over neighbouring pairs."""
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
                "qmf: needs each sample's history; call before_epoch(model, train, progress) before each epoch, and give batches with their index"
            )
        sums, count, index = self.state["sum"], self.state["count"], batch.index.cpu()
        seen = count > 0
        history = sums / count.clamp_min(1)
        low, high = (
            history.masked_fill(~seen, torch.inf).min(0).values,
            history.masked_fill(~seen, -torch.inf).max(0).values,
        )
        history = torch.where(seen, (history - low) / (high - low).clamp_min(1e-12), 0.0)[index].to(
            output.weights
        )
        mask = (
            torch.ones_like(output.weights, dtype=torch.bool) if batch.mask is None else batch.mask
        )
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

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        head = model.head
        embeddings, mask = (
            embed_split(model, validation),
            validation.mask.to(head.log_temperature.device),
        )
        head.log_temperature.add_(
            torch.tensor(
                fit_temperature(head.fuse(embeddings, mask).logits.cpu(), validation.targets)
            ).log()
        )
        for index, values in enumerate(head.heads(embeddings)):
            rows = validation.mask[:, index]
            if rows.any():
                head.own_temperature[index] = fit_temperature(
                    values.cpu()[rows], validation.targets[rows]
                )

"""ReconBoost: modalities that learn in turn what the others get wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class SumHead(SeparateHead):
    """One linear classifier an embedding; the prediction is the sum of their logits.

    >>> head = SumHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head([torch.zeros(2, 4), torch.zeros(2, 2)], torch.tensor([1, 0])).logits.shape
    torch.Size([2, 3])
    """

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        logits = self.heads(embeddings, mask)
        own = tempered(logits, self.own_temperature)
        return HeadOutput(sum(logits) / self.log_temperature.exp(), None, None, own)

    def losses(self, embeddings: list[Tensor], targets: Tensor, mask: Tensor | None) -> HeadOutput:
        """The cross-entropy of the sum; ``parts`` holds the modalities' own too."""
        logits = self.heads(embeddings, mask)
        fused = sum(logits)
        loss = F.cross_entropy(fused.float(), targets)
        parts = Losses(loss, own_cross_entropies(logits, targets, mask).detach())
        return HeadOutput(fused, None, None, tuple(logits), loss, parts)


class Turn(NamedTuple):
    """Who learns in an epoch."""

    modality: int | None  #: None: all of them, by the rectification
    before: int | None  #: who learnt in the stage before; None in the first


class ReconBoost(Tempered):
    """Boosting over modalities: in turn each learns what the sum of the others gets wrong.

    Hua, Xu, Bao, Yang, Huang: "ReconBoost: Boosting Can Achieve Modality Reconcilement", ICML 2024.
    For any number M of modalities.

    Stages go round the modalities. In the first part of a stage modality k alone learns; p is the
    softmax of its logits l_k, q that of sum_{j != k} l_j, which is not differentiated, and r that
    of the modality of the stage before:

        L = mean_i -(1 - reconcile q[y_i]) log p[y_i] + memory mean (p - r)^2

    The first term is its own cross-entropy less the agreement with the others: a sample that they
    know already weighs less, by what remains of the label (y - q, the residual of gradient
    boosting, at y). The second consolidates memory. In the second part of a stage all learners
    minimise the cross-entropy of sum_m l_m together: the global rectification. Of each modality the
    newest learner alone is kept.

    The paper itself could not be had: this is written after its abstract, the authors' code and
    others' accounts of it. They call the agreement a KL divergence from q to p over all classes;
    taken away from a cross-entropy that has no lower bound. The code, of which the published
    figures are, keeps the term of the right class, and so is it here.

    What the authors' code does otherwise. Its memory term has no gradient, for both sides are
    detached; here p is differentiated. All its learners share one head of two layers, for which
    embeddings must be of one size; here each has a linear classifier. Its sum has a learnt factor,
    which the temperature stands for here. It starts from encoders that were trained alone, and has
    a new optimiser and four epochs in each part of some hundreds of stages; here training starts
    from scratch, and a part is ``epochs`` long. A modality whose turn it is not has no gradient in
    the first part: the optimiser passes it by, weight decay and moments included.

    Where samples lack a modality, q sums those that are there, and only rows that have modality k
    count (for the memory, those that have both).

    Parameters: ``reconcile`` (0.2), ``memory`` (0.5), ``epochs`` (1).

    Two modalities with parts of one epoch:

    >>> [ReconBoost.turn(epoch, 2, 1).modality for epoch in range(6)]
    [0, None, 1, None, 0, None]
    """

    name = "reconboost"
    # A part of a stage leaves parameters without a gradient, which DistributedDataParallel refuses.
    processes = False
    defaults = {"reconcile": 0.2, "memory": 0.5, "epochs": 1.0}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return SumHead(embedding_dims, num_classes)

    @staticmethod
    def turn(epoch: int, count: int, epochs: int) -> Turn:
        """Who learns in ``epoch``, from 0, of ``count`` modalities."""
        stage, rest = divmod(epoch, 2 * epochs)
        before = (stage - 1) % count if stage else None
        return Turn(stage % count if rest < epochs else None, before)

    @staticmethod
    def boosting(own: Tensor, others: Tensor, targets: Tensor, reconcile: float) -> Tensor:
        """[]: the first term of L, of the learner's logits and the others' summed ones, [B, K].

        The mean over the rows whose target is not -100.
        """
        known = others.detach().float().softmax(-1)
        known = known.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
        losses = F.cross_entropy(own.float(), targets, reduction="none")
        return ((1 - reconcile * known) * losses).sum() / (targets != -100).sum().clamp_min(1)

    @staticmethod
    def consolidation(own: Tensor, before: Tensor, rows: Tensor) -> Tensor:
        """[]: the mean square between both predictions, logits [B, K], over ``rows`` [B] bool."""
        gap = own.float().softmax(-1) - before.detach().float().softmax(-1)
        return gap.square().mean(1)[rows].sum() / rows.sum().clamp_min(1)

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        self.state["epoch"] = self.state.get("epoch", torch.tensor(-1)) + 1

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        if "epoch" not in self.state:
            raise ValueError(
                "reconboost: whose turn it is is not known yet; "
                "call before_epoch(model, train, progress) before each epoch"
            )
        logits: Sequence[Tensor] = output.modality_logits
        epochs = max(1, round(self.options.epochs))
        turn = self.turn(int(self.state["epoch"]), len(logits), epochs)
        if turn.modality is None:
            return output.loss
        own, targets = logits[turn.modality], batch.targets
        there = targets != -100
        if batch.mask is not None:
            there = there & batch.mask[:, turn.modality]
        others = output.logits.detach() - own.detach()
        targets = targets.masked_fill(~there, -100)
        loss = self.boosting(own, others, targets, self.options.reconcile)
        if turn.before is None or turn.before == turn.modality:
            return loss
        if batch.mask is not None:
            there = there & batch.mask[:, turn.before]
        memory = self.consolidation(own, logits[turn.before], there)
        return loss + self.options.memory * memory

"""Balanced training against greedy modality use: re-balancing by conditional learning speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Batch, Split
from iibalance.methods.base import Method
from iibalance.methods.gradients import unwrap
from iibalance.methods.heads import (
    Losses,
    TemperedHead,
    fit_temperatures,
    linear_classifiers,
    own_cross_entropies,
    tempered,
)
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import Embeddings, HeadOutput
from iibalance.nn.missing import fill_missing
from iibalance.nn.model import MultimodalClassifier


class GreedyHead(TemperedHead):
    """Two branches that see each other through one transfer module; their mean is the prediction.

    The module squeezes and excites. With embeddings z_0, z_1: joint = ReLU(W [z_0, z_1] + b),
    h_m = 2 sigmoid(W_m joint + b_m) * z_m, and branch m's logits are linear in h_m.

    In a re-balancing step for modality c (``rebalance``, of training alone) the other one's
    embedding enters the joint squeeze as its running average, so that nothing passes from it to
    branch c. A missing modality enters as its running average too, and the prediction is then the
    other branch's own.

    >>> head = GreedyHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head([torch.zeros(2, 4), torch.zeros(2, 2)], torch.tensor([1, 0])).logits.shape
    torch.Size([2, 3])
    """

    def __init__(
        self, embedding_dims: Mapping[str, int], num_classes: int, *, momentum: float = 0.9
    ):
        super().__init__(embedding_dims, num_classes)
        sizes = list(embedding_dims.values())
        hidden = max(sum(sizes) // 4, 1)
        self.squeeze = nn.Linear(sum(sizes), hidden)
        self.excite = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)
        self.classifiers = linear_classifiers(embedding_dims, num_classes)
        self.momentum, self.rebalance = momentum, None
        for index, size in enumerate(sizes):
            self.register_buffer(f"average_{index}", torch.zeros(size))
        self.register_buffer("own_temperature", torch.ones(len(sizes)))

    def heads(
        self, embeddings: Embeddings, mask: Tensor | None = None, rebalance: int | None = None
    ) -> list[Tensor]:
        """Both branches' logits, M of [B, K]; rows of a missing modality are 0.

        With ``rebalance`` the other modality is its average in what the branches are told.
        """
        embeddings = self.present(embeddings, mask)
        context = []
        for index, values in enumerate(embeddings):
            average = getattr(self, f"average_{index}").to(values.dtype).expand_as(values)
            if rebalance is not None and index != rebalance:
                values = average
            elif mask is not None:
                values = torch.where(mask[:, index, None], values, average)
            context.append(values)
        joint = F.relu(self.squeeze(torch.cat(context, 1)))
        logits = [
            classifier(2 * torch.sigmoid(excite(joint)) * values)
            for excite, classifier, values in zip(self.excite, self.classifiers, embeddings)
        ]
        return fill_missing(logits, mask)

    def own(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """Each branch's logits where the other modality is its average."""
        count = len(self.classifiers)
        return [self.heads(embeddings, mask, index)[index] for index in range(count)]

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool).

        ``modality_logits`` are the branches with nothing but their own modality to see.
        """
        logits = _mean(self.heads(embeddings, mask), mask) / self.log_temperature.exp()
        own = tempered(self.own(embeddings, mask), self.own_temperature)
        return HeadOutput(logits, None, None, own)

    def losses(self, embeddings: list[Tensor], targets: Tensor, mask: Tensor | None) -> HeadOutput:
        """The sum of the branches' cross-entropies."""
        logits = self.heads(embeddings, mask, self.rebalance if self.training else None)
        losses = own_cross_entropies(logits, targets, mask)
        if self.training:
            self._average(embeddings, mask)
        fused = _mean(logits, mask)
        parts = Losses(F.cross_entropy(fused.float(), targets).detach(), losses)
        return HeadOutput(fused, None, None, tuple(logits), losses.sum(), parts)

    @torch.no_grad()
    def _average(self, embeddings: Sequence[Tensor], mask: Tensor | None) -> None:
        for index, values in enumerate(embeddings):
            rows = torch.ones_like(values[:, :1]) if mask is None else mask[:, index, None]
            rows = rows.float()
            if rows.any():
                average = getattr(self, f"average_{index}").mul_(self.momentum)
                average.add_(values.float().sum(0) / rows.sum(), alpha=1 - self.momentum)


def _mean(logits: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    there = len(logits) if mask is None else mask.sum(1, keepdim=True).clamp_min(1)
    return sum(logits) / there


class Greedy(Method):
    """Re-balancing steps whenever one modality is learnt much faster given the other than the
    other way round.

    Wu, Jastrzebski, Cho, Geras: "Characterizing and Overcoming the Greedy Nature of Learning in
    Multi-modal Deep Neural Networks", ICML 2022, section 5, algorithm 1. With
    mu = |gradient|^2 / |parameter|^2 summed over the regular steps so far, for branch m's own
    parameters theta_m and for the parameters theta'_m through which it sees the other modality, the
    conditional learning speed and its gap are

        s_m = log10(sum mu(theta'_m) / sum mu(theta_m)),  d = s_0 - s_1

    Where |d| > ``alpha``, the next ``steps`` steps re-balance: they train with the context from the
    other modality replaced by its running average, for modality 0 if d > 0 (branch 0 learns faster
    from what it is told of modality 1) and for modality 1 if d < 0.

    Defined for two modalities. The paper has such transfer modules between the layers of two
    convolutional networks; here there is one on the embeddings, because any encoder may be given.

    Parameters: ``alpha`` (0.01), ``steps`` (5).

    >>> Greedy.gap([0.1, 1.0], [1.0, 1.0])  # branch 0's own parameters move ten times as fast
    -1.0
    """

    name = "greedy"
    modalities = 2
    processes = False  # the running averages of embeddings are each process's own
    defaults = {"alpha": 0.01, "steps": 5.0}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return GreedyHead(embedding_dims, num_classes)

    @staticmethod
    def gap(bypass: Sequence[float], main: Sequence[float]) -> float:
        """d of the summed mu of both branches' bypass and main parameters."""
        speed = [math.log10(max(b, 1e-30) / max(a, 1e-30)) for b, a in zip(bypass, main)]
        return speed[0] - speed[1]

    @staticmethod
    def parameters(model: nn.Module) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """(bypass, main) parameters of both branches; the squeeze belongs to both bypasses."""
        head = model.head
        bypass = [[*head.excite[m].parameters(), *head.squeeze.parameters()] for m in range(2)]
        main = [
            [*model.encoders[m].parameters(), *head.classifiers[m].parameters()] for m in range(2)
        ]
        return bypass, main

    @torch.no_grad()
    def after_backward(self, model: nn.Module, batch: Batch, output) -> None:
        model = unwrap(model)
        left, caring = int(self.state.get("left", torch.tensor(0))), -1
        if left:  # this was a re-balancing step: it does not count for the speeds
            left -= 1
            caring = int(self.state["caring"]) if left else -1
        else:
            sums = self.state.get("sums", torch.zeros(2, 2, dtype=torch.float64))  # bypass, main
            for row, parts in enumerate(self.parameters(model)):
                for m, values in enumerate(parts):
                    gradients = (value.grad for value in values if value.grad is not None)
                    sums[row, m] += _square(gradients) / max(_square(values), 1e-30)
            self.state["sums"] = sums
            gap = self.gap(sums[0].tolist(), sums[1].tolist())
            if abs(gap) > self.options.alpha:
                left, caring = max(1, round(self.options.steps)), 0 if gap > 0 else 1
        self.state |= {"left": torch.tensor(left), "caring": torch.tensor(caring)}
        model.head.rebalance = caring if caring >= 0 else None

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        caring = int(self.state.get("caring", torch.tensor(-1)))
        unwrap(model).head.rebalance = caring if caring >= 0 else None  # also after a resume

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        fit_temperatures(model, validation, own=model.head.own)


def _square(tensors: Iterable[Tensor]) -> float:
    """The squared length of all of them together."""
    return sum(float(value.square().sum()) for value in tensors)

"""What Gradient-Blending and MMPareto share: a classifier on the concatenated embeddings beside one on each embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Split
from iibalance.errors import as_sequence, check_names
from iibalance.methods.base import Method
from iibalance.methods.concat import present_only
from iibalance.metrics import fit_temperature
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import HeadOutput
from iibalance.nn.model import MultimodalClassifier, embed_split


class Losses(NamedTuple):
    """Cross-entropies of a batch, nats."""

    fused: Tensor  #: []
    unimodal: Tensor  #: [M], each over the samples that have the modality


class MultitaskHead(nn.Module):
    """One linear classifier on the concatenated embeddings and one on each; the prediction is the former's, ``modality_logits`` are the latter's.

    A missing modality's embedding is zero in the former and does not count in the latter. Temperatures are fitted by :meth:`fit_temperatures`.

    >>> head = MultitaskHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> out = head([torch.zeros(2, 4), torch.zeros(2, 2)], torch.tensor([1, 0]))
    >>> out.parts.unimodal.shape
    torch.Size([2])
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__()
        self.modalities, self.embedding_dims, self.num_classes = (
            check_names(embedding_dims),
            dict(embedding_dims),
            num_classes,
        )
        self.classifier = nn.Linear(sum(embedding_dims.values()), num_classes)
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

    def fuse(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None = None
    ) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        embeddings = present_only(as_sequence(embeddings, self.modalities, "embeddings"), mask)
        own = tuple(
            values / temperature
            for values, temperature in zip(self.heads(embeddings, mask), self.own_temperature)
        )
        return HeadOutput(
            self.classifier(torch.cat(embeddings, 1)) / self.log_temperature.exp(), None, None, own
        )

    def forward(
        self,
        embeddings: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """As :class:`~iibalance.nn.head.IIBalanceHead`; the loss is the plain sum of all cross-entropies, ``parts`` holds them."""
        if targets is None:
            return self.fuse(embeddings, mask)
        embeddings = present_only(as_sequence(embeddings, self.modalities, "embeddings"), mask)
        logits, own = self.classifier(torch.cat(embeddings, 1)), self.heads(embeddings, mask)
        losses = Losses(
            F.cross_entropy(logits.float(), targets), own_cross_entropies(own, targets, mask)
        )
        return HeadOutput(
            logits,
            None,
            None,
            tuple(own),
            losses.fused + losses.unimodal.sum(),
            losses,
            tuple(embeddings),
        )

    @torch.no_grad()
    def fit_temperatures(self, model: MultimodalClassifier, validation: Split) -> None:
        """One temperature for the prediction and one for each own classifier, on held-out samples."""
        embeddings, mask = embed_split(model, validation), validation.mask
        logits = self.classifier(
            torch.cat(present_only(embeddings, mask.to(embeddings[0].device)), 1)
        )
        self.log_temperature.copy_(
            torch.tensor(fit_temperature(logits.cpu(), validation.targets)).log()
        )
        for index, values in enumerate(self.heads(embeddings)):
            rows = mask[:, index]
            if rows.any():
                self.own_temperature[index] = fit_temperature(
                    values.cpu()[rows], validation.targets[rows]
                )


def own_cross_entropies(logits: Sequence[Tensor], targets: Tensor, mask: Tensor | None) -> Tensor:
    """[M]: each modality's mean cross-entropy over the samples that have it (0 where none does)."""
    losses = []
    for index, values in enumerate(logits):
        own = targets if mask is None else targets.masked_fill(~mask[:, index], -100)
        losses.append(
            F.cross_entropy(values.float(), own, reduction="sum") / (own != -100).sum().clamp_min(1)
        )
    return torch.stack(losses)


class Multitask(Method):
    """Base of the methods that train a :class:`MultitaskHead`."""

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return MultitaskHead(embedding_dims, num_classes)

    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        model.head.fit_temperatures(model, validation)

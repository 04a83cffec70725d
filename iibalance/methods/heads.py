"""Heads that several methods share, and the one temperature fit of all that have no gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Split
from iibalance.errors import as_sequence, check_names
from iibalance.metrics import fit_temperature, own_temperatures
from iibalance.nn.head import Embeddings, HeadOutput
from iibalance.nn.missing import fill_missing
from iibalance.nn.model import MultimodalClassifier, embed_split


class Losses(NamedTuple):
    """Cross-entropies of a batch, nats."""

    fused: Tensor  #: []
    unimodal: Tensor  #: [M], each over the samples that have the modality


class TemperedHead(nn.Module):
    """Base of the heads here: names, sizes, and a temperature of the fused prediction.

    A class of it has ``fuse(embeddings, mask)``, which predicts, and ``losses(embeddings, targets,
    mask)``, which gives the training's output with its loss for embeddings in order.
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__()
        self.modalities = check_names(embedding_dims)
        self.embedding_dims, self.num_classes = dict(embedding_dims), num_classes
        self.register_buffer("log_temperature", torch.zeros(()))

    def present(self, embeddings: Embeddings, mask: Tensor | None) -> list[Tensor]:
        """The embeddings in order, M of [B, D_m]; rows of missing modalities are 0."""
        return fill_missing(as_sequence(embeddings, self.modalities, "embeddings"), mask)

    def cool(self, temperature: float) -> None:
        """Divide the fused logits by ``temperature`` from now on, beside what divides them now."""
        self.log_temperature.add_(math.log(temperature))

    def forward(
        self,
        embeddings: Embeddings,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """As :class:`~iibalance.nn.head.IIBalanceHead`: predict, with ``targets`` the loss too."""
        if targets is None:
            return self.fuse(embeddings, mask)
        return self.losses(self.present(embeddings, mask), targets, mask)


class SeparateHead(TemperedHead):
    """Base of the heads with one linear classifier an embedding, ``classifiers``."""

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__(embedding_dims, num_classes)
        self.classifiers = linear_classifiers(embedding_dims, num_classes)
        self.register_buffer("own_temperature", torch.ones(len(embedding_dims)))

    def heads(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """Each modality's own logits before any temperature, M of [B, K]; missing rows are 0."""
        return classify(self.classifiers, self.present(embeddings, mask), mask)


class ProbedHead(TemperedHead):
    """Base of the heads whose branches have no classifier of their own.

    Their ``modality_logits`` come from linear probes that :meth:`fit_probes` fits on each frozen
    branch: what a branch of the joint model can tell by itself. There are none before that. A class
    of it calls :meth:`add_probes` once its own layers are there.
    """

    def add_probes(self) -> None:
        """A linear probe a modality, of zeros, which no training moves."""
        self.probes = nn.ModuleList(
            nn.Linear(size, self.num_classes) for size in self.embedding_dims.values()
        ).requires_grad_(False)
        self.register_buffer("probed", torch.tensor(False))
        for probe in self.probes:
            nn.init.zeros_(probe.weight)
            nn.init.zeros_(probe.bias)

    def probe(self, embeddings: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        """The probes' logits, M of [B, K], rows of missing modalities 0; none before they fit."""
        if not self.probed:
            return ()
        own = [probe(values) for probe, values in zip(self.probes, embeddings)]
        return tuple(fill_missing(own, mask))

    def fit_probes(self, embeddings: Sequence[Tensor], targets: Tensor, mask: Tensor) -> None:
        """Logistic regression on each branch's training embeddings, M of [N, D_m].

        Rows of a missing modality do not count. A branch that training shows for one class only
        keeps its neutral probe.
        """
        from sklearn.linear_model import LogisticRegression

        self.probed.fill_(True)
        for index, (probe, values) in enumerate(zip(self.probes, embeddings)):
            rows = mask[:, index]
            x, y = values[rows].cpu().double(), targets[rows]
            if len(y.unique()) < 2:
                continue
            mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
            # 0.06 against 3.7 s a fit: BLAS threads only wait for each other at this size.
            with threadpool_limits(1, user_api="blas"):
                model = LogisticRegression(C=0.1, max_iter=1000)
                model.fit(((x - mean) / std).numpy(), y.numpy())
            weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
            if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            weight = weight / std
            full = torch.full((self.num_classes,), -30.0, dtype=torch.float64)
            full[model.classes_] = bias - weight @ mean
            probe.bias.copy_(full)
            probe.weight.zero_()
            probe.weight[model.classes_] = weight.to(probe.weight)


class ConcatHead(ProbedHead):
    """Linear classifier on concatenated embeddings; a missing modality's part is zero.

    >>> head = ConcatHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head([torch.zeros(1, 4), torch.zeros(1, 2)], torch.tensor([1])).logits.shape
    torch.Size([1, 3])
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__(embedding_dims, num_classes)
        self.classifier = nn.Linear(sum(embedding_dims.values()), num_classes)
        self.add_probes()

    def slices(self) -> tuple[Tensor, ...]:
        """The classifier's weight on each modality's embedding, M of [K, D_m] views."""
        return self.classifier.weight.split(list(self.embedding_dims.values()), 1)

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        embeddings = self.present(embeddings, mask)
        logits = self.classifier(torch.cat(embeddings, 1)) / self.log_temperature.exp()
        return HeadOutput(logits, None, None, self.probe(embeddings, mask))

    def losses(self, embeddings: list[Tensor], targets: Tensor, mask: Tensor | None) -> HeadOutput:
        """The cross-entropy of the one classifier."""
        logits = self.classifier(torch.cat(embeddings, 1))
        loss = F.cross_entropy(logits.float(), targets)
        return HeadOutput(logits, None, None, (), loss, embeddings=tuple(embeddings))


class MultitaskHead(TemperedHead):
    """One linear classifier on the concatenated embeddings and one on each.

    The prediction is the former's, ``modality_logits`` are the latter's. A missing modality's
    embedding is zero in the former and does not count in the latter.

    >>> head = MultitaskHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> out = head([torch.zeros(2, 4), torch.zeros(2, 2)], torch.tensor([1, 0]))
    >>> out.parts.unimodal.shape
    torch.Size([2])
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__(embedding_dims, num_classes)
        self.classifier = nn.Linear(sum(embedding_dims.values()), num_classes)
        self.classifiers = linear_classifiers(embedding_dims, num_classes)
        self.register_buffer("own_temperature", torch.ones(len(embedding_dims)))

    def heads(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """Each modality's own logits before any temperature, M of [B, K]; missing rows are 0."""
        return classify(self.classifiers, self.present(embeddings, mask), mask)

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        embeddings = self.present(embeddings, mask)
        logits = self.classifier(torch.cat(embeddings, 1)) / self.log_temperature.exp()
        own = tempered(self.heads(embeddings, mask), self.own_temperature)
        return HeadOutput(logits, None, None, own)

    def losses(self, embeddings: list[Tensor], targets: Tensor, mask: Tensor | None) -> HeadOutput:
        """The plain sum of all cross-entropies; ``parts`` holds them."""
        logits, own = self.classifier(torch.cat(embeddings, 1)), self.heads(embeddings, mask)
        fused = F.cross_entropy(logits.float(), targets)
        parts = Losses(fused, own_cross_entropies(own, targets, mask))
        total = parts.fused + parts.unimodal.sum()
        return HeadOutput(logits, None, None, tuple(own), total, parts, tuple(embeddings))


def linear_classifiers(embedding_dims: Mapping[str, int], num_classes: int) -> nn.ModuleList:
    """A linear classifier a modality."""
    return nn.ModuleList(nn.Linear(size, num_classes) for size in embedding_dims.values())


def classify(
    classifiers: nn.ModuleList, embeddings: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """Each modality's logits, M of [B, K]; rows of missing modalities are 0."""
    logits = [classifier(values) for classifier, values in zip(classifiers, embeddings)]
    return fill_missing(logits, mask)


def tempered(logits: Sequence[Tensor], temperatures: Tensor) -> tuple[Tensor, ...]:
    """Each modality's logits, M of [B, K], divided by its temperature [M]."""
    return tuple(values / temperature for values, temperature in zip(logits, temperatures))


def own_cross_entropies(logits: Sequence[Tensor], targets: Tensor, mask: Tensor | None) -> Tensor:
    """[M]: each modality's mean cross-entropy over the samples that have it (0 without any)."""
    losses = []
    for index, values in enumerate(logits):
        own = targets if mask is None else targets.masked_fill(~mask[:, index], -100)
        total = F.cross_entropy(values.float(), own, reduction="sum")
        losses.append(total / (own != -100).sum().clamp_min(1))
    return torch.stack(losses)


@torch.no_grad()
def fit_temperatures(
    model: MultimodalClassifier,
    validation: Split,
    *,
    fused: bool = True,
    own: Callable[..., list[Tensor]] | None = None,
) -> None:
    """Calibrate a head that has no gate, on held-out samples.

    One temperature for the fused prediction (with ``fused``), and one for each modality's own,
    where the head has such predictions: ``head.heads`` by default, or what ``own`` gives for
    (embeddings, mask).
    """
    head, embeddings = model.head, embed_split(model, validation)
    mask = validation.mask.to(embeddings[0].device)
    if fused:
        logits = head.fuse(embeddings, mask).logits.cpu()
        head.cool(fit_temperature(logits, validation.targets))
    own = own or getattr(head, "heads", None)
    if own is not None:
        logits = [values.cpu() for values in own(embeddings, mask)]
        found = own_temperatures(logits, validation.targets, validation.mask)
        head.own_temperature.copy_(found)

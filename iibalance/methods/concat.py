"""The plain baseline: one linear classifier on the concatenated embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Split
from iibalance.errors import as_sequence, check_names
from iibalance.methods.base import Method
from iibalance.metrics import fit_temperature
from iibalance.nn.calibration import HeldOut
from iibalance.nn.head import HeadOutput
from iibalance.nn.model import MultimodalClassifier, embed_split


class ConcatHead(nn.Module):
    """Linear classifier on concatenated embeddings; a missing modality's part is zero. One temperature, fitted after training.

    ``modality_logits`` come from linear probes that :meth:`fit_probes` fits on each frozen branch: what a branch of the joint model can tell by itself. There
    are none before that.

    >>> head = ConcatHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head([torch.zeros(1, 4), torch.zeros(1, 2)], torch.tensor([1])).logits.shape
    torch.Size([1, 3])
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__()
        self.modalities, self.embedding_dims, self.num_classes = (
            check_names(embedding_dims),
            dict(embedding_dims),
            num_classes,
        )
        self.classifier = nn.Linear(sum(embedding_dims.values()), num_classes)
        self.probes = nn.ModuleList(
            nn.Linear(size, num_classes) for size in embedding_dims.values()
        ).requires_grad_(False)
        self.register_buffer("log_temperature", torch.zeros(()))
        self.register_buffer("probed", torch.tensor(False))
        for probe in self.probes:
            nn.init.zeros_(probe.weight)
            nn.init.zeros_(probe.bias)

    def slices(self) -> tuple[Tensor, ...]:
        """The classifier's weight on each modality's embedding, M of [K, D_m] views."""
        return self.classifier.weight.split(list(self.embedding_dims.values()), 1)

    def _logits(self, embeddings: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        return self.classifier(torch.cat(present_only(embeddings, mask), 1))

    def fuse(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None = None
    ) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        own = []
        if self.probed:
            own = [probe(values) for probe, values in zip(self.probes, embeddings)]
        if mask is not None:
            own = [
                values.masked_fill(~mask[:, index, None], 0.0) for index, values in enumerate(own)
            ]
        return HeadOutput(
            self._logits(embeddings, mask) / self.log_temperature.exp(), None, None, tuple(own)
        )

    def forward(
        self,
        embeddings: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """As :class:`~iibalance.nn.head.IIBalanceHead`; the loss is the cross-entropy of the one classifier."""
        if targets is None:
            return self.fuse(embeddings, mask)
        embeddings = present_only(as_sequence(embeddings, self.modalities, "embeddings"), mask)
        logits = self.classifier(torch.cat(embeddings, 1))
        return HeadOutput(
            logits,
            None,
            None,
            (),
            F.cross_entropy(logits.float(), targets),
            embeddings=tuple(embeddings),
        )

    def fit_probes(self, embeddings: Sequence[Tensor], targets: Tensor, mask: Tensor) -> None:
        """Logistic regression on each branch's training embeddings, M of [N, D_m]; rows of a missing modality do not count. A branch that training shows
        for one class only keeps its neutral probe."""
        from sklearn.linear_model import LogisticRegression

        self.probed.fill_(True)
        for index, (probe, values) in enumerate(zip(self.probes, embeddings)):
            rows = mask[:, index]
            x, y = values[rows].cpu().double(), targets[rows]
            if len(y.unique()) < 2:
                continue
            mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
            with threadpool_limits(
                1, user_api="blas"
            ):  # 0.06 against 3.7 s a fit: BLAS threads only wait for each other at this size
                model = LogisticRegression(C=0.1, max_iter=1000).fit(
                    ((x - mean) / std).numpy(), y.numpy()
                )
            weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
            if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            weight, full = weight / std, torch.zeros(self.num_classes, dtype=torch.float64)
            full[:] = -30.0
            full[model.classes_] = bias - weight @ mean
            probe.bias.copy_(full)
            probe.weight.zero_()
            probe.weight[model.classes_] = weight.to(probe.weight)


def present_only(embeddings: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The embeddings (M of [B, D_m]) with the rows of missing modalities 0, whatever they held."""
    return (
        list(embeddings)
        if mask is None
        else [
            values.masked_fill(~mask[:, index, None], 0.0)
            for index, values in enumerate(embeddings)
        ]
    )


class Concat(Method):
    """Concatenated embeddings, one linear classifier, cross-entropy; one temperature fitted on validation data."""

    name = "concat"

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return ConcatHead(embedding_dims, num_classes)

    @torch.no_grad()
    def calibrate(
        self,
        model: MultimodalClassifier,
        train: Split,
        validation: Split,
        out_of_fold: HeldOut | None,
        seed: int,
    ) -> None:
        head, device = model.head, model.head.log_temperature.device
        fused = head.fuse(embed_split(model, validation), validation.mask.to(device)).logits.cpu()
        head.log_temperature.add_(
            torch.tensor(fit_temperature(fused, validation.targets)).log().to(device)
        )
        head.fit_probes(embed_split(model, train), train.targets, train.mask)

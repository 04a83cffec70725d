"""The EMA prototype bank (method page, section 2) and the gate's surprise (section 4).

One prototype per class and modality, the same on every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import iib_kernels
from iib_kernels import cpu
from iibalance.config import ObjectiveConfig
from iibalance.errors import as_sequence

# In standard deviations: a new subject's clean samples lie a little farther out than those the
# spread was measured on, and are no surprise.
USUAL = 2.0


class PrototypeBank(nn.Module):
    """Class prototypes of every modality, as buffers that move, save and load with the model.

    A class takes the mean of its embeddings the first time it is seen, and moves by ``momentum``
    afterwards; classes not yet seen are left out of every softmax. Prototypes are kept in float32
    whatever the embeddings' dtype.

    Under ``torch.distributed`` class sums and counts are summed over the processes first, so all
    ranks hold the same prototypes as one process that had seen the whole batch.

    Args:
        embedding_dims: modality name -> D_m, the embedding's size.
        num_classes: K.
        momentum: mu of the moving average, in [0, 1).
        metric: ``"cosine"`` (embeddings and prototypes are L2-normalised) or ``"sqeuclidean"``.
        impl: ``iib_kernels`` implementation.

    Source: arXiv 2603.17347 (EMA prototypes); the equations are this project's own formulation.

    >>> bank = PrototypeBank({"audio": 4, "visual": 3}, num_classes=2)
    >>> targets = torch.tensor([0, 1, 1])
    >>> bank.update({"audio": torch.eye(4)[:3], "visual": torch.eye(3)}, targets)
    >>> bank.seen.tolist()
    [[True, True], [True, True]]
    >>> bank.nearest({"audio": torch.eye(4)[:1], "visual": torch.eye(3)[:1]})  # class 0's own
    tensor([[0., 0.]])
    """

    def __init__(
        self,
        embedding_dims: Mapping[str, int],
        num_classes: int,
        *,
        momentum: float = ObjectiveConfig.momentum,
        metric: str = "cosine",
        impl: str = "auto",
    ):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.modalities = tuple(embedding_dims)
        self.num_classes, self.momentum = num_classes, momentum
        self.metric, self.impl = metric, impl
        for index, size in enumerate(embedding_dims.values()):
            self.register_buffer(f"prototypes_{index}", torch.zeros(num_classes, size))
            counts = torch.zeros(num_classes, dtype=torch.int64)
            self.register_buffer(f"counts_{index}", counts)
        self._complete = False  # all classes seen by all modalities: then they stay so
        self.register_load_state_dict_post_hook(_look_again)
        # Mean of the novelty of held-out samples, and its standard deviation.
        self.register_buffer("usual", torch.zeros(len(self.modalities), 2))
        self.register_buffer("spread", torch.ones(len(self.modalities), 2))

    def table(self, index: int) -> tuple[Tensor, Tensor]:
        """Prototypes [K, D_m] float32 and counts [K] int64 of one modality, as they are kept."""
        return self._buffers[f"prototypes_{index}"], self._buffers[f"counts_{index}"]

    @property
    def prototypes(self) -> list[Tensor]:
        """The prototypes, [K, D_m] float32 a modality."""
        return [self.table(index)[0] for index in range(len(self.modalities))]

    @property
    def counts(self) -> Tensor:
        """How many samples of each class have been seen, [M, K] int64."""
        return torch.stack([self.table(index)[1] for index in range(len(self.modalities))])

    @property
    def seen(self) -> Tensor:
        """Which classes have a prototype, [M, K] bool."""
        return self.counts > 0

    @property
    def complete(self) -> bool:
        """Whether every class has a prototype in every modality; False on the meta device."""
        if not self._complete:
            seen = self.seen
            self._complete = not seen.is_meta and bool(seen.all())
        return self._complete

    @torch.no_grad()
    def update(
        self,
        embeddings: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor,
        mask: Tensor | None = None,
        *,
        ignore_index: int = -100,
    ) -> None:
        """Move the prototypes towards the batch.

        Args:
            embeddings: M of [B, D_m].
            targets: [B] int64; rows of ``ignore_index`` do not count.
            mask: [B, M] bool, True = present; rows of a missing modality do not count.
        """
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        if not shared and mask is None and self.metric == "cosine" and ignore_index == -100:
            tables = self.prototypes
            same_size = tables[0].shape[1] == embeddings[0].shape[1]
            takes = cpu.takes(self.impl, targets, self.num_classes, tables, embeddings)
            if takes and same_size:
                stacked = torch.stack([values.detach() for values in embeddings])
                self.update_rows(cpu.unit(stacked)[0], targets)
                return
        common = {"metric": self.metric, "ignore_index": ignore_index, "impl": self.impl}
        tables = [self.table(index) for index in range(len(self.modalities))]
        if not shared:
            prototypes, counts = zip(*tables)
            iib_kernels.update_prototypes_(
                prototypes,
                counts,
                embeddings,
                targets,
                momentum=self.momentum,
                mask=mask,
                **common,
            )
            return
        for index, (before, embedding) in enumerate(zip(tables, embeddings)):
            rows = targets
            if mask is not None:
                rows = targets.masked_fill(~mask[:, index], ignore_index)
            sums = iib_kernels.class_sums(embedding, rows, self.num_classes, **common)
            for value in sums:
                dist.all_reduce(value)
            after = iib_kernels.ema_from_sums(
                *before, *sums, momentum=self.momentum, metric=self.metric
            )
            for kept, new in zip(before, after):
                kept.copy_(new)

    def update_rows(self, rows: Tensor, targets: Tensor) -> None:
        """The CPU's fast path of :meth:`update`, in one process.

        ``rows`` [M, B, D] are embeddings of one size at unit length, all present; targets [B] are
        in [0, K).
        """
        prototypes, counts = zip(*(self.table(index) for index in range(len(self.modalities))))
        cpu.update(prototypes, counts, rows, targets, self.momentum, self.complete)

    def nearest(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Squared distance to the nearest prototype of a seen class, [B, M]."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        return iib_kernels.nearest_prototype(
            embeddings,
            self.prototypes,
            metric=self.metric,
            seen=list(self.seen),
            impl=self.impl,
        ).distance

    def novelty(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """[B, M, 2]: distance to the nearest prototype, and log length of the embedding.

        The cosine does not see length, and length is what noise changes most.
        """
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        lengths = [values.float().norm(dim=1).clamp_min(1e-12).log() for values in embeddings]
        return torch.stack([self.nearest(embeddings).float(), torch.stack(lengths, 1)], -1)

    def surprise(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """[B, M] >= 0: how much more unusual a sample is than clean held-out ones are.

        0 for most clean samples. What is usual is set by :meth:`set_usual`; the formula is that of
        :func:`surprise`.
        """
        return surprise(self.novelty(embeddings), self.usual, self.spread)

    @torch.no_grad()
    def set_usual(self, novelty: Tensor, mask: Tensor | None = None) -> None:
        """Set what is usual from the novelty [N, M, 2] of clean held-out samples.

        Only rows in which a modality is present count for it (``mask`` [N, M] bool).
        """
        usual, spread = usual_novelty(novelty, mask)
        self.usual.copy_(usual)
        self.spread.copy_(spread)


def _look_again(bank: PrototypeBank, _) -> None:
    """After other tables were loaded: which classes they hold is not known."""
    bank._complete = False


def usual_novelty(novelty: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [M, 2] of the novelty [N, M, 2] of clean samples.

    0 and 1 for a modality with fewer than two samples.
    """
    values = novelty.double()
    rows = torch.ones_like(values[..., 0], dtype=torch.bool) if mask is None else mask
    rows = rows[..., None]
    count = rows.sum(0)
    mean = values.masked_fill(~rows, 0.0).sum(0) / count.clamp_min(1)
    variance = (values - mean).square().masked_fill(~rows, 0.0).sum(0).div(count.clamp_min(1))
    spread = variance.sqrt().clamp_min(1e-3)
    return torch.where(count > 1, mean, 0.0).float(), torch.where(count > 1, spread, 1.0).float()


def surprise(novelty: Tensor, usual: Tensor, spread: Tensor) -> Tensor:
    """[B, M]: max(0, max(z, |v|) - 2), z and v the novelty's two columns standardised.

    Farther than usual counts, nearer does not; length counts both ways.

    >>> novelty = torch.tensor([[[0.5, 1.0]], [[0.5, 4.0]], [[0.1, 1.0]]])
    >>> usual, spread = torch.tensor([[0.4, 1.0]]), torch.tensor([[0.1, 1.0]])
    >>> surprise(novelty, usual, spread).squeeze(1)  # the second is unusually long, the third near
    tensor([0., 1., 0.])
    """
    distance, length = ((novelty - usual) / spread).unbind(-1)
    return (torch.maximum(distance, length.abs()) - USUAL).clamp_min(0)

"""The EMA prototype bank (method page, section 2): one prototype per class and modality, the same on every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import iib_kernels
from iib_kernels import cpu
from iibalance.errors import as_sequence

USUAL = 2.0  # standard deviations: a new subject's clean samples lie a little farther out than those the spread was measured on, and are no surprise


class PrototypeBank(nn.Module):
    """Class prototypes of every modality, as buffers that move, save and load with the model.

    Args:
        embedding_dims: modality name -> D_m, the embedding's size.
        num_classes: K.
        momentum: mu of the moving average, in [0, 1).
        metric: ``"cosine"`` (embeddings and prototypes are L2-normalised) or ``"sqeuclidean"``.

    A class takes the mean of its embeddings the first time it is seen, and moves by ``momentum`` afterwards; classes not yet seen are left out
    of every softmax. Under ``torch.distributed`` class sums and counts are summed over the processes first, so all ranks hold the same
    prototypes as one process that had seen the whole batch. Prototypes are kept in float32 whatever the embeddings' dtype.

    Source: arXiv 2603.17347 (EMA prototypes); the equations are this project's own formulation.

    >>> bank = PrototypeBank({"audio": 4, "visual": 3}, num_classes=2)
    >>> targets = torch.tensor([0, 1, 1])
    >>> bank.update({"audio": torch.eye(4)[:3], "visual": torch.eye(3)}, targets)
    >>> bank.seen.tolist()
    [[True, True], [True, True]]
    >>> bank.nearest({"audio": torch.eye(4)[:1], "visual": torch.eye(3)[:1]})  # both lie on their class's prototype
    tensor([[0., 0.]])
    """

    def __init__(
        self,
        embedding_dims: Mapping[str, int],
        num_classes: int,
        *,
        momentum: float = 0.9,
        metric: str = "cosine",
        impl: str = "auto",
    ):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.modalities = tuple(embedding_dims)
        self.num_classes, self.momentum, self.metric, self.impl = (
            num_classes,
            momentum,
            metric,
            impl,
        )
        for index, size in enumerate(embedding_dims.values()):
            self.register_buffer(f"prototypes_{index}", torch.zeros(num_classes, size))
            self.register_buffer(f"counts_{index}", torch.zeros(num_classes, dtype=torch.int64))
        self._names = (
            [f"prototypes_{index}" for index in range(len(self.modalities))],
            [f"counts_{index}" for index in range(len(self.modalities))],
        )
        self._complete = False  # all classes seen by all modalities: then they stay so
        self.register_load_state_dict_post_hook(
            lambda module, _: setattr(module, "_complete", False)
        )
        self.register_buffer(
            "usual", torch.zeros(len(self.modalities), 2)
        )  # mean of the novelty of held-out samples,
        self.register_buffer(
            "spread", torch.ones(len(self.modalities), 2)
        )  # and its standard deviation

    @property
    def prototypes(self) -> list[Tensor]:
        """The prototypes, [K, D_m] float32 a modality."""
        return [self._buffers[name] for name in self._names[0]]

    @property
    def counts(self) -> Tensor:
        """How many samples of each class have been seen, [M, K] int64."""
        return torch.stack(
            [getattr(self, f"counts_{index}") for index in range(len(self.modalities))]
        )

    @property
    def seen(self) -> Tensor:
        """Which classes have a prototype, [M, K] bool."""
        return self.counts > 0

    @property
    def complete(self) -> bool:
        """Whether every class has a prototype in every modality."""
        if not self._complete and bool(self.seen.all()):
            self._complete = True
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
        """Move the prototypes towards the batch: embeddings [B, D_m], targets [B] int64, mask [B, M] bool (True = present).

        Rows whose target is ``ignore_index`` or whose modality is missing do not count.
        """
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        if not shared and mask is None and self.metric == "cosine" and ignore_index == -100:
            tables = self.prototypes
            if (
                cpu.takes(self.impl, targets, self.num_classes, tables, embeddings)
                and tables[0].shape[1] == embeddings[0].shape[1]
            ):
                self.update_rows(
                    cpu.unit(torch.stack([values.detach() for values in embeddings]))[0], targets
                )
                return
        for index, embedding in enumerate(embeddings):
            rows = targets if mask is None else targets.masked_fill(~mask[:, index], ignore_index)
            before = getattr(self, f"prototypes_{index}"), getattr(self, f"counts_{index}")
            if shared:
                sums = iib_kernels.class_sums(
                    embedding,
                    rows,
                    self.num_classes,
                    metric=self.metric,
                    ignore_index=ignore_index,
                    impl=self.impl,
                )
                for value in sums:
                    dist.all_reduce(value)
                prototypes, total = iib_kernels.ema_from_sums(
                    *before, *sums, momentum=self.momentum, metric=self.metric
                )
            else:
                prototypes, total = iib_kernels.update_prototypes(
                    *before,
                    embedding,
                    rows,
                    momentum=self.momentum,
                    metric=self.metric,
                    ignore_index=ignore_index,
                    impl=self.impl,
                )
            getattr(self, f"prototypes_{index}").copy_(prototypes)
            getattr(self, f"counts_{index}").copy_(total)

    def update_rows(self, rows: Tensor, targets: Tensor) -> None:
        """The CPU's fast path of :meth:`update`, in one process: embeddings at unit length [M, B, D], of one size, all present, and targets [B] in [0, K)."""
        prototypes, counts = ([self._buffers[name] for name in names] for names in self._names)
        cpu.update(prototypes, counts, rows, targets, self.momentum, self.complete)

    def nearest(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Squared distance to the nearest prototype of a seen class, [B, M] (section 4)."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        return iib_kernels.nearest_prototype(
            embeddings, self.prototypes, metric=self.metric, seen=list(self.seen), impl=self.impl
        ).distance

    def novelty(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """[B, M, 2]: distance to the nearest prototype, and the logarithm of the embedding's length, which the cosine does not see."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        lengths = torch.stack(
            [values.float().norm(dim=1).clamp_min(1e-12).log() for values in embeddings], 1
        )
        return torch.stack([self.nearest(embeddings).float(), lengths], -1)

    def surprise(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """[B, M] >= 0: by how many standard deviations more than two a sample is farther from every prototype, or shorter or longer, than held-out samples are.

        0 for most clean samples. What is usual is set by :meth:`set_usual`; see :func:`surprise`.
        """
        return surprise(self.novelty(embeddings), self.usual, self.spread)

    @torch.no_grad()
    def set_usual(self, novelty: Tensor, mask: Tensor | None = None) -> None:
        """Set what is usual from the novelty [N, M, 2] of clean held-out samples, over the rows in which each modality is present (mask [N, M] bool)."""
        usual, spread = usual_novelty(novelty, mask)
        self.usual.copy_(usual)
        self.spread.copy_(spread)


def usual_novelty(novelty: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [M, 2] of the novelty [N, M, 2] of clean samples; 0 and 1 for a modality with fewer than two."""
    values = novelty.double()
    rows = (
        torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        if mask is None
        else mask
    )
    rows = rows[..., None]
    count = rows.sum(0)
    mean = values.masked_fill(~rows, 0.0).sum(0) / count.clamp_min(1)
    spread = (
        (values - mean)
        .square()
        .masked_fill(~rows, 0.0)
        .sum(0)
        .div(count.clamp_min(1))
        .sqrt()
        .clamp_min(1e-3)
    )
    return torch.where(count > 1, mean, 0.0).float(), torch.where(count > 1, spread, 1.0).float()


def surprise(novelty: Tensor, usual: Tensor, spread: Tensor) -> Tensor:
    """[B, M]: max(0, max(z, |v|) - 2) with z and v the novelty's two columns standardised: farther than usual counts, nearer does not; length counts both ways.

    >>> novelty = torch.tensor([[[0.5, 1.0]], [[0.5, 4.0]], [[0.1, 1.0]]])  # the second is unusually long, the third unusually near
    >>> surprise(novelty, torch.tensor([[0.4, 1.0]]), torch.tensor([[0.1, 1.0]])).squeeze(1)
    tensor([0., 1., 0.])
    """
    distance, length = ((novelty - usual) / spread).unbind(-1)
    return (torch.maximum(distance, length.abs()) - USUAL).clamp_min(0)

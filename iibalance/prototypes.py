"""The EMA prototype bank (method page, section 2): one prototype per class and modality, the same on every process."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import iib_kernels
from iibalance.names import as_sequence


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

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int, *, momentum: float = 0.9, metric: str = "cosine", impl: str = "auto"):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.modalities = tuple(embedding_dims)
        self.num_classes, self.momentum, self.metric, self.impl = num_classes, momentum, metric, impl
        for index, size in enumerate(embedding_dims.values()):
            self.register_buffer(f"prototypes_{index}", torch.zeros(num_classes, size))
            self.register_buffer(f"counts_{index}", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def prototypes(self) -> list[Tensor]:
        """The prototypes, [K, D_m] float32 a modality."""
        return [getattr(self, f"prototypes_{index}") for index in range(len(self.modalities))]

    @property
    def counts(self) -> Tensor:
        """How many samples of each class have been seen, [M, K] int64."""
        return torch.stack([getattr(self, f"counts_{index}") for index in range(len(self.modalities))])

    @property
    def seen(self) -> Tensor:
        """Which classes have a prototype, [M, K] bool."""
        return self.counts > 0

    @torch.no_grad()
    def update(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], targets: Tensor, mask: Tensor | None = None, *, ignore_index: int = -100) -> None:
        """Move the prototypes towards the batch: embeddings [B, D_m], targets [B] int64, mask [B, M] bool (True = present).

        Rows whose target is ``ignore_index`` or whose modality is missing do not count.
        """
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for index, embedding in enumerate(as_sequence(embeddings, self.modalities, "embeddings")):
            rows = targets if mask is None else targets.masked_fill(~mask[:, index], ignore_index)
            before = getattr(self, f"prototypes_{index}"), getattr(self, f"counts_{index}")
            if shared:
                sums = iib_kernels.class_sums(embedding, rows, self.num_classes, metric=self.metric, ignore_index=ignore_index, impl=self.impl)
                for value in sums:
                    dist.all_reduce(value)
                prototypes, total = iib_kernels.ema_from_sums(*before, *sums, momentum=self.momentum, metric=self.metric)
            else:
                prototypes, total = iib_kernels.update_prototypes(
                    *before, embedding, rows, momentum=self.momentum, metric=self.metric, ignore_index=ignore_index, impl=self.impl
                )
            getattr(self, f"prototypes_{index}").copy_(prototypes)
            getattr(self, f"counts_{index}").copy_(total)

    def nearest(self, embeddings: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Squared distance to the nearest prototype of a seen class, [B, M]: the gate's measure of surprise (section 4)."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        return iib_kernels.nearest_prototype(embeddings, self.prototypes, metric=self.metric, seen=list(self.seen), impl=self.impl).distance

"""Seeds, and the order in which an epoch takes its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from iibalance.errors import InputError


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: equal parts, equal seed.

    >>> derive_seed(0, "joint", 3) == derive_seed(0, "joint", 3) != derive_seed(0, "joint", 4)
    True
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class EpochSampler(Sampler):
    """A seeded permutation of ``size`` samples, another one each epoch.

    With ``weights`` [size] samples are drawn with replacement instead, each as often as its weight
    says: what a method then minimises is, on average, the loss weighted by them, whatever its loss
    is.

    The last sample is left out where it would make a batch of its own: batch normalisation cannot
    train on one sample.
    """

    def __init__(self, size: int, batch_size: int, seed: int, weights: Tensor | None = None):
        self.count = size - 1 if size % batch_size == 1 and size > 1 else size
        self.size, self.seed, self.epoch, self.weights = size, seed, 0, weights

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        seed = derive_seed(self.seed, "order", self.epoch)
        generator = torch.Generator().manual_seed(seed)
        if self.weights is not None:
            drawn = torch.multinomial(self.weights, self.count, True, generator=generator)
            return iter(drawn.tolist())
        return iter(torch.randperm(self.size, generator=generator)[: self.count].tolist())


def class_weights(
    targets: Tensor,
    weight: str | Mapping[str, float] | None,
    class_names: Sequence[str] | None = None,
) -> Tensor | None:
    """[N] float64: how often each sample is to be drawn; None where all are alike.

    Args:
        weight: ``"balanced"`` (all classes alike), or class name -> weight, 1 where not named.
        class_names: of the K classes; their numbers by default.

    >>> class_weights(torch.tensor([0, 0, 0, 1]), "balanced", ["no", "yes"]).tolist()
    [0.666..., 0.666..., 0.666..., 2.0]
    """
    if weight is None:
        return None
    if class_names is None:
        class_names = [str(index) for index in range(int(targets.max()) + 1)]
    counts = torch.bincount(targets, minlength=len(class_names)).double()
    if isinstance(weight, str):
        by_class = len(targets) / ((counts > 0).sum() * counts.clamp_min(1))
    else:
        unknown = [str(name) for name in weight if str(name) not in class_names]
        if unknown:
            raise InputError(
                f"training.class_weight: {unknown[0]!r} is none of the classes "
                f"({', '.join(class_names)})"
            )
        given = {str(name): float(value) for name, value in weight.items()}
        by_class = torch.tensor([given.get(name, 1.0) for name in class_names]).double()
    return by_class[targets]

"""Seeds, and the order in which an epoch takes its samples."""

from __future__ import annotations

import hashlib

import torch
from torch.utils.data import Sampler


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: equal parts, equal seed.

    >>> derive_seed(0, "joint", 3) == derive_seed(0, "joint", 3) != derive_seed(0, "joint", 4)
    True
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class EpochSampler(Sampler):
    """A seeded permutation of ``size`` samples, another one each epoch.

    The last sample is left out where it would make a batch of its own: batch normalisation cannot
    train on one sample.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.count = size - 1 if size % batch_size == 1 and size > 1 else size
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        seed = derive_seed(self.seed, "order", self.epoch)
        generator = torch.Generator().manual_seed(seed)
        return iter(torch.randperm(self.size, generator=generator)[: self.count].tolist())

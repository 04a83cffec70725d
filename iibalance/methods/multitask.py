"""What Gradient-Blending and MMPareto share: the multitask head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from iibalance.methods.heads import MultitaskHead
from iibalance.methods.tempered import Tempered


class Multitask(Tempered):
    """Base of the methods that train a :class:`~iibalance.methods.heads.MultitaskHead`."""

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return MultitaskHead(embedding_dims, num_classes)

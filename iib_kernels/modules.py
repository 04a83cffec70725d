"""The operations as modules, for models that are written as modules.

Each holds the options of one function and calls it; none has parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from iib_kernels.alignment import AlignmentOutput, alignment_loss
from iib_kernels.fusion import FusionOutput, gated_fusion
from iib_kernels.objective import ObjectiveOutput, multimodal_objective
from iib_kernels.prototype import prototype_distance
from iib_kernels.trust import TrustOutput, trusted_fusion


class _Options(nn.Module):
    """Holds keyword options, and shows them."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class GatedFusion(_Options):
    """:func:`~iib_kernels.gated_fusion` as a module: options here, tensors in the call.

    >>> import torch
    >>> fuse = GatedFusion(uncertainty_weight=2.0)
    >>> fuse
    GatedFusion(uncertainty_weight=2.0)
    >>> fuse([torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])]).weights
    tensor([[0.8423, 0.1577]])
    """

    def forward(
        self, logits: Sequence[Tensor] | Tensor, log_prior: Tensor | None = None, **tensors
    ) -> FusionOutput:
        return gated_fusion(logits, log_prior, **self.options, **tensors)


class TrustedFusion(_Options):
    """:func:`~iib_kernels.trusted_fusion` as a module: options here, tensors in the call.

    >>> import torch
    >>> fuse = TrustedFusion(temperature=2.0)
    >>> audio, visual = torch.tensor([[6.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    >>> fuse([audio, visual], torch.tensor([0.0, 4.0])).logits.argmax(1)
    tensor([1])
    """

    def forward(
        self, logits: Sequence[Tensor] | Tensor, trust_logits: Tensor | None = None, **tensors
    ) -> TrustOutput:
        return trusted_fusion(logits, trust_logits, **self.options, **tensors)


class MultimodalObjective(_Options):
    """:func:`~iib_kernels.multimodal_objective` as a module: options here, tensors in the call.

    >>> import torch
    >>> objective = MultimodalObjective(weights=(1.0, 1.0, 0.5, 1.0), scale=2.0)
    >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> objective(logits, torch.tensor([0])).parts.unimodal
    tensor([0.1269, 1.3133])
    """

    def forward(
        self, logits: Sequence[Tensor] | Tensor, targets: Tensor, **tensors
    ) -> ObjectiveOutput:
        return multimodal_objective(logits, targets, **self.options, **tensors)


class PrototypeDistance(_Options):
    """:func:`~iib_kernels.prototype_distance` as a module: options here, tensors in the call.

    >>> import torch
    >>> PrototypeDistance()(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([[0., 2.]])
    """

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return prototype_distance(features, prototypes, **self.options)


class AlignmentLoss(_Options):
    """:func:`~iib_kernels.alignment_loss` as a module: options here, tensors in the call.

    >>> import torch
    >>> criterion = AlignmentLoss(temperature=0.5)
    >>> features = [torch.tensor([[1.0, 0.1]]), torch.tensor([[0.2, 0.3]])]
    >>> criterion(features, [torch.eye(2)] * 2, torch.tensor([0]), [0.9, 0.6]).confidence.shape
    torch.Size([2])
    """

    def forward(
        self,
        features: Sequence[Tensor],
        prototypes: Sequence[Tensor],
        targets: Tensor,
        budgets: Tensor | Sequence[float],
        **tensors,
    ) -> AlignmentOutput:
        return alignment_loss(features, prototypes, targets, budgets, **self.options, **tensors)

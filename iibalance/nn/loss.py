"""The training objective and its schedule (method page, sections 3 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

import iib_kernels
from iib_kernels.compat import exportable
from iibalance.config import ObjectiveConfig


@exportable
class LossOutput(NamedTuple):
    """The objective and its parts; every part is a mean over the samples that count.

    The parts are for reading: only ``total`` carries a gradient.
    """

    total: Tensor  #: [] what to differentiate
    fused: Tensor  #: [] cross-entropy of the fused logits, nats
    unimodal: Tensor  #: [M] cross-entropy of each modality's head, nats
    contrastive: Tensor  #: [M] prototype contrastive loss C_m, nats
    alignment: Tensor  #: [M] budget-conditioned relative alignment A_m


class IIBalanceLoss(nn.Module):
    """L = phi CE(f, y) + sum_m CE(l_m, y) + lambda(t) sum_m [alpha C_m + beta A_m].

    Args:
        fused_weight: phi, weight of the cross-entropy of the fused logits.
        unimodal_weight: weight of the heads' own cross-entropies.
        alpha: weight of the prototype contrastive loss.
        beta: weight of the relative alignment, which acts only where a modality falls below its
            budgeted share of the anchor's evidence.
        temperature: tau of the prototype softmax.
        warmup, ramp: lambda is 0 for the first ``warmup`` of the training, then rises linearly to 1
            over the next ``ramp`` (both are shares of the training).
        metric: ``"cosine"`` or ``"sqeuclidean"``.
        impl: ``iib_kernels`` implementation.

    The defaults are those of :class:`~iibalance.config.ObjectiveConfig`.

    Source: arXiv 2603.17347 (prototype contrastive loss, budget-controlled relative alignment,
    linear schedule); the equations are this project's own formulation.

    >>> import torch
    >>> criterion = IIBalanceLoss(warmup=0.25, ramp=0.5)
    >>> [criterion.strength(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> loss = criterion(logits, torch.tensor([0]))  # no prototypes: cross-entropies alone
    >>> round(float(loss.fused), 4), [round(float(part), 4) for part in loss.unimodal]
    (0.3133, [0.1269, 1.3133])
    """

    def __init__(
        self,
        *,
        fused_weight: float = ObjectiveConfig.fused_weight,
        unimodal_weight: float = 1.0,
        alpha: float = ObjectiveConfig.alpha,
        beta: float = ObjectiveConfig.beta,
        temperature: float = ObjectiveConfig.temperature,
        warmup: float = ObjectiveConfig.warmup,
        ramp: float = ObjectiveConfig.ramp,
        metric: str = "cosine",
        impl: str = "auto",
    ):
        super().__init__()
        self.fused_weight, self.unimodal_weight = fused_weight, unimodal_weight
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.warmup, self.ramp, self.metric, self.impl = warmup, ramp, metric, impl
        for name in ("fused_weight", "unimodal_weight", "alpha", "beta", "warmup", "ramp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")

    def strength(self, progress: float) -> float:
        """lambda at ``progress``, the share of the training that is done, in [0, 1]."""
        if progress <= self.warmup and self.warmup + self.ramp > 0:
            return 0.0
        return min(1.0, (progress - self.warmup) / self.ramp) if self.ramp else 1.0

    def forward(
        self,
        logits: Sequence[Tensor],
        targets: Tensor,
        *,
        embeddings: Sequence[Tensor] | None = None,
        prototypes: Sequence[Tensor] | None = None,
        seen: Sequence[Tensor] | None = None,
        budgets: Tensor | None = None,
        gate_logits: Tensor | None = None,
        mask: Tensor | None = None,
        progress: float = 1.0,
        unit_prototypes: bool = False,
    ) -> LossOutput:
        """The objective of a batch.

        Args:
            logits: M of [B, K].
            targets: [B] int64; -100 = ignored.
            embeddings, prototypes: M of [B, D_m] and M of [K, D_m], for the prototype terms, which
                are left out without them.
            seen: M of [K] bool, the classes that have a prototype; all by default.
            budgets: [M]; all 1 by default.
            gate_logits: [B, M], log weights of the fusion, never differentiated; uniform by
                default.
            mask: [B, M] bool, True = present.
            progress: in [0, 1], drives the schedule of the prototype terms.
            unit_prototypes: prototypes of seen classes have unit length, so that the cosine needs
                no lengths of them.
        """
        strength = self.strength(progress)
        out = iib_kernels.multimodal_objective(
            logits,
            targets,
            features=embeddings if strength > 0 else None,
            prototypes=prototypes if embeddings is not None and strength > 0 else None,
            budgets=budgets,
            weights=(
                self.fused_weight,
                self.unimodal_weight,
                strength * self.alpha,
                strength * self.beta,
            ),
            gate_logits=None if gate_logits is None else gate_logits.detach(),
            uncertainty_weight=0.0,
            # The neutral gate sums the logits that are there, however many
            scale="present" if gate_logits is None else float(len(logits)),
            prototype_temperature=self.temperature,
            metric=self.metric,
            unit_prototypes=unit_prototypes,
            seen=seen,
            mask=mask,
            impl=self.impl,
        )
        return LossOutput(out.loss, *out.parts)

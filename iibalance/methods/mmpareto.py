"""MMPareto: Pareto integration of the multimodal and the unimodal gradient of each encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch
from iibalance.methods.gradients import unwrap
from iibalance.methods.multitask import Multitask


class MMPareto(Multitask):
    """Multitask losses whose two gradients on each encoder are combined without conflict, and not made smaller by it.

    Wei, Hu: "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024, algorithm 1. For each encoder with gradients g_mm of the fused and
    g_uni of its own cross-entropy: where their cosine is not negative, h = g_mm + g_uni; else h = 2 a g_mm + 2 (1 - a) g_uni with a that of the smallest norm
    (the min-norm point of the segment), and h is lengthened to |g_mm + g_uni| where it is shorter. Heads take the plain sum. Each encoder has its own pair, so any number
    of modalities will do. (The authors' code magnifies by a further 1.5; the paper is followed.)

    >>> MMPareto.combine(torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.5]))  # in conflict
    tensor([0.2236, 0.6708])
    """

    name = "mmpareto"
    processes = False  # gradients are taken apart before they could be averaged

    # What is differentiated are the cross-entropies in ``output.parts``, not their sum ``loss``: a class of your own that changes the loss changes ``backward`` too.

    @staticmethod
    def combine(multimodal: Tensor, unimodal: Tensor) -> Tensor:
        """The encoder's gradient from the two, as vectors."""
        product, plain = multimodal @ unimodal, multimodal + unimodal
        if product >= 0:
            return plain
        difference = multimodal - unimodal
        share = (
            (unimodal - multimodal) @ unimodal / (difference @ difference).clamp_min(1e-30)
        ).clamp(0, 1)
        combined = 2 * share * multimodal + 2 * (1 - share) * unimodal
        return combined * (plain.norm() / combined.norm().clamp_min(1e-30)).clamp_min(1.0)

    def backward(
        self,
        loss: Tensor,
        model: nn.Module,
        batch: Batch,
        output,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        model = unwrap(model)
        encoders = [
            [value for value in encoder.parameters() if value.requires_grad]
            for encoder in model.encoders
        ]
        before = [[value.grad for value in values] for values in encoders]
        self._clear(encoders)
        backward(output.parts.fused, retain_graph=True)
        multimodal = [[value.grad for value in values] for values in encoders]
        self._clear(encoders)
        backward(output.parts.unimodal.sum())  # encoder m is reached by its own cross-entropy alone
        for values, first, kept in zip(encoders, multimodal, before):
            second = [value.grad for value in values]
            self._fill(values, first, second)
            for value, old in zip(values, kept):
                if old is not None:  # gradient accumulation
                    value.grad = old if value.grad is None else value.grad + old

    def _fill(
        self,
        values: Sequence[Tensor],
        first: Sequence[Tensor | None],
        second: Sequence[Tensor | None],
    ) -> None:
        pairs = [
            (
                torch.zeros_like(value) if a is None else a,
                torch.zeros_like(value) if b is None else b,
            )
            for value, a, b in zip(values, first, second)
        ]
        if not pairs:
            return
        combined = self.combine(
            torch.cat([a.flatten() for a, _ in pairs]), torch.cat([b.flatten() for _, b in pairs])
        )
        for value, part in zip(values, combined.split([value.numel() for value in values])):
            value.grad = part.view_as(value).clone()

    @staticmethod
    def _clear(encoders: Sequence[Sequence[Tensor]]) -> None:
        for values in encoders:
            for value in values:
                value.grad = None

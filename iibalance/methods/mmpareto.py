"""MMPareto: Pareto integration of the multimodal and the unimodal gradient of each encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch
from iibalance.methods.gradients import unwrap
from iibalance.methods.multitask import Multitask


class MMPareto(Multitask):
    """Multitask losses whose two gradients on each encoder are combined without conflict.

    Wei, Hu: "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance", ICML 2024,
    algorithm 1. Each encoder has a pair of gradients of its own, so any number of modalities will
    do: g_mm of the fused cross-entropy and g_uni of its own one.

    Where their cosine is not negative, they are added. Where they conflict, the shortest vector
    between them (the min-norm point of the segment) gives the direction, and is lengthened so that
    the gradient is not shorter than the plain sum:

        h = g_mm + g_uni                         if g_mm . g_uni >= 0
        h = 2 a g_mm + 2 (1 - a) g_uni           else, with the a in [0, 1] of the smallest |h|,
            times max(1, |g_mm + g_uni| / |h|)

    Heads take the plain sum. (The authors' code magnifies h by a further 1.5; the paper is
    followed.)

    Two gradients in conflict:

    >>> MMPareto.combine(torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.5]))
    tensor([0.2236, 0.6708])
    """

    name = "mmpareto"
    processes = False  # gradients are taken apart before they could be averaged

    # ``backward`` differentiates the cross-entropies in ``output.parts``, not their sum ``loss``. A
    # subclass that changes the loss must therefore change ``backward`` too.

    @staticmethod
    def combine(multimodal: Tensor, unimodal: Tensor) -> Tensor:
        """The encoder's gradient from the two, as vectors."""
        product, plain = multimodal @ unimodal, multimodal + unimodal
        if product >= 0:
            return plain
        difference = unimodal - multimodal
        squared = (difference @ difference).clamp_min(1e-30)
        share = (difference @ unimodal / squared).clamp(0, 1)
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
        """Set the gradients of ``values`` to the combination of two; None stands for zeros."""
        if not values:
            return

        def vector(gradients: Sequence[Tensor | None]) -> Tensor:
            filled = [
                torch.zeros_like(value) if gradient is None else gradient
                for value, gradient in zip(values, gradients)
            ]
            return torch.cat([gradient.flatten() for gradient in filled])

        combined = self.combine(vector(first), vector(second))
        for value, part in zip(values, combined.split([value.numel() for value in values])):
            value.grad = part.view_as(value).clone()

    @staticmethod
    def _clear(encoders: Sequence[Sequence[Tensor]]) -> None:
        for values in encoders:
            for value in values:
                value.grad = None

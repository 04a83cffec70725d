"""AGM: adaptive gradient modulation by Shapley responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Batch
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import mean_over_processes, unwrap


class AGM(Concat):
    """Scales the gradient through each modality's response by its lead against its usual lead.

    Li, Li, Hu, Lei, Li, Zhou: "Boosting Multi-modal Model Performance with Adaptive Gradient
    Modulation", ICCV 2023, equations 2 to 8. The response of modality m is its Shapley value over
    the subsets of modalities, where those outside the subset are masked with zeros.

    The authors mask inputs; here embeddings are masked, so that any encoder will do. Under the
    linear head f(S) = bias + sum_{m in S} W_m z_m, the Shapley value then has a closed form for any
    number M of modalities:

        response_m = W_m z_m + bias / M

    With s_m the mean of -log softmax(response_m)[y] over the batch, and S_m the running mean of s_m
    over the steps so far:

        r_m = exp(mean_{j != m} (s_j - s_m)),  R_m = exp(mean_{j != m} (S_j - S_m))
        k_m = exp(alpha min(R_m - r_m, 10))

    The gradient that reaches W_m and encoder m through response m is multiplied by k_m. (The
    paper's mean over the other modalities is defined for any M >= 2.)

    Parameters: ``alpha`` (1).

    The first is ahead by 1 nat, and usually by 0:

    >>> AGM.coefficients(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.5]), alpha=1.0)
    tensor([0.1794, 1.8816])
    """

    name = "agm"
    defaults = {"alpha": 1.0}

    @staticmethod
    def coefficients(scores: Tensor, running: Tensor, alpha: float) -> Tensor:
        """k [M] of the batch's scores [M] and their running means [M]."""
        count = len(scores)
        ratio = lambda s: torch.exp(((s.sum() - s) / max(count - 1, 1) - s).clamp(-50, 50))
        return torch.exp(alpha * (ratio(running) - ratio(scores)).clamp_max(10))

    @staticmethod
    def responses(head: nn.Module, embeddings) -> list[Tensor]:
        """M of [B, K]: Shapley values of the modalities under the linear head."""
        share = head.classifier.bias / len(embeddings)
        return [
            F.linear(values, weight) + share for values, weight in zip(embeddings, head.slices())
        ]

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        head = unwrap(model).head
        responses = self.responses(head, output.embeddings)
        scores = []
        with torch.no_grad():
            for index, values in enumerate(responses):
                targets = batch.targets
                if batch.mask is not None:
                    targets = targets.masked_fill(~batch.mask[:, index], -100)
                count = (targets != -100).sum().clamp_min(1)
                scores.append(F.cross_entropy(values.float(), targets, reduction="sum") / count)
            scores = mean_over_processes(torch.stack(scores)).double().cpu()
            steps = self.state.get("steps", torch.zeros((), dtype=torch.float64))
            running = scores
            if steps:
                running = self.state["running"] + (scores - self.state["running"]) / (steps + 1)
            self.state = {"running": running, "steps": steps + 1}
            coefficients = self.coefficients(scores, running, self.options.alpha).tolist()
        # Each response passes forward unchanged, and its gradient is multiplied on the way back.
        logits = sum(
            values.detach() + k * (values - values.detach())
            for values, k in zip(responses, coefficients)
        )
        loss = F.cross_entropy(logits.float(), batch.targets)
        if not math.isfinite(sum(coefficients)):
            raise FloatingPointError(
                "method_options.alpha: the modulation overflowed; lower it or the learning rate"
            )
        return loss

"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import mean_over_processes, same_on_processes, unwrap


class OGMGE(Concat):
    """Slows the encoder of the modality that is ahead, and adds noise to the encoders' gradients.

    Peng, Wei, Deng, Wang, Hu: "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022, equations 6 to 11. With the concatenated head's
    weights W = [W_a, W_b] and bias, each modality's score is s_m = sum_i softmax(W_m z_m,i + bias / 2)[y_i], the discrepancy ratio rho_m = s_m / s_other, and

        k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1
        gradient of encoder m <- k_m g + N(0, std(g)^2)

    for every parameter of the encoder. (The released code touches 4-D parameters only, which in an MLP or a 1-D network are none: the paper is followed there. The paper's
    noise has the covariance of the stochastic gradient, which one batch's gradient does not tell; std(g) is over each parameter's elements, as in that code.)
    Defined for two modalities. With a sample's modality missing, its score counts the samples that have both.

    Parameters: ``alpha`` (0.3), ``noise`` (1; 0 = OGM without enhancement).

    >>> OGMGE.coefficients(torch.tensor([3.0, 1.0]), alpha=0.5)
    tensor([0.0949, 1.0000])
    """

    name = "ogm_ge"
    modalities = 2
    defaults = {"alpha": 0.3, "noise": 1.0}

    @staticmethod
    def coefficients(scores: Tensor, alpha: float) -> Tensor:
        """k [2] of the two modalities' scores [2]."""
        ratio = scores / scores.flip(0).clamp_min(1e-12)
        return torch.where(ratio > 1, 1 - torch.tanh(alpha * ratio), torch.ones_like(ratio))

    @staticmethod
    @torch.no_grad()
    def scores(head: nn.Module, batch: Batch, output) -> Tensor:
        """s [2]: each modality's summed probability of the right classes, from its slice of the head and half the bias."""
        rows = batch.targets != -100
        if batch.mask is not None:
            rows = rows & batch.mask.all(1)
        targets, scores = batch.targets[rows], []
        for weight, values in zip(head.slices(), output.embeddings):
            logits = values[rows].float() @ weight.float().T + head.classifier.bias.float() / 2
            scores.append(logits.softmax(-1).gather(1, targets[:, None]).sum())
        return torch.stack(scores)

    @torch.no_grad()
    def after_backward(self, model: nn.Module, batch: Batch, output) -> None:
        model = unwrap(model)
        coefficients = self.coefficients(
            mean_over_processes(self.scores(model.head, batch, output)), self.options.alpha
        ).tolist()
        for encoder, coefficient in zip(model.encoders, coefficients):
            for value in encoder.parameters():
                if value.grad is not None:
                    noise = (
                        torch.randn_like(value.grad)
                        * (value.grad.std(correction=0) + 1e-8)
                        * self.options.noise
                    )
                    value.grad.mul_(coefficient).add_(same_on_processes(noise))

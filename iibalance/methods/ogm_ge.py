"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import mean_over_processes, same_on_processes, unwrap


class OGMGE(Concat):
    """Slows the encoder of the modality that is ahead, and adds noise to the encoders' gradients.

    Peng, Wei, Deng, Wang, Hu: "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
    CVPR 2022, equations 6 to 11. Defined for two modalities.

    Each modality is scored by its slice of the concatenated head's weights W = [W_a, W_b] and half
    the bias. The gradient of every parameter of encoder m is scaled by k_m, and noise is added:

        s_m = sum_i softmax(W_m z_m,i + bias / 2)[y_i],  rho_m = s_m / s_other
        k_m = 1 - tanh(alpha rho_m) if rho_m > 1 else 1
        gradient of encoder m <- k_m g + N(0, std(g)^2)

    Where samples lack a modality, the scores count those that have both.

    The released code changes only parameters of four dimensions, of which an MLP or a 1-D network
    has none; the paper is followed there. The paper's noise has the covariance of the stochastic
    gradient, which the gradient of one batch does not tell; as in the code, std(g) is the standard
    deviation over the elements of each parameter.

    Parameters: ``alpha`` (0.3), and ``noise`` (1), which scales the noise: 0 is OGM without the
    generalisation enhancement.

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
        """s [2]: each modality's probabilities of the right classes, summed over the batch.

        They come from its slice of the head's weights and half the bias.
        """
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
        scores = mean_over_processes(self.scores(model.head, batch, output))
        coefficients = self.coefficients(scores, self.options.alpha).tolist()
        for encoder, coefficient in zip(model.encoders, coefficients):
            for value in encoder.parameters():
                if value.grad is not None:
                    std = value.grad.std(correction=0) + 1e-8
                    noise = torch.randn_like(value.grad) * std * self.options.noise
                    value.grad.mul_(coefficient).add_(same_on_processes(noise))

"""PMR: prototypical modal rebalance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import iib_kernels
from iibalance.data.dataset import Batch, Split
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import mean_over_processes, unwrap
from iibalance.nn.model import embed_split


class PMR(Concat):
    """Speeds the slower modality up by a prototypical cross-entropy, and early on holds the faster one back by an entropy term.

    Fan, Xu, Wang, Wang, Guo: "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR 2023, equations 6 to 13. Class prototypes c_m are the mean training
    embeddings, renewed before every epoch, c <- (1 - epsilon) c_new + epsilon c_old; similarities are -||z - c||_2, p_m their softmax, L_PCE,m = CE(similarity_m, y),
    rho = sum_i p_0[y_i] / sum_i p_1[y_i], and

        b = clip(1 / rho - 1, 0, 1),  g = clip(rho - 1, 0, 1)
        L = CE + alpha (b L_PCE,0 + g L_PCE,1) - mu (g H(p_0) + b H(p_1))

    the last term while ``progress`` < ``regularise``. (The authors' code switches b and g hard between 0 and a constant, drops the entropy and gives NaN for a class
    that is absent; the paper is followed, and an absent class is left out of the softmax.) Defined for two modalities.

    Parameters: ``alpha`` (1), ``mu`` (0.1), ``epsilon`` (0.5), ``regularise`` (0.2, share of the training).

    >>> PMR.coefficients(torch.tensor([1.5, 1.0]))  # the first is ahead: the second's prototypes pull
    (tensor(0.), tensor(0.5000))
    """

    name = "pmr"
    modalities = 2
    processes = False  # prototypes of the whole training split on each process would be right, its shares would not
    defaults = {"alpha": 1.0, "mu": 0.1, "epsilon": 0.5, "regularise": 0.2}

    @staticmethod
    def coefficients(scores: Tensor) -> tuple[Tensor, Tensor]:
        """(b, g) of the two modalities' summed probabilities [2]."""
        rho = scores[0].clamp_min(1e-12) / scores[1].clamp_min(1e-12)
        return (1 / rho - 1).clamp(0, 1), (rho - 1).clamp(0, 1)

    @torch.no_grad()
    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        model = unwrap(model)
        for index, values in enumerate(embed_split(model, train)):
            targets = train.targets.masked_fill(~train.mask[:, index], -100).to(values.device)
            sums, counts = iib_kernels.class_sums(
                values, targets, model.num_classes, metric="sqeuclidean"
            )
            new = sums / counts.clamp_min(1)[:, None]
            old = self.state.get(f"prototypes_{index}", new)
            self.state[f"prototypes_{index}"] = (
                1 - self.options.epsilon
            ) * new + self.options.epsilon * old
            self.state[f"seen_{index}"] = counts > 0

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        if "prototypes_0" not in self.state:
            raise ValueError(
                "pmr: there are no prototypes yet; call before_epoch(model, train, progress) before each epoch"
            )
        entropies, losses, scores = [], [], []
        valid = batch.targets != -100
        for index, values in enumerate(output.embeddings):
            prototypes, seen = (
                self.state[f"prototypes_{index}"].to(values.device),
                self.state[f"seen_{index}"].to(values.device),
            )
            squared = iib_kernels.prototype_distance(
                values.float(), prototypes.float(), metric="sqeuclidean"
            )
            log_p = (
                (-squared.clamp_min(1e-12).sqrt()).masked_fill(~seen, -torch.inf).log_softmax(-1)
            )
            rows = valid if batch.mask is None else valid & batch.mask[:, index]
            rows = rows & seen[batch.targets.clamp_min(0)]
            count = rows.sum().clamp_min(1)
            own = log_p.gather(1, batch.targets.clamp_min(0)[:, None]).squeeze(1)
            losses.append(-own.masked_fill(~rows, 0.0).sum() / count)
            finite = log_p.masked_fill(~seen, 0.0)
            entropies.append(
                -(finite.exp() * finite)
                .masked_fill(~seen, 0.0)
                .sum(-1)
                .masked_fill(~rows, 0.0)
                .sum()
                / count
            )
            scores.append(own.detach().exp().masked_fill(~rows, 0.0).sum())
        b, g = self.coefficients(mean_over_processes(torch.stack(scores)))
        loss = output.loss + self.options.alpha * (b * losses[0] + g * losses[1])
        if progress < self.options.regularise:
            loss = loss - self.options.mu * (g * entropies[0] + b * entropies[1])
        return loss

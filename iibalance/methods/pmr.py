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
    """Speeds the slower modality up by prototypes, and early on holds the faster one back.

    Fan, Xu, Wang, Wang, Guo: "PMR: Prototypical Modal Rebalance for Multimodal Learning", CVPR
    2023, equations 6 to 13. Defined for two modalities.

    The prototype of a class is the mean embedding c_m of its training samples. It is renewed before
    every epoch:

        c_m <- (1 - epsilon) new c_m + epsilon old c_m

    A sample's similarities to the classes are -||z_m - c_m||_2, and p_m is their softmax. The loss
    adds a prototypical cross-entropy L_PCE,m = CE(similarities_m, y) for the modality that is
    behind, and takes away the entropy H of p of the one that is ahead:

        rho = sum_i p_0[y_i] / sum_i p_1[y_i]
        b = clip(1 / rho - 1, 0, 1),  g = clip(rho - 1, 0, 1)
        L = CE + alpha (b L_PCE,0 + g L_PCE,1) - mu (g H(p_0) + b H(p_1))

    The entropy term is there only while ``progress`` < ``regularise``.

    The authors' code departs from the paper: it switches b and g between 0 and a constant, drops
    the entropy, and gives NaN for a class that is absent. The paper is followed here, and an absent
    class is left out of the softmax.

    Parameters: ``alpha`` (1), ``mu`` (0.1), ``epsilon`` (0.5), and ``regularise`` (0.2), the share
    of the training that has the entropy term.

    The first is ahead here, so the second modality's prototypes pull:

    >>> PMR.coefficients(torch.tensor([1.5, 1.0]))
    (tensor(0.), tensor(0.5000))
    """

    name = "pmr"
    modalities = 2
    # Prototypes are of the whole training split; a process would see only its share of it.
    processes = False
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
            epsilon = self.options.epsilon
            self.state[f"prototypes_{index}"] = (1 - epsilon) * new + epsilon * old
            self.state[f"seen_{index}"] = counts > 0

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        if "prototypes_0" not in self.state:
            raise ValueError(
                "pmr: there are no prototypes yet; "
                "call before_epoch(model, train, progress) before each epoch"
            )
        entropies, losses, scores = [], [], []
        valid = batch.targets != -100
        for index, values in enumerate(output.embeddings):
            prototypes = self.state[f"prototypes_{index}"].to(values.device)
            seen = self.state[f"seen_{index}"].to(values.device)
            squared = iib_kernels.prototype_distance(
                values.float(), prototypes.float(), metric="sqeuclidean"
            )
            similarity = -squared.clamp_min(1e-12).sqrt()
            log_p = similarity.masked_fill(~seen, -torch.inf).log_softmax(-1)  # [B, K]
            rows = valid if batch.mask is None else valid & batch.mask[:, index]
            rows = rows & seen[batch.targets.clamp_min(0)]
            count = rows.sum().clamp_min(1)
            own = log_p.gather(1, batch.targets.clamp_min(0)[:, None]).squeeze(1)
            losses.append(-own.masked_fill(~rows, 0.0).sum() / count)
            finite = log_p.masked_fill(~seen, 0.0)
            terms = (finite.exp() * finite).masked_fill(~seen, 0.0).sum(-1)  # [B]: -H(p)
            entropies.append(-terms.masked_fill(~rows, 0.0).sum() / count)
            scores.append(own.detach().exp().masked_fill(~rows, 0.0).sum())
        b, g = self.coefficients(mean_over_processes(torch.stack(scores)))
        loss = output.loss + self.options.alpha * (b * losses[0] + g * losses[1])
        if progress < self.options.regularise:
            loss = loss - self.options.mu * (g * entropies[0] + b * entropies[1])
        return loss

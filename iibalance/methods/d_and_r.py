"""D&R: diagnosing and re-learning, encoders that are softly put back to where they began."""

from __future__ import annotations

import logging

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from iibalance.data.dataset import Split
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import unwrap
from iibalance.nn.model import embed_split

logger = logging.getLogger(__name__)


class DAndR(Concat):
    """Puts each encoder back towards its first weights, by how much it knows by heart.

    Wei, Li, Feng, Hu: "Diagnosing and Re-learning for Balanced Multimodal Learning", ECCV 2024. For
    any number of modalities.

    At chosen epochs, the embeddings of each modality m are clustered by k-means into as many
    clusters as there are classes, those of the training split and those of the validation split by
    themselves. The purity P of a clustering is the share of samples that are of the commonest class
    of their cluster. The gap between both splits says how well modality m is learnt, and how far
    the parameters theta_m of its encoder go back to their first values:

        g_m = |P_train,m - P_validation,m|,  a_m = tanh(strength g_m)
        theta_m <- (1 - a_m) theta_m + a_m theta_m,first

    A well learnt encoder has a wide gap and goes back far, so that the others get a turn. One that
    has not learnt, or cannot, has a narrow gap: it goes back little and is not driven to memorise.

    As in the authors' code, each split's features are scaled to [-1, 1] before they are clustered,
    the classifier and the optimiser's moments stay as they are, and so do running statistics of
    normalisation. The code does it after epochs 20, 40 and 60 of 90; here that is every ``every``
    of the training, ``times`` times. Both are silent on missing modalities: a purity is taken over
    the samples that have the modality. The best of ten starts of k-means counts (that is what
    scikit-learn's default was at the code's time).

    The training gives ``validation``; in a loop of your own, set ``method.validation``. Without it
    nothing is re-learnt, and a warning says so.

    Parameters: ``strength`` (3), ``every`` (0.22, a share of the training), ``times`` (3).

    Two clusters, of three and two samples; one sample is not of its cluster's commonest class:

    >>> DAndR.purity(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1]))
    0.8
    """

    name = "d_and_r"
    # The purity is of a whole split; processes would cluster it each for itself.
    processes = False
    defaults = {"strength": 3.0, "every": 0.22, "times": 3.0}

    @staticmethod
    def purity(targets: Tensor, clusters: Tensor) -> float:
        """Share of samples of their cluster's commonest class; classes and clusters [N] int64."""
        table = torch.zeros(int(clusters.max()) + 1, int(targets.max()) + 1)
        table.index_put_((clusters, targets), torch.ones(len(targets)), accumulate=True)
        return float(table.double().max(1).values.sum() / len(targets))

    @staticmethod
    def clusters(values: Tensor, count: int) -> Tensor:
        """The cluster [N] of each row of ``values`` [N, D], of at most ``count`` clusters."""
        from sklearn.cluster import KMeans

        rows = values.cpu().double().numpy()
        span = np.ptp(rows, 0)
        rows = 2 * (rows - rows.min(0)) / np.where(span > 0, span, 1.0) - 1
        kmeans = KMeans(min(count, len(rows)), n_init=10, random_state=0)
        with threadpool_limits(1):  # several threads add up in any order: a resume would differ
            return torch.from_numpy(kmeans.fit_predict(rows)).long()

    @torch.no_grad()
    def purities(self, model: nn.Module, split: Split) -> list[float]:
        """P_m of each modality's embeddings of a split; NaN where no sample has the modality."""
        found = []
        for index, values in enumerate(embed_split(model, split)):
            rows = split.mask[:, index] & (split.targets != -100)
            targets = split.targets[rows]
            if not len(targets):
                found.append(float("nan"))
                continue
            clusters = self.clusters(values[rows.to(values.device)], model.num_classes)
            found.append(self.purity(targets, clusters))
        return found

    @torch.no_grad()
    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        model = unwrap(model)
        if "done" not in self.state:
            self.state["done"] = torch.tensor(0)
            for key, value in model.encoders.named_parameters():
                self.state[f"first.{key}"] = value.detach().clone()
        done = int(self.state["done"])
        if done >= round(self.options.times) or progress < (done + 1) * self.options.every:
            return
        self.state["done"] = torch.tensor(done + 1)
        if self.validation is None:
            logger.warning(
                "d_and_r: there is no validation split, so nothing is re-learnt; "
                "set method.validation"
            )
            return
        pairs = zip(self.purities(model, train), self.purities(model, self.validation))
        for index, (known, new) in enumerate(pairs):
            back = float(np.tanh(self.options.strength * abs(known - new)))
            if not np.isfinite(back):
                continue  # a modality that one of the splits has not
            for key, value in model.encoders[index].named_parameters():
                value.lerp_(self.state[f"first.{index}.{key}"].to(value), back)

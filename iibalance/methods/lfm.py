"""LFM: contrastive learning beside the classification, by a weight that is learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.data.dataset import Batch, Split
from iibalance.data.values import each
from iibalance.methods.concat import Concat
from iibalance.methods.gradients import mean_over_processes, unwrap
from iibalance.methods.heads import ConcatHead
from iibalance.nn.encoding import evaluating
from iibalance.nn.missing import fill_missing

ROWS = 64  # training samples by which the weight is moved, once an epoch
STEPS = 5  # of conjugate gradients, two gradients of those samples each
FLAT = 1e-2  # they stop at a curvature below this share of the first direction's
NUDGE = 1e-2  # how far parameters are moved for a Hessian's product, as a length


class ContrastiveHead(ConcatHead):
    """A :class:`~iibalance.methods.heads.ConcatHead` that can compare its embeddings.

    Where they are of several sizes, each is projected to the smallest for the comparison.

    >>> head = ContrastiveHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> head.matching([torch.eye(4), torch.eye(4, 2)], None, temperature=0.4).shape
    torch.Size([])
    """

    def __init__(self, embedding_dims: Mapping[str, int], num_classes: int):
        super().__init__(embedding_dims, num_classes)
        sizes = list(embedding_dims.values())
        alike = len(set(sizes)) == 1
        self.projections = nn.ModuleList(
            nn.Identity() if alike else nn.Linear(size, min(sizes)) for size in sizes
        )

    def matching(
        self, embeddings: Sequence[Tensor], mask: Tensor | None, temperature: float
    ) -> Tensor:
        """L_MM []: the mean over the pairs of modalities, each over the samples that have both."""
        projected = [layer(values) for layer, values in zip(self.projections, embeddings)]
        projected = [values.float() for values in fill_missing(projected, mask)]
        losses = [values.sum() * 0 for values in projected]  # all take part, alone or not
        for first, second in combinations(range(len(projected)), 2):
            x, y = projected[first], projected[second]
            if mask is not None:
                rows = mask[:, first] & mask[:, second]
                x, y = x[rows], y[rows]
            if len(x):
                losses.append(info_nce(x, y, temperature))
        pairs = len(projected) * (len(projected) - 1) // 2
        return sum(losses) / max(pairs, 1)


def info_nce(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """[]: the contrastive loss of embeddings [B, D] whose rows belong together.

    Orthogonal pairs that match: each row has 1 against 0.

    >>> info_nce(torch.eye(2), torch.eye(2), 1.0)
    tensor(0.3133)
    """
    similarity = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / temperature
    own = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


class LFM(Concat):
    """Minimises (1 - a) CE + a L_MM, where the weight a is learnt by a bi-level optimisation.

    Yang, Wan, Jiang, Xu: "Facilitating Multimodal Classification via Dynamically Learning Modality
    Gap", NeurIPS 2024, equations 1 to 3 and algorithm 1, with the learning-based strategy: the
    paper's tables have it ahead of the heuristic a = 1 - exp(-1 / epoch) everywhere. For any number
    of modalities.

    CE is that of one classifier on the concatenated embeddings. L_MM matches the modalities of a
    sample in a batch: with s_ik the cosine of z_j,i and z_l,k over ``temperature``,

        L_MM = -1 / (2 B) sum_i log softmax_k(s_ik)[i] + log softmax_k(s_ki)[i]

    and the mean over the pairs (j, l) of modalities, where there are more than two. Before each
    epoch but the first, a goes down the gradient of CE at the parameters theta that minimise the
    total loss L = (1 - a) CE + a L_MM, and is clipped to [0, 1]:

        d CE / d a = -(grad L_MM - grad CE)^T [Hessian of L]^-1 grad CE
        a <- a - rate (share of the training since then) clip(d CE / d a, -1, 1)

    The inverse Hessian is applied by five steps of conjugate gradients, which stop where the
    curvature is below a hundredth of the first direction's: where the loss is flat or falls off,
    the solution would be noise. Its products are differences of gradients, so that an encoder need
    not be differentiable twice; a random batch of training samples is taken for it, with the model
    in evaluation mode. (Ghadimi and Wang, whom the paper cites, have a Neumann series, which needs
    a bound of the curvature.)

    The paper does not tell a's first value, its rate, nor the temperature; 0.95 and 0.4 are those
    of the code. The clip and the share are ours: a = 0 minimises CE on training data, and the
    gradient, 13 nats after the first epoch of `digits`, would go there in one step. So a falls from
    ``start`` by at most ``rate`` in a whole training; the authors' fitted run fell from 0.80 to
    0.08 in its 200 epochs.

    The authors' code departs from the paper: for L_MM it takes the Jensen-Shannon divergence of the
    modalities' own predictions, for the gradient of a the mean of the first parameter's elements of
    a Hessian-vector product, and in the script for the published figures a polynomial of the epoch
    fitted to an earlier run. It averages the logits of one classifier a modality. The paper is
    followed here. Where samples lack a modality, a pair is compared over those that have both.
    Embeddings of several sizes, which the paper has not, are projected to the smallest.

    Parameters: ``rate`` (1), ``start`` (0.95), ``temperature`` (0.4).

    Of a bowl that is four times as steep one way:

    >>> LFM.solve(lambda v: torch.tensor([1.0, 4.0]) * v, torch.tensor([1.0, 1.0]), steps=2)
    tensor([1.0000, 0.2500])
    """

    name = "lfm"
    defaults = {"rate": 1.0, "start": 0.95, "temperature": 0.4}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return ContrastiveHead(embedding_dims, num_classes)

    @staticmethod
    def solve(product: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
        """About H^-1 ``vector`` [P], given ``product`` v -> H v, by conjugate gradients.

        Where the first direction has no positive curvature it is ``vector`` itself.
        """
        found, rest, direction = torch.zeros_like(vector), vector.clone(), vector.clone()
        square = start = rest @ rest
        floor = 0.0
        for step in range(steps):
            if square <= 1e-10 * start:
                break
            curved = product(direction)
            curvature = direction @ curved / (direction @ direction)
            if curvature <= floor:
                return found if step else vector.clone()
            floor = floor or FLAT * float(curvature)
            size = square / (curvature * (direction @ direction))
            found += size * direction
            rest -= size * curved
            old, square = square, rest @ rest
            direction = rest + square / old * direction
        return found

    @property
    def alpha(self) -> float:
        """a, the share of the contrastive loss."""
        return float(self.state.get("alpha", torch.tensor(min(self.options.start, 1.0))))

    def losses(self, output, model: nn.Module, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(CE, L_MM) of a batch's output."""
        matching = model.head.matching(output.embeddings, mask, max(self.options.temperature, 1e-3))
        return output.loss, matching

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        classification, matching = self.losses(output, unwrap(model), batch.mask)
        return (1 - self.alpha) * classification + self.alpha * matching

    def hypergradient(self, model: nn.Module, batch: Batch) -> Tensor:
        """d CE / d a [] by the batch, with the model as it is."""
        values = [value for value in model.parameters() if value.requires_grad]

        def gradients() -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                output = model(batch.inputs, batch.targets, mask=batch.mask)
                both = self.losses(output, model, batch.mask)
                return tuple(_gradient(loss, values) for loss in both)

        share = self.alpha

        def product(vector: Tensor) -> Tensor:
            step, ends = NUDGE / float(vector.norm().clamp_min(1e-30)), []
            for sign in (1, -1):
                with _moved(values, vector, sign * step):
                    classification, matching = gradients()
                ends.append((1 - share) * classification + share * matching)
            return (ends[0] - ends[1]) / (2 * step)

        classification, matching = gradients()
        return -(matching - classification) @ self.solve(product, classification, STEPS)

    def before_epoch(self, model: nn.Module, train: Split, progress: float) -> None:
        passed = progress - float(self.state.get("progress", torch.tensor(progress)))
        self.state |= {
            "alpha": torch.tensor(self.alpha, dtype=torch.float64),
            "progress": torch.tensor(progress, dtype=torch.float64),
        }
        if passed <= 0:  # the first epoch
            return
        model = unwrap(model)
        device = next(model.parameters()).device
        batch = train.__getitems__(torch.randperm(len(train))[:ROWS])
        to_device = lambda part: part.to(device)
        batch = Batch(
            {name: each(to_device, values) for name, values in batch.inputs.items()},
            batch.targets.to(device),
            batch.mask.to(device),
        )
        with evaluating(model):
            slope = mean_over_processes(self.hypergradient(model, batch))
        if bool(slope.isfinite()):
            moved = self.alpha - self.options.rate * passed * float(slope.clamp(-1, 1))
            self.state["alpha"] = torch.tensor(min(max(moved, 0.0), 1.0), dtype=torch.float64)


def _gradient(loss: Tensor, values: Sequence[Tensor]) -> Tensor:
    """[P] float32: the gradient of ``loss`` by all of ``values``, 0 where it does not reach."""
    found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(v) if g is None else g for v, g in zip(values, found)]
    return torch.cat([part.float().flatten() for part in parts])


@contextmanager
@torch.no_grad()
def _moved(values: Sequence[Tensor], vector: Tensor, step: float) -> Iterator[None]:
    """The parameters ``values`` moved by ``step`` times ``vector`` [P], and back afterwards."""
    kept = [value.detach().clone() for value in values]
    parts = vector.split([value.numel() for value in values])
    for value, part in zip(values, parts):
        value.add_(part.view_as(value).to(value), alpha=step)
    try:
        yield
    finally:
        for value, old in zip(values, kept):
            value.copy_(old)

"""Gradient-Blending: losses weighted by what each gains on held-out data for what it overfits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iibalance.data.dataset import Batch, Split
from iibalance.data.splits import hold_out
from iibalance.methods.heads import Losses
from iibalance.methods.multitask import Multitask
from iibalance.nn.model import MultimodalClassifier, embed_split


class GBlend(Multitask):
    """Weights the fused and the unimodal losses by what each gains for what it overfits.

    Wang, Tran, Feiszli: "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020,
    equations 5 to 7 and algorithm 2 (offline). The paper defines it for any number M of modalities.

    Before the training, each of the M unimodal losses and the fused one is minimised by itself from
    initialisation. With its value L on training and L* on held-out data, before (0) and after (N):

        G = L*_0 - L*_N                              what it gained on held-out data
        O = (L*_N - L_N) - (L*_0 - L_0)              by how much more it overfits
        w proportional to G / O^2, sum w = 1

    The training then minimises sum_m w_m CE_m + w_fused CE_fused. A loss that gained nothing weighs
    nothing.

    The held-out data are a fifth of the training split, because the validation split chooses epochs
    here. All unimodal losses are minimised in one training, for they share no parameter.

    In a loop of your own, set ``method.state["weights"] = GBlend.weights(...)``; the weights are
    equal otherwise.

    Parameters: ``share`` (0.5) of the epochs for the estimation.

    Here the second loss gains half as much and overfits twice as much:

    >>> before, after = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5])
    >>> GBlend.weights(before, after, before, torch.tensor([1.0, 1.5]))
    tensor([0.8889, 0.1111])
    """

    name = "g_blend"
    defaults = {"share": 0.5}

    @staticmethod
    def weights(
        train_before: Tensor, train_after: Tensor, held_before: Tensor, held_after: Tensor
    ) -> Tensor:
        """w [L] of L losses, from their values [L] on training and held-out data."""
        gain = (held_before - held_after).clamp_min(0)
        overfitting = (held_after - train_after) - (held_before - train_before)
        weights = gain / overfitting.square().clamp_min(1e-4)  # 0.01 nats: less is noise
        if weights.sum() > 0:
            return weights / weights.sum()
        return torch.full_like(weights, 1 / len(weights))

    @staticmethod
    def fold(split: Split, seed: int) -> tuple[Split, Split]:
        """(training, held-out) parts of a split: four fifths and one fifth.

        No group is in both parts where the split has groups.
        """
        groups = None if split.groups is None else split.groups.numpy()
        held = torch.from_numpy(
            hold_out(split.targets.numpy(), 0.2, seed=seed % 2**32, groups=groups)
        )
        return split.subset(~held), split.subset(held)

    def prepare(self, train: Callable, split: Split, seed: int) -> None:
        fit, held = self.fold(split, seed)
        share = self.options.share

        def measure(model: MultimodalClassifier) -> Tensor:  # [2, M + 1]
            return torch.stack([_losses(model, part) for part in (fit, held)])

        unimodal_sum = lambda output: output.parts.unimodal.sum()
        before, unimodal = train("blend-unimodal", unimodal_sum, fit, measure, share)
        # This is another model, so the fused loss has a beginning of its own.
        start, fused = train("blend-fused", lambda output: output.parts.fused, fit, measure, share)
        before = torch.cat([before[:, :-1], start[:, -1:]], 1)
        after = torch.cat([unimodal[:, :-1], fused[:, -1:]], 1)
        self.state["weights"] = self.weights(before[0], after[0], before[1], after[1])

    def training_key(self) -> dict:
        weights = self.state.get("weights")
        return super().training_key() | ({} if weights is None else {"weights": weights.tolist()})

    def loss(self, output, model: nn.Module, batch: Batch, progress: float) -> Tensor:
        losses = torch.cat([output.parts.unimodal, output.parts.fused[None]])
        weights = self.state.get("weights")
        if weights is None:
            return losses.mean()
        return (weights.to(losses) * losses).sum()


@torch.no_grad()
def _losses(model: MultimodalClassifier, split: Split) -> Tensor:
    """[M + 1]: unimodal and fused cross-entropy over a split."""
    embeddings = embed_split(model, split)
    device = embeddings[0].device
    parts: Losses = model.head(
        embeddings, split.targets.to(device), mask=split.mask.to(device)
    ).parts
    return torch.cat([parts.unimodal, parts.fused[None]]).double().cpu()

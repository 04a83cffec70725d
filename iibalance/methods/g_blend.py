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
    """Weights the fused and the unimodal losses by their generalisation over the square of their overfitting.

    Wang, Tran, Feiszli: "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020, equations 5 to 7 and algorithm 2 (offline): each loss is first
    minimised by itself from initialisation; with its training loss L and held-out loss L* before (0) and after (N),

        G = L*_0 - L*_N,  O = (L*_N - L_N) - (L*_0 - L_0),  w proportional to G / O^2, sum w = 1

    over the M unimodal losses and the fused one (the paper defines it for any M). Held-out is a fifth of the training split, as validation data choose epochs here. The
    unimodal losses are minimised in one training: they share no parameter. Loss: sum_m w_m CE_m + w_fused CE_fused. A loss that gains nothing weighs nothing.

    In a loop of your own, set ``method.state["weights"] = GBlend.weights(...)``; equal weights otherwise.

    Parameters: ``share`` (0.5) of the epochs for the estimation.

    >>> before, after = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5])
    >>> GBlend.weights(before, after, before, torch.tensor([1.0, 1.5]))  # the second gains half as much and overfits twice as much
    tensor([0.8889, 0.1111])
    """

    name = "g_blend"
    defaults = {"share": 0.5}

    @staticmethod
    def weights(
        train_before: Tensor, train_after: Tensor, held_before: Tensor, held_after: Tensor
    ) -> Tensor:
        """w [L] of L losses from their values [L] on training and held-out data before and after."""
        gain = (held_before - held_after).clamp_min(0)
        overfitting = (held_after - train_after) - (held_before - train_before)
        weights = gain / overfitting.square().clamp_min(1e-4)  # 0.01 nats: less is noise
        return (
            weights / weights.sum()
            if weights.sum() > 0
            else torch.full_like(weights, 1 / len(weights))
        )

    @staticmethod
    def fold(split: Split, seed: int) -> tuple[Split, Split]:
        """(training, held-out) parts of a split: four fifths and one fifth, by groups where it has any."""
        groups = None if split.groups is None else split.groups.numpy()
        held = torch.from_numpy(
            hold_out(split.targets.numpy(), 0.2, seed=seed % 2**32, groups=groups)
        )
        return split.subset(~held), split.subset(held)

    def prepare(self, train: Callable, split: Split, seed: int) -> None:
        fit, held = self.fold(split, seed)
        measure = lambda model: torch.stack(
            [_losses(model, part) for part in (fit, held)]
        )  # [2, M + 1]
        before, unimodal = train(
            "blend-unimodal",
            lambda output: output.parts.unimodal.sum(),
            fit,
            measure,
            self.options.share,
        )
        start, fused = train(
            "blend-fused", lambda output: output.parts.fused, fit, measure, self.options.share
        )  # another model: another beginning
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

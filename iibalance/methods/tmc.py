"""TMC: trusted multi-view classification by evidence and Dempster's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iibalance.methods.heads import (
    Losses,
    SeparateHead,
    tempered,
)
from iibalance.methods.tempered import Tempered
from iibalance.nn.head import Embeddings, HeadOutput
from iibalance.nn.missing import fill_missing


class EvidentialHead(SeparateHead):
    """Each modality's evidence for each class, combined by the reduced Dempster rule.

    A linear classifier and a softplus give the evidence e_m [B, K]: alpha_m = e_m + 1 is a
    Dirichlet distribution over the classes' probabilities, of strength S_m = sum_k alpha_m,k. All
    logits are logarithms of expected probabilities, log(alpha_k / S). ``uncertainty`` is the mass
    u_m = K / S_m that modality m assigns to no class, 1 where it is missing.

    Args:
        annealing: share of the training over which the KL term comes in.

    >>> head = EvidentialHead({"audio": 4, "visual": 2}, num_classes=3)
    >>> out = head([torch.randn(2, 4), torch.randn(2, 2)])
    >>> torch.allclose(out.logits.exp().sum(1), torch.ones(2))
    True
    """

    def __init__(
        self, embedding_dims: Mapping[str, int], num_classes: int, *, annealing: float = 0.1
    ):
        super().__init__(embedding_dims, num_classes)
        self.annealing = annealing

    def evidence(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """M of [B, K] float32, at least 0; a missing modality has none."""
        logits = super().heads(embeddings, mask)
        return fill_missing([F.softplus(values.float()) for values in logits], mask)

    def heads(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """Each modality's log expected probabilities, M of [B, K]; missing rows are 0."""
        return fill_missing([log_expected(e) for e in self.evidence(embeddings, mask)], mask)

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        evidence = self.evidence(embeddings, mask)
        own = fill_missing([log_expected(values) for values in evidence], mask)
        logits = log_expected(combined_evidence(evidence)) / self.log_temperature.exp()
        uncertainty = [self.num_classes / (values + 1).sum(1) for values in evidence]
        return HeadOutput(
            logits, None, torch.stack(uncertainty, 1), tempered(own, self.own_temperature)
        )

    def forward(
        self,
        embeddings: Embeddings,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """As in the base class; ``progress`` drives the weight of the KL term.

        With targets, ``parts`` are the evidential losses of the combination and of each modality.
        """
        if targets is None:
            return self.fuse(embeddings, mask)
        evidence = self.evidence(embeddings, mask)
        fused = combined_evidence(evidence)
        strength = min(1.0, progress / self.annealing) if self.annealing else 1.0
        valid = targets != -100
        unimodal = []
        for index, values in enumerate(evidence):
            rows = valid if mask is None else valid & mask[:, index]
            unimodal.append(mean_over(rows, evidential_loss(values, targets, strength)))
        parts = Losses(
            mean_over(valid, evidential_loss(fused, targets, strength)), torch.stack(unimodal)
        )
        own = fill_missing([log_expected(values) for values in evidence], mask)
        total = parts.fused + parts.unimodal.sum()
        return HeadOutput(log_expected(fused), None, None, tuple(own), total, parts)


def log_expected(evidence: Tensor) -> Tensor:
    """log(alpha / S) [B, K], the logarithms of a Dirichlet's expected probabilities."""
    alpha = evidence + 1
    return (alpha / alpha.sum(-1, keepdim=True)).log()


def combined_evidence(evidence: Sequence[Tensor]) -> Tensor:
    """The evidence [B, K] that the reduced Dempster rule makes of M of [B, K], in any order.

    One modality that tells nothing changes nothing:

    >>> combined_evidence([torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2)]).round(decimals=4)
    tensor([[3., 1.]])
    >>> e = torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 1.0]])
    >>> combined_evidence(e).round(decimals=4)
    tensor([[10.,  1.]])
    """
    classes = evidence[0].shape[-1]
    logs = sum(torch.log1p(values / classes) for values in evidence)
    # Many sure modalities would overflow float32 at exp(88).
    return classes * torch.expm1(logs.clamp_max(60.0))


def evidential_loss(evidence: Tensor, targets: Tensor, strength: float) -> Tensor:
    """[B]: the adjusted cross-entropy and ``strength`` times the KL term, of evidence [B, K]."""
    alpha, rows = evidence + 1, targets.clamp_min(0)[:, None]
    fit = torch.digamma(alpha.sum(-1)) - torch.digamma(alpha.gather(1, rows)).squeeze(1)
    return fit + strength * divergence(alpha.scatter(1, rows, 1.0))


def divergence(alpha: Tensor) -> Tensor:
    """KL(Dir(alpha) || Dir(1, ..., 1)) of alpha [B, K], in nats, [B].

    >>> divergence(torch.tensor([[1.0, 1.0, 1.0], [9.0, 1.0, 1.0]]))
    tensor([0.0000, 2.1178])
    """
    total = alpha.sum(-1)
    uniform = torch.lgamma(alpha.new_tensor(float(alpha.shape[-1])))
    pull = (alpha - 1) * (torch.digamma(alpha) - torch.digamma(total)[:, None])
    return torch.lgamma(total) - uniform - torch.lgamma(alpha).sum(-1) + pull.sum(-1)


def mean_over(rows: Tensor, losses: Tensor) -> Tensor:
    """The mean of ``losses`` [B] over ``rows`` [B] bool; 0 without any."""
    return losses.masked_fill(~rows, 0.0).sum() / rows.sum().clamp_min(1)


class TMC(Tempered):
    """Evidence of each modality, combined by Dempster's rule; evidential losses on all of them.

    Han, Zhang, Fu, Zhou: "Trusted Multi-View Classification", ICLR 2021. For any number of
    modalities. Modality m's evidence e_m,k >= 0 for each of K classes is a Dirichlet distribution
    alpha_m = e_m + 1 of strength S_m = sum_k alpha_m,k. As an opinion, it believes b_m,k =
    e_m,k / S_m in class k, and leaves u_m = K / S_m open. Two opinions make one by

        b_k = (b_1,k b_2,k + b_1,k u_2 + b_2,k u_1) / (1 - C),  u = u_1 u_2 / (1 - C)
        C = sum_(i != j) b_1,i b_2,j

    and one after another they make that of all. Because b_m,k / u_m = e_m,k / K, the evidence of
    all of them, e = K b / u, is

        e_k = K (prod_m (1 + e_m,k / K) - 1)

    in closed form, which is how it is computed here. The prediction is the expected probability
    alpha_k / S. The loss is taken of each modality's alpha and of the combined one, and summed:

        L(alpha) = psi(S) - psi(alpha_y) + lambda KL(Dir(alpha~) || Dir(1, ..., 1))

    psi is the digamma function, alpha~ is alpha with 1 in the place of alpha_y, and lambda grows
    from 0 to 1 over the first share ``annealing`` of the training.

    A missing modality has no evidence: it leaves all open (u_m = 1), and the rule gives what those
    that are present give. Its own loss does not count.

    The paper makes evidence by a ReLU, the authors' code by a softplus, as here: it has a gradient
    wherever it is. Their lambda counts epochs and is 1 from the 50th of 500 on; that is the default
    share. They know no calibration; here one temperature divides the logarithms of the expected
    probabilities, fitted on validation data.

    Parameters: ``annealing`` (0.1).

    Two modalities of equal evidence, for one class, and one against the other:

    >>> one, other = torch.tensor([[8.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    >>> [combined_evidence([one, second]).round(decimals=3) for second in (one, other)]
    [tensor([[48.,  0.]]), tensor([[8., 8.]])]
    """

    name = "tmc"
    defaults = {"annealing": 0.1}

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return EvidentialHead(embedding_dims, num_classes, annealing=self.options.annealing)

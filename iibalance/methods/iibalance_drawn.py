"""The published figure of IIBalance as a method, its gaps filled in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import iib_kernels
from iib_kernels import reference
from iibalance.budgets import Budgets
from iibalance.config import ObjectiveConfig, RunConfig
from iibalance.errors import InputError, as_sequence
from iibalance.methods.heads import (
    TemperedHead,
    classify,
    linear_classifiers,
    own_cross_entropies,
    tempered,
)
from iibalance.methods.tempered import Tempered
from iibalance.nn.head import Embeddings, HeadOutput
from iibalance.nn.model import MultimodalClassifier
from iibalance.nn.prototypes import PrototypeBank


class DrawnLosses(NamedTuple):
    """The parts of both stages' losses, nats."""

    unimodal: Tensor  #: [M] stage I: cross-entropies of classifier_m(h_m)
    pra: Tensor  #: [M] stage I: prototype-guided relative alignment, 0 for the anchor
    fused: Tensor  #: [] stage II: cross-entropy of the classified sum
    branches: Tensor  #: [M] stage II: cross-entropies of classifier_m(w_m h_m)


class DrawnHead(TemperedHead):
    """Features of one width, the anchor's prototypes, a gate of entropy times prior, classifiers.

    The equations are those of :class:`IIBalanceDrawn`. Fusion and alignment are
    ``iib_kernels.gated_fusion`` and ``iib_kernels.alignment_loss``.

    Args:
        embedding_dims: modality name -> D_m.
        num_classes: K.
        tau_b: temperature of the softmax that makes the prior of the budgets.
        temperature: tau of the prototype softmax.
        momentum: mu of the prototypes' moving average.
        impl: ``iib_kernels`` implementation.

    >>> head = DrawnHead({"audio": 4, "visual": 2}, num_classes=3).eval()
    >>> head.set_budgets({"audio": 0.9, "visual": 0.2})
    >>> head.log_prior.exp()
    tensor([0.6682, 0.3318])
    >>> out = head([torch.randn(5, 4), torch.randn(5, 2)], torch.arange(5) % 3, progress=0.5)
    >>> out.logits.shape, out.parts.pra.shape
    (torch.Size([5, 3]), torch.Size([2]))
    """

    def __init__(
        self,
        embedding_dims: Mapping[str, int],
        num_classes: int,
        *,
        tau_b: float = 1.0,
        temperature: float = ObjectiveConfig.temperature,
        momentum: float = ObjectiveConfig.momentum,
        impl: str = "auto",
    ):
        super().__init__(embedding_dims, num_classes)
        sizes, count = list(self.embedding_dims.values()), len(self.modalities)
        self.width, self.tau_b = max(sizes), tau_b
        self.temperature, self.impl = temperature, impl
        same = len(set(sizes)) == 1
        self.projections = nn.ModuleList(
            nn.Identity() if same else nn.Linear(size, self.width) for size in sizes
        )
        self.classifiers = linear_classifiers(
            dict.fromkeys(self.modalities, self.width), num_classes
        )
        self.fused_classifier = nn.Linear(self.width, num_classes)
        self.prototypes = PrototypeBank(
            {"anchor": self.width}, num_classes, momentum=momentum, impl=impl
        )
        self.gate_bias = nn.Parameter(torch.zeros(count))  # a
        one = math.log(math.e - 1)  # whose softplus is 1
        self.gate_slope = nn.Parameter(torch.full((count,), one))  # c before its softplus
        self.register_buffer("budgets", torch.ones(count))
        self.register_buffer("log_prior", torch.full((count,), 1 / count).log())
        self.register_buffer("own_temperature", torch.ones(count))

    @torch.no_grad()
    def set_budgets(self, budgets: Budgets | Mapping[str, float]) -> None:
        """Use these budgets B from now on: the anchor, rho_m, and beta = softmax(B / tau_b)."""
        if isinstance(budgets, Budgets):
            budgets = dict(zip(budgets.modalities, budgets.values))
        values = torch.tensor(as_sequence(budgets, self.modalities, "budgets"))
        self.budgets.copy_(values)
        self.log_prior.copy_((values.double() / self.tau_b).log_softmax(0))

    def features(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """h_m, M of [B, D]; of a missing modality that of zeros, which nothing below counts."""
        embeddings = self.present(embeddings, mask)
        return [project(values) for project, values in zip(self.projections, embeddings)]

    def heads(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """l_m = classifier_m(h_m) before any temperature, M of [B, K]; missing rows are 0."""
        return classify(self.classifiers, self.features(embeddings, mask), mask)

    def fuse_features(
        self, features: list[Tensor], logits: list[Tensor], mask: Tensor | None
    ) -> tuple[iib_kernels.FusionOutput, Tensor]:
        """sum_m w_m h_m [B, D] with its weights, and the entropies u [B, M].

        The kernel's own gate is linear in u and this one is log sigmoid(a - c u). So a first call
        gives u alone, and in the second the gate comes ready in ``gate_logits``.
        """
        u = iib_kernels.gated_fusion(logits, mask=mask, impl=self.impl).uncertainty
        gate = F.logsigmoid(self.gate_bias - F.softplus(self.gate_slope) * u)
        fused = iib_kernels.gated_fusion(
            logits,
            self.log_prior,
            gate_logits=gate.to(u.dtype),
            uncertainty_weight=0.0,
            mask=mask,
            values=features,
            impl=self.impl,
        )
        return fused, u

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings (M of [B, D_m], mask [B, M] bool)."""
        features = self.features(embeddings, mask)
        logits = classify(self.classifiers, features, mask)
        fused, u = self.fuse_features(features, logits, mask)
        return HeadOutput(
            self.fused_classifier(fused.logits) / self.log_temperature.exp(),
            fused.weights,
            u,
            tempered(logits, self.own_temperature),
        )

    def forward(
        self,
        embeddings: Embeddings,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """Predict, and with ``targets`` compute the loss at ``progress``, in [0, 1].

        In training mode the prototypes move as well, after the loss was taken with the old ones.
        """
        if targets is None:
            return self.fuse(embeddings, mask)
        features = self.features(embeddings, mask)
        logits = classify(self.classifiers, features, mask)
        fused, u = self.fuse_features(features, logits, mask)
        branches = [
            weight[:, None].to(rows.dtype) * rows
            for weight, rows in zip(fused.weights.unbind(1), features)
        ]
        classified = self.fused_classifier(fused.logits)
        parts = DrawnLosses(
            own_cross_entropies(logits, targets, mask),
            self.pra(features, targets, mask),
            F.cross_entropy(classified.float(), targets),
            own_cross_entropies(classify(self.classifiers, branches, mask), targets, mask),
        )
        first = parts.unimodal.sum() + parts.pra.sum()
        second = parts.fused + parts.branches.sum()
        loss = (1 - progress) * first + progress * second
        if self.training:
            self.update_prototypes(features, targets, mask)
        return HeadOutput(
            classified, fused.weights.detach(), u.detach(), tuple(logits), loss, parts
        )

    def pra(self, features: list[Tensor], targets: Tensor, mask: Tensor | None) -> Tensor:
        """[M]: C_m where the switch is on, a mean over the rows that count for m.

        ``alignment_loss`` gives C_m(i) and q_m(i, y_i) of each row. The switch is its delta_m > 0
        (method page, section 3), which is never so for the anchor itself, nor without the anchor.
        """
        seen = self.prototypes.seen[0]  # [K]
        # A copy: backward reads the table, which has moved by then
        table = iib_kernels.snapshot(self.prototypes.prototypes[0])
        out = iib_kernels.alignment_loss(
            features,
            [table] * len(features),
            targets,
            self.budgets,
            temperature=self.temperature,
            seen=seen,
            mask=mask,
            reduction="none",
            impl=self.impl,
        )
        anchor, relative = reference.anchor_and_relative(self.budgets)
        on = reference.deviation(out.confidence, relative, anchor) > 0  # [B, M]
        rows = ((targets != -100) & seen[targets.clamp_min(0)])[:, None]
        counts = rows.expand_as(on) if mask is None else rows & mask
        return torch.where(on, out.contrastive, 0.0).sum(0) / counts.sum(0).clamp_min(1)

    def update_prototypes(
        self, features: list[Tensor], targets: Tensor, mask: Tensor | None
    ) -> None:
        """Move the prototypes towards the anchor's features."""
        # The anchor is chosen on the device: to know it here would synchronise
        anchor = self.budgets.argmax()[None]
        rows = torch.stack([values.detach() for values in features]).index_select(0, anchor)
        present = None if mask is None else mask.index_select(1, anchor)
        self.prototypes.update(list(rows), targets, present)


def entropy_budgets(
    logits: Mapping[str, Tensor],
    mask: Tensor | None = None,
    *,
    source: str = "given",
    tau_b: float | None = None,
) -> Budgets:
    """B_m = 1 - mean_i H(p_m(. | x_i)) / log K from held-out logits, [N, K] a modality.

    No label enters, and no temperature is fitted, which would take labels. The standard error is
    that of the mean. Only rows where a modality is present count for it (``mask`` [N, M] bool).
    ``tau_b``: the prior is softmax(B / tau_b).

    Being sure is all that counts here: a network that is sure and wrong has a large budget, which
    the cross-entropy budgets of the method page, section 1, would not give it.

    >>> sure, unsure = torch.tensor([[50.0, 0.0]] * 4), torch.zeros(4, 2)
    >>> entropy_budgets({"audio": sure, "visual": unsure}, tau_b=1.0).values
    (1.0, 0.0)
    """
    values, errors = [], []
    for index, (name, l) in enumerate(logits.items()):
        log_p = (l if mask is None else l[mask[:, index]]).double().log_softmax(-1)
        if not len(log_p):
            raise InputError(f"mask: {name} is missing in every sample; leave it out")
        sure = 1 + (log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[1])
        values.append(round(min(1.0, max(0.0, float(sure.mean()))), 12))
        errors.append(1.0)  # of one sample nothing is known
        if len(sure) > 1:
            errors[-1] = float(sure.std(correction=1)) / math.sqrt(len(sure))
    return Budgets(tuple(logits), tuple(values), tuple(errors), None, source, tau_b)


class IIBalanceDrawn(Tempered):
    """What the published figure of IIBalance shows, as far as it shows it.

    The text of the paper (arXiv 2603.17347) could not be had; its method figure could:
    ``images/IIBalance.png`` in github.com/pengyuanli-bjtu/pengyuanli-bjtu.github.io, at 6da6e29.
    What follows is that figure. What it leaves open is filled in the plainest way and marked
    (ours), so no figure of this method is one of the paper's.

    **Offline budgets**, from out-of-fold predictions p_m of encoders trained alone:

        B_m = 1 - mean_i H(p_m(. | x_i)) / log K,    beta = softmax(B / tau_b)

    The entropies, their average over the data, the softmax and that no label enters are drawn.
    (Ours: the sign, the normaliser log K, out-of-fold predictions, no temperature of theirs, their
    trainings by cross-entropy alone, tau_b.)

    **Stage I, prototype-guided relative alignment (PRA).** The anchor a = argmax B has one set of
    class prototypes c_k, a moving average of its features h_a. A weaker modality is drawn to the
    prototype of the class and off the others while its switch is on:

        C_m(i) = -log q_m(i, y_i),    q_m(i, .) = softmax_k(-|h_m,i - c_k|^2 / tau)
        on_m(i): q_m(i, y_i) < rho_m q_a(i, y_i),    rho_m = B_m / B_a
        L_I = sum_m CE(classifier_m(h_m), y) + sum_{m != a} mean_i on_m(i) C_m(i)

    (Ours: h_m is a linear layer on the embedding, one a modality and as wide as the widest, where
    widths differ, and the embedding itself where they do not; unit length of h and c inside q;
    momentum and tau, ``objective.momentum`` and ``objective.temperature``; the rule of the switch,
    off too where the anchor is missing; no gradient through it; a mean over all rows that count for
    m, switched off ones at 0; that terms are added with weight 1.)

    **Stage II, uncertainty-aware Bayesian fusion.** With u_m the normalised entropy of classifier_m
    (h_m):

        g_m = sigmoid(a_m - c_m u_m),    w_m = beta_m g_m / sum_j beta_j g_j
        L_II = CE(classifier(sum_m w_m h_m), y) + sum_m CE(classifier_m(w_m h_m), y)

    Entropy, sigmoid, the product with beta, the sum that is then classified and a classifier of
    each weighted branch are drawn. (Ours: the gating net's size, a = 0 and c = 1 at the start,
    c >= 0 by a softplus; the gradient through u; weights that sum to 1 over the modalities present;
    that a branch's classifier is the modality's one of stage I.)

    **Both together:** L = (1 - s) L_I + s L_II, and s rises linearly from 0 to 1 over the training
    (ours). Afterwards one temperature of the prediction is fitted on validation, as for every
    method here (ours), and one of each modality's own. All weights start new.

    Any number of modalities. Each mean is over the rows that have the modality.

    Parameters: ``tau_b`` (1), above 0. Given budgets take the place of B; online ones are the
    entropy budgets of the validation predictions.

    Two modalities that are equally sure, the second of half the budget:

    >>> head = IIBalanceDrawn().head({"audio": 4, "visual": 4}, 3)
    >>> head.set_budgets({"audio": 0.8, "visual": 0.4})
    >>> _ = head.classifiers[1].load_state_dict(head.classifiers[0].state_dict())
    >>> head.fuse([torch.ones(1, 4), torch.ones(1, 4)]).weights.detach()
    tensor([[0.5987, 0.4013]])
    >>> IIBalanceDrawn(tau_b=0)
    Traceback (most recent call last):
    iibalance.errors.InputError: method_options: tau_b is 0; give a number above 0
    """

    name = "iibalance_drawn"
    needs_budgets = True
    defaults = {"tau_b": 1.0}

    def __init__(self, config: RunConfig | None = None, **options: float):
        super().__init__(config, **options)
        if not self.options.tau_b > 0:
            raise InputError(
                f"method_options: tau_b is {self.options.tau_b}; give a number above 0"
            )

    def head(self, embedding_dims: Mapping[str, int], num_classes: int) -> nn.Module:
        return DrawnHead(
            embedding_dims,
            num_classes,
            tau_b=self.options.tau_b,
            temperature=self.config.objective.temperature,
            momentum=self.config.objective.momentum,
            impl=self.config.kernels,
        )

    @property
    def budget_alpha(self) -> float:
        return 0.0

    @property
    def prior_softmax(self) -> float:
        return self.options.tau_b

    def measure_budgets(
        self,
        logits: Mapping[str, Tensor],
        targets: Tensor,
        *,
        mask: Tensor,
        entropy: float,
        source: str,
    ) -> Budgets:
        return entropy_budgets(logits, mask, source=source, tau_b=self.prior_softmax)

    def set_budgets(self, model: MultimodalClassifier, budgets: Budgets) -> None:
        model.head.set_budgets(budgets)

    def training_key(self) -> dict:
        objective = self.config.objective
        return {
            **super().training_key(),
            "temperature": objective.temperature,
            "momentum": objective.momentum,
        }

"""IIBalanceHead: embeddings in; fused logits, trust, uncertainty and loss out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iib_kernels import cpu
from iib_kernels.compat import exportable
from iibalance.budgets import Budgets
from iibalance.config import ObjectiveConfig
from iibalance.errors import as_sequence, check_names
from iibalance.nn.gate import Gate
from iibalance.nn.loss import IIBalanceLoss, LossOutput
from iibalance.nn.missing import fill_missing
from iibalance.nn.prototypes import PrototypeBank

Embeddings = Mapping[str, Tensor] | Sequence[Tensor]
_DISTRIBUTED = dist.is_available()


@exportable
class HeadOutput(NamedTuple):
    """What a head returns. Rows are samples; columns of [B, M] follow the modalities' order."""

    logits: Tensor  #: [B, K] fused, calibrated logits
    weights: Tensor | None  #: [B, M] shares in a weighted sum, where a method has such
    uncertainty: Tensor | None  #: [B, M] normalised entropy of each own prediction, in [0, 1]
    modality_logits: tuple[Tensor, ...]  #: M of [B, K], each own prediction at its temperature
    loss: Tensor | None = None  #: [] with targets
    parts: LossOutput | None = None  #: the loss's parts, with targets
    embeddings: tuple[Tensor, ...] = ()  #: M of [B, D_m], missing rows 0: for methods, in training
    trust: Tensor | None = None  #: [B, M] in [0, 1], 0 where missing; None without a gate


class IIBalanceHead(nn.Module):
    """Turns embeddings of any encoders into an IIBalance model.

    Heads, prototypes, budgets, gate and objective in one module. Call it with embeddings (dict or
    list), and with ``targets`` for the loss; in training mode with targets the prototypes move as
    well. A missing modality is told by ``mask`` [B, M] bool (False = missing, its embedding may
    hold anything).

    Args:
        embedding_dims: modality name -> D_m (or a list of D_m: modalities are then named "0", "1",
            ...).
        num_classes: K.
        objective: the loss, ``IIBalanceLoss()`` by default.
        budgets: budgets in [0, 1], by name or in order, or a
            :class:`~iibalance.budgets.Budgets`; equal by default.
        momentum: of the prototypes' moving average.
        metric: of the prototypes and the loss; the objective's own where one is given.
        impl: ``iib_kernels`` implementation.

    ``torch.export.export`` takes it in evaluation mode, with a batch of any size
    (``torch.export.Dim``). What ``torch.export.save`` writes then is loaded by a process that has
    imported this module, for :class:`HeadOutput`.

    Raises ValueError naming the argument for embeddings of the wrong number, size or names, for a
    sample with no modality present, and for an objective of another metric than ``metric``.

    >>> head = IIBalanceHead({"audio": 8, "visual": 16}, 3, budgets={"audio": 0.8, "visual": 0.3})
    >>> batch = {"audio": torch.randn(4, 8), "visual": torch.randn(4, 16)}
    >>> head(batch, torch.tensor([0, 1, 2, 0])).loss.backward()
    >>> trust = head.eval()(batch).trust
    >>> trust.shape, bool((trust <= 1).all())
    (torch.Size([4, 2]), True)
    """

    def __init__(
        self,
        embedding_dims: Mapping[str, int] | Sequence[int],
        num_classes: int,
        *,
        objective: IIBalanceLoss | None = None,
        budgets: Budgets | Mapping[str, float] | Sequence[float] | None = None,
        momentum: float = ObjectiveConfig.momentum,
        metric: str | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        if not isinstance(embedding_dims, Mapping):
            embedding_dims = {str(index): size for index, size in enumerate(embedding_dims)}
        if objective is None:
            objective = IIBalanceLoss(metric=metric or "cosine", impl=impl)
        its = getattr(objective, "metric", None)  # a user's own loss may have none
        if metric is not None and its is not None and metric != its:
            raise ValueError(
                f"metric: {metric!r} is not the objective's {its!r}; "
                "leave it out, or give an objective of this metric"
            )
        self.modalities = check_names(embedding_dims)
        self.embedding_dims = {name: int(size) for name, size in embedding_dims.items()}
        self.num_classes = num_classes
        self.classifiers = nn.ModuleList(
            nn.Linear(size, num_classes) for size in self.embedding_dims.values()
        )
        self.prototypes = PrototypeBank(
            self.embedding_dims,
            num_classes,
            momentum=momentum,
            metric=its or metric or "cosine",
            impl=impl,
        )
        self.gate = Gate(self.modalities, impl=impl)
        self.objective = objective
        count = len(self.modalities)
        self.register_buffer("budgets", torch.ones(count))
        if budgets is not None:
            self.set_budgets(budgets)

    @torch.no_grad()
    def set_budgets(self, budgets: Budgets | Mapping[str, float] | Sequence[float]) -> None:
        """Use these budgets from now on: they set the alignment's anchor and relative budgets."""
        if not isinstance(budgets, Budgets):
            given = as_sequence(budgets, self.modalities, "budgets")
            budgets = Budgets.given(dict(zip(self.modalities, given)))
        by_name = dict(zip(budgets.modalities, budgets.values))
        self.budgets.copy_(torch.tensor(as_sequence(by_name, self.modalities, "budgets")))

    def heads(self, embeddings: Embeddings, mask: Tensor | None = None) -> list[Tensor]:
        """Each modality's own logits l_m before any temperature, M of [B, K].

        Rows of a missing modality are 0.
        """
        return self._heads(self._present(embeddings, mask), mask)

    def keys_of(self, index: int) -> list[str]:
        """Names, in the state dict, of what belongs to modality ``index`` alone."""
        classifier = [
            f"classifiers.{index}.{name}" for name in self.classifiers[index].state_dict()
        ]
        return [*classifier, f"prototypes.prototypes_{index}", f"prototypes.counts_{index}"]

    @property
    def own_temperature(self) -> Tensor:
        """[M]: what calibrates each modality's own prediction."""
        return self.gate.own_temperature

    def cool(self, temperature: float) -> None:
        """Divide the fused logits by ``temperature`` from now on, beside what scales them now."""
        self.gate.log_scale.sub_(math.log(temperature))

    def _heads(self, embeddings: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        logits = [classifier(rows) for classifier, rows in zip(self.classifiers, embeddings)]
        return fill_missing(logits, mask)

    def _present(self, embeddings: Embeddings, mask: Tensor | None) -> list[Tensor]:
        """The embeddings in order, checked; missing rows are 0."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        for (name, size), embedding in zip(self.embedding_dims.items(), embeddings):
            if embedding.dim() != 2 or embedding.shape[1] != size:
                raise ValueError(
                    f"embeddings: {name} has shape {tuple(embedding.shape)}, expected [B, {size}]; "
                    "the encoder must return one vector a sample"
                )
        return fill_missing(embeddings, mask)

    def fuse(self, embeddings: Embeddings, mask: Tensor | None = None) -> HeadOutput:
        """Predict from embeddings with the calibrated gate (no loss)."""
        embeddings = self._present(embeddings, mask)
        return self._fuse(self._heads(embeddings, mask), embeddings, mask)

    def _fuse(
        self, logits: list[Tensor], embeddings: list[Tensor], mask: Tensor | None
    ) -> HeadOutput:
        surprise = self.prototypes.surprise(embeddings)
        fused = self.gate(logits, surprise, mask)
        own = self.gate.own(logits)
        doubt = uncertainties(own)
        return HeadOutput(fused.logits, None, doubt, own, trust=fused.trust)

    def forward(
        self,
        embeddings: Embeddings,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """Predict, and with ``targets`` compute the loss.

        The loss always takes the neutral gate: calibration comes after training. In training mode
        with targets ``logits`` is the neutral sum too, and ``trust`` and ``uncertainty`` are None.

        Args:
            embeddings: M of [B, D_m].
            targets: [B] int64; None = no loss, -100 = ignored rows.
            mask: [B, M] bool, True = present.
            progress: in [0, 1], the share of the training that is done; drives the schedule of the
                prototype terms.
        """
        embeddings = self._present(embeddings, mask)
        if self.training and targets is not None and mask is None:
            linear = self._plain(embeddings, targets)
            if linear:
                return self._step(embeddings, targets, progress, *linear)
        logits = self._heads(embeddings, mask)
        if targets is None:
            return self._fuse(logits, embeddings, mask)
        all_seen = not torch.compiler.is_compiling() and self.prototypes.complete
        parts = self.objective(
            logits,
            targets,
            embeddings=embeddings,
            prototypes=self.prototypes.prototypes,
            budgets=self.budgets,
            mask=mask,
            progress=progress,
            seen=None if all_seen else list(self.prototypes.seen),
        )
        if self.training:
            self.prototypes.update(embeddings, targets, mask)
            return HeadOutput(sum(logits), None, None, tuple(logits), parts.total, parts)
        with torch.no_grad():
            fused = self._fuse(logits, embeddings, mask)
        return fused._replace(loss=parts.total, parts=parts)

    def _plain(
        self, embeddings: list[Tensor], targets: Tensor
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """The classifiers' weights and biases, if the CPU's fast step may be taken.

        It may where nothing stands in its way: one process, classes all seen, and the objective,
        the classifiers and :meth:`_heads` as they are here, without hooks.
        """
        if torch.compiler.is_compiling():
            return None
        objective, prototypes, linear = self.objective, self.prototypes, list(self.classifiers)
        if _DISTRIBUTED and dist.is_initialized():
            return None
        if type(objective) is not IIBalanceLoss or type(self)._heads is not IIBalanceHead._heads:
            return None
        if objective.metric != "cosine" or prototypes.impl != "auto" or not prototypes.complete:
            return None
        if any(map(_hooked, (objective, *linear))):
            return None
        if any(type(classifier) is not nn.Linear for classifier in linear):
            return None
        weights = [classifier.weight for classifier in linear]
        biases = [classifier.bias for classifier in linear]
        if any(bias is None for bias in biases):
            return None
        if not cpu.takes(objective.impl, targets, self.num_classes, embeddings, weights):
            return None
        return weights, biases

    def _step(
        self,
        embeddings: list[Tensor],
        targets: Tensor,
        progress: float,
        weights: list[Tensor],
        biases: list[Tensor],
    ) -> HeadOutput:
        objective, strength = self.objective, self.objective.strength(progress)
        terms = cpu.Weights(
            objective.fused_weight,
            objective.unimodal_weight,
            strength * objective.alpha,
            strength * objective.beta,
        )
        out = cpu.step(
            embeddings,
            weights,
            biases,
            targets,
            self.prototypes.prototypes,
            self.budgets,
            objective.temperature,
            terms,
        )
        self.prototypes.update_rows(out.rows, targets)
        parts = LossOutput(*out[:5])
        return HeadOutput(out.summed, None, None, out.logits.unbind(), out.total, parts)


def uncertainties(logits: Sequence[Tensor]) -> Tensor:
    """[B, M] in [0, 1]: entropy over log K of the predictions with ``logits`` M of [B, K].

    1 for a modality that is missing, whose logits are 0; 0 where there is one class.
    """
    p = torch.stack(list(logits), 1).softmax(-1)
    return torch.special.entr(p).sum(-1) / math.log(max(p.shape[-1], 2))


def _hooked(part: nn.Module) -> bool:
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
    )

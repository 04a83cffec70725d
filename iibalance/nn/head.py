"""IIBalanceHead: any encoders' embeddings in; fused logits, weights, uncertainty and loss out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iib_kernels import cpu
from iibalance.budgets import Budgets
from iibalance.errors import as_sequence, check_names
from iibalance.nn.gate import Gate
from iibalance.nn.loss import IIBalanceLoss, LossOutput
from iibalance.nn.prototypes import PrototypeBank

_DISTRIBUTED = dist.is_available()


class HeadOutput(NamedTuple):
    """What a head returns. Rows are samples; columns of [B, M] follow the order of the modalities."""

    logits: Tensor  #: [B, K] fused, calibrated logits
    weights: Tensor | None  #: [B, M] fusion weights, sum to 1
    uncertainty: (
        Tensor | None
    )  #: [B, M] normalised entropy of each modality's own prediction, in [0, 1]
    modality_logits: tuple[
        Tensor, ...
    ]  #: M of [B, K], each modality's own prediction, at its own temperature
    loss: Tensor | None = None  #: [] with targets
    parts: LossOutput | None = None  #: the loss's parts, with targets
    embeddings: tuple[
        Tensor, ...
    ] = ()  #: M of [B, D_m], missing rows 0: for the methods that need them, in training


class IIBalanceHead(nn.Module):
    """Turns embeddings of any encoders into an IIBalance model: heads, prototypes, budgets, gate and objective in one module.

    Args:
        embedding_dims: modality name -> D_m (or a list of D_m: modalities are then named "0", "1", ...).
        num_classes: K.
        objective: the loss, ``IIBalanceLoss()`` by default.
        budgets: budgets in [0, 1], by name or in order, or a :class:`~iibalance.budgets.Budgets`; equal by default.
        gate_hidden: units of the optional gate network (0 = none).
        momentum: of the prototypes' moving average.
        metric, impl: of ``iib_kernels``.

    Call it with embeddings (dict or list), and with ``targets`` for the loss; in training mode with targets the prototypes move as well. A missing
    modality is told by ``mask`` [B, M] bool (False = missing, its embedding may hold anything).

    Raises ValueError naming the argument for embeddings of the wrong number, size or names and for a sample with no modality present.

    >>> head = IIBalanceHead({"audio": 8, "visual": 16}, num_classes=3, budgets={"audio": 0.8, "visual": 0.3})
    >>> out = head({"audio": torch.randn(4, 8), "visual": torch.randn(4, 16)}, torch.tensor([0, 1, 2, 0]))
    >>> out.loss.backward()
    >>> weights = head.eval()({"audio": torch.randn(2, 8), "visual": torch.randn(2, 16)}).weights
    >>> torch.allclose(weights.sum(1), torch.ones(2))
    True
    """

    def __init__(
        self,
        embedding_dims: Mapping[str, int] | Sequence[int],
        num_classes: int,
        *,
        objective: IIBalanceLoss | None = None,
        budgets: Budgets | Mapping[str, float] | Sequence[float] | None = None,
        gate_hidden: int = 0,
        momentum: float = 0.9,
        metric: str = "cosine",
        impl: str = "auto",
    ):
        super().__init__()
        if not isinstance(embedding_dims, Mapping):
            embedding_dims = {str(index): size for index, size in enumerate(embedding_dims)}
        self.modalities = check_names(embedding_dims)
        self.embedding_dims = {name: int(size) for name, size in embedding_dims.items()}
        self.num_classes = num_classes
        self.classifiers = nn.ModuleList(
            nn.Linear(size, num_classes) for size in self.embedding_dims.values()
        )
        self.prototypes = PrototypeBank(
            self.embedding_dims, num_classes, momentum=momentum, metric=metric, impl=impl
        )
        self.gate = Gate(self.modalities, hidden=gate_hidden, impl=impl)
        self.objective = IIBalanceLoss(metric=metric, impl=impl) if objective is None else objective
        self.register_buffer("budgets", torch.ones(len(self.modalities)))
        self.register_buffer(
            "log_prior", torch.full((len(self.modalities),), 1 / len(self.modalities)).log()
        )
        if budgets is not None:
            self.set_budgets(budgets)

    @torch.no_grad()
    def set_budgets(self, budgets: Budgets | Mapping[str, float] | Sequence[float]) -> None:
        """Use these budgets from now on: they set the anchor and relative budgets of the alignment and the gate's prior."""
        if not isinstance(budgets, Budgets):
            budgets = Budgets.given(
                dict(zip(self.modalities, as_sequence(budgets, self.modalities, "budgets")))
            )
        self.budgets.copy_(
            torch.tensor(
                as_sequence(
                    dict(zip(budgets.modalities, budgets.values)), self.modalities, "budgets"
                )
            )
        )
        self.log_prior.copy_(
            torch.tensor(
                as_sequence(
                    dict(zip(budgets.modalities, budgets.prior)), self.modalities, "budgets"
                )
            ).log()
        )

    def heads(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None = None
    ) -> list[Tensor]:
        """Each modality's own logits l_m before any temperature, M of [B, K]; rows of a missing modality are 0."""
        return self._heads(self._present(embeddings, mask), mask)

    def _heads(self, embeddings: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        logits = [
            classifier(embedding) for classifier, embedding in zip(self.classifiers, embeddings)
        ]
        return logits if mask is None else _fill_missing(logits, mask)

    def _present(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None
    ) -> list[Tensor]:
        """The embeddings in order, checked; a missing modality's rows, which may hold anything, are 0: NaN would pass through a gradient of 0."""
        embeddings = as_sequence(embeddings, self.modalities, "embeddings")
        for name, size, embedding in zip(self.modalities, self.embedding_dims.values(), embeddings):
            if embedding.dim() != 2 or embedding.shape[1] != size:
                raise ValueError(
                    f"embeddings: {name} has shape {tuple(embedding.shape)}, expected [B, {size}]; the encoder must return one vector a sample"
                )
        return embeddings if mask is None else _fill_missing(embeddings, mask)

    def fuse(
        self, embeddings: Mapping[str, Tensor] | Sequence[Tensor], mask: Tensor | None = None
    ) -> HeadOutput:
        """Predict from embeddings with the calibrated gate (no loss)."""
        embeddings = self._present(embeddings, mask)
        return self._fuse(self._heads(embeddings, mask), embeddings, mask)

    def _fuse(
        self, logits: list[Tensor], embeddings: list[Tensor], mask: Tensor | None
    ) -> HeadOutput:
        surprise = self.prototypes.surprise(embeddings)
        fused = self.gate(logits, self.log_prior, surprise, mask)
        return HeadOutput(fused.logits, fused.weights, fused.uncertainty, self.gate.own(logits))

    def forward(
        self,
        embeddings: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        progress: float = 1.0,
    ) -> HeadOutput:
        """Predict, and with ``targets`` compute the loss, which always takes the neutral gate: calibration comes after training, and weights that no
        gradient passes cannot starve a modality. In training mode with targets ``logits`` is the neutral sum too, ``weights`` and ``uncertainty`` are None.

        Args: embeddings M of [B, D_m]; targets [B] int64 (None = no loss; -100 = ignored rows); mask [B, M] bool; ``progress`` in [0, 1], the share
        of the training that is done, drives the schedule of the prototype terms.
        """
        embeddings = self._present(embeddings, mask)
        if self.training and targets is not None and mask is None:
            linear = self._plain(embeddings, targets)
            if linear:
                return self._step(embeddings, targets, progress, *linear)
        logits = self._heads(embeddings, mask)
        if targets is None:
            return self._fuse(logits, embeddings, mask)
        parts = self.objective(
            logits,
            targets,
            embeddings=embeddings,
            prototypes=self.prototypes.prototypes,
            budgets=self.budgets,
            mask=mask,
            progress=progress,
            seen=None
            if not torch.compiler.is_compiling() and self.prototypes.complete
            else list(self.prototypes.seen),
        )
        if self.training:
            self.prototypes.update(embeddings, targets, mask)
            return HeadOutput(sum(logits), None, None, tuple(logits), parts.total, parts)
        with torch.no_grad():
            return self._fuse(logits, embeddings, mask)._replace(loss=parts.total, parts=parts)

    def _plain(
        self, embeddings: list[Tensor], targets: Tensor
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """The classifiers' weights and biases if nothing stands in the way of the CPU's fast path: one process, classes all seen, the objective as it is."""
        if torch.compiler.is_compiling():
            return None
        objective, prototypes, linear = self.objective, self.prototypes, list(self.classifiers)
        if (
            _DISTRIBUTED
            and dist.is_initialized()
            or type(objective) is not IIBalanceLoss
            or type(self)._heads is not IIBalanceHead._heads
        ):
            return None
        if (
            objective.metric != "cosine"
            or prototypes.metric != "cosine"
            or prototypes.impl != "auto"
            or not prototypes.complete
        ):
            return None
        for part in (objective, *linear):
            if (
                part._forward_hooks
                or part._forward_pre_hooks
                or part._backward_hooks
                or part._backward_pre_hooks
            ):
                return None
        if any(type(classifier) is not nn.Linear for classifier in linear):
            return None
        weights, biases = (
            [classifier.weight for classifier in linear],
            [classifier.bias for classifier in linear],
        )
        if any(bias is None for bias in biases) or not cpu.takes(
            objective.impl, targets, self.num_classes, embeddings, weights
        ):
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
        out = cpu.step(
            embeddings,
            weights,
            biases,
            targets,
            self.prototypes.prototypes,
            self.budgets,
            objective.temperature,
            cpu.Weights(
                objective.fused_weight,
                objective.unimodal_weight,
                strength * objective.alpha,
                strength * objective.beta,
            ),
        )
        self.prototypes.update_rows(out.rows, targets)
        return HeadOutput(
            out.summed, None, None, out.logits.unbind(), out.total, LossOutput(*out[:5])
        )


def _fill_missing(values: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    return [rows.masked_fill(~mask[:, index, None], 0.0) for index, rows in enumerate(values)]

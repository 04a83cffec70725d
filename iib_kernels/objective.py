"""The whole objective of a batch as one scalar (method page, section 5).

Its gradients are computed in the forward pass, with the losses: a scalar needs no second one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels._checks import check_device, check_number, check_shape, check_targets, describe
from iib_kernels._runtime import choose, compute_dtype
from iib_kernels.alignment import alignment_loss, check_budgets, check_temperature, check_unit
from iib_kernels.compat import apply, distinct, exportable
from iib_kernels.cpu import objective as cpu_objective
from iib_kernels.cpu.shared import takes as cpu_takes
from iib_kernels.fusion import check_labels, fusion_cross_entropy, prepare
from iib_kernels.ops.objective.autograd import MultimodalObjectiveFunction
from iib_kernels.prototype import check_modalities
from iib_kernels.update import snapshot


class ObjectiveWeights(NamedTuple):
    """What each kind of loss weighs in :func:`multimodal_objective`; numbers >= 0."""

    fused: float = 1.0  #: of the cross-entropy of the fused logits
    unimodal: float = 1.0  #: of each modality's own cross-entropy
    contrastive: float = 1.0  #: of each modality's prototype contrast
    alignment: float = 1.0  #: of each modality's alignment with the anchor


EVEN = ObjectiveWeights()


@exportable
class ObjectiveParts(NamedTuple):
    """The losses that make up an objective, each a mean over the rows that count for it.

    They are for reading: no gradient passes them.
    """

    fused: Tensor  #: [] cross-entropy of the fused logits, nats
    unimodal: Tensor  #: [M] cross-entropies of the temperature-scaled logits, nats
    contrastive: Tensor  #: [M] prototype contrast, nats; 0 without features
    alignment: Tensor  #: [M] alignment; 0 without features and for the anchor


@exportable
class ObjectiveOutput(NamedTuple):
    """What :func:`multimodal_objective` returns; float32, or float64 where any input is."""

    loss: Tensor  #: [] what to differentiate
    parts: ObjectiveParts  #: what it is made of, without gradient
    weights: Tensor  #: [B, M] fusion weights, without gradient


def multimodal_objective(
    logits: Sequence[Tensor] | Tensor,
    targets: Tensor,
    log_prior: Tensor | None = None,
    *,
    features: Sequence[Tensor] | None = None,
    prototypes: Sequence[Tensor] | None = None,
    budgets: Tensor | Sequence[float] | None = None,
    weights: ObjectiveWeights | Sequence[float] = EVEN,
    gate_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    uncertainty_weight: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    prototype_temperature: float = 0.2,
    metric: str = "cosine",
    unit_prototypes: bool = False,
    seen: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> ObjectiveOutput:
    """One scalar for all losses of a batch (method page, section 5).

    With the cross-entropies of :func:`~iib_kernels.fusion_cross_entropy` and the prototype losses
    C_m and A_m of :func:`~iib_kernels.alignment_loss`, each a mean over the rows that count for
    it::

        loss = fused CE(f, y) + sum_m [unimodal CE(t_m, y) + contrastive C_m + alignment A_m]

    Losses and gradients come out of the same pass; ``loss.backward()`` multiplies the gradients by
    what comes in. Only ``loss`` carries a gradient. To weigh a part in a way of your own, call the
    two functions above instead. Prototypes may be moved between the call and its backward.

    Args:
        logits: M tensors [B, K], or one tensor [M, B, K].
        targets: [B] class indices; rows with ``ignore_index`` contribute nothing.
        log_prior: [M], eta * log pi; uniform by default.
        features: M tensors [B, D_m], for the prototype losses, which are left out without them.
        prototypes: M tensors [K, D_m], given with ``features``; they get no gradient.
        budgets: [M] in [0, 1], a tensor or numbers; all 1 by default.
        weights: :class:`ObjectiveWeights`, or four numbers in its order.
        gate_logits, temperature, uncertainty_weight, scale, weight, label_smoothing: as in
            :func:`~iib_kernels.fusion_cross_entropy`. ``scale`` may be ``"present"`` as well: the
            number of modalities that are there in a row, so that uniform weights give the plain
            sum of their logits.
        prototype_temperature: tau of the prototype softmax; ``temperature`` of
            :func:`~iib_kernels.alignment_loss`, as are ``metric``, ``unit_prototypes`` and
            ``seen``.
        mask: [B, M] bool, True = present.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Half types are computed in float32; each gradient comes in its input's dtype. Raises TypeError
    or ValueError naming the argument. Second derivatives: ``impl="reference"``.

    Source: arXiv 2603.17347; this project's own formulation.

    >>> logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> features = [torch.tensor([[1.0, 0.1]]), torch.tensor([[0.2, 0.3]])]
    >>> out = multimodal_objective(
    ...     logits, torch.tensor([0]), features=features, prototypes=[torch.eye(2)] * 2,
    ...     budgets=[0.9, 0.6], uncertainty_weight=0.0, scale=2.0,
    ... )
    >>> out.loss, out.parts.fused
    (tensor(6.3092), tensor(0.3133))
    """
    weights = _check_weights(weights)
    logits, gate, labels = _check_fusion(
        logits,
        targets,
        {
            "log_prior": log_prior,
            "gate_logits": gate_logits,
            "temperature": temperature,
            "uncertainty_weight": uncertainty_weight,
            "scale": scale,
            "mask": mask,
        },
        {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index},
        impl,
    )
    tables = _check_tables(features, prototypes, budgets, seen, metric, logits, labels["targets"])
    if not (weights.contrastive or weights.alignment):
        tables = None
    options = {
        "prototype_temperature": prototype_temperature,
        "metric": metric,
        "unit_prototypes": unit_prototypes,
    }
    check_temperature(prototype_temperature, "prototype_temperature")
    check_unit(unit_prototypes, metric)
    call = _Call(logits, gate, labels, tables, weights, options)
    if choose(impl, *logits) == "triton":
        if not _asks_gradient(gate):
            return _by_kernels(call)
    elif _on_cpu(impl, call):
        return _on_the_cpu(call)
    return _composed(call, impl)


class _Tables(NamedTuple):
    """The prototype losses' tensors."""

    features: list[Tensor]  # M of [B, D_m]
    prototypes: list[Tensor]  # M of [K, D_m]
    budgets: Tensor  # [M]
    seen: list[Tensor] | None  # M of [K]


class _Call(NamedTuple):
    """The arguments, checked."""

    logits: list[Tensor]  # M of [B, K]
    gate: dict  # what fusion makes weights of
    labels: dict  # what cross-entropies are taken of
    tables: _Tables | None  # None: without prototype losses
    weights: ObjectiveWeights
    options: dict  # of the prototype losses


# ----- Implementations


def _by_kernels(call: _Call) -> ObjectiveOutput:
    """Triton: losses and gradients in one pass."""
    logits, gate, labels, tables, weights, options = call
    count, present = len(logits), isinstance(gate["scale"], str)
    parameters = [gate[name] for name in ("temperature", "uncertainty_weight", "scale")]
    numbers = [1.0 if isinstance(value, (Tensor, str)) else float(value) for value in parameters]
    parameters = [value if isinstance(value, Tensor) else None for value in parameters]
    features, prototypes, budgets, seen = tables or ([], [], None, None)
    small = (budgets, gate["log_prior"], gate["gate_logits"], *parameters, gate["mask"])
    small = (labels["targets"], *small, labels["weight"])
    tensors = [*small, *logits, *features, *prototypes, *(seen or [])]
    given = iter(distinct([value for value in tensors if value is not None]))
    tensors = [None if value is None else next(given) for value in tensors]
    asked = torch.is_grad_enabled() and any(v.requires_grad for v in (*logits, *features))
    constants = (
        [
            *map(float, weights),
            float(options["prototype_temperature"]),
            float(labels["label_smoothing"]),
            *numbers,
        ],
        present,
        options["metric"] == "cosine",
        options["unit_prototypes"],
        labels["ignore_index"],
        # Compiled code does not know whether it stands inside torch.func.grad
        asked or torch.compiler.is_compiling(),
    )
    loss, parts, shares, *_ = apply(MultimodalObjectiveFunction, constants, count, *tensors)
    fused, *others = parts[0], *parts[1:].split(count)
    return ObjectiveOutput(loss, ObjectiveParts(fused, *others), shares)


def _on_cpu(impl: str, call: _Call) -> bool:
    """Whether the implementation for a CPU takes the call."""
    logits, gate, labels, tables = call[:4]
    flat = [] if tables is None else [*tables.features, *tables.prototypes, tables.budgets]
    return cpu_takes(impl, *logits, *gate.values(), *labels.values(), *flat)


def _on_the_cpu(call: _Call) -> ObjectiveOutput:
    """Losses and gradients in one pass, chunk by chunk."""
    logits, gate, labels, tables, weights, options = call
    dtype = compute_dtype(*logits, *(() if tables is None else tables.features))
    raised = _to(gate, dtype, but="mask")
    if isinstance(gate["scale"], str):  # "present"
        raised["scale"] = gate["mask"].sum(-1).to(dtype)
    tensors: dict = {}
    if tables is not None:
        tensors = {
            "features": [value.to(dtype) for value in tables.features],
            "prototypes": [value.to(dtype) for value in tables.prototypes],
            "budgets": tables.budgets.to(dtype),
            "seen": tables.seen,
        }
    loss, *parts, shares = cpu_objective.multimodal_objective(
        [value.to(dtype) for value in logits],
        weights=weights,
        **raised,
        **_to(labels, dtype, but="targets"),
        **tensors,
        **options,
    )
    return ObjectiveOutput(loss, ObjectiveParts(*parts), shares)


def _composed(call: _Call, impl: str) -> ObjectiveOutput:
    """The sum of what the two functions return."""
    logits, gate, labels, tables, weights, options = call
    entropies = fusion_cross_entropy(logits, **gate, **labels, impl=impl)
    contrastive = alignment = torch.zeros_like(entropies.unimodal)
    loss = weights.fused * entropies.fused + weights.unimodal * entropies.unimodal.sum()
    if tables is not None:
        # Backward reads the prototypes, which an update may have moved by then
        contrastive, alignment, _ = alignment_loss(
            tables.features,
            [snapshot(table) for table in tables.prototypes],
            labels["targets"],
            tables.budgets,
            temperature=options["prototype_temperature"],
            metric=options["metric"],
            unit_prototypes=options["unit_prototypes"],
            seen=tables.seen,
            mask=gate["mask"],
            ignore_index=labels["ignore_index"],
            impl=impl,
        )
        loss = loss + weights.contrastive * contrastive.sum() + weights.alignment * alignment.sum()
    parts = entropies.fused, entropies.unimodal, contrastive, alignment
    return ObjectiveOutput(
        loss, ObjectiveParts(*(part.detach() for part in parts)), entropies.weights.detach()
    )


def _to(values: dict, dtype: torch.dtype, *, but: str) -> dict:
    """Tensors among ``values`` in the dtype to compute in."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and name != but else value
        for name, value in values.items()
    }


def _asks_gradient(gate: dict) -> bool:
    """Whether gradients are wanted by what turns logits into weights, which kernels leave out."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in gate.values()
    )


# ----- Checks


def _check_fusion(
    logits: object, targets: object, gate: dict, labels: dict, impl: str
) -> tuple[list[Tensor], dict, dict]:
    """Checked logits M of [B, K], gate arguments and labels, each by name."""
    logits, checked, _ = prepare(logits, **gate)
    if logits[0].dim() != 2:
        raise ValueError(f"logits[0]: expected shape [B, K], got {describe(logits[0])}")
    (batch, classes), ignore_index = logits[0].shape, labels["ignore_index"]
    # Kernels look at each target themselves
    replace = choose(impl, *logits) == "reference"
    targets = check_targets(targets, (batch,), classes, ignore_index, replace=replace)
    check_labels(labels["weight"], labels["label_smoothing"], logits[0])
    check_device(logits[0], targets=targets, weight=labels["weight"])
    return logits, checked, {"targets": targets, **labels}


def _check_tables(
    features: object,
    prototypes: object,
    budgets: object,
    seen: object,
    metric: str,
    logits: list[Tensor],
    targets: Tensor,
) -> _Tables | None:
    """Checked tensors of the prototype losses; None without features."""
    if (features is None) != (prototypes is None):
        missing = "prototypes" if prototypes is None else "features"
        raise ValueError(f"{missing}: give features and prototypes together, or neither")
    if features is None:
        return None
    features, prototypes, seen = check_modalities(features, prototypes, seen, metric)
    count, classes = len(logits), logits[0].shape[1]
    if len(features) != count:
        raise ValueError(f"features: expected {count} tensors, as logits, got {len(features)}")
    if len(prototypes[0]) != classes:
        raise ValueError(
            f"prototypes[0]: expected {classes} classes, as logits[0], "
            f"got {describe(prototypes[0])}"
        )
    check_shape(features[0], (targets.shape[0], None), "features[0]", "[B, D_0]")
    check_device(logits[0], **{"features[0]": features[0]})
    if budgets is None:
        budgets = torch.ones(count, dtype=compute_dtype(*features), device=targets.device)
    budgets = check_budgets(budgets, features)
    return _Tables(features, prototypes, budgets, seen)


def _check_weights(weights: object) -> ObjectiveWeights:
    """Four numbers >= 0."""
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected ObjectiveWeights, got {describe(weights)}")
    if len(weights) != 4:
        raise ValueError(
            "weights: expected four numbers (fused, unimodal, contrastive, alignment), "
            f"got {len(weights)}"
        )
    for name, value in zip(ObjectiveWeights._fields, weights):
        check_number(value, f"weights.{name}")
        if not 0 <= value < math.inf:
            raise ValueError(f"weights.{name}: expected a number >= 0 and finite, got {value}")
    return ObjectiveWeights(*weights)

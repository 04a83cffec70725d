"""The operators that are timed: their inputs, their peers, and the least that each must do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import iib_kernels
from benchmarks.shapes import (
    FORWARD,
    MODES,
    ONLY,
    PRECISIONS,
    WITHOUT_PRODUCTS,
    Case,
    Precision,
    Shape,
    size,
)
from iib_kernels import reference
from iib_kernels.objective import multimodal_objective as objective


def _moved(inputs, outputs, leaves) -> dict[str, int]:
    """Least bytes.

    Forward reads inputs and writes outputs. Backward reads inputs and the outputs' gradients, and
    writes the leaves'.
    """
    forward = size(inputs, outputs)
    backward = size(inputs, [value for value in outputs if value.is_floating_point()], leaves)
    return {"forward": forward, "backward": backward, "step": forward + backward}


def _products(shape: Shape, count: int) -> dict[str, int]:
    """Least operations: scores of ``count`` modalities, and as many for the features' gradient."""
    scores = 2 * shape.batch * shape.classes * shape.width * count
    return dict(zip(MODES, (scores, scores, 2 * scores)))


def _features(
    shape: Shape, precision: Precision, device: str
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Features that ask for a gradient, prototypes and targets.

    A feature is its class's prototype and as much noise, so that no other prototype is nearer by
    rounding alone.
    """
    targets = torch.randint(shape.classes, (shape.batch,), device=device)
    prototypes, features = [], []
    for _ in range(shape.modalities):
        table = torch.randn(shape.classes, shape.width, device=device)
        rows = table[targets] + torch.randn(shape.batch, shape.width, device=device)
        prototypes.append(table.to(precision.prototypes))
        features.append(rows.to(precision.features).requires_grad_())
    return features, prototypes, targets


def _logits(
    shape: Shape, precision: Precision, device: str
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Logits that ask for a gradient, targets, a prior and gate logits."""
    logits = [
        torch.randn(
            shape.batch, shape.classes, dtype=precision.features, device=device, requires_grad=True
        )
        for _ in range(shape.modalities)
    ]
    gate = torch.randn(shape.batch, shape.modalities, device=device)
    prior = torch.full((shape.modalities,), -0.5, device=device)
    targets = torch.randint(shape.classes, (shape.batch,), device=device)
    return logits, targets, prior, gate


def _cross_entropies(logits: list[Tensor], targets: Tensor) -> tuple[Tensor, ...]:
    """``F.cross_entropy`` of each modality's logits and of their sum: M + 1 calls."""
    return tuple(F.cross_entropy(values, targets) for values in (*logits, sum(logits)))


def prototype_distance(shape: Shape, precision: Precision, device: str) -> Case:
    """Squared distances of one modality."""
    (features, *_), (prototypes, *_), _ = _features(shape, precision, device)
    run = lambda impl, inputs: (
        iib_kernels.prototype_distance(*inputs, metric="sqeuclidean", impl=impl),
    )

    def product(inputs):
        """The library's product in the features' type, and an epilogue."""
        rows, table = inputs
        table = table.to(rows.dtype)
        lengths = lambda values: values.float().square().sum(-1).to(rows.dtype)
        scores = torch.addmm(lengths(table), rows, table.mT, alpha=-2)
        return ((scores + lengths(rows)[:, None]).clamp_min(0),)

    peers = {"product": product}
    if precision.features == torch.float32:  # the only one that it has
        peers["cdist"] = lambda inputs: (torch.cdist(*inputs).square(),)
    output = torch.empty(shape.batch, shape.classes, dtype=precision.features, device="meta")
    inputs = (features, prototypes)
    return Case(
        "prototype_distance",
        shape,
        run,
        inputs,
        [features],
        _moved(inputs, [output], [features]),
        _products(shape, 1),
        peers,
    )


def alignment_loss(shape: Shape, precision: Precision, device: str) -> Case:
    """Contrastive and alignment loss of all modalities."""
    features, prototypes, targets = _features(shape, precision, device)
    inputs = (features, prototypes, targets, torch.linspace(1.0, 0.4, shape.modalities).to(device))
    run = lambda impl, inputs: iib_kernels.alignment_loss(*inputs, impl=impl)[:2]

    def autocast(inputs):
        """What AMP makes of the equations: products in bfloat16, the rest in float32."""
        with torch.autocast(device, dtype=torch.bfloat16):
            contrastive, alignment, *_ = reference.alignment_loss(*inputs)
        return contrastive.float().mean(0), alignment.float().mean(0)

    outputs = [torch.empty(shape.modalities, device="meta")] * 2
    return Case(
        "alignment_loss",
        shape,
        run,
        inputs,
        features,
        _moved(inputs[:3], outputs, features),
        _products(shape, shape.modalities),
        {} if precision.features == torch.float32 else {"autocast": autocast},
    )


def nearest_prototype(shape: Shape, precision: Precision, device: str) -> Case:
    """Distance to the nearest prototype, all modalities."""
    inputs = features, _, _ = _features(shape, precision, device)
    run = lambda impl, inputs: (iib_kernels.nearest_prototype(*inputs[:2], impl=impl).distance,)
    outputs = [
        torch.empty(shape.batch, shape.modalities, device="meta"),
        torch.empty(shape.batch, shape.modalities, dtype=torch.int64, device="meta"),
    ]
    scores = _products(shape, shape.modalities)["forward"]
    return Case(
        "nearest_prototype",
        shape,
        run,
        inputs,
        features,
        _moved(inputs[:2], outputs, features),
        {"forward": scores, "step": scores},  # the gradient needs one prototype a row
    )


def gated_fusion(shape: Shape, precision: Precision, device: str) -> Case:
    """Fused logits under a prior and gate logits."""
    inputs = logits, _, _, gate = _logits(shape, precision, device)

    def run(impl, inputs):
        logits, _, prior, gate = inputs
        return iib_kernels.gated_fusion(logits, prior, gate_logits=gate, impl=impl)[:1]

    output = torch.empty(shape.batch, shape.classes, dtype=precision.features, device="meta")
    bytes = _moved([logits, gate], [output, gate, gate], logits)
    return Case("gated_fusion", shape, run, inputs, logits, bytes)


def fusion_cross_entropy(shape: Shape, precision: Precision, device: str) -> Case:
    """Fused and unimodal cross-entropies under a prior and gate logits."""
    inputs = logits, targets, _, gate = _logits(shape, precision, device)

    def run(impl, inputs):
        return iib_kernels.fusion_cross_entropy(*inputs[:3], gate_logits=inputs[3], impl=impl)[:2]

    outputs = [torch.empty((), device="meta"), torch.empty(shape.modalities, device="meta"), gate]
    return Case(
        "fusion_cross_entropy",
        shape,
        run,
        inputs,
        logits,
        _moved([logits, gate, targets], outputs, logits),
        lesser={"F.cross_entropy x (M+1)": lambda inputs: _cross_entropies(*inputs[:2])},
    )


def multimodal_objective(shape: Shape, precision: Precision, device: str) -> Case:
    """All losses of a batch as one scalar: no backward of its own, as a step may be one pass."""
    logits, _, prior, gate = _logits(shape, precision, device)
    features, prototypes, targets = _features(shape, precision, device)
    budgets = torch.linspace(1.0, 0.4, shape.modalities).to(device)
    inputs = (logits, targets, prior, gate, features, prototypes, budgets)

    def run(impl, inputs):
        logits, targets, prior, gate, features, prototypes, budgets = inputs
        output = objective(
            logits,
            targets,
            prior,
            gate_logits=gate,
            features=features,
            prototypes=prototypes,
            budgets=budgets,
            impl=impl,
        )
        return (output.loss,)

    leaves = [*logits, *features]
    forward = size(inputs, torch.empty((1 + 3 * shape.modalities), device="meta"), gate)
    products = _products(shape, shape.modalities)
    return Case(
        "multimodal_objective",
        shape,
        run,
        inputs,
        leaves,
        {"forward": forward, "step": forward + size(leaves)},
        {mode: products[mode] for mode in ("forward", "step")},
        lesser={"F.cross_entropy x (M+1)": lambda inputs: (sum(_cross_entropies(*inputs[:2])),)},
    )


def update_prototypes(shape: Shape, precision: Precision, device: str) -> Case:
    """The moving average of one modality's prototypes; it has no gradient."""
    (features, *_), (prototypes, *_), targets = _features(shape, precision, device)
    counts = torch.ones(shape.classes, dtype=torch.int64, device=device)
    inputs = (prototypes, counts, features.detach(), targets)
    run = lambda impl, inputs: iib_kernels.update_prototypes(*inputs, impl=impl)
    bytes = size(inputs, prototypes, counts)
    return Case("update_prototypes", shape, run, inputs, [], {"forward": bytes})


def update_prototypes_(shape: Shape, precision: Precision, device: str) -> Case:
    """The same of all modalities, in place: rows of classes that are in the batch move."""
    features, prototypes, targets = _features(shape, precision, device)
    counts = [
        torch.ones(shape.classes, dtype=torch.int64, device=device) for _ in range(shape.modalities)
    ]
    inputs = (prototypes, counts, [rows.detach() for rows in features], targets)

    def run(impl, inputs):
        iib_kernels.update_prototypes_(*inputs, impl=impl)
        return (*inputs[0], *inputs[1])

    present = len(targets.unique()) / shape.classes
    moved = int(2 * present * size(prototypes, counts))  # read and written
    bytes = size(features, targets) + moved
    return Case("update_prototypes_", shape, run, inputs, [], {"forward": bytes})


Build = Callable[[Shape, Precision, str], Case]
OPS: dict[str, Build] = {
    build.__name__: build
    for build in (
        prototype_distance,
        alignment_loss,
        nearest_prototype,
        gated_fusion,
        fusion_cross_entropy,
        multimodal_objective,
        update_prototypes,
        update_prototypes_,
    )
}
FUSION = ("gated_fusion", "fusion_cross_entropy")
UPDATES = ("update_prototypes", "update_prototypes_")


def precisions(op: str) -> tuple[str, ...]:
    """Names of the precisions that make a difference to an operator."""
    return WITHOUT_PRODUCTS if op in FUSION + UPDATES else tuple(PRECISIONS)


def modes(op: str) -> tuple[str, ...]:
    """What can be timed of an operator, without its inputs."""
    if op in UPDATES:
        return FORWARD
    return ("forward", "step") if op == "multimodal_objective" else MODES


def at(shape: Shape) -> tuple[str, ...]:
    """The operators that are timed at a shape."""
    return ONLY.get(shape, FUSION if not shape.width else tuple(OPS))

"""What is timed: every operator at every shape, its peers, and the least bytes it must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import iib_kernels

MODES = ("forward", "backward", "step")


class Shape(NamedTuple):
    """Sizes of one case, and whose they are."""

    batch: int
    classes: int
    width: int
    modalities: int
    name: str = ""

    def __str__(self) -> str:
        return f"B={self.batch} K={self.classes} D={self.width} M={self.modalities}"


SHAPES = (
    Shape(64, 6, 512, 2, "CREMA-D"),
    Shape(64, 31, 512, 2, "Kinetics-Sounds"),
    Shape(256, 309, 512, 2, "VGGSound"),
    Shape(4096, 1000, 768, 3),
    Shape(8192, 32768, 512, 2),
)
TINY = (Shape(5, 3, 8, 2, "tiny"),)
ONLY_ALIGNMENT = SHAPES[-1]  # and on a GPU only


@dataclass
class Case:
    """One operator at one shape.

    ``call(impl)`` gives its outputs; ``leaves`` are what a gradient is asked for.
    """

    op: str
    shape: Shape
    call: Callable[[str], Sequence[Tensor]]
    leaves: list[Tensor]
    bytes: dict[str, int]  #: mode -> the least to be moved: each input once, each output once
    peers: dict[str, Callable[[], Sequence[Tensor]]] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        """What can be timed of it: forward alone where nothing asks for a gradient."""
        return MODES if self.leaves else MODES[:1]


def size(*values) -> int:
    """Bytes of tensors, nested in sequences or None.

    >>> size(torch.zeros(2, 3), [torch.zeros(1, dtype=torch.bool), None])
    25
    """
    return sum(
        size(*value)
        if isinstance(value, (tuple, list))
        else 0
        if value is None
        else value.numel() * value.element_size()
        for value in values
    )


def _moved(inputs, outputs, leaves) -> dict[str, int]:
    """Least bytes.

    Forward reads inputs and writes outputs. Backward reads inputs and the outputs' gradients, and
    writes the leaves'.
    """
    forward = size(inputs, outputs)
    backward = size(inputs, [value for value in outputs if value.is_floating_point()], leaves)
    return {"forward": forward, "backward": backward, "step": forward + backward}


def _features(
    shape: Shape, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Random features that ask for a gradient, prototypes and targets."""
    features = [
        torch.randn(shape.batch, shape.width, dtype=dtype, device=device, requires_grad=True)
        for _ in range(shape.modalities)
    ]
    prototypes = [
        torch.randn(shape.classes, shape.width, dtype=dtype, device=device)
        for _ in range(shape.modalities)
    ]
    return features, prototypes, torch.randint(shape.classes, (shape.batch,), device=device)


def _logits(shape: Shape, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random logits and gate logits that ask for a gradient, and targets."""
    logits = [
        torch.randn(shape.batch, shape.classes, dtype=dtype, device=device, requires_grad=True)
        for _ in range(shape.modalities)
    ]
    gate = torch.randn(shape.batch, shape.modalities, device=device)
    return logits, gate, torch.randint(shape.classes, (shape.batch,), device=device)


def prototype_distance(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Squared distances of one modality; ``torch.cdist`` beside it, which has no half precision."""
    (features, *_), (prototypes, *_), _ = _features(shape, dtype, device)
    call = lambda impl: (
        iib_kernels.prototype_distance(features, prototypes, metric="sqeuclidean", impl=impl),
    )
    output = torch.empty(shape.batch, shape.classes, dtype=dtype, device=device)
    peers = (
        {}
        if dtype.itemsize == 2
        else {"cdist": lambda: (torch.cdist(features, prototypes).square(),)}
    )
    return Case(
        "prototype_distance",
        shape,
        call,
        [features],
        _moved([features, prototypes], [output], [features]),
        peers,
    )


def alignment_loss(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Contrastive and alignment loss of all modalities."""
    features, prototypes, targets = _features(shape, dtype, device)
    budgets = torch.linspace(1.0, 0.4, shape.modalities, device=device)
    call = lambda impl: iib_kernels.alignment_loss(
        features, prototypes, targets, budgets, impl=impl
    )[:2]
    outputs = [torch.empty(shape.modalities, device=device)] * 2
    return Case(
        "alignment_loss",
        shape,
        call,
        features,
        _moved([features, prototypes, targets], outputs, features),
    )


def nearest_prototype(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Distance to the nearest prototype, all modalities."""
    features, prototypes, _ = _features(shape, dtype, device)
    call = lambda impl: (iib_kernels.nearest_prototype(features, prototypes, impl=impl).distance,)
    outputs = [
        torch.empty(shape.batch, shape.modalities, device=device),
        torch.empty(shape.batch, shape.modalities, dtype=torch.int64, device=device),
    ]
    return Case(
        "nearest_prototype",
        shape,
        call,
        features,
        _moved([features, prototypes], outputs, features),
    )


def gated_fusion(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Fused logits under a prior and gate logits."""
    logits, gate, _ = _logits(shape, dtype, device)
    prior = torch.full((shape.modalities,), -0.5, device=device)
    call = lambda impl: iib_kernels.gated_fusion(logits, prior, gate_logits=gate, impl=impl)[:1]
    output = torch.empty(shape.batch, shape.classes, dtype=dtype, device=device)
    return Case(
        "gated_fusion", shape, call, logits, _moved([logits, gate], [output, gate, gate], logits)
    )


def fusion_cross_entropy(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Fused and unimodal cross-entropies under a prior and gate logits."""
    logits, gate, targets = _logits(shape, dtype, device)
    prior = torch.full((shape.modalities,), -0.5, device=device)
    call = lambda impl: iib_kernels.fusion_cross_entropy(
        logits, targets, prior, gate_logits=gate, impl=impl
    )[:2]
    outputs = [torch.empty((), device=device), torch.empty(shape.modalities, device=device), gate]
    return Case(
        "fusion_cross_entropy",
        shape,
        call,
        logits,
        _moved([logits, gate, targets], outputs, logits),
    )


def update_prototypes(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The moving average of one modality's prototypes, in place; it has no gradient."""
    (features, *_), (prototypes, *_), targets = _features(shape, dtype, device)
    features, counts = (
        features.detach(),
        torch.ones(shape.classes, dtype=torch.int64, device=device),
    )
    call = lambda impl: iib_kernels.update_prototypes(
        prototypes, counts, features, targets, impl=impl
    )
    return Case(
        "update_prototypes",
        shape,
        call,
        [],
        _moved([features, targets, prototypes, counts], [prototypes, counts], []),
    )


OPS: dict[str, Callable[[Shape, torch.dtype, str], Case]] = {
    build.__name__: build
    for build in (
        prototype_distance,
        alignment_loss,
        nearest_prototype,
        gated_fusion,
        fusion_cross_entropy,
        update_prototypes,
    )
}


def function(case: Case, row: str) -> Callable[[], Sequence[Tensor]]:
    """The forward of one row.

    A row is an implementation's name, ``compiled`` or ``compiled max-autotune`` (of the reference),
    or a peer's name.
    """
    if row in case.peers:
        return case.peers[row]
    if row.startswith("compiled"):
        mode = row.partition(" ")[2] or None
        return torch.compile(
            lambda: case.call("reference"),
            mode="max-autotune-no-cudagraphs" if mode == "max-autotune" else mode,
            dynamic=False,
        )
    return lambda: case.call(row)


def timed(case: Case, row: str, mode: str) -> Callable[[], object]:
    """What a benchmark of one row in one mode calls."""
    return in_mode(function(case, row), case, mode)


def in_mode(forward: Callable[[], Sequence[Tensor]], case: Case, mode: str) -> Callable[[], object]:
    """``forward`` without a gradient, its backward (of an output made once), or both (a step)."""
    if mode == "forward":

        def run():
            with torch.no_grad():
                return forward()

        return run
    differentiable = lambda: [value for value in forward() if value.requires_grad]
    if mode == "step":

        def step():
            outputs = differentiable()
            return torch.autograd.grad(outputs, case.leaves, [value.detach() for value in outputs])

        return step
    outputs = differentiable()
    upstream = [torch.randn_like(value) for value in outputs]
    return lambda: torch.autograd.grad(outputs, case.leaves, upstream, retain_graph=True)

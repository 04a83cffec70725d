"""What a benchmark is made of: shapes, precisions, and one operator's inputs at one of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _chunks

MODES = ("forward", "backward", "step")
FORWARD = MODES[:1]


class Shape(NamedTuple):
    """Sizes of one case, and whose they are."""

    batch: int
    classes: int
    width: int  #: 0: only for operators without embeddings
    modalities: int
    name: str = ""

    def __str__(self) -> str:
        return f"B={self.batch} K={self.classes} D={self.width or '-'} M={self.modalities}"


SHAPES = (
    Shape(64, 6, 512, 2, "CREMA-D"),
    Shape(64, 31, 512, 2, "Kinetics-Sounds"),
    Shape(256, 309, 512, 2, "VGGSound"),
    Shape(4096, 1000, 768, 3),
    Shape(65536, 1024, 0, 3, "fusion of many samples"),
    Shape(8192, 32768, 512, 2, "alignment with many classes"),
)
ONLY = {SHAPES[4]: ("gated_fusion", "fusion_cross_entropy"), SHAPES[5]: ("alignment_loss",)}
CPU_SHAPES = (Shape(64, 31, 512, 2), Shape(1024, 309, 512, 2), Shape(4096, 1000, 512, 3))
ODD = Shape(37, 19, 45, 3, "odd sizes")
MANY = Shape(5, 309, 33, 2, "more classes than rows")
TINY = (Shape(5, 3, 8, 2, "tiny"), Shape(7, 4, 0, 3, "tiny, without embeddings"))


class Precision(NamedTuple):
    """Types of a case's tensors, and of its float32 products."""

    features: torch.dtype  #: and logits
    prototypes: torch.dtype
    matmul: str = "highest"  #: ``torch.get_float32_matmul_precision()`` for the kernels
    matmul_eager: str = "highest"  #: and for everything else
    rate: str = "fp32"  #: which of the device's product rates these products can have

    def products(self, row: str) -> str:
        """The float32 matmul precision under which a row is measured."""
        return self.matmul if row == "ours" else self.matmul_eager


# Plain PyTorch computes half types in float32: TF32, or it would be a straw man.
PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "tf32": Precision(torch.float32, torch.float32, "high", "high", "tf32"),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, "highest", "high", "bf16"),
    "amp": Precision(torch.bfloat16, torch.float32, "highest", "high", "bf16"),
}
WITHOUT_PRODUCTS = ("fp32", "bf16")


@dataclass
class Case:
    """One operator at one shape and precision.

    ``run(implementation, inputs)`` gives its outputs. Everything that it reads is in ``inputs``, so
    that the function of one case runs on the inputs of another.
    """

    op: str
    shape: Shape
    run: Callable[[str, tuple], Sequence[Tensor]]
    inputs: tuple
    leaves: list[Tensor]  #: what a gradient is asked for
    bytes: dict[str, int]  #: mode -> the least to be moved: each input once, each output once
    operations: dict[str, int] = field(default_factory=dict)  #: mode -> of the products, each once
    peers: dict[str, Callable[[tuple], Sequence[Tensor]]] = field(default_factory=dict)
    #: peers that do less: what the operator costs more than usual heads do
    lesser: dict[str, Callable[[tuple], Sequence[Tensor]]] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        """What can be timed of it: forward alone where nothing asks for a gradient."""
        return tuple(mode for mode in MODES if mode in self.bytes)


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


def function(case: Case, row: str, device: str) -> Callable[[tuple], Sequence[Tensor]]:
    """The forward of one row, of a case's inputs.

    A row is ``ours``, ``reference``, ``compiled`` or ``compiled max-autotune`` (both of the
    reference), or a peer's name.
    """
    others = {**case.peers, **case.lesser}
    if row in others:
        return others[row]
    if row.startswith("compiled"):
        tuned = row.endswith("max-autotune")
        return torch.compile(
            lambda inputs: case.run("reference", inputs),
            mode="max-autotune-no-cudagraphs" if tuned else None,
            dynamic=False,
        )
    implementation = ("triton" if device == "cuda" else "auto") if row == "ours" else row
    return lambda inputs: case.run(implementation, inputs)


def in_mode(
    forward: Callable[[tuple], Sequence[Tensor]], case: Case, mode: str
) -> Callable[[], object]:
    """``forward`` without a gradient, its backward (of an output made once), or both (a step)."""
    if mode == "forward":

        def run():
            with torch.no_grad():
                return forward(case.inputs)

        return run
    differentiable = lambda: [value for value in forward(case.inputs) if value.requires_grad]
    if mode == "step":

        def step():
            outputs = differentiable()
            upstream = [value.detach() for value in outputs]
            return torch.autograd.grad(outputs, case.leaves, upstream, allow_unused=True)

        return step
    outputs = differentiable()
    upstream = [torch.randn_like(value) for value in outputs]
    return lambda: torch.autograd.grad(outputs, case.leaves, upstream, retain_graph=True)


@contextlib.contextmanager
def conditions(precision: Precision, row: str, device: str) -> Iterator[None]:
    """What a row is measured under.

    Its precision of float32 products; and, for plain PyTorch on a GPU, chunks of a sixteenth of its
    memory: chunks for a small CPU would be a straw man there.
    """
    before, chunk = torch.get_float32_matmul_precision(), _chunks.CHUNK_BYTES
    torch.set_float32_matmul_precision(precision.products(row))
    if device == "cuda":
        _chunks.CHUNK_BYTES = torch.cuda.get_device_properties(0).total_memory // 16
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _chunks.CHUNK_BYTES = chunk

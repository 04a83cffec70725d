"""Which implementation runs: Triton where it can, plain PyTorch elsewhere, and an explanation instead of a silent fallback."""
from __future__ import annotations

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference")


def choose(impl: str, *tensors: Tensor) -> str:
    """``"reference"`` or ``"triton"`` for a call on these tensors. ValueError for an unknown ``impl``, RuntimeError where
    Triton is asked for and cannot run."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        raise RuntimeError("impl='triton': this version of iib_kernels holds no Triton kernels yet; use impl='auto' or impl='reference'")
    return "reference"


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if a tensor is float64, else float32 (half types are raised)."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether values may be looked at: an ordinary CPU tensor, outside torch.compile, fake tensors and function transforms."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)

"""Which implementation runs, and in which dtype and precision.

Triton runs where it can and plain PyTorch elsewhere, with an explanation instead of a silent
fallback.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels.compat import check_transforms, constant

IMPLEMENTATIONS = ("auto", "triton", "reference")


@constant
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton>=3.6"
    return None


@constant
def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: kernels then run on the CPU, slowly."""
    if triton_missing():
        return False
    from triton.language import standard

    return type(standard.cdiv).__name__ == "InterpretedFunction"


def choose(impl: str, *tensors: Tensor) -> str:
    """``"reference"`` or ``"triton"`` for a call on these tensors.

    ValueError for an unknown ``impl``, RuntimeError where Triton is asked for and cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return "reference"
    device = tensors[0].device
    kind, reason = device.type, triton_missing()
    if kind == "meta":
        reason = None  # the operators know their shapes without Triton
    elif reason is None and not (kind == "cuda" or (kind == "cpu" and interpreting())):
        reason = f"the tensors are on {device}; move them to a GPU"
        if kind == "cpu":
            reason += (
                ", or set TRITON_INTERPRET=1 before the program starts to run the kernels slowly "
                "on the CPU"
            )
    if impl == "auto" and kind != "cuda":
        return "reference"
    if reason is not None:
        if impl == "triton":
            raise RuntimeError(
                f"impl='triton' cannot run: {reason}; or use impl='auto' or impl='reference'"
            )
        _warn_slow(reason)
        return "reference"
    check_transforms(tensors)
    return "triton"


@functools.cache
def _warn_slow(reason: str) -> None:
    """Say once that a GPU does without the kernels."""
    warnings.warn(
        f"iib_kernels runs plain PyTorch on this GPU: {reason}; impl='reference' says that this "
        "is meant",
        stacklevel=4,
    )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if a tensor is float64, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether values may be looked at.

    They may of an ordinary CPU tensor, outside torch.compile, fake tensors and function transforms.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def full_precision(tensor: Tensor):
    """Context in which autocast, which casts products, leaves the tensor's device alone.

    The meta device has no autocast, and ``torch.autocast`` refuses it.
    """
    if tensor.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def on_device(tensor: Tensor):
    """Context in which kernels are launched on the tensor's device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def accumulator(dtype: torch.dtype):
    """Triton's dtype of :func:`compute_dtype`'s."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def hip() -> bool:
    """Whether this PyTorch is for AMD GPUs.

    Their waves are twice as wide and their register file is twice as deep; they have no TF32.
    """
    return torch.version.hip is not None


def dot_options(*tensors: Tensor) -> dict:
    """Constant arguments for products of these tensors.

    UPCAST: whether to raise the operands first, for several types and always when interpreted.
    PRECISION of float32 products: see :func:`tf32_products`.
    """
    return {
        "UPCAST": interpreting() or len({tensor.dtype for tensor in tensors}) > 1,
        "PRECISION": "tf32" if tf32_products() else "ieee",
    }


def tf32_products() -> bool:
    """Whether products of float32 are in TF32: where cuBLAS takes it too (on NVIDIA).

    That is what ``torch.backends.cuda.matmul.fp32_precision`` says. Where it is "none", PyTorch
    looks at ``torch.backends.cudnn.fp32_precision`` and at ``torch.backends.fp32_precision``
    itself, and all three "none" is IEEE. The older ``set_float32_matmul_precision`` sets it as
    well; its getter raises where the newer settings say something else.
    """
    if hip():
        return False
    try:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    except AttributeError:  # a PyTorch without it: the older setting is all there is
        return torch.get_float32_matmul_precision() != "highest"


def slope_precision(*tensors: Tensor) -> str:
    """Precision of products with a float32 gradient.

    Where the other side is of half precision, TF32 (on NVIDIA) loses less than the result's
    rounding.
    """
    if all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors) and not hip():
        return "tf32"
    return dot_options(*tensors)["PRECISION"]


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A kernel's scalar argument: the number, or a tensor [] where float32 would lose digits."""
    if dtype == torch.float64:
        return torch.full((), value, dtype=dtype, device=device)
    return float(value)


def uniform_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves, or, where their dtypes differ, in the one that holds them all.

    Kernels that choose a modality on the device need one dtype.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    common = functools.reduce(torch.promote_types, dtypes)
    return [tensor.to(common) for tensor in tensors]

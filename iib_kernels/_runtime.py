"""Which implementation runs: Triton where it can, plain PyTorch elsewhere, and an explanation instead of a silent fallback."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "reference")


def _constant(function: Callable) -> Callable:
    """Cached, and for torch.compile a constant (``torch.compiler.assume_constant_result`` would import dynamo, which imports Triton)."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def call():
        return cached()

    call._dynamo_marked_constant = True
    return call


@_constant
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton>=3.6"
    return None


@_constant
def interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: kernels then run on the CPU, slowly."""
    if triton_missing():
        return False
    from triton.language import standard

    return type(standard.cdiv).__name__ == "InterpretedFunction"


def choose(impl: str, *tensors: Tensor) -> str:
    """``"reference"`` or ``"triton"`` for a call on these tensors. ValueError for an unknown ``impl``, RuntimeError where
    Triton is asked for and cannot run."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return "reference"
    device = tensors[0].device
    reason = triton_missing()
    if reason is None and not (device.type == "cuda" or (device.type == "cpu" and interpreting())):
        reason = f"the tensors are on {device}; move them to a GPU" + (
            ", or set TRITON_INTERPRET=1 before the program starts to run the kernels slowly on the CPU"
            if device.type == "cpu"
            else ""
        )
    if impl == "auto" and device.type != "cuda":
        return "reference"
    if reason is not None:
        if impl == "triton":
            raise RuntimeError(
                f"impl='triton' cannot run: {reason}; or use impl='auto' or impl='reference'"
            )
        _warn_slow(reason)
        return "reference"
    _check_transforms(tensors)
    return "triton"


def _unfollowed() -> str:
    """The function transform around this call that opaque kernels cannot follow, or "" (for torch.compile a constant, as found while tracing)."""
    for level in torch._C._functorch.get_interpreter_stack() or ():
        if level.key() in (
            torch._C._functorch.TransformType.Vmap,
            torch._C._functorch.TransformType.Jvp,
        ):
            return level.key().name.lower()
    return ""


def _gradients_asked() -> int:
    """How many ``torch.func.grad`` are around this call."""
    return sum(
        level.key() == torch._C._functorch.TransformType.Grad
        for level in torch._C._functorch.get_interpreter_stack() or ()
    )


_unfollowed._dynamo_marked_constant = _gradients_asked._dynamo_marked_constant = True


def _check_transforms(tensors: Sequence[Tensor]) -> None:
    """NotImplementedError where a derivative or a transform is asked for that opaque kernels do not have."""
    dual = torch.autograd.forward_ad
    name = _unfollowed()
    if (
        not name
        and not torch.compiler.is_compiling()
        and dual._current_level >= 0
        and any(dual.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        name = "jvp"
    if name:
        raise NotImplementedError(
            f"the Triton kernels have no {name} (batching rule or forward-mode derivative); use impl='reference'"
        )
    if torch.compiler.is_compiling() and _gradients_asked() > 1:
        raise NotImplementedError(
            "the Triton kernels have no second derivative; use impl='reference'"
        )


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply(*arguments)``, in the forms that torch.compile follows.

    Where nothing asks for a gradient it would inline ``forward`` and stumble over its variable arguments; inside ``torch.func.grad`` it finds only
    intermediate tensors to ask for one.
    """
    if torch.compiler.is_compiling():
        if _gradients_asked():
            arguments = tuple(
                value.view_as(value) if isinstance(value, Tensor) else value for value in arguments
            )
        if not (
            torch.is_grad_enabled()
            and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)
        ):
            return function.forward(*arguments)
    return function.apply(*arguments)


@functools.cache
def _warn_slow(reason: str) -> None:
    """Say once that a GPU does without the kernels."""
    warnings.warn(
        f"iib_kernels runs plain PyTorch on this GPU: {reason}; impl='reference' says that this is meant",
        stacklevel=4,
    )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if a tensor is float64, else float32 (half types are raised)."""
    return (
        torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    )


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether values may be looked at: an ordinary CPU tensor, outside torch.compile, fake tensors and function transforms."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return type(tensor) in (
        Tensor,
        torch.nn.Parameter,
    ) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def on_device(tensor: Tensor):
    """Context in which kernels are launched on the tensor's device."""
    return (
        torch.cuda.device(tensor.device)
        if tensor.device.type == "cuda"
        else contextlib.nullcontext()
    )


def accumulator(dtype: torch.dtype):
    """Triton's dtype of :func:`compute_dtype`'s."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def _hip() -> bool:
    """Whether this PyTorch is for AMD GPUs, which have no TF32."""
    return torch.version.hip is not None


def dot_options(*tensors: Tensor) -> dict:
    """Constant arguments for products of these tensors: UPCAST (operands of several types, and always when interpreted) and PRECISION of float32 ones,
    which is that of ``torch.get_float32_matmul_precision()``: IEEE for "highest", TF32 below (on NVIDIA)."""
    tf32 = torch.get_float32_matmul_precision() != "highest" and not _hip()
    return {
        "UPCAST": interpreting() or len({tensor.dtype for tensor in tensors}) > 1,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def slope_precision(*tensors: Tensor) -> str:
    """Precision of products with a float32 gradient: where the other side is of half precision, TF32 (on NVIDIA) loses less than the result's rounding."""
    if all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors) and not _hip():
        return "tf32"
    return dot_options(*tensors)["PRECISION"]


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A kernel's scalar argument: the number, or a tensor [] where it would lose digits as float32."""
    return (
        torch.full((), value, dtype=dtype, device=device)
        if dtype == torch.float64
        else float(value)
    )


def uniform_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves, or, where their dtypes differ, in the one that holds them all (kernels that choose a modality on the device need one)."""
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        list(tensors)
        if len(dtypes) == 1
        else [tensor.to(functools.reduce(torch.promote_types, dtypes)) for tensor in tensors]
    )


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with a view in place of each that was there before: torch.compile takes no tensor twice in one autograd Function."""
    found: list[Tensor] = []
    for tensor in tensors:
        repeated = any(
            [tensor is other for other in found]
        )  # not by id(), which compiled code would be bound to
        found.append(tensor.view_as(tensor) if repeated else tensor)
    return found


class FirstOrder(torch.autograd.Function):
    """(name, call, arguments...): runs a backward operator, and says in its own backward that there is no second derivative."""

    @staticmethod
    def forward(name, call, *arguments):
        return call(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.name}: the Triton kernels have no second derivative; use impl='reference'"
        )


def first_order(name: str, call: Callable, *arguments) -> tuple[Tensor, ...]:
    """``call(*arguments)``, a backward operator, which cannot be differentiated again (compiled code says so by itself)."""
    return (
        call(*arguments)
        if torch.compiler.is_compiling()
        else FirstOrder.apply(name, call, *arguments)
    )

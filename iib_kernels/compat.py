"""What PyTorch's compiler and transforms ask for: torch.compile, torch.func, second derivatives.

Everything that knows of dynamo or functorch stands here, so that the functions and operators of
this package read as if there were neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

Kind = TypeVar("Kind", bound=type)

_transformed = torch._C._are_functorch_transforms_active


def constant(function: Callable) -> Callable:
    """The function cached, and for torch.compile a constant.

    ``torch.compiler.assume_constant_result`` would import dynamo, which imports Triton.
    """
    cached = functools.cache(function)

    @functools.wraps(function)
    def call():
        return cached()

    call._dynamo_marked_constant = True
    return call


def _unfollowed() -> str:
    """The function transform around this call that opaque kernels cannot follow, or ""."""
    kinds = torch._C._functorch.TransformType
    for level in torch._C._functorch.get_interpreter_stack() or ():
        if level.key() in (kinds.Vmap, kinds.Jvp):
            return level.key().name.lower()
    return ""


def _gradients_asked() -> int:
    """How many ``torch.func.grad`` are around this call."""
    return sum(
        level.key() == torch._C._functorch.TransformType.Grad
        for level in torch._C._functorch.get_interpreter_stack() or ()
    )


# For torch.compile both are constants, as found while tracing
_unfollowed._dynamo_marked_constant = _gradients_asked._dynamo_marked_constant = True


def check_transforms(tensors: Sequence[Tensor]) -> None:
    """NotImplementedError where a transform or derivative is asked for that the kernels lack."""
    dual = torch.autograd.forward_ad
    name = _unfollowed()
    if not name and not torch.compiler.is_compiling() and dual._current_level >= 0:
        if any(dual.unpack_dual(tensor).tangent is not None for tensor in tensors):
            name = "jvp"
    if name:
        raise NotImplementedError(
            f"the Triton kernels have no {name} (batching rule or forward-mode derivative); "
            "use impl='reference'"
        )
    if torch.compiler.is_compiling() and _gradients_asked() > 1:
        raise NotImplementedError(
            "the Triton kernels have no second derivative; use impl='reference'"
        )


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply(*arguments)``, in the form that costs least where it is called.

    ``Function.apply`` of a Function with ``setup_context`` binds its signature anew on every call,
    which takes longer than a small kernel. torch.func and torch.compile need that form; elsewhere
    the same code runs as a classic Function. Where nothing asks for a gradient, forward alone does.

    Where nothing asks for a gradient torch.compile would inline ``forward`` and stumble over its
    variable arguments; inside ``torch.func.grad`` it finds only intermediate tensors to ask for
    one.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and _gradients_asked():
        arguments = tuple(
            value.view_as(value) if isinstance(value, Tensor) else value for value in arguments
        )
    if not compiling and _transformed():
        return function.apply(*arguments)
    needed = any([isinstance(value, Tensor) and value.requires_grad for value in arguments])
    if not (torch.is_grad_enabled() and needed):
        return function.forward(*arguments)
    if compiling:
        return function.apply(*arguments)
    return super(torch.autograd.Function, _classic(function)).apply(*arguments)


@functools.cache
def _classic(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function with forward and ``setup_context`` in one, as before torch.func."""

    def forward(ctx, *arguments):
        outputs = function.forward(*arguments)
        function.setup_context(ctx, arguments, outputs)
        return outputs

    members = {
        "__doc__": function.__doc__,
        "forward": staticmethod(forward),
        "backward": staticmethod(function.backward),
    }
    return type(function.__name__, (torch.autograd.Function,), members)


def exportable(kind: Kind) -> Kind:
    """A named tuple that ``torch.export.save`` can write where an exported module returns one.

    ``torch.export.load`` then finds it in a process that has imported its module.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    _pytree._register_namedtuple(kind, serialized_type_name=name)
    return kind


def symbolic(size: int) -> bool:
    """Whether a size is only a symbol in the graph that is being traced.

    That is a batch which ``torch.export`` or ``torch.compile`` was told, or has found, to vary.
    """
    if torch.compiler.is_compiling():  # where a symbol may pass itself off as an int
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return not has_static_value(size)
    return isinstance(size, torch.SymInt)


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with a view in place of each that was there before.

    torch.compile takes no tensor twice in one autograd Function.
    """
    found: list[Tensor] = []
    for tensor in tensors:
        # Not by id(), which compiled code would be bound to
        repeated = any([tensor is other for other in found])
        found.append(tensor.view_as(tensor) if repeated else tensor)
    return found


class FirstOrder(torch.autograd.Function):
    """Runs a backward operator; its own backward says that there is no second derivative.

    (name, call, arguments...) -> what ``call(*arguments)`` gives.
    """

    @staticmethod
    def forward(name, call, *arguments):
        return call(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def vmap(info, in_dims, name, *_):
        raise NotImplementedError(
            f"{name}: the Triton kernels have no vmap, which batched gradients take (jacrev); "
            "use impl='reference'"
        )

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.name}: the Triton kernels have no second derivative; use impl='reference'"
        )


def first_order(name: str, call: Callable, *arguments) -> tuple[Tensor, ...]:
    """``call(*arguments)``, a backward operator, which cannot be differentiated again.

    The tensors must be arguments themselves, not within tuples: autograd sees no others.
    """
    # Compiled code refuses a second derivative by itself, and without grad mode nobody asks
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return call(*arguments)
    return FirstOrder.apply(name, call, *arguments)

"""Argument checks shared by the public functions.

Every message names the argument, what it is and what was expected.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from iib_kernels._runtime import eager_on_cpu

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (Tensor, torch.nn.Parameter)  # what nearly all tensors are
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def describe(value: object) -> str:
    """A tensor's dtype and shape, or what else it is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def check_whole(value: Tensor, name: str) -> Tensor:
    """TypeError if ``value`` is a DTensor: the operations know nothing of its mesh.

    By name, as ``torch.distributed`` is not to be imported for this.
    """
    if type(value) not in PLAIN and any(
        kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")
        for kind in type(value).__mro__
    ):
        raise TypeError(
            f"{name}: is a DTensor, which these functions do not take; give {name}.full_tensor(), "
            f"or {name}.to_local() for this process's own part"
        )
    return value


def check_float(value: object, name: str) -> Tensor:
    """TypeError unless ``value`` is a floating-point tensor, and a whole one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    check_whole(value, name)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {describe(value)}; "
            "convert it with .float()"
        )
    return value


def check_shape(value: Tensor, shape: Sequence[int | None], name: str, letters: str) -> Tensor:
    """ValueError unless ``value`` has ``shape`` (None = any size).

    ``letters`` says it for the message, as in ``"[B, D]"``.
    """
    if value.dim() != len(shape) or any(
        size is not None and size != actual for size, actual in zip(shape, value.shape)
    ):
        known = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape {letters} = [{known}], got {describe(value)}")
    return value


def check_choice(value: object, options: Sequence[str], name: str) -> None:
    """ValueError unless ``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(options)}")


def check_number(value: object, name: str) -> None:
    """TypeError unless ``value`` is a real number.

    A tensor is none: it would have to be read on the host.
    """
    if isinstance(value, bool) or not isinstance(
        value, (numbers.Real, torch.SymInt, torch.SymFloat)
    ):
        raise TypeError(
            f"{name}: expected a number, got {describe(value)}; it is not differentiated"
        )


def check_integer(value: object, name: str) -> None:
    """TypeError unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")


def tensor_list(values: object, name: str, count: int | None = None) -> list[Tensor]:
    """A non-empty sequence of floating-point tensors as a list, of ``count`` if given.

    TypeError or ValueError naming the entry otherwise.
    """
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}: expected a sequence with one tensor a modality, got {describe(values)}; "
            "wrap a single one in a list"
        )
    if not len(values) or (count is not None and len(values) != count):
        expected = "at least one tensor" if count is None else f"{count} tensors, one a modality"
        raise ValueError(f"{name}: expected {expected}, got {len(values)}")
    return [check_float(value, f"{name}[{index}]") for index, value in enumerate(values)]


def check_device(reference: Tensor, **others: Tensor | None) -> None:
    """ValueError unless all tensors stand on one device."""
    for name, value in others.items():
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"{name}: is on {value.device}, the other arguments on {reference.device}; "
                "move it there"
            )


def check_mask(
    mask: object, shape: Sequence[int], name: str = "mask", *, rows_need_one: bool = False
) -> Tensor | None:
    """A bool tensor of ``shape`` [..., M] or None.

    With ``rows_need_one``, a row without any True is a ValueError where values may be looked at.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (True = present), got {describe(mask)}")
    check_whole(mask, name)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {list(shape)} (samples, modalities), got {list(mask.shape)}"
        )
    if rows_need_one and eager_on_cpu(mask):
        empty = ~mask.any(-1)
        if empty.any():
            row = int(empty.flatten().nonzero()[0])
            raise ValueError(
                f"{name}: row {row} has no modality present; leave such samples out, there is "
                "nothing to fuse"
            )
    return mask


def check_targets(
    targets: object,
    shape: Sequence[int],
    num_classes: int,
    ignore_index: int,
    *,
    replace: bool = True,
) -> Tensor:
    """Class indices of ``shape`` as int64, with ``ignore_index`` in place of any out of range.

    Without ``replace`` they stay as they are, for kernels that look at each themselves.

    Where values may be looked at (eager, on the CPU) one out of range is a ValueError naming its
    row. Elsewhere, without synchronising, it counts as ignored: it is never used as an index.
    """
    check_integer(ignore_index, "ignore_index")
    if not isinstance(targets, Tensor) or targets.dtype not in INTEGERS:
        raise TypeError(f"targets: expected int64 class indices, got {describe(targets)}")
    check_whole(targets, "targets")
    if tuple(targets.shape) != tuple(shape):
        raise ValueError(
            f"targets: expected shape {list(shape)}, one class index a sample, "
            f"got {list(targets.shape)}"
        )
    if not replace and not eager_on_cpu(targets):
        return targets
    targets = targets.long()
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= num_classes))
    if eager_on_cpu(targets) and bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"targets: row {row} holds {int(targets.flatten()[row])}, outside "
            f"0..{num_classes - 1}; use ignore_index ({ignore_index}) to leave a row out"
        )
    return torch.where(bad, ignore_index, targets) if replace else targets


def refuse_grad(name: str, *values: Tensor | None) -> None:
    """ValueError if an argument that no gradient reaches asks for one."""
    if torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in values
    ):
        raise ValueError(
            f"{name}: requires grad, but this function gives it no gradient; pass {name}.detach()"
        )

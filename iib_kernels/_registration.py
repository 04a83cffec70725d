"""Operators of torch.library: one helper for schema, implementation and fake."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("iib", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """The operator ``iib::<schema>``, opaque to torch.compile.

    One implementation serves CPU tensors (in the interpreter) and GPU tensors. Gradients are not
    registered here: each operator is called from the autograd Function beside it.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"iib::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.iib, name).default

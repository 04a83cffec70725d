"""One room an operation, and in each room one idea a file:

    kernels.py     the Triton kernels and nothing else: `@triton.jit` functions, in several files
                   where they are several algorithms
    launch.py      allocation, block sizes and grid
    autograd.py    operator (``torch.ops.iib``) and autograd Function

`tiles.py` holds what the kernels share. Nothing here checks arguments: the public functions, one
floor up, do so before they call.

In kernels the names are the field's: `offs_b`, `offs_k`, `offs_d` are the rows, classes and
components of a block, `mask_*` says which of them exist, `*_ptr` is an argument in memory, and
`[B, K]` behind a line is a shape.
"""

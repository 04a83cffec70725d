"""The Triton kernels, and nothing else: `@triton.jit` functions, launched from `iib_kernels/_ops`.

One file a kernel, or two that belong together; `tiles.py` holds what they share. Names are the
field's: `offs_b`, `offs_k`, `offs_d` are the rows, classes and components of a block, `mask_*` says
which of them exist, `*_ptr` is an argument in memory, and `[B, K]` behind a line is a shape.
"""

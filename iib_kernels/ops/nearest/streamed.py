"""The gradient through the nearest prototype, of rows too wide for registers.

The same as in `kernels.py`, BLOCK_D components at a time: the cosine reads rows twice, for the
lengths and for the gradient.
"""

import triton
import triton.language as tl

from iib_kernels.ops.nearest.kernels import load_winners, nearest_gradient
from iib_kernels.ops.tiles import inverse_length, load_tile, store_tile


@triton.jit
def _pull_back(
    x,
    table,
    at,
    grad_ptr,
    WIDTH: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of rows of one modality."""
    ACC: tl.constexpr = at.upstream.dtype
    z_inverse = tl.full(at.upstream.shape, 1.0, ACC)
    p_inverse = z_inverse
    along = z_inverse
    if COSINE:
        zz = tl.zeros(at.upstream.shape, ACC)
        pp = zz
        dots = zz
        for start in range(0, WIDTH, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < WIDTH
            z_tile = load_tile(x, at.offs_b, at.found, offs_d, mask_d).to(ACC)
            p_tile = load_tile(table, at.index, at.found, offs_d, mask_d).to(ACC)
            zz += tl.sum(z_tile * z_tile, 1)
            pp += tl.sum(p_tile * p_tile, 1)
            dots += tl.sum(z_tile * p_tile, 1)
        z_inverse = inverse_length(zz)
        p_inverse = inverse_length(pp)
        along = dots * z_inverse * p_inverse
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < WIDTH
        z_tile = load_tile(x, at.offs_b, at.found, offs_d, mask_d).to(ACC)
        p_tile = load_tile(table, at.index, at.found, offs_d, mask_d).to(ACC)
        gradient = nearest_gradient(z_tile, p_tile, at.upstream, z_inverse, p_inverse, along)
        store_tile(grad_ptr, WIDTH, at.offs_b, at.mask_b, offs_d, mask_d, gradient)


@triton.jit(do_not_specialize=["batch"])
def nearest_backward_streamed(
    flow,
    batch,
    WIDTHS: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the features through the winning prototypes, BLOCK_B rows of one modality."""
    at = load_winners(flow, batch, ACC, BLOCK_B)
    for m in tl.static_range(len(flow.features)):
        if tl.program_id(1) == m:
            x, table = flow.features[m], flow.prototypes[m]
            _pull_back(x, table, at, flow.grad_ptrs[m], WIDTHS[m], COSINE, BLOCK_D)

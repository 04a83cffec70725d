"""Gradients times what comes in from above: one launch for all of them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def scale_all(inputs, factor_ptr, outputs, batch, WIDTHS: tl.constexpr, BLOCK: tl.constexpr):
    """outputs[i] = inputs[i] * factor, of [batch, WIDTHS[i]] elements in a row; program (block, i).

    The widths are the model's, and the compiled kernel serves batches of any size.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1)
    factor = tl.load(factor_ptr)
    # Types differ from tensor to tensor, so no pointer is selected
    for j in tl.static_range(len(inputs)):
        if i == j:
            mask = offs < batch.to(tl.int64) * WIDTHS[j]
            values = tl.load(inputs[j] + offs, mask=mask, other=0.0)
            product = values.to(factor.dtype) * factor
            # A gradient of 0 stays 0 under an infinite factor: its row has no part in the loss
            product = tl.where(values == 0.0, 0.0, product)
            tl.store(outputs[j] + offs, product, mask=mask)

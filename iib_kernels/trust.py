"""Fusion of experts that may each be wrong about a sample (method page, section 4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels._checks import check_device, check_float, check_mask, describe
from iib_kernels._runtime import choose, compute_dtype, full_precision
from iib_kernels.compat import apply, distinct, exportable
from iib_kernels.fusion import beside, check_logits, check_parameter
from iib_kernels.ops.trust.autograd import TrustedFusionFunction


@exportable
class TrustOutput(NamedTuple):
    """What :func:`trusted_fusion` returns."""

    logits: Tensor  #: [..., K] in the logits' dtype
    trust: Tensor  #: [..., M] float32 (float64 for float64 logits), in [0, 1]; 0 where missing


def trusted_fusion(
    logits: Sequence[Tensor] | Tensor,
    trust_logits: Tensor | None = None,
    *,
    temperature: Tensor | float = 1.0,
    scale: Tensor | float = 1.0,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> TrustOutput:
    """Multiply the modalities' predictions, each as far as it can be trusted.

    A modality tells of a sample with probability r_m, and of nothing with 1 - r_m: then every class
    is as likely as any other (method page, section 4). Its prediction is that mixture, and the
    fused logits are the sum of the logarithms:

        p_m = softmax(l_m / T_m)        r_m = sigmoid(v_m)
        f   = scale * sum_m log(r_m p_m + (1 - r_m) / K)

    over the modalities present. What one modality can say against a class is bounded by
    log((1 - r_m) / K): an expert that is sure and wrong can be outvoted.

    ``trust`` is what the fused prediction makes of each modality: the probability, given all of
    them, that this one tells of the sample, sum_k softmax(f)_k r_m p_m(k) / (r_m p_m(k) + (1 - r_m)
    / K). An expert that contradicts the others loses trust; one that says nothing keeps r_m.

    Args:
        logits: M tensors [..., K], or one tensor [M, ..., K]; float16, bfloat16, float32 or
            float64. Entries may be -inf (a class ruled out).
        trust_logits: v, [M] or [..., M], finite; None = r_m is 1 and f the sum of log p_m.
        temperature: T > 0, a number or [M].
        scale: a number or a tensor [].
        mask: [..., M] bool, True = present. What stands in a missing modality's logits and trust
            has no effect, NaN included.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Half types are computed in float32; each gradient comes in its input's dtype. The fused logits
    are differentiable in everything but the mask; ``trust`` carries no gradient.

    Raises TypeError or ValueError naming the argument. A sample without any modality present is a
    ValueError in eager mode on the CPU; elsewhere its row is 0 in every class.

    Source: this project's own formulation of the uncertainty-gated fusion of arXiv 2603.17347.

    >>> audio, visual = torch.tensor([[6.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    >>> fused = trusted_fusion([audio, visual], torch.tensor([0.0, 4.0]))
    >>> fused.logits.argmax(1), fused.trust  # audio is surer, and not trusted
    (tensor([1]), tensor([[0.1362, 0.9689]]))
    """
    logits = check_logits(logits)
    shape, count = logits[0].shape, len(logits)
    if trust_logits is not None:
        check_float(trust_logits, "trust_logits")
        # By the number of dimensions first: a batch is not to be compared with M while it is traced
        by_row = trust_logits.dim() == len(shape)
        if trust_logits.shape != ((*shape[:-1], count) if by_row else (count,)):
            raise ValueError(
                f"trust_logits: expected shape [M] or [..., M] = {[*shape[:-1], count]}, "
                f"got {describe(trust_logits)}"
            )
    check_parameter(temperature, "temperature", ((), (count,)), count)
    if isinstance(scale, str):
        raise TypeError(f"scale: expected a number or a tensor [], got {scale!r}")
    check_parameter(scale, "scale", ((),), count)
    mask = check_mask(mask, (*shape[:-1], count), rows_need_one=True)
    temperature, scale = beside(temperature, logits[0]), beside(scale, logits[0])
    given = {"trust_logits": trust_logits, "temperature": temperature, "scale": scale}
    sized = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    sized = {name: value for name, value in sized.items() if value.dim()}
    entries = {f"logits[{index}]": values for index, values in enumerate(logits)}
    check_device(logits[0], mask=mask, **sized, **entries)
    dtype = functools.reduce(torch.promote_types, [values.dtype for values in logits])
    if choose(impl, *logits) == "triton":
        fused, trust, _ = apply(TrustedFusionFunction, *_flat(logits, mask, given))
        return TrustOutput(fused.reshape(shape), trust.reshape(*shape[:-1], count))
    compute = compute_dtype(*logits)
    raised = {
        name: value.to(compute) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    with full_precision(logits[0]):
        fused, trust = reference.trusted_fusion(
            [values.to(compute) for values in logits], mask=mask, **raised
        )
    return TrustOutput(fused.to(dtype), trust)


def _flat(logits: list[Tensor], mask: Tensor | None, given: dict) -> tuple:
    """Arguments of the autograd Function, with the leading dimensions in one.

    Reshaping is a view where the strides allow.
    """
    count = len(logits)
    numbers = [
        1.0 if isinstance(given[name], Tensor) else float(given[name])
        for name in ("temperature", "scale")
    ]
    optional = [value if isinstance(value, Tensor) else None for value in given.values()]
    tensors = (*optional, *logits)
    present = iter(distinct([value for value in tensors if value is not None]))
    trust, *parameters = (None if value is None else next(present) for value in optional)
    mask = None if mask is None else mask.reshape(-1, count)
    if trust is not None and trust.dim() > 1:
        trust = trust.reshape(-1, count)
    rows = [matrix.reshape(-1, matrix.shape[-1]) for matrix in present]
    return numbers, mask, trust, *parameters, *rows

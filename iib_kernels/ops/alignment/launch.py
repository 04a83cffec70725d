"""Allocation, block sizes and launches of the alignment kernels.

Up to `_tuning.ALIGNMENT_CLASSES` classes one tile holds all scores: one launch forward and one
backward. More are attention: prototypes are laid out, two launches weigh them (by each modality's
posterior, and by the anchor's), and one makes losses of what they found. Backward is one launch,
which combines the means that forward kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import _tuning
from iib_kernels._runtime import (
    accumulator,
    compute_dtype,
    dot_options,
    hip,
    interpreting,
    on_device,
    scalar,
    slope_precision,
    uniform_dtype,
)
from iib_kernels.ops.arguments import reduction_argument

HALF = (torch.float16, torch.bfloat16)
PADDING = 128  # classes are padded to a multiple: every block of classes divides it


class Inputs(NamedTuple):
    """What forward and backward both take, in the order of their schemas."""

    features: Sequence[Tensor]  # M of [B, D_m]
    prototypes: Sequence[Tensor]  # M of [K, D_m]
    targets: Tensor  # [B]
    budgets: Tensor  # [M]
    temperature: float
    cosine: bool
    seen: Sequence[Tensor]  # M of [K], or none
    mask: Tensor | None  # [B, M]
    ignore_index: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums and losses."""
        return compute_dtype(*self.features)

    @property
    def batch(self) -> int:
        return self.targets.shape[0]

    @property
    def classes(self) -> int:
        return self.prototypes[0].shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """D_m of every modality."""
        return tuple(values.shape[1] for values in self.features)

    @property
    def many(self) -> bool:
        """Whether the classes need several tiles."""
        return self.classes > _tuning.ALIGNMENT_CLASSES

    @property
    def size(self) -> tuple:
        """What block sizes depend on, and the key under which they are remembered."""
        count, kind = len(self.features), self.features[0].dtype
        return self.batch, self.classes, max(self.widths), count, kind


class Results(NamedTuple):
    """What the forward operator gives."""

    contrastive: Tensor  # [B, M], reduced [M]
    alignment: Tensor  # [B, M], reduced [M]
    mean: Tensor  # [M], the confidences reduced; else empty
    confidence: Tensor  # [B, M]; empty where it is neither asked for nor kept
    counts: Tensor  # [B, M] bool, for backward; empty where it computes it itself
    share: Tensor  # [B, M], likewise
    pulls: Tensor  # [2, M, B, width], likewise: the means of attention.py
    divisors: Tensor  # [M] of what is reduced; else empty


def empty_results(inputs: Inputs, keep: bool, reduction: str = "none") -> Results:
    """Results to be filled; ``keep``: with what backward needs."""
    like, dtype, modalities = inputs.features[0].new_empty, inputs.dtype, len(inputs.features)
    size, apart = (inputs.batch, modalities), reduction == "none"
    found = size if apart else (modalities,)
    contrastive, alignment = (like(found, dtype=dtype) for _ in range(2))
    mean, divisors = (like(0 if apart else modalities, dtype=dtype) for _ in range(2))
    confidence = like(size if apart or inputs.many else (0, 0), dtype=dtype)
    counts = like(size if inputs.many else (0, 0), dtype=torch.bool)
    share = like(size if inputs.many else (0, 0), dtype=dtype)
    # An only modality is the anchor
    kinds = 1 if modalities == 1 else 2
    kept = (kinds, modalities, inputs.batch, _tuning.padded(max(inputs.widths)))
    pulls = like(kept if inputs.many and keep else (0,) * 4, dtype=multiplied(inputs.features))
    return Results(contrastive, alignment, mean, confidence, counts, share, pulls, divisors)


def multiplied(features: Sequence[Tensor]) -> torch.dtype:
    """The dtype that products over many classes are taken in: the features' own, or common one."""
    return uniform_dtype([values[:0] for values in features])[0].dtype


def _matrices(values: Sequence[Tensor]) -> tuple:
    from iib_kernels.ops.tiles import Matrix

    return tuple(Matrix(value, *value.stride()) for value in values)


def _rows(inputs: Inputs):
    """The kernels' Rows."""
    from iib_kernels.ops.alignment.kernels import Rows

    return Rows(
        inputs.targets.contiguous(),
        inputs.ignore_index,
        None if inputs.mask is None else inputs.mask.contiguous(),
        tuple(value.contiguous() for value in inputs.seen) or None,
        inputs.budgets.contiguous(),
        scalar(inputs.temperature, inputs.dtype, inputs.targets.device),
        inputs.classes,
    )


def _upstream(contrastive: Tensor | None, alignment: Tensor | None, divisors: Tensor):
    """The kernels' Upstream, of tensors [B, M] or, with divisors, [M]; or None."""
    from iib_kernels.ops.alignment.kernels import Upstream
    from iib_kernels.ops.tiles import Matrix

    matrices = (
        Matrix(None, 0, 0)
        if values is None
        else Matrix(values, *((0,) * (2 - values.dim())), *values.stride())
        for values in (contrastive, alignment)
    )
    # As a matrix: Triton 3.6 loses the strides beside a None
    return Upstream(*matrices, Matrix(divisors if len(divisors) else None, 0, 0))


def _outputs(results: Results, programs: int, reduction: str) -> tuple:
    """Losses and Reduction, for a launch of so many programs."""
    from iib_kernels.ops.alignment.kernels import Losses

    contrastive, alignment, mean, confidence, counts, *_ = results
    kept = (value if value.numel() else None for value in (confidence, counts))
    if reduction == "none":
        return Losses(contrastive, alignment, *kept), None
    means = reduction_argument(reduction, programs, results[:3], results.divisors)
    return Losses(None, None, *kept), means


def _precision(inputs: Inputs) -> dict:
    """UPCAST and PRECISION of products whose factors may differ in type.

    Half features beside float32 prototypes, as autocast leaves them, are multiplied in TF32 where
    there is one: it holds half features exactly, and IEEE would do without tensor cores.
    """
    options = dot_options(*inputs.features, *inputs.prototypes)
    if all(values.dtype in HALF for values in inputs.features) and not hip():
        options["PRECISION"] = "tf32"
    return options


def forward(inputs: Inputs, keep: bool, reduction: str = "none") -> Results:
    """Losses, and with ``keep`` what :func:`backward` needs."""
    results = empty_results(inputs, keep, reduction)
    if inputs.batch:
        with on_device(inputs.targets):
            (_forward_many if inputs.many else _forward_block)(inputs, results, reduction)
    else:
        for values in results[:3]:
            values.zero_()
        results.divisors.fill_(1)
    return results


def backward(
    inputs: Inputs,
    results: Results,
    contrastive: Tensor | None,
    alignment: Tensor | None,
    gradients: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gradients [B, D_m], from upstream gradients [B, M] of C and A (of any strides).

    ``gradients``: where they go, in any dtypes; tensors like the features by default.
    """
    gradients = list(gradients or [values.new_empty(values.shape) for values in inputs.features])
    if inputs.batch:
        upstream = _upstream(contrastive, alignment, results.divisors)
        with on_device(inputs.targets):
            if inputs.many:
                _backward_many(inputs, results, upstream, gradients)
            else:
                _backward_block(inputs, upstream, gradients)
    return gradients


def losses_and_gradients(
    inputs: Inputs,
    factors: Tensor,
    gradients: Sequence[Tensor] | None = None,
    reduction: str = "none",
) -> tuple[list[Tensor], Results]:
    """Gradients [B, D_m] of sum(factors[0] C + factors[1] A), and the losses.

    ``factors`` [2, M] is what a row that counts weighs, known before the losses are; ``gradients``
    as in :func:`backward`.
    """
    results = forward(inputs, True, reduction)
    weights = factors.unsqueeze(1).expand(2, inputs.batch, -1)  # [2, B, M], a row's stride is 0
    return backward(inputs, results, weights[0], weights[1], gradients), results


# ----- One tile of classes


def _block_options(inputs: Inputs) -> dict:
    return {
        "M": len(inputs.features),
        "COSINE": inputs.cosine,
        "ACC": accumulator(inputs.dtype),
        **_precision(inputs),
    }


def _run_block(name: str, inputs: Inputs, kernel, arguments: Callable, options: dict) -> None:
    """Launch a kernel. ``arguments(programs)``: those between the rows and the batch."""
    itemsize = max(value.dtype.itemsize for value in (*inputs.features, *inputs.prototypes))
    shared = (
        _matrices(inputs.features),
        _matrices(inputs.prototypes),
        inputs.widths,
        _rows(inputs),
    )

    def launch(config: _tuning.Launch) -> None:
        programs = -(-inputs.batch // config.blocks["BLOCK_B"])
        everything = *shared, *arguments(programs), inputs.batch
        kernel[(programs,)](*everything, **_block_options(inputs), **options, **config.options())

    width, count = max(inputs.widths), len(inputs.features)
    launches = _tuning.alignment(inputs.classes, width, count, itemsize)
    _tuning.run((name, *inputs.size), launches, launch)


def _forward_block(inputs: Inputs, results: Results, reduction: str) -> None:
    from iib_kernels.ops.alignment.kernels import alignment_forward

    outputs = lambda programs: _outputs(results, programs, reduction)
    _run_block("alignment", inputs, alignment_forward, outputs, {})


def _backward_block(inputs: Inputs, upstream, gradients: list[Tensor]) -> None:
    from iib_kernels.ops.alignment.kernels_backward import alignment_backward

    options = {"SLOPE_PRECISION": slope_precision(*inputs.features, *inputs.prototypes)}
    if _precision(inputs)["PRECISION"] == "tf32":
        options["SLOPE_PRECISION"] = "tf32"
    arguments = upstream, tuple(gradients)
    _run_block("alignment_backward", inputs, alignment_backward, lambda _: arguments, options)


# ----- Many classes


def _lay_out(inputs: Inputs, dtype: torch.dtype, width: int):
    """The kernels' Tables of all modalities' prototypes."""
    from iib_kernels.ops.alignment.tables import Tables, lay_out

    modalities, classes = len(inputs.features), -(-inputs.classes // PADDING) * PADDING
    like = inputs.features[0].new_empty
    tables = Tables(
        like((modalities, classes, width), dtype=dtype),
        like((modalities, 3, classes), dtype=inputs.dtype),
        classes,
        width,
    )
    rows = _rows(inputs)
    config = _tuning.tables(width)
    lay_out[(-(-classes // config.blocks["BLOCK_K"]), modalities)](
        _matrices(inputs.prototypes),
        inputs.widths,
        rows.seen,
        rows.temperature,
        tables,
        inputs.classes,
        M=modalities,
        COSINE=inputs.cosine,
        ACC=accumulator(inputs.dtype),
        SCALED=dtype in HALF,
        **config.options(),
    )
    return tables


def _forward_many(inputs: Inputs, results: Results, reduction: str) -> None:
    from iib_kernels.ops.alignment.attention import Given
    from iib_kernels.ops.alignment.outcome import losses
    from iib_kernels.ops.alignment.streamed import evidence

    features = uniform_dtype(inputs.features)
    dtype, modalities, device = features[0].dtype, len(features), inputs.targets.device
    width, keep = _tuning.padded(max(inputs.widths)), results.pulls.numel() > 0
    tables, rows = _lay_out(inputs, dtype, width), _rows(inputs)
    given = Given(_matrices(features), inputs.widths, rows, tables)
    options = {
        "M": modalities,
        "COSINE": inputs.cosine,
        "ACC": accumulator(inputs.dtype),
        "UPCAST": interpreting(),
        "PRECISION": dot_options(*features)["PRECISION"],
    }
    sums = lambda *size: features[0].new_empty(size, dtype=inputs.dtype)
    chunks = 1
    if keep:
        tensor_cores = dtype in HALF or options["PRECISION"] != "ieee"
        kind = width, dtype.itemsize, tensor_cores, device, inputs.batch * modalities
        configs = [_tuning.attention(*kind, across) for across in (False, True)]
        chunks = width // (configs[0].blocks.get("CHUNK", width) * configs[0].blocks.get("HELD", 1))
        blocks = -(-inputs.batch // configs[0].blocks["BLOCK_B"])
        splits = _tuning.splits(blocks * modalities * chunks, inputs.classes, device)
        own = sums(splits, 3, modalities, inputs.batch)
        across = sums(splits, 2 + chunks, modalities, inputs.batch)
        for place, found in enumerate((own, across)):
            if place < len(results.pulls):
                pulls, config = results.pulls[place], configs[place]
                _attend(config, (blocks, splits), given, pulls, found, place == 1, options)
    else:
        size = dtype.itemsize, modalities, inputs.batch, inputs.classes
        config = _tuning.evidence(width, *size, device)
        blocks = -(-inputs.batch // config.blocks["BLOCK_B"])
        splits = _tuning.splits(blocks, inputs.classes, device)
        own, across = (sums(splits, 3, modalities, inputs.batch) for _ in range(2))
        evidence[(blocks, splits)](
            given, own, across, inputs.batch, splits, **options, **config.options()
        )
    config = _tuning.Launch({"BLOCK_B": 128})
    programs = -(-inputs.batch // 128)
    losses[(programs,)](
        rows,
        own,
        across,
        *_outputs(results, programs, reduction),
        results.share,
        inputs.batch,
        splits,
        M=modalities,
        ACC=accumulator(inputs.dtype),
        CHUNKS=chunks,
        **config.options(),
    )


def _attend(
    config: _tuning.Launch,
    grid: tuple[int, int],
    given,
    pulls: Tensor,
    sums: Tensor,
    across: bool,
    options: dict,
) -> None:
    """One attention into pulls [M, B, width] and sums [splits, rows, M, B].

    ``grid``: blocks of rows, and parts of the classes.
    """
    from iib_kernels.ops.alignment.attention import attend_resident
    from iib_kernels.ops.alignment.outcome import merge
    from iib_kernels.ops.alignment.streamed import attend_streamed

    modalities, batch, width = pulls.shape
    blocks, splits = grid
    parts = pulls if splits == 1 else pulls.new_empty((splits, *pulls.shape))
    arguments = given, parts, sums, batch, splits
    options = {**options, "ACROSS": across, **config.options()}
    if "CHUNK" in config.blocks:
        chunks = width // (config.blocks["CHUNK"] * config.blocks["HELD"])
        attend_streamed[(blocks, modalities, splits * chunks)](*arguments, CHUNKS=chunks, **options)
    else:
        # Triton (3.6, 3.7) gives a product whose result goes into another one all warps along its
        # rows: of 64 rows, both halves of 8 warps would compute all scores. It does not look
        # through branches: so each step of the scores stands in one that is always taken.
        steps = width // config.blocks["BLOCK_D"]
        attend_resident[(blocks, modalities, splits)](*arguments, STEPS=steps, **options)
    if splits > 1:
        config = _tuning.Launch({"BLOCK_D": min(1024, _tuning.power_of_two(width))})
        merge[(batch, modalities, -(-width // config.blocks["BLOCK_D"]))](
            parts,
            sums,
            pulls,
            batch,
            splits,
            width,
            M=modalities,
            ROW=sums.shape[1],
            **config.options(),
        )


def _backward_many(inputs: Inputs, results: Results, upstream, gradients: list[Tensor]) -> None:
    from iib_kernels.ops.alignment.outcome import Outcome
    from iib_kernels.ops.alignment.outcome import gradients as kernel

    if not results.pulls.numel():
        raise RuntimeError("alignment_loss: forward kept nothing for backward (keep=False)")
    config = _tuning.gradients(max(inputs.widths))
    outcome = Outcome(*results[3:7], results.pulls.shape[-1])
    kernel[(-(-inputs.batch // config.blocks["BLOCK_B"]),)](
        _matrices(inputs.features),
        inputs.widths,
        _rows(inputs),
        outcome,
        upstream,
        tuple(gradients),
        inputs.batch,
        M=len(inputs.features),
        COSINE=inputs.cosine,
        ACC=accumulator(inputs.dtype),
        **config.options(),
    )

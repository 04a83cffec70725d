"""Degraded inputs: to calibrate the gate, for modality dropout, and to evaluate what degrades.

The stages that use them are in the method page, section 5.

Everything here works on standardised batches, draws from the ``torch.Generator`` it is given (on
that generator's device), and leaves its input as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from iibalance.data.dataset import Batch
from iibalance.data.degrade import CALIBRATION_KINDS, check_amount, check_degradation
from iibalance.data.layouts import MAX_CHANNELS, check_layout, infer_layout
from iibalance.data.values import Values, each, is_numeric, parts_of
from iibalance.errors import InputError


def corrupt(
    batch: Batch,
    modality: str,
    kind: str,
    *,
    fraction: float = 0.5,
    strength: float = 3.0,
    generator: torch.Generator,
    scale: Mapping[str, Tensor] | None = None,
    layout: str | None = None,
) -> Batch:
    """Corrupt one modality of a random ``fraction`` of the samples that have it.

    Their number is rounded, and they are the same samples whatever the kind. Three kinds are those
    that the gate is calibrated on:

    - ``noise`` adds ``strength`` standard deviations of Gaussian noise; what is no number (token
      ids, fields) is taken from another of these samples at a share strength / (1 + strength) of
      its positions;
    - ``missing`` clears the mask and the values, except where this is the sample's only modality;
    - ``shuffled`` gives each chosen sample this modality of another chosen one, never its own.

    Three it never sees:

    - ``blur`` smooths by a Gaussian of ``strength`` positions, cut at four of these, beyond an edge
      as at the edge: over time (a sequence's or a video's frames), over both sides of an image,
      along the index of a vector. Features in an order (bands of a spectrum, lags, pixels) are
      smoothed as such; those in none are mixed with whatever stands beside them;
    - ``dropped`` puts the mean in the place of one run of frames (of a vector's features; in an
      image of one rectangle with the image's proportions), as long as a share
      strength / (1 + strength) of all; token ids become padding, 0;
    - ``gain`` multiplies by exp(strength / 3) or exp(-strength / 3), at random for each sample:
      what is standardised is loud or faint by a factor e at strength 3.

    The mean, and what ``gain`` multiplies the distance from, is 0 where numbers are standardised,
    and otherwise that of the samples at hand, over what ``scale`` averages over.

    Args:
        scale: one standard deviation of each modality that is not standardised (``Split.scale``).
        layout: how a sample of this modality is read; inferred from its shape where not given.

    Raises InputError for an unknown modality or kind, a fraction outside 0..1, a strength below 0
    or too large, and a kind that is not defined for what the modality holds.

    >>> inputs, mask = {"a": torch.zeros(4, 2), "b": torch.ones(4, 3)}, torch.ones(4, 2) > 0
    >>> generator, batch = torch.Generator().manual_seed(0), Batch(inputs, torch.arange(4), mask)
    >>> corrupt(batch, "a", "missing", generator=generator).mask.sum(0)
    tensor([2, 4])
    >>> louder = corrupt(batch, "b", "gain", fraction=1.0, generator=generator).inputs["b"]
    >>> louder.unique()
    tensor([0.3679, 2.7183])
    """
    check_degradation(modality, kind, tuple(batch.inputs))
    check_amount(fraction, strength, kind)
    original, mask = batch.inputs[modality], batch.mask.clone()
    axes = _axes(original, modality, kind, layout)
    column = tuple(batch.inputs).index(modality)
    present = batch.mask[:, column].nonzero().squeeze(1)
    order = torch.randperm(len(present), generator=generator, device=generator.device)
    order = order.to(present.device)
    count = int(fraction * len(present) + 0.5)
    rows, spare = present[order[:count]], present[order[count:]]
    values = each(torch.clone, original)
    # One cycle through the rows, which are in random order: nobody gets its own.
    others = spare[:1] if count == 1 and len(spare) else rows.roll(1)
    if kind == "noise" and is_numeric(values):
        values[rows] += strength * _noise(values[rows], modality, scale, generator)
    elif kind == "noise":
        share = torch.full((len(rows),), strength / (1 + strength), device=rows.device)
        _mix(values, original, rows, others, share, generator)
    elif kind == "missing":
        rows = rows[batch.mask[rows].sum(1) > 1]
        _clear(values, rows)
        mask[rows, column] = False
    elif kind == "shuffled":
        if count > 1 or len(spare):
            _replace(values, rows, original, others)
    elif isinstance(values, Tensor):
        mean, chosen = _mean(values, present, modality, scale), values[rows]
        if layout == "vector":  # whatever its shape, features in a row
            mean, chosen = mean.flatten(1), chosen.flatten(1)
        changed = _distort(chosen, kind, axes, strength, mean, generator)
        values[rows] = changed.view(len(rows), *values.shape[1:])
    return Batch({**batch.inputs, modality: values}, batch.targets, mask)


def random_corruptions(
    batch: Batch,
    *,
    generator: torch.Generator,
    max_strength: float = 4.0,
    kinds: Sequence[str] = CALIBRATION_KINDS,
    scale: Mapping[str, Tensor] | None = None,
) -> Batch:
    """Each sample with one of its modalities, chosen at random, corrupted in a random way.

    This is the second half of the set that the gate is calibrated on (method page, section 5).

    - ``noise`` has a strength uniform in 0..``max_strength``, drawn for each sample, and is that of
      :func:`corrupt`;
    - ``missing`` clears the mask and the values;
    - ``shuffled`` takes the modality of another sample of the batch.

    A sample with a single modality can only get noise, because without its one input nothing could
    be learnt from it. It stays clean if ``noise`` is not among the ``kinds``. ``scale`` is that of
    :func:`corrupt`.

    Raises InputError for a kind that is none of these three, none at all, or a negative strength.

    >>> inputs, mask = {"a": torch.zeros(4, 2), "b": torch.ones(4, 3)}, torch.ones(4, 2) > 0
    >>> generator, batch = torch.Generator().manual_seed(0), Batch(inputs, torch.arange(4), mask)
    >>> random_corruptions(batch, kinds=["missing"], generator=generator).mask.sum(1)
    tensor([1, 1, 1, 1])
    """
    kinds = tuple(kinds)
    for kind in kinds or ("",):
        if kind not in CALIBRATION_KINDS:
            raise InputError(f"kinds: {kind!r} is none of {', '.join(CALIBRATION_KINDS)}")
    if not 0 <= max_strength < float("inf"):
        raise InputError(
            f"max_strength: {max_strength} is no noise level; give 0 or more standard deviations"
        )
    device, count = batch.mask.device, len(batch.mask)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=generator.device).to(device)

    # A present modality of each sample, all equally likely.
    chosen = (uniform(*batch.mask.shape) + batch.mask).argmax(1)  # [B]
    drawn = (uniform(count) * len(kinds)).long().clamp_max(len(kinds) - 1)
    strength = max_strength * uniform(count)
    alone = batch.mask.sum(1) < 2
    is_kind = {kind: (drawn == index) & ~alone for index, kind in enumerate(kinds)}
    if "noise" in is_kind:
        is_kind["noise"] |= alone & batch.mask.any(1)
    inputs, mask = {}, batch.mask.clone()
    for column, (name, original) in enumerate(batch.inputs.items()):
        values = inputs[name] = each(torch.clone, original)
        rows = {
            kind: (where & (chosen == column)).nonzero().squeeze(1)
            for kind, where in is_kind.items()
        }
        present = batch.mask[:, column].nonzero().squeeze(1)
        if "noise" in rows and is_numeric(values):
            levels = strength[rows["noise"]].view(-1, *[1] * (values.dim() - 1))
            noise = _noise(values[rows["noise"]], name, scale, generator)
            values[rows["noise"]] += levels * noise
        elif "noise" in rows and len(present) > 1:
            share = strength[rows["noise"]] / (1 + strength[rows["noise"]])
            others = _others(present, rows["noise"], uniform)
            _mix(values, original, rows["noise"], others, share, generator)
        if "shuffled" in rows and len(present) > 1:
            others = _others(present, rows["shuffled"], uniform)
            _replace(values, rows["shuffled"], original, others)
        if "missing" in rows:
            _clear(values, rows["missing"])
            mask[rows["missing"], column] = False
    return Batch(inputs, batch.targets, mask)


def _others(present: Tensor, rows: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
    """For each of ``rows`` another one of ``present``, at random."""
    count = len(present) - 1
    place = torch.searchsorted(present, rows)
    step = (uniform(len(place)) * count).long().clamp_max(count - 1)
    return present[(place + 1 + step) % len(present)]  # 1 to n - 1 places on: never itself


def _clear(values: Values, rows: Tensor) -> None:
    for (part,) in parts_of(values):
        part[rows] = 0


def _replace(values: Values, rows: Tensor, source: Values, others: Tensor) -> None:
    """``values[rows] = source[others]``, of every field."""
    for part, from_part in parts_of(values, source):
        part[rows] = from_part[others]


def _mix(
    values: Values,
    source: Values,
    rows: Tensor,
    others: Tensor,
    share: Tensor,
    generator: torch.Generator,
) -> None:
    """Give ``rows`` the values that ``others`` have at a ``share`` [n] of the positions.

    Positions go along the first axis of a sample, and are the same in every field that has as many:
    a token keeps its place in the attention mask.
    """
    drawn: dict[int, Tensor] = {}
    for part, from_part in parts_of(values, source):
        size = part.shape[1] if part.dim() > 1 else 1
        if size not in drawn:
            draw = torch.rand(len(rows), size, generator=generator, device=generator.device)
            drawn[size] = draw.to(share.device) < share[:, None]
        swap = drawn[size].view(len(rows), *part.shape[1:2], *[1] * (part.dim() - 2))
        part[rows] = torch.where(swap, from_part[others], part[rows])


def drop_modalities(mask: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """``mask`` [B, M] bool with each True dropped with ``probability``.

    A row that would lose everything keeps one at random.

    >>> mask = torch.ones(1000, 3, dtype=torch.bool)
    >>> drop_modalities(mask, 1.0, torch.Generator().manual_seed(0)).sum(1).unique()
    tensor([1])
    """
    if not 0 <= probability <= 1:
        raise InputError(
            f"modality dropout: {probability} is no probability; give a number from 0 to 1"
        )
    draw = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device)
    kept = mask & (draw >= probability)
    # Given that all were dropped, the largest draw is any of them with the same probability.
    last = draw.masked_fill(~mask, -1.0).argmax(1, keepdim=True)
    rescue = torch.zeros_like(mask).scatter_(1, last, True) & mask
    return torch.where(kept.any(1, keepdim=True), kept, rescue)


def _noise(
    like: Tensor, name: str, scale: Mapping[str, Tensor] | None, generator: torch.Generator
) -> Tensor:
    """Gaussian noise of one standard deviation of a modality, of the shape of ``like`` [n, ...]."""
    noise = torch.randn(like.shape, generator=generator, device=generator.device).to(like)
    return noise * scale[name].to(like) if scale is not None and name in scale else noise


def _axes(values: Values, modality: str, kind: str, layout: str | None) -> tuple[int, ...]:
    """The axes of ``values`` [B, ...] along which a sample has neighbours: time, or two sides.

    Empty for a kind that needs none. InputError where ``kind`` is not defined for ``values``.
    """
    if kind in CALIBRATION_KINDS:
        return ()
    refused = f"degrade: {kind!r} of {modality!r} is not defined: it holds"
    if not isinstance(values, Tensor):
        raise InputError(f"{refused} fields, not numbers; choose {', '.join(CALIBRATION_KINDS)}")
    if not is_numeric(values):
        if values.dim() != 2:
            raise InputError(f"{refused} ids, not numbers; choose {', '.join(CALIBRATION_KINDS)}")
        if kind != "dropped":
            kinds = (*CALIBRATION_KINDS, "dropped")
            raise InputError(f"{refused} ids, not numbers; choose {', '.join(kinds)}")
        return (1,)
    if kind == "gain":
        return ()
    shape = tuple(values.shape[1:])
    if layout in (None, "raw"):
        try:
            layout = infer_layout(shape)
        except InputError:
            kinds = (*CALIBRATION_KINDS, "gain")
            raise InputError(
                f"{refused} samples of shape {shape}, of which no axis is known to be time; "
                f"choose {', '.join(kinds)}"
            ) from None
    check_layout(shape, layout)
    if layout != "image":
        return (1,)
    # Channels stand where the built-in encoders find them.
    return (1, 2) if len(shape) == 2 or shape[0] > MAX_CHANNELS >= shape[2] else (2, 3)


def _mean(values: Tensor, rows: Tensor, name: str, scale: Mapping[str, Tensor] | None) -> Tensor:
    """The mean of a modality over ``rows`` of ``values`` [N, ...]; 0 where it is standardised.

    It is taken over the samples and the axes that its ``scale`` has one value for: [1, ...].
    """
    if scale is None or name not in scale or not is_numeric(values):
        return values.new_zeros((1,) * values.dim())
    sizes = tuple(scale[name].shape)
    sizes = (1,) * (values.dim() - len(sizes)) + sizes
    over = [axis for axis, size in enumerate(sizes) if size == 1]
    return values[rows].mean(over, keepdim=True, dtype=torch.float64).to(values)


def _distort(
    values: Tensor,
    kind: str,
    axes: Sequence[int],
    strength: float,
    mean: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """``values`` [n, ...] blurred, with a segment dropped, or louder or fainter."""
    if kind == "blur":
        for axis in axes:
            values = _smooth(values, axis, strength)
        return values.contiguous()
    if kind == "dropped":
        return torch.where(_segment(values, axes, strength, generator), mean, values)
    return values + (_factors(values, strength, generator) - 1) * (values - mean)


def _smooth(values: Tensor, axis: int, width: float) -> Tensor:
    """``values`` smoothed along ``axis`` by a Gaussian of standard deviation ``width``.

    The Gaussian is cut at four standard deviations; what lies beyond an edge is as at the edge.
    """
    reach = int(4 * width + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=values.device)
    weights = torch.exp(-0.5 * (offsets / (width or 1.0)) ** 2)
    # All that lies farther off than a sample is long is the value at the edge: no need to hold it.
    far = min(reach, values.shape[axis] - 1)
    place = offsets.clamp(-far, far).long() + far
    kernel = weights.new_zeros(2 * far + 1).index_add_(0, place, weights / weights.sum())
    lines = values.movedim(axis, -1)
    padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (far, far), mode="replicate")
    smooth = F.conv1d(padded, kernel.to(values).view(1, 1, -1))
    return smooth.view(lines.shape).movedim(-1, axis)


def _segment(
    values: Tensor, axes: Sequence[int], strength: float, generator: torch.Generator
) -> Tensor:
    """Which positions of ``values`` [n, ...] to drop: bool that broadcasts to it.

    One run along each of ``axes``, and where they cross: together a share
    strength / (1 + strength) of the positions, rounded to whole ones.
    """
    share = (strength / (1 + strength)) ** (1 / len(axes))
    found = torch.ones((), dtype=torch.bool, device=values.device)
    for axis in axes:
        size = values.shape[axis]
        length = int(share * size + 0.5)
        draw = torch.rand(len(values), generator=generator, device=generator.device)
        start = (draw.to(values.device) * (size - length + 1)).long().clamp_max(size - length)
        place = torch.arange(size, device=values.device) - start[:, None]  # [n, size]
        inside = (place >= 0) & (place < length)
        shape = [size if other == axis else 1 for other in range(1, values.dim())]
        found = found & inside.view(len(values), *shape)
    return found


def _factors(values: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """exp(strength / 3) or exp(-strength / 3) of each sample, both as likely: [n, 1, ...]."""
    draw = torch.rand(len(values), generator=generator, device=generator.device).to(values)
    exponent = torch.where(draw < 0.5, -strength / 3, strength / 3)
    return exponent.exp().to(values).view(-1, *[1] * (values.dim() - 1))

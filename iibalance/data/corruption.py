"""Degraded inputs: to calibrate the gate, for modality dropout, and to evaluate what degrades.

The stages that use them are in the method page, section 5.

Everything here works on standardised batches, draws from the ``torch.Generator`` it is given (on
that generator's device), and leaves its input as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from iibalance.data.dataset import Batch
from iibalance.data.degrade import KINDS, check_amount, check_degradation
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
) -> Batch:
    """Corrupt one modality of a random ``fraction`` of the samples that have it.

    Their number is rounded, and they are the same samples whatever the kind:

    - ``noise`` adds ``strength`` standard deviations of Gaussian noise; what is no number (token
      ids, fields) is taken from another of these samples at a share strength / (1 + strength) of
      its positions;
    - ``missing`` clears the mask and the values, except where this is the sample's only modality;
    - ``shuffled`` gives each chosen sample this modality of another chosen one, never its own.

    ``scale``: one standard deviation of each modality that is not standardised (``Split.scale``).

    Raises InputError for an unknown modality or kind, a fraction outside 0..1 or a negative
    strength.

    >>> inputs, mask = {"a": torch.zeros(4, 2), "b": torch.ones(4, 3)}, torch.ones(4, 2) > 0
    >>> generator, batch = torch.Generator().manual_seed(0), Batch(inputs, torch.arange(4), mask)
    >>> corrupt(batch, "a", "missing", generator=generator).mask.sum(0)
    tensor([2, 4])
    """
    check_degradation(modality, kind, tuple(batch.inputs))
    check_amount(fraction, strength)
    column = tuple(batch.inputs).index(modality)
    present = batch.mask[:, column].nonzero().squeeze(1)
    order = torch.randperm(len(present), generator=generator, device=generator.device)
    order = order.to(present.device)
    count = int(fraction * len(present) + 0.5)
    rows, spare = present[order[:count]], present[order[count:]]
    original, mask = batch.inputs[modality], batch.mask.clone()
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
    elif count > 1 or len(spare):
        _replace(values, rows, original, others)
    return Batch({**batch.inputs, modality: values}, batch.targets, mask)


def random_corruptions(
    batch: Batch,
    *,
    generator: torch.Generator,
    max_strength: float = 4.0,
    kinds: Sequence[str] = KINDS,
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

    Raises InputError for an unknown kind, none at all, or a negative strength.

    >>> inputs, mask = {"a": torch.zeros(4, 2), "b": torch.ones(4, 3)}, torch.ones(4, 2) > 0
    >>> generator, batch = torch.Generator().manual_seed(0), Batch(inputs, torch.arange(4), mask)
    >>> random_corruptions(batch, kinds=["missing"], generator=generator).mask.sum(1)
    tensor([1, 1, 1, 1])
    """
    kinds = tuple(kinds)
    for kind in kinds or ("",):
        if kind not in KINDS:
            raise InputError(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
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

"""A chunk of rows through the prototype losses, and back (method page, sections 2 and 3).

Scores of a row z are (2 z . p_k - |p_k|^2) / tau: -d2 / tau but for a constant of the row, which no
softmax sees. For the cosine the prototypes are brought to unit length once a call, and the scores
are divided by the row's length, which are fewer than its components.

Shapes: R rows of a chunk of a batch of B, K classes, M modalities, which stand first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from iib_kernels import reference
from iib_kernels.cpu import shared
from iib_kernels.cpu.shared import part
from iib_kernels.cpu.step import unit

NEVER = -1e30  # score of a class not seen: its probability is 0, and 0 times it is 0 and not NaN


class Tables(NamedTuple):
    """What is the same for all rows."""

    prototypes: list[Tensor]  # M of [K, D_m], at unit length for the cosine, 0 if not seen
    offset: Tensor  # [M, 1, K] of the scores
    seen: Tensor | None  # [M, 1, K] 1 or 0; None where all classes are seen by all modalities
    factor: float  # 2 / tau
    cosine: bool
    anchor: int
    relative: Tensor  # [M, 1] budgets by the anchor's


class Counts(NamedTuple):
    """Which rows count for which modality."""

    index: Tensor  # [B, 1] target in [0, K), anything in rows that do not count
    counts: Tensor | None  # [M, B] bool; None where all do

    def rows(self, start: int, stop: int) -> Counts:
        """These of some rows."""
        return Counts(part(self.index, start, stop), part(self.counts, start, stop, 1))


class Rows(NamedTuple):
    """What the prototypes make of the rows of a chunk."""

    p: Tensor  # [M, R, K] posteriors
    inverse: Tensor | None  # [M, R, 1] of the rows' lengths, 0 of zero rows; None without cosine
    log_true: Tensor  # [M, R] log q(y)
    divergence: Tensor  # [M, R] of the anchor's posterior from each


def tables_of(
    prototypes: Sequence[Tensor],
    budgets: Tensor,
    temperature: float,
    metric: str,
    seen: Sequence[Tensor] | None,
    unit_prototypes: bool,
    dtype: torch.dtype,
) -> Tables:
    """Prototypes ready for products with rows."""
    anchor, relative = _anchor_and_relative(tuple(budgets.tolist()), dtype)
    cosine, tables = metric == "cosine", [table.to(dtype) for table in prototypes]
    known = None if seen is None else torch.stack(list(seen)).unsqueeze(1)
    if known is not None and known.all():
        known = None
    if known is not None:  # what stands there may be NaN
        tables = [torch.where(k.mT, table, 0.0) for k, table in zip(known, tables)]
    if cosine and not unit_prototypes:
        tables, inverse = zip(*(unit(table) for table in tables))
        squares = (torch.stack(inverse) > 0).to(dtype)  # a zero prototype stays one
    else:
        squares = torch.stack([table.square().sum(1, keepdim=True) for table in tables])
    offset = squares.mT * (-1 / temperature)
    if known is not None:
        offset = offset.masked_fill(~known & known.any(2, keepdim=True), NEVER)
        known = known.to(dtype)
    factor = 2 / temperature
    return Tables(list(tables), offset, known, factor, cosine, anchor, relative)


@lru_cache(64)
def _anchor_and_relative(budgets: tuple[float, ...], dtype: torch.dtype) -> tuple[int, Tensor]:
    """The anchor and rho [M, 1]: budgets change seldom, and the calls took 12 us."""
    given = torch.tensor(budgets, dtype=dtype, device="cpu")  # not the default device
    anchor, relative = reference.anchor_and_relative(given)
    return int(anchor), relative.unsqueeze(1)


def counts_of(
    targets: Tensor,
    mask: Tensor | None,
    seen: Sequence[Tensor] | None,
    count: int,
    ignore_index: int,
) -> Counts:
    """Targets and which rows count."""
    valid = targets != ignore_index
    index = torch.where(valid, targets, 0)
    counts = valid.expand(count, -1) if mask is None else valid & mask.mT
    if seen is not None:
        counts = counts & torch.stack([known[index] for known in seen])
    return Counts(index.unsqueeze(1), None if counts.all() else counts)


def usable(features: Sequence[Tensor], counts: Counts) -> list[Tensor]:
    """The features of a chunk, 0 in rows that do not count, which may hold anything."""
    if counts.counts is None:
        return list(features)
    return [
        torch.where(known.unsqueeze(1), rows, 0.0) for known, rows in zip(counts.counts, features)
    ]


def evaluate(features: Sequence[Tensor], counts: Counts, tables: Tables) -> Rows:
    """Posteriors of a chunk's rows, M of [R, D_m] as :func:`usable` gives them."""
    shape = len(features), len(features[0]), tables.offset.shape[2]
    scores = features[0].new_empty(shape)
    # Products by class for a K that fills no vectors: twice as fast at K = 31, slower at 1000
    by_class = shape[2] % 8 > 0
    products = scores.new_empty(shape[0], shape[2], shape[1]) if by_class else scores
    for rows, table, room in zip(features, tables.prototypes, products):
        torch.mm(*((table, rows.mT) if by_class else (rows, table.mT)), out=room)
    products = products.mT if by_class else products
    inverse = None
    if tables.cosine:
        length = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in features])
        inverse = torch.threshold_(length, reference.EPS, torch.inf).reciprocal_().unsqueeze(2)
        torch.addcmul(tables.offset, products, inverse * tables.factor, out=scores)
    else:
        torch.add(tables.offset, products, alpha=tables.factor, out=scores)
    log_p, p = shared.log_softmax(scores)
    index = counts.index.expand(*p.shape[:2], 1)
    log_true = log_p.gather(2, index).squeeze(2)
    evidence = anchors_evidence(p, tables)
    overlap = (evidence * log_p).sum(2)  # sum_k q_a log q_m
    if tables.seen is None:
        divergence = overlap[tables.anchor] - overlap
    else:
        # Of the classes that both have seen; the others' log p is large and their evidence 0
        divergence = (evidence * log_p[tables.anchor]).sum(2) - overlap
    return Rows(p, inverse, log_true, divergence)


def anchors_evidence(p: Tensor, tables: Tables) -> Tensor:
    """The anchor's posterior over the classes that each modality has seen, [R, K] or [M, R, K]."""
    evidence = p[tables.anchor]
    return evidence if tables.seen is None else evidence * tables.seen


def losses(
    log_true: Tensor, divergence: Tensor, counts: Counts, tables: Tables
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contrast, alignment, confidence and what a divergence weighs in the alignment, [M, R]."""
    known, anchor = counts.counts, tables.anchor
    if known is not None:
        log_true = log_true.masked_fill(~known, 0.0)
    confidence = log_true.exp()
    if known is not None:
        confidence.masked_fill_(~known, 0.0)
    # 0 for the anchor, whose rho is 1
    strength = (tables.relative * confidence[anchor]).sub_(confidence).clamp_min_(0.0)
    if known is not None:
        both = known & known[anchor]
        strength.masked_fill_(~both, 0.0)
        divergence = divergence.masked_fill(~both, 0.0)
    return -log_true, strength * divergence, confidence, strength


def differentiate(
    features: Sequence[Tensor],
    rows: Rows,
    counts: Counts,
    tables: Tables,
    contrast: Tensor,
    pull: Tensor,
    out: Sequence[Tensor],
) -> None:
    """Writes the features' gradients into M of [R, D_m].

    Args:
        features: as :func:`usable` gives them.
        contrast: [M, R] gradient of C_m, 0 where it does not count.
        pull: [M, R] gradient of the divergence, 0 where it does not count.
    """
    p, inverse, _, _ = rows
    evidence = anchors_evidence(p, tables)
    mass = 1.0 if tables.seen is None else evidence.sum(2)
    # Scores are factor times the product with the row, at unit length for the cosine
    factor = tables.factor if inverse is None else inverse.squeeze(2) * tables.factor
    contrast, pull = contrast * factor, pull * factor
    # By the products: -log q_y has q - 1_y, KL(q_a || q) has q sum(q_a) - q_a
    slope = p * (contrast + pull * mass).unsqueeze(2)
    slope.addcmul_(evidence, pull.unsqueeze(2), value=-1)
    slope.scatter_add_(2, counts.index.expand(*p.shape[:2], 1), contrast.neg_().unsqueeze(2))
    for m, (values, table, room) in enumerate(zip(features, tables.prototypes, out)):
        torch.mm(slope[m], table, out=room)
        if inverse is not None:  # less the part along the row, which does not change its direction
            along = (room * values).sum(1, keepdim=True) * inverse[m].square()
            room.addcmul_(values, along, value=-1)

"""What each modality adds to the prediction of a sample: exact Shapley values of log p."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iibalance.errors import InputError
from iibalance.metrics import MAX_PLAYERS


@torch.no_grad()
def contributions(
    head: nn.Module, embeddings: Sequence[Tensor], mask: Tensor, base_rate: Tensor
) -> Tensor:
    """[B, M] float64 nats: what each modality adds to log p of the class that is predicted.

    The exact Shapley values over all subsets of the modalities. A row's sum is log p(predicted)
    minus the log of that class's base rate, which is what is predicted from nothing; a missing
    modality adds 0.

    Args:
        head: has ``fuse(embeddings, mask)``.
        embeddings: M of [B, D_m].
        mask: [B, M] bool, True = present.
        base_rate: [K] each class's share of the training samples.

    Raises InputError for more than six modalities.

    >>> from iibalance.nn.head import IIBalanceHead
    >>> head = IIBalanceHead({"audio": 3, "video": 2}, 2).eval()
    >>> embeddings, mask = [torch.randn(4, 3), torch.randn(4, 2)], torch.ones(4, 2) > 0
    >>> found = contributions(head, embeddings, mask, torch.tensor([0.5, 0.5]))
    >>> log_p = head.fuse(embeddings, mask).logits.log_softmax(1).amax(1)
    >>> torch.allclose(found.sum(1).float(), log_p - math.log(0.5), atol=1e-5)
    True
    """
    count = mask.shape[1]
    if count > MAX_PLAYERS:
        raise InputError(
            f"X: {count} modalities have {2**count} subsets; "
            f"contributions are computed for at most {MAX_PLAYERS}"
        )
    whole = head.fuse(embeddings, mask).logits.double().log_softmax(-1)
    predicted = whole.argmax(1, keepdim=True)
    base = base_rate.to(whole).log()[predicted].squeeze(1)

    def value(subset: tuple[int, ...]) -> Tensor:
        chosen = torch.zeros(count, dtype=torch.bool, device=mask.device)
        chosen[list(subset)] = True
        part = mask & chosen
        rows, found = part.any(1), base.clone()
        if rows.any():
            logits = head.fuse([values[rows] for values in embeddings], part[rows]).logits
            log_p = logits.double().log_softmax(-1)
            found[rows] = log_p.gather(1, predicted[rows]).squeeze(1)
        return found

    subsets = [
        subset for size in range(count + 1) for subset in itertools.combinations(range(count), size)
    ]
    values = {subset: value(subset) for subset in subsets}
    shares = whole.new_zeros(len(mask), count)
    for subset in subsets[:-1]:
        weight = 1 / (count * math.comb(count - 1, len(subset)))
        for player in set(range(count)) - set(subset):
            after = values[tuple(sorted((*subset, player)))]
            shares[:, player] += weight * (after - values[subset])
    return shares
